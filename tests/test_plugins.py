"""Discovery, and the contract that every file in a plug-in folder keeps, whoever wrote it."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import models
from dfqc.compiler import contracts, plugin_contracts, plugins
from dfqc.compiler.contracts import CalibSet, QuantState
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.graph import has_batch_norm
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.plan import make_plan
from dfqc.compiler.spec import Bits, TargetSpec
from dfqc.compiler.stages import require_batch_norm, require_classes
from dfqc.compiler.storage import load_calib, load_state, save_calib, save_state

CPU = torch.device("cpu")
SYNTHESIZERS = plugins.available("synthesizer")
QUANTIZERS = plugins.available("quantizer")
TARGETS = plugins.available("target")

each_synthesizer = pytest.mark.parametrize("name", SYNTHESIZERS)
each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
each_target = pytest.mark.parametrize("name", TARGETS)


# --- discovery


def test_files_are_plugins_and_helpers_are_not():
    assert {"zeroq", "noise", "images"} <= set(SYNTHESIZERS)
    assert "rtn" in QUANTIZERS
    assert "ort" in TARGETS
    assert not [n for kind in plugins.KINDS for n in plugins.available(kind) if n.startswith("_")]


def test_a_new_file_is_a_new_plugin(tmp_path, monkeypatch):
    import dfqc.calib

    (tmp_path / "fresh.py").write_text('"""Make nothing."""\ndef synthesize(): ...\n')
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(dfqc.calib, "__path__", [*dfqc.calib.__path__, str(tmp_path)])
    plugins.available.cache_clear()
    try:
        assert set(plugins.available("synthesizer")) == {*SYNTHESIZERS, "fresh"}
        assert plugins.load("synthesizer", "fresh").synthesize() is None
    finally:
        plugins.available.cache_clear()
        sys.modules.pop("dfqc.calib.fresh", None)


def test_a_target_is_a_backend_with_a_target(tmp_path, monkeypatch):
    import dfqc.backends

    (tmp_path / "oracle.py").write_text('"""A runner without a target."""\n')
    monkeypatch.setattr(dfqc.backends, "__path__", [*dfqc.backends.__path__, str(tmp_path)])
    plugins.available.cache_clear()
    try:
        assert plugins.available("target") == TARGETS
        with pytest.raises(UsageError, match="unknown target 'oracle'"):
            plugins.load("target", "oracle")
    finally:
        plugins.available.cache_clear()
        sys.modules.pop("dfqc.backends.oracle", None)


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [("synthesizer", "zeroqq", "zeroq"), ("quantizer", "rnt", "rtn"), ("target", "orrt", "ort")],
)
def test_an_unknown_name_is_answered_with_the_names(kind, name, near):
    with pytest.raises(UsageError, match=f"unknown {kind} '{name}': did you mean '{near}'") as info:
        plugins.load(kind, name)
    for known in plugins.available(kind):
        assert known in str(info.value)


def test_nothing_near_is_no_suggestion():
    with pytest.raises(UsageError, match="unknown target 'xyzzy': expected one of"):
        plugins.load("target", "xyzzy")


def test_summaries_are_read_without_loading():
    code = (
        "import sys; from dfqc.compiler import plugins\n"
        "found = [plugins.summary(k, n) for k in plugins.KINDS for n in plugins.available(k)]\n"
        "assert all(found), found; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sources_are_found_without_importing():
    assert plugins.find_source("dfqc.compiler.plugins").name == "plugins.py"
    assert plugins.find_source("dfqc.compiler.passes").name == "__init__.py"
    assert plugins.find_source("dfqc.compiler.plugins.load") is None
    assert plugins.find_source("dfqc.nowhere") is None


# --- the contract of every file


def check_signature(function, protocol):
    """Same parameters, same kinds; the protocol's `self` is the module."""
    ours = inspect.signature(function).parameters
    wanted = dict(inspect.signature(protocol).parameters)
    del wanted["self"]
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in wanted.values()]
    if "progress" in ours:
        assert ours["progress"].default is contracts.silent


def check_options(module):
    options = module.Options
    assert issubclass(options, BaseModel)
    assert options.model_config["frozen"] is True
    assert options.model_config["extra"] == "forbid"
    for effort, preset in getattr(module, "PRESETS", {}).items():
        assert effort in ("quick", "standard", "max")
        assert set(preset) <= set(options.model_fields)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8),
             labels=rng.integers(0, 10, 12))  # fmt: skip
    return path


def options_of(module, name, image_file):
    """Cheap options: every plug-in has defaults for all but what only a user can know."""
    fields = module.Options.model_fields
    cheap = {"path": str(image_file), "iterations": 2, "steps": 2, "epochs": 1}
    required = {n for n, field in fields.items() if field.is_required()}
    assert required <= {"path"}
    return plugin_options(module, name, "quick", {k: v for k, v in cheap.items() if k in fields})


@each_synthesizer
def test_synthesizer_contract(name, image_file):
    module = plugins.load("synthesizer", name)
    check_signature(module.synthesize, plugin_contracts.Synthesizer.synthesize)
    check_options(module)
    check_signature(module.count_passes, plugin_contracts.Synthesizer.count_passes)
    options = options_of(module, name, image_file)
    assert (module.count_passes(options, (3, 16, 16), 1) > 0) == module.NEEDS_BN
    check_signature(module.count_bytes, plugin_contracts.Synthesizer.count_bytes)
    assert (module.count_bytes(options, (3, 16, 16), 8) > 0) == module.NEEDS_BN
    for constant in ("NEEDS_BN", "NEEDS_CLASSES", "USES_ZOO", "CARRIES"):
        assert isinstance(getattr(module, constant), bool)
        # What is asked before torch is loaded is read from the source.
        assert plugins.constant("synthesizer", name, constant) is getattr(module, constant)
    assert options_of(module, name, image_file).batch_size >= 1  # the driver splits by it


def synthesize(name, net, image_file, seed, progress=contracts.silent):
    module = plugins.load("synthesizer", name)
    return module.synthesize(
        models.trace_tiny(net), 4, options_of(module, name, image_file),
        rng=torch.Generator().manual_seed(seed), device=CPU, progress=progress,
    )  # fmt: skip


@each_synthesizer
@pytest.mark.parametrize("net", ["plain", "depthwise"])
def test_synthesizer_makes_what_was_asked_for(name, net, image_file, tmp_path):
    seen = []
    calib = synthesize(name, net, image_file, 0, lambda *report: seen.append(report))
    assert isinstance(calib, CalibSet)
    assert calib.images.shape == (4, *models.IMAGE.size)
    assert calib.images.dtype == torch.float32
    assert calib.images.device.type == "cpu"
    assert not calib.images.requires_grad
    assert torch.isfinite(calib.images).all()
    assert calib.images.std() > 0.01
    if calib.labels is not None:
        assert calib.labels.shape == (4,)
    assert seen
    done, total, _ = seen[-1]
    assert done == total
    assert all(0 <= d <= t for d, t, _ in seen)
    save_calib(calib, tmp_path)
    assert torch.equal(load_calib(tmp_path).images, calib.images)
    assert load_calib(tmp_path).info == calib.info  # plain data


@each_synthesizer
def test_synthesizer_is_seeded_by_its_generator_alone(name, image_file):
    torch.manual_seed(1)
    first = synthesize(name, "plain", image_file, 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = synthesize(name, "plain", image_file, 5)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, synthesize(name, "plain", image_file, 6).images)


@each_synthesizer
def test_synthesizer_leaves_the_graph_alone(name, image_file):
    module, graph = plugins.load("synthesizer", name), models.trace_tiny("plain")
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    nodes = [n.name for n in graph.module.graph.nodes]
    module.synthesize(
        graph, 2, options_of(module, name, image_file),
        rng=torch.Generator().manual_seed(0), device=CPU,
    )  # fmt: skip
    assert all(torch.equal(before[k], v) for k, v in graph.module.state_dict().items())
    assert [n.name for n in graph.module.graph.nodes] == nodes
    assert not graph.module.training


@each_synthesizer
def test_needs_bn_tells_the_truth(name, image_file):
    graph = models.trace_tiny("no_norm")
    if plugins.load("synthesizer", name).NEEDS_BN:
        with pytest.raises(Exception, match=r"need batch norms: .*\bzeroq\b.*do not: .*\bnoise\b"):
            require_batch_norm(name, has_batch_norm(graph))
    else:
        require_batch_norm(name, has_batch_norm(graph))
        assert len(synthesize(name, "no_norm", image_file, 0).images) == 4


@each_synthesizer
@pytest.mark.parametrize("classes", [None, 1])
def test_needs_classes_tells_the_truth(name, classes):
    if plugins.load("synthesizer", name).NEEDS_CLASSES:
        with pytest.raises(UnsupportedError, match=r"without classes: .*zeroq"):
            require_classes(name, classes)
    else:
        require_classes(name, classes)
    require_classes(name, 2)


@each_quantizer
def test_quantizer_contract(name):
    module = plugins.load("quantizer", name)
    check_signature(module.quantize, plugin_contracts.QuantizerPlugin.quantize)
    check_options(module)


def quantize(name, net, bits, seed=0):
    module, graph = plugins.load("quantizer", name), fold(models.trace_tiny(net))
    plan = make_plan(graph, plugins.load("target", "ort").TARGET, bits, [], ends=None)
    calib = CalibSet(models.images(8), None, "noise")
    few = {"iterations": 3, "act_iterations": 3, "batch_size": 4}
    few |= {"start": "rtn"} if name == "qat" else {}  # of others, the name of a rounding
    options = {k: v for k, v in few.items() if k in module.Options.model_fields}
    state = module.quantize(
        graph, calib, plan, module.Options(**options),
        rng=torch.Generator().manual_seed(seed), device=CPU,
    )  # fmt: skip
    return plan, state


@each_quantizer
@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat"])
@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, 4), Bits(2, 16)], ids=str)
def test_quantizer_decides_everything_on_its_grids(name, net, bits, tmp_path):
    plan, state = quantize(name, net, bits)
    assert isinstance(state, QuantState)
    assert set(state.acts) == set(plan.quantizers)
    planned = [layer for layer in plan.layers.values() if layer.weight is not None]
    assert set(state.weights) == {layer.name for layer in planned}
    for layer in planned:
        weight = state.weights[layer.name]
        assert weight.codes.dtype == torch.int8
        assert weight.codes.min() >= layer.weight.quant_min
        assert weight.codes.max() <= layer.weight.quant_max
        codes = weight.codes.flatten(1).int()
        assert (codes.amax(1).clamp_min(0) - codes.amin(1).clamp_max(0) < layer.weight.levels).all()
        assert (weight.scale > 0).all()
    for quantizer in plan.quantizers.values():
        grid = state.acts[quantizer.name]
        assert grid.scale > 0
        assert quantizer.scheme.quant_min <= grid.zero_point <= quantizer.scheme.quant_max
    save_state(state, tmp_path)
    back = load_state(tmp_path)
    assert back.acts == state.acts
    assert all(torch.equal(back.weights[n].codes, w.codes) for n, w in state.weights.items())


@each_quantizer
def test_quantizer_is_deterministic(name):
    first, second = (quantize(name, "residual", Bits(4, 4))[1] for _ in "ab")
    assert first.acts == second.acts
    for layer, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[layer].codes)
        assert torch.equal(weight.scale, second.weights[layer].scale)


@each_target
def test_target_contract(name):
    backend = plugins.load("target", name)
    assert isinstance(backend.TARGET, TargetSpec)
    assert backend.TARGET.name == name
    for function in ("available", "lower", "lower_float", "open_runner", "executed"):
        wanted = list(inspect.signature(getattr(plugin_contracts.Backend, function)).parameters)[1:]
        ours = inspect.signature(getattr(backend, function)).parameters
        assert list(ours)[: len(wanted)] == wanted
        assert all(p.default is not p.empty for p in list(ours.values())[len(wanted) :])
    usable, detail = backend.available()
    assert isinstance(usable, bool)
    assert detail


@each_target
def test_target_is_read_without_torch_and_without_its_runtime(name):
    heavy = ("torch", "onnxruntime", "openvino", "tensorrt", "onnx")
    code = (
        f"import sys; from dfqc.compiler import plugins; plugins.load('target', {name!r}).TARGET\n"
        f"sys.exit(repr([m for m in {heavy!r} if m in sys.modules] or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() in ("", "0"), done.stderr


@each_target
def test_target_lowers_to_equal_bytes(name):
    backend = plugins.load("target", name)
    graph = fold(models.trace_tiny("residual"))
    plan = make_plan(graph, backend.TARGET, Bits(8, 8), [], ends=None)
    module = plugins.load("quantizer", "rtn")
    state = module.quantize(
        graph, CalibSet(models.images(8), None, "noise"), plan, module.Options(),
        rng=torch.Generator(), device=CPU,
    )  # fmt: skip
    first, second = (backend.lower(graph, state, metadata={"dfqc.bits": "w8a8"}) for _ in "ab")
    assert first.model == second.model
    assert first.model
    assert set(first.taps) == set(plan.quantizers)
    assert set(first.layers) >= {x.name for x in plan.layers.values() if x.weight is not None}
