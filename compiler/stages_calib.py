"""What the stages that make images do: a context in, a calibration or a held-out set out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqc.compiler import plugins
from dfqc.compiler.batches import join, make_images, synth_overrides
from dfqc.compiler.contracts import CalibSet, ImageSpec
from dfqc.compiler.driver import Context
from dfqc.compiler.options import plugin_options
from dfqc.compiler.stages import device_of
from dfqc.compiler.storage import save_calib

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dfqc.compiler.graph import Graph

log = logging.getLogger("dfqc.calib")

SHEET = "contact_sheet.png"
HELD_OUT = 128  # images of the held-out set
_SHEET_IMAGES = 64
_PINK = {"kind": "pink"}
# Another loss from another start than the calibration set's, and fewer iterations than even a quick
# one has: these images judge, nothing is fitted to them. On ResNet-20 their mean distance to the
# batch norms' statistics is 0.19; that of 1/f noise 0.47. Valid pixels only: the engine's input
# grid covers those, and others would measure its clipping.
MATCHED: Mapping[str, Any] = {
    "loss": "std",
    "init": "gaussian",
    "statistic": "batch",
    "iterations": 30,
    "clip": True,
}
_NOISE_SEEDS = 1000  # seeds of the noise are counted from here
# Parts of the time left that making images may take; alone, a little is kept for storing them.
_SHARE, _SHARE_ALONE, _SHARE_HELD_OUT = 0.5, 0.9, 0.2


def synthesize(context: Context) -> tuple[CalibSet, bytes]:
    """Make the calibration images batch by batch; beside them, their contact sheet."""
    recipe = context.settings.recipe
    plugin = plugins.load("synthesizer", recipe.synth)
    options = plugin_options(plugin, recipe.synth, recipe.effort, synth_overrides(recipe))
    calib = make_images(
        context,
        recipe.synth,
        options,
        recipe.samples,
        zoo=context.value("zoo") if plugin.USES_ZOO else (),
        seconds=context.share_of_time(_SHARE_ALONE if context.is_last else _SHARE),
    )
    return _finished(context, calib)


def read_zoo(context: Context) -> list[Graph]:
    """Load the other models of the zoo."""
    from dfqc.compiler.mixing_zoo import load_zoo

    return load_zoo(context.settings.recipe, context.value("trace"))


def hold_out(context: Context) -> tuple[CalibSet, bytes]:
    """Make images in another way than the calibration set, to judge what was made from that.

    With batch norms, half match their statistics by another loss, from another seed; the other
    half, and all of them without batch norms, are 1/f noise.
    """
    from dfqc.compiler.graph import has_batch_norm

    noise = plugin_options(plugins.load("synthesizer", "noise"), "noise", "standard", _PINK)
    if not has_batch_norm(context.value("trace")):
        return _finished(context, make_images(context, "noise", noise, HELD_OUT))
    matched = plugin_options(plugins.load("synthesizer", "zeroq"), "zeroq", "quick", MATCHED)
    seconds = context.share_of_time(_SHARE_HELD_OUT)
    parts = [
        make_images(context, "zeroq", matched, HELD_OUT // 2, seconds=seconds),
        make_images(context, "noise", noise, HELD_OUT // 2, start=_NOISE_SEEDS),
    ]
    return _finished(context, join(parts, asked=HELD_OUT))


def count_fitting(held_out: CalibSet, *, batch_norm: bool) -> int:
    """Return how many held-out images, from the first on, look like the model's data.

    As far as can be told. Between results that were learned, 1/f noise picks the wrong one: on a
    CIFAR-10 ResNet-8 it costs a point of agreement.
    """
    return len(held_out.images) - (HELD_OUT // 2 if batch_norm else 0)


def _finished(context: Context, calib: CalibSet) -> tuple[CalibSet, bytes]:
    """Add what the report says of a set: its score, and how it looks; warn of a poor one."""
    from dfqc.compiler.calib_quality import score, warnings
    from dfqc.compiler.report import contact_sheet

    graph = context.value("trace")
    found = score(graph, calib.images, calib.labels, device=device_of(context))
    faults = warnings(found)
    if context.stage.name == "synthesize":  # the held-out images are half noise by design
        for fault in faults:
            log.warning("calibration images: %s", fault)
    info = dict(calib.info) | {"score": found.to_json() | {"warnings": faults}}
    sheet = contact_sheet(as_pixels(calib.images[:_SHEET_IMAGES], graph.image))
    return dataclasses.replace(calib, info=info), sheet


def as_pixels(images: Tensor, image: ImageSpec) -> np.ndarray:
    """Return normalized images as a camera would have seen them, uint8 (n, h, w, 1 or 3)."""
    from dfqc.compiler._likeness import to_pixels

    pixels = to_pixels(images.cpu(), image).clamp(0, 1) * 255
    channels = 3 if pixels.shape[1] == 3 else 1
    shown: np.ndarray = pixels[:, :channels].round().byte().permute(0, 2, 3, 1).numpy()
    return shown


def save_calibration(value: tuple[CalibSet, bytes], folder: Path) -> None:
    """Write the images and their contact sheet."""
    save_calib(value[0], folder)
    (folder / SHEET).write_bytes(value[1])
