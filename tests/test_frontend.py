import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from dfqc.compiler.errors import LoadError, UnsupportedError
from dfqc.compiler.frontend import export, load_graph, raise_program, save_graph
from dfqc.compiler.graph import batch_norms, layer_nodes, verify
from dfqc.compiler.passes.fold import fold
from functions import Function

aten = torch.ops.aten


def calls(graph):
    return [n.target for n in graph.module.graph.nodes if n.op == "call_function"]


def paths(graph):
    return [str(n.target) for n in graph.module.graph.nodes if n.op == "call_module"]


def check_equal(graph, module, *, batches=(1, 2, 5), tolerance=1e-6):
    for count in batches:
        x = models.images(count, graph.image, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(graph.module(x), module(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", models.TINY)
def test_tiny_nets_compute_the_same_with_any_batch(name):
    module = models.build(name)
    graph = models.trace_module(module)
    verify(graph, "trace")
    check_equal(graph, module)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    own = {path for path, m in module.named_modules() if isinstance(m, kinds)}
    assert {path for path, _ in layer_nodes(graph)} == own
    norms = {p for p, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {norm.path for norm in batch_norms(graph)} == norms


def test_train_and_eval_work_and_the_model_is_untouched():
    module = models.build("residual")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    graph = models.trace_module(module)
    graph.module.train()
    graph.module(models.images())
    graph.module.eval()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(p.requires_grad for p in graph.module.parameters())


def test_names_depend_on_the_model_alone():
    first, second = (models.trace_tiny("residual", seed) for seed in (0, 1))
    names = [n.name for n in first.module.graph.nodes]
    assert names == [n.name for n in second.module.graph.nodes]
    assert names[:4] == ["x", "conv1", "bn1", "relu"]
    assert paths(first)[2] == "layer1.conv1"
    assert not any(n.meta for n in first.module.graph.nodes)


# Canonical spellings.


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.relu6(x), (aten.hardtanh.default, (0.0, 6.0))),
        (lambda x: nn.ReLU6(inplace=True)(x), (aten.hardtanh.default, (0.0, 6.0))),
        (lambda x: x.clamp(0, 6), (aten.hardtanh.default, (0.0, 6.0))),
        (lambda x: x.clip(-1, 1), (aten.hardtanh.default, (-1.0, 1.0))),
        (lambda x: F.hardtanh(x), (aten.hardtanh.default, (-1.0, 1.0))),
        (lambda x: x.clamp(min=0), (aten.relu.default, ())),
        (lambda x: x.clamp_min(0.0), (aten.relu.default, ())),
        (lambda x: F.relu(x, inplace=True), (aten.relu.default, ())),
        (lambda x: F.adaptive_avg_pool2d(x, 1), (aten.mean.dim, ([2, 3], True))),
        (lambda x: x.mean((-1, -2)), (aten.mean.dim, ([2, 3], False))),
        (lambda x: x.mean((3, 2), keepdim=True), (aten.mean.dim, ([2, 3], True))),
        (lambda x: x.view(-1, 768), (aten.reshape.default, ([-1, 768],))),
        (lambda x: F.pad(x, (1, 2)), (aten.pad.default, ([1, 2], "constant", 0.0))),
        (lambda x: nn.ConstantPad2d(1, 2)(x), (aten.pad.default, ([1] * 4, "constant", 2.0))),
    ],
)
def test_operators_have_one_spelling(function, expected):
    module = Function(lambda _, x: function(x * 2)).eval()
    graph = models.trace_module(module)
    node = next(n for n in graph.module.graph.nodes if n.target == expected[0])
    assert node.args[1:] == expected[1]
    check_equal(graph, module)


@pytest.mark.parametrize("function", [lambda x: x.clamp(max=3.0), lambda x: x.clamp(min=1.0)])
def test_one_sided_clamps_stay(function):
    module = Function(lambda _, x: function(x)).eval()
    graph = models.trace_module(module)
    assert calls(graph)[0] in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
    check_equal(graph, module)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "pads"),
    [(3, 1, (1, 1), 0), (3, 2, (2, 2), 0), (4, 1, (1, 1), 1), ((3, 2), 1, (1, 0), 1)],
)
def test_same_padding_becomes_numbers(kernel, dilation, padding, pads):
    conv = nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation)
    graph = models.trace_module(conv)
    check_equal(graph, conv)
    (_, node), *rest = layer_nodes(graph)
    assert not rest
    assert graph.module.get_submodule(str(node.target)).padding == padding
    assert calls(graph).count(aten.pad.default) == pads


def test_valid_padding_becomes_zero():
    conv = nn.Conv2d(3, 4, 3, padding="valid")
    graph = models.trace_module(conv)
    assert graph.module.get_submodule(paths(graph)[0]).padding == (0, 0)
    check_equal(graph, conv)


def test_reflect_padding_stays_apart():
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    graph = models.trace_module(conv)
    assert calls(graph) == [aten.pad.default]
    check_equal(graph, conv)


# What becomes a module, and under which name.


def test_a_module_used_twice_is_one_module_called_twice():
    module = Function(lambda self, x: self.conv(F.relu(self.conv(x))), conv=nn.Conv2d(3, 3, 1))
    graph = models.trace_module(module)
    assert paths(graph) == ["conv", "conv"]
    check_equal(graph, module)


def test_one_weight_with_two_strides_is_two_modules():
    def forward(self, x):
        return F.conv2d(x, self.w)[:, :, ::2, ::2] + F.conv2d(x, self.w, stride=2)

    module = Function(forward, w=nn.Parameter(torch.randn(4, 3, 1, 1)))
    graph = models.trace_module(module)
    assert paths(graph) == ["w", "w_2"]
    check_equal(graph, module)


def test_a_module_inside_a_module_that_computes_too():
    class Outer(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 1)
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.inner(super().forward(x))

    module = nn.Sequential(Outer())
    graph = models.trace_module(module)
    assert paths(graph) == ["0", "0.inner"]
    check_equal(graph, module)


@pytest.mark.filterwarnings("ignore")
def test_computed_weights_stay_operators():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    module = nn.Sequential(conv, nn.Conv2d(4, 4, 1))
    graph = models.trace_module(module)
    assert paths(graph) == ["1"]
    assert aten.conv2d.default in calls(graph)
    check_equal(graph, module)


def test_weight_standardization_by_batch_norm_stays_an_operator():
    def forward(self, x):
        flat = F.batch_norm(self.w.view(1, 4, -1), None, None, training=True)
        return self.conv(F.conv2d(x, flat.view_as(self.w)))

    module = Function(forward, w=nn.Parameter(torch.randn(4, 3, 3, 3)), conv=nn.Conv2d(4, 4, 1))
    graph = models.trace_module(module)
    assert paths(graph) == ["conv"]
    check_equal(graph, module)


def test_batch_norm_without_weight_and_functional_batch_norm():
    plain = nn.BatchNorm2d(3, affine=False)
    called = nn.BatchNorm2d(3)
    models.randomize_norms(nn.Sequential(plain, called))

    def forward(self, x):
        x = self.plain(x)
        stats = self.called.running_mean, self.called.running_var
        return F.batch_norm(x, *stats, self.called.weight, self.called.bias, False, 0.0, 1e-3)

    module = Function(forward, plain=plain, called=called).eval()
    graph = models.trace_module(module)
    assert [(n.path, n.module.eps) for n in batch_norms(graph)] == [
        ("plain", 1e-5),
        ("called", 1e-3),
    ]
    check_equal(graph, module)


def test_no_grad_region_is_inlined():
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x) * 2
        return F.relu(x)

    module = Function(forward, conv=nn.Conv2d(3, 4, 3))
    graph = models.trace_module(module)
    assert paths(graph) == ["conv"]
    check_equal(graph, module)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_region_is_inlined_only_if_it_is_off(enabled):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = self.conv(x)
        return F.relu(x)

    module = Function(forward, conv=nn.Conv2d(3, 4, 3))
    if enabled:
        with pytest.raises(UnsupportedError, match=r"autocast.*test_frontend.py:\d+.*precision"):
            models.trace_module(module)
    else:
        check_equal(models.trace_module(module), module)


@pytest.mark.parametrize("name", ["residual", "linear_norm", "transposed"])
def test_fully_decomposed_programs_are_raised_too(name):
    module = models.build(name)
    program = export(module, models.IMAGE).run_decompositions()
    kinds = {n.target for n in program.graph.nodes}
    assert kinds & {aten.convolution.default, aten.addmm.default}
    graph = raise_program(program, models.IMAGE, name)
    check_equal(graph, module, tolerance=1e-5)
    direct = models.trace_module(module)
    assert {p for p, _ in layer_nodes(graph)} == {p for p, _ in layer_nodes(direct)}
    assert len(batch_norms(graph)) == len(batch_norms(direct))


# What cannot be compiled: the operator, the source line, what to do.


# Saving and loading.


def digests(folder: Path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("name", models.TINY)
def test_a_saved_graph_comes_back_the_same(tmp_path, name):
    for i, graph in enumerate((models.trace_tiny(name), fold(models.trace_tiny(name)))):
        one, two = tmp_path / f"{i}a", tmp_path / f"{i}b"
        save_graph(graph, one)
        loaded = load_graph(one)
        verify(loaded, "load")
        assert str(loaded.module.graph) == str(graph.module.graph)
        assert (loaded.image, loaded.source) == (graph.image, graph.source)
        x = models.images(3)
        with torch.no_grad():
            assert torch.equal(loaded.module(x), graph.module(x))
        save_graph(loaded, two)
        assert digests(one) == digests(two)


def test_equal_models_are_saved_to_equal_bytes(tmp_path):
    for part in ("a", "b"):
        save_graph(models.trace_tiny("concat"), tmp_path / part)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_damaged_graph_is_refused(tmp_path):
    save_graph(models.trace_tiny("plain"), tmp_path)
    (tmp_path / "graph.json").write_text("{")
    with pytest.raises(LoadError, match="no graph can be read"):
        load_graph(tmp_path)
    with pytest.raises(LoadError, match="no graph can be read"):
        load_graph(tmp_path / "nowhere")
