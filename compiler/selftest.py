"""The script that a package brings to test itself: its text, and the limits that it reads.

It needs numpy and the runtime that the package was built for, and nothing of dfqc: a serving team
runs it where the package lands.
"""

from __future__ import annotations

SELFTEST = "selftest.py"

SCRIPT = '''#!/usr/bin/env python3
"""Does this package compute here what it computed when it was built?

Needs numpy and the runtime, openvino or onnxruntime, nothing else:  python selftest.py
Exit code 0: yes. 3: a file is missing or was changed. 7: the outputs differ. 8: no runtime.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    count = check_files()
    name = "openvino" if manifest["target"] == "openvino" else "onnxruntime"
    try:
        runtime = importlib.import_module(name)
    except ImportError as error:
        stop(8, f"{name} cannot be imported ({error}): pip install {name} numpy")
    run = run_openvino if name == "openvino" else run_onnxruntime
    print(f"files    {count} as written")
    import numpy

    with numpy.load(HERE / "golden.npz", allow_pickle=False) as golden:
        inputs, expected = golden["inputs"], golden["outputs"]
    outputs = run(runtime, HERE / "model.onnx", inputs)
    compare(numpy, outputs, expected, manifest["golden"])
    baked = manifest.get("preprocessing", {}).get("baked")
    if baked:
        compare_baked(numpy, lambda *given: run(runtime, *given), inputs, manifest, baked)
    print(f"passed   model.onnx on {name} {runtime.__version__}")
    if manifest.get("engine", "model.onnx") != "model.onnx":
        print(f"note     {manifest['engine']} itself was not run: `dfqc verify` does that")


def check_files():
    """Compare every file with SHA256SUMS and return how many there are."""
    lines = (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        if not (HERE / name).is_file():
            stop(3, f"{name} is missing")
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
            stop(3, f"{name} was changed since it was written")
    return len(lines)


def run_openvino(openvino, path, images):
    """Return the first output for a batch of images: the codes that dfqc computes."""
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(images.shape)
    # Float in float32, as it was simulated; integer weights of float layers likewise.
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    if not any(op.get_type_name() == "Softmax" for op in model.get_ops()):
        options["SNIPPETS_MODE"] = "DISABLE"  # convolutions add residuals themselves
    return core.compile_model(model, "CPU", options)(images)[0]


def run_onnxruntime(onnxruntime, path, images):
    """Return the first output for a batch of images, as dfqc runs the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weight-only matrix products in float32, as they were simulated.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if session.get_modelmeta().custom_metadata_map.get("dfqc.weight_only") == "true":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def compare(numpy, outputs, expected, limits):
    """Compare outputs with what the build's simulation computed."""
    largest = float(numpy.abs(outputs - expected).max())
    print(f"outputs  largest difference {largest:.3g}, tolerance {limits['tolerance']:.3g}")
    if not largest <= limits["tolerance"]:  # also true of NaN
        stop(7, f"the outputs differ by {largest:.3g}, tolerance {limits['tolerance']:.3g}")
    ordered = numpy.sort(expected, axis=1)
    clear = numpy.full(len(expected), True)
    if expected.shape[1] > 1:
        clear = ordered[:, -1] - ordered[:, -2] > limits["margin"]
    equal = outputs.argmax(1)[clear] == expected.argmax(1)[clear]
    percent = 100.0 * float(equal.mean()) if len(equal) else 100.0
    ties = len(expected) - len(equal)
    print(f"arg-max  equal on {percent:.2f} % of {len(equal)} images")
    if ties:
        print(f"         {ties} more not judged: their best two outputs differ by rounding alone")
    if percent < limits["agreement"]:
        stop(7, f"arg-max equal on {percent:.2f} %, expected {limits['agreement']:g} %")


def compare_baked(numpy, run, inputs, manifest, baked):
    """Compare the model that takes pixels with the one that takes normalized images."""
    image = manifest["image"]
    mean, std = (numpy.array(image[name], numpy.float32) for name in ("mean", "std"))
    real = (inputs.transpose(0, 2, 3, 1) * std + mean) * numpy.float32(255)
    pixels = numpy.clip(numpy.rint(real), 0, 255).astype(numpy.uint8)
    normalized = (pixels.astype(numpy.float32) / numpy.float32(255) - mean) / std
    normalized = numpy.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
    plain = run(HERE / "model.onnx", normalized)
    largest = float(numpy.abs(run(HERE / baked["file"], pixels) - plain).max())
    tolerance = manifest["golden"]["tolerance"]
    print(f"pixels   {baked['file']} differs by {largest:.3g}, tolerance {tolerance:.3g}")
    if not largest <= tolerance:
        stop(7, f"{baked['file']} and model.onnx differ by {largest:.3g}")


def stop(code, reason):
    print(f"FAILED   {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
'''
