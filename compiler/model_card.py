"""The card of a package for whoever serves it: the manifest in, `MODEL_CARD.md` out.

What, from what, how made, measured how, what it does not do, how to run it. Every figure comes from
the manifest; what was not measured is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfqc.compiler.choice_text import describe_choice
from dfqc.compiler.report import open_points
from dfqc.compiler.units import format_size

_ABSENT = "not measured"


def model_card(manifest: Mapping[str, Any], files: Sequence[str] = ()) -> str:
    """Return the card; `files` are the paths in the package, of which the known are explained."""
    parts = [
        f"# {_name(manifest)}, {manifest.get('bits')} for {manifest.get('target')}",
        _summary(manifest),
        "## Figures",
        _table(("", "float", "this model"), _figures(manifest)),
        *_conditions(manifest),
        "## Limits",
        _bullets(_limits(manifest)),
        "## Input",
        _bullets(_preprocessing(manifest)),
        "## Run it",
        _how_to_run(manifest),
        "## How it was made",
        _bullets(_how_made(manifest)),
        f"```\n{manifest.get('command') or 'dfqc build --recipe recipe.yaml'}\n```",
        "## Files",
        _bullets(f"`{name}`: {text}" for name, text in _explain_files(files)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _name(manifest: Mapping[str, Any]) -> str:
    source = str(_get(manifest, "model", "source") or "model")
    return source.replace("\\", "/").rpartition("/")[2]


def _summary(manifest: Mapping[str, Any]) -> str:
    status = manifest.get("status")
    gates = manifest.get("gates", [])
    failed = [str(gate["name"]) for gate in gates if not gate.get("passed")]
    verdict = (
        f"{len(gates) - len(failed)} of {len(gates)} gates passed"
        if gates
        else "No gate was set or measured"
    )
    if failed:
        verdict += f"; **failed: {', '.join(failed)}**"
    if status == "failed":
        verdict += ". **The build is marked as failed: do not serve it without a reason**"
    layers = manifest.get("layers", [])
    widths: dict[str, int] = {}
    for layer in layers:
        widths[str(layer.get("exported"))] = widths.get(str(layer.get("exported")), 0) + 1
    bits = ", ".join(f"{count} layers {name}" for name, count in widths.items())
    return (
        f"An image model compressed by dfqc {manifest.get('dfqc')} from a float32 model of "
        f"{_count(_get(manifest, 'model', 'params'))} parameters and "
        f"{_count(_get(manifest, 'model', 'macs'))} multiply-adds ({bits}). {verdict}."
    )


def _figures(manifest: Mapping[str, Any]) -> list[list[str]]:
    metrics, size = manifest.get("metrics", {}), manifest.get("size", {})
    top1, latency = metrics.get("top1") or {}, metrics.get("latency_ms") or {}
    agreement = metrics.get("agreement") or {}
    built = "simulated" if agreement.get("engine") is None else "engine"
    return [
        ["top-1", _unit(top1.get("float"), "%"), _unit(top1.get(built), "%")],
        ["predictions as in float", "100 %", _unit(agreement.get(built), "%")],
        ["size", _bytes(size.get("float_bytes")), _bytes(size.get("model_bytes"))],
        ["latency", _unit(latency.get("float"), "ms", 3), _unit(latency.get("engine"), "ms", 3)],
        ["speed", "1.00 x", _unit(latency.get("speedup"), "x")],
    ]


def _conditions(manifest: Mapping[str, Any]) -> list[str]:
    """Say under which conditions the figures hold."""
    metrics, environment = manifest.get("metrics", {}), manifest.get("environment", {})
    top1, latency = metrics.get("top1") or {}, metrics.get("latency_ms") or {}
    said = []
    if top1.get("images"):
        said.append(f"Top-1 on {top1['images']} labelled images.")
    images = _get(metrics, "agreement", "images")
    if images:
        said.append(f"Predictions as in float on {images} synthetic held-out images.")
    if latency.get("engine") is not None:
        said.append(
            f"Latency at batch {latency.get('batch')} with {latency.get('threads')} threads on "
            f"{environment.get('cpu')}, runtime {environment.get('runtime')}, medians of calls "
            "that took turns with the float model's."
        )
    if latency.get("half") is not None:
        said.append(
            f"In {latency['half_precision']} the float model takes "
            f"{_unit(latency['half'], 'ms', 3)} there: {_unit(latency['half_speedup'], 'x')}."
        )
    return [" ".join(said)] if said else []


def _limits(manifest: Mapping[str, Any]) -> list[str]:
    points = open_points(manifest)
    points += [f"Calibration images: {text}" for text in _get(manifest, "calib", "warnings") or []]
    points.append(
        "It answers as the float model does or worse: whatever that was trained for, and its "
        "faults and biases, are inherited. Nothing was tested beyond the figures above."
    )
    narrow = [
        str(layer["name"])
        for layer in manifest.get("layers", [])
        if layer.get("executed") and layer.get("asked") != layer.get("exported")
    ]
    if narrow:
        shown = ", ".join(narrow[:5]) + (" and more" if len(narrow) > 5 else "")
        points.append(f"Exported with other bits than asked (`layers.csv` says why): {shown}.")
    return points


def _preprocessing(manifest: Mapping[str, Any]) -> list[str]:
    about = manifest.get("preprocessing") or {}
    if not about:
        return ["not recorded"]
    lines = [
        f"{about['color']}, resize: {about['resize']}; crop: {about['crop']}",
        f"{about['scale']}, minus mean {about['mean']}, divided by std {about['std']}",
        f"{about['layout']}",
    ]
    if about.get("assumed"):
        lines.append("mean and std were assumed (ImageNet's): check them against the training")
    if baked := about.get("baked"):
        lines.append(
            f"`{baked['file']}` takes uint8 pixels n x h x w x c instead, resized and cropped: "
            "division, mean, std and layout are in the graph"
        )
    return lines


def _how_to_run(manifest: Mapping[str, Any]) -> str:
    about = manifest.get("preprocessing") or {}
    runtime = "openvino" if manifest["target"] == "openvino" else "onnxruntime"
    code = _snippet(manifest) if about else ""
    verbs = (
        f"```\npython selftest.py            # numpy and {runtime} only: does it compute here "
        "what it must?\nsha256sum -c SHA256SUMS\ndfqc verify .                 # the same and "
        "more, layer by layer\ndfqc bench .                  # how fast it is on this device\n"
        "tritonserver --model-repository=$PWD/triton\n```"
    )
    return f"{verbs}\n\n{code}" if code else verbs


# How the snippet imports its runtime, and how it calls the model.
_ONNXRUNTIME = (
    "import onnxruntime as ort",
    """session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: images})[0]""",
)
_OPENVINO = (
    "import openvino as ov",
    """options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
options["SNIPPETS_MODE"] = "DISABLE"  # for residual sums; without them, and for ViTs, leave it out
model = ov.Core().compile_model("model.onnx", "CPU", options)
logits = model(images)[0]""",
)


def _snippet(manifest: Mapping[str, Any]) -> str:
    """Return Python that classifies one picture; a test runs it."""
    load, call = _OPENVINO if manifest["target"] == "openvino" else _ONNXRUNTIME
    image = manifest["image"]
    channels, height, width = image["size"]
    mode = "RGB" if channels == 3 else "L"
    if image.get("resize"):
        scale = f"{image['resize']} / min(picture.size)"
    else:
        scale = f"max({width} / picture.width, {height} / picture.height)"
    return f"""```python
import numpy as np
{load}
from PIL import Image

picture = Image.open("image.jpg").convert("{mode}")
scale = {scale}
side = [max(1, int(s * scale + 1e-6)) for s in picture.size]
picture = picture.resize(side, Image.Resampling.BILINEAR)
left, top = (side[0] - {width}) // 2, (side[1] - {height}) // 2
picture = picture.crop((left, top, left + {width}, top + {height}))
pixels = np.asarray(picture, np.float32).reshape({height}, {width}, {channels})
mean, std = np.float32({list(image["mean"])}), np.float32({list(image["std"])})
images = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]
{call}
print(logits.argmax(1))
```"""


def _how_made(manifest: Mapping[str, Any]) -> list[str]:
    calib, recipe = manifest.get("calib", {}), manifest.get("recipe", {})
    quantization = manifest.get("quantization") or {}
    kept = describe_choice(quantization) or quantization.get("kept")
    kept = f", kept: {kept}" if kept else ""
    real = recipe.get("calib-data")
    data = f"images given by the user, {real}" if real else "images synthesized from it, no data"
    return [
        f"source {_get(manifest, 'model', 'source')}, sha256 {_get(manifest, 'model', 'sha256')}",
        f"calibrated on {data} ({calib.get('images')} by `{calib.get('method')}`)",
        f"quantizer `{quantization.get('quantizer')}`{kept}",
        f"seed {manifest.get('seed')}, recipe sha256 {manifest.get('recipe_sha256')}",
        "versions, digests and inputs: `provenance.json`",
    ]


def _explain_files(files: Sequence[str]) -> list[tuple[str, str]]:
    meanings = {
        "model.onnx": "the model, normalized float32 images in",
        "model.uint8.onnx": "the same with its preprocessing, uint8 pixels in",
        "float.onnx": "the float model, as the control of `dfqc bench` and `dfqc eval`",
        "manifest.json": "every figure, for programs",
        "report.html": "every figure, for people",
        "layers.csv": "per layer: bits asked, exported and executed",
        "golden.npz": "inputs and the outputs that they must give",
        "selftest.py": "checks the files and the outputs",
        "junit.xml": "the gates, for CI systems",
        "provenance.json": "what this was made of (in-toto statement, unsigned)",
        "recipe.yaml": "`dfqc build --recipe` makes it again",
        "SHA256SUMS": "checksums of all files",
    }
    present = {*files, "manifest.json", "SHA256SUMS"}
    known = [(name, text) for name, text in meanings.items() if name in present]
    return known + [
        (name, "for Triton Inference Server") for name in files if name.endswith("config.pbtxt")
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(points: Any) -> str:
    return "\n".join(f"- {point}" for point in points)


def _bytes(value: float | None) -> str:
    return _ABSENT if value is None else format_size(value)


def _unit(value: float | None, unit: str, digits: int = 2) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f} {unit}"


def _count(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:,}"


def _get(values: Mapping[str, Any], *path: str) -> Any:
    current: Any = values
    for name in path:
        current = current.get(name) if isinstance(current, Mapping) else None
    return current
