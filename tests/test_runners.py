"""What every engine's runner owes its callers, whichever engine it is."""

import importlib.metadata
import importlib.util
import sys

import numpy as np
import pytest

from dfqc.backends import openvino, ort
from dfqc.compiler.errors import EnvironmentFault, LoadError
from qdq_models import CLASSES, SIZE, sample_images, tiny_net

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed: pip install 'dfqc[openvino]'",
)
ENGINES = [ort, pytest.param(openvino, marks=needs_openvino)]
each_engine = pytest.mark.parametrize("engine", ENGINES, ids=["ort", "openvino"])
# Module to be missing, how to get it.
MISSING = [
    (ort, "onnxruntime", "pip install onnxruntime"),
    (openvino, "openvino", r"pip install 'dfqc\[openvino\]'"),
]


@pytest.mark.parametrize(("engine", "module", "mend"), MISSING, ids=["ort", "openvino"])
def test_a_missing_runtime_is_said(engine, module, mend, monkeypatch, store):
    monkeypatch.setitem(sys.modules, module, None)
    usable, reason = engine.available()
    assert not usable
    assert mend.replace("\\", "") in reason
    with pytest.raises(EnvironmentFault, match=mend):
        engine.open_runner(store(tiny_net()))


@each_engine
def test_available_names_the_installed_version(engine):
    distribution = {"ort": "onnxruntime"}.get(engine.TARGET.name, engine.TARGET.name)
    usable, version = engine.available()
    assert usable
    assert version.startswith(importlib.metadata.version(distribution))


@each_engine
def test_float_model_matches_float64(engine, store):
    net = tiny_net(float32=True)
    path = store(net)
    output = engine.open_runner(path, threads=1).infer(net.images)
    np.testing.assert_allclose(output, net.outputs, rtol=0, atol=1e-6)
    assert all("float" in kernel for kernel in engine.executed(path, net.layers).values())


@each_engine
@pytest.mark.parametrize("max_batch", [1, 3, 16, 100])
def test_a_batch_of_any_size_is_run_in_pieces(engine, max_batch, store):
    net = tiny_net(float32=True)
    runner = engine.open_runner(store(net), threads=1, max_batch=max_batch)
    np.testing.assert_allclose(runner.infer(net.images), net.outputs, rtol=0, atol=1e-6)
    stem = net.layers["stem"]
    tapped = runner.codes(net.images, [stem])
    assert tapped[stem].shape == (len(net.images), 8, 8, 8)
    np.testing.assert_allclose(tapped["output"], net.outputs, rtol=0, atol=1e-6)


@each_engine
def test_an_unknown_tap_is_refused(engine, store):
    with pytest.raises(LoadError, match="no node computes elsewhere"):
        engine.open_runner(store(tiny_net())).codes(sample_images(1), ["elsewhere"])


@each_engine
def test_a_name_map_of_another_model_is_refused(engine, store):
    with pytest.raises(LoadError, match=r"stem: value 'conv1' is computed by no node"):
        engine.executed(store(tiny_net()), {"stem": "conv1"})


@each_engine
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no such file"),
        (b"", "cannot load it"),
        (b"this is text, not a model", "no ONNX model"),
        (tiny_net().data[:2000], "no ONNX model"),
    ],
    ids=["missing", "empty", "text", "truncated"],
)
def test_a_file_that_is_no_model_is_refused(engine, data, reason, store, tmp_path):
    path = tmp_path / "none.onnx" if data is None else store(data)
    with pytest.raises(LoadError, match=reason) as caught:
        engine.open_runner(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@each_engine
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 1, 8, 8), (2, 3, 9, 8), (0, *SIZE)], ids=str)
def test_images_of_another_shape_are_refused(engine, shape, store):
    runner = engine.open_runner(store(tiny_net()))
    with pytest.raises(LoadError, match=r"expected n×3×8×8"):
        runner.infer(np.zeros(shape, np.float32))


@each_engine
def test_a_single_image_and_another_memory_order_are_fine(engine, store):
    net = tiny_net()
    runner = engine.open_runner(store(net))
    channels_last = np.ascontiguousarray(net.images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert runner.infer(channels_last[:1]).shape == (1, CLASSES)
    np.testing.assert_array_equal(runner.infer(channels_last), runner.infer(net.images))
