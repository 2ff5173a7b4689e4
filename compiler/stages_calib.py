"""What the stages that make images do: a context in, a calibration or a held-out set out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.contracts import CalibSet, ImageSpec, Progress
from dfqc.compiler.driver import Context
from dfqc.compiler.options import plugin_options
from dfqc.compiler.stages import device_of
from dfqc.compiler.storage import load_calib, save_calib

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


SHEET = "contact_sheet.png"
HELD_OUT = 128  # images of the held-out set
_SHEET_IMAGES = 64
_PINK = {"kind": "pink"}
# Another loss from another start than the calibration set's, and fewer iterations than even a quick
# one has: these images judge, nothing is fitted to them. On ResNet-20 their mean distance to the
# batch norms' statistics is 0.19; that of 1/f noise 0.47. Valid pixels only: the engine's input
# grid covers those, and others would measure its clipping.
_MATCHED = {
    "loss": "std",
    "init": "gaussian",
    "statistic": "batch",
    "iterations": 30,
    "clip": True,
}
# Options of a stage that its batches do not depend on, or know from their own options.
_NOT_PARTS = ("samples", "effort", "synth-option")
_NOISE_SEEDS = 1000  # seeds of the noise are counted from here


def synthesize(context: Context) -> tuple[CalibSet, bytes]:
    """Make the calibration images batch by batch; beside them, their contact sheet."""
    recipe = context.settings.recipe
    plugin = plugins.load("synthesizer", recipe.synth)
    overrides = dict(recipe.synth_option)
    if recipe.calib_data:
        overrides["path"] = recipe.calib_data
    options = plugin_options(plugin, recipe.synth, recipe.effort, overrides)
    return _finished(context, make_images(context, recipe.synth, options, recipe.samples))


def hold_out(context: Context) -> tuple[CalibSet, bytes]:
    """Make images in another way than the calibration set, to judge what was made from that.

    With batch norms, half match their statistics by another loss, from another seed; the other
    half, and all of them without batch norms, are 1/f noise.
    """
    from dfqc.compiler.graph import has_batch_norm

    noise = plugin_options(plugins.load("synthesizer", "noise"), "noise", "standard", _PINK)
    if not has_batch_norm(context.value("trace")):
        return _finished(context, make_images(context, "noise", noise, HELD_OUT))
    matched = plugin_options(plugins.load("synthesizer", "zeroq"), "zeroq", "quick", _MATCHED)
    parts = [
        make_images(context, "zeroq", matched, HELD_OUT // 2),
        make_images(context, "noise", noise, HELD_OUT // 2, start=_NOISE_SEEDS),
    ]
    return _finished(context, _join(parts))


def make_images(
    context: Context, name: str, options: Any, count: int, *, start: int = 0
) -> CalibSet:
    """Return `count` images, made in batches that each survive a kill."""
    import torch

    plugin = plugins.load("synthesizer", name)
    graph, device = context.value("trace"), device_of(context)
    size = min(options.batch_size, count)
    sizes = [min(size, count - done) for done in range(0, count, size)]
    chosen = options.model_dump(mode="json", exclude={"path"})  # data count by content
    parts = []
    report = context.progress()
    for place, images in enumerate(sizes):
        index = start + place
        rng = torch.Generator(device).manual_seed(context.seed(index))
        progress = _share(report, place, len(sizes))

        def make(images: int = images, rng: Any = rng, progress: Progress = progress) -> CalibSet:
            made: CalibSet = plugin.synthesize(
                graph, images, options, rng=rng, device=device, progress=progress
            )
            return made

        part = {"synthesizer": name, "index": index, "images": images, "options": chosen}
        parts.append(context.checkpoint(part, make, save_calib, load_calib, without=_NOT_PARTS))
    return _join(parts)


def _share(report: Progress, place: int, batches: int) -> Progress:
    """Report the steps of one batch as a part of all batches: one bar, one time left."""

    def progress(done: int, total: int, note: str) -> None:
        report(place * total + done, batches * total, note)

    return progress


def _join(parts: list[CalibSet]) -> CalibSet:
    import torch

    labels = [part.labels for part in parts if part.labels is not None]
    return CalibSet(
        torch.cat([part.images for part in parts]),
        torch.cat(labels) if len(labels) == len(parts) else None,
        parts[0].source,
        {"batches": [dict(part.info) for part in parts]},
    )


def _finished(context: Context, calib: CalibSet) -> tuple[CalibSet, bytes]:
    """Add what the report says of a set: its score, and how it looks."""
    from dfqc.compiler.calib_quality import bn_divergence
    from dfqc.compiler.report import contact_sheet

    graph = context.value("trace")
    info = dict(calib.info) | {"bn_divergence": bn_divergence(graph, calib.images)}
    sheet = contact_sheet(as_pixels(calib.images[:_SHEET_IMAGES], graph.image))
    return dataclasses.replace(calib, info=info), sheet


def as_pixels(images: Tensor, image: ImageSpec) -> np.ndarray:
    """Return normalized images as a camera would have seen them, uint8 (n, h, w, 1 or 3)."""
    import torch

    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (image.mean, image.std))
    pixels = (images.cpu() * std + mean).clamp(0, 1) * 255
    channels = 3 if pixels.shape[1] == 3 else 1
    shown: np.ndarray = pixels[:, :channels].round().byte().permute(0, 2, 3, 1).numpy()
    return shown


def save_calibration(value: tuple[CalibSet, bytes], folder: Path) -> None:
    """Write the images and their contact sheet."""
    save_calib(value[0], folder)
    (folder / SHEET).write_bytes(value[1])
