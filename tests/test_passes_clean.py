import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import models
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.passes.clean import AliasConflictError, clean, functionalize

aten = torch.ops.aten


def export(module, *, train=False):
    """Export without touching the mode; the example has two images."""
    return torch.export.export(module.train(train), (models.images(),)).module()


def targets(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def check_equal(module, graph_module):
    x = models.images(2, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x.clone()), module(x.clone()), rtol=0, atol=0)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def relu_on_a_fresh_tensor(x):
    return F.relu(x * 2, inplace=True) + 1


def result_is_not_used(x):
    y = x * 2
    y.add_(1)
    return y * 3


def tensor_and_result_are_both_used(x):
    y = x * 2
    z = y.relu_()
    return y + z


def reader_before_and_reader_after(x):
    y = x + 1
    before = y * 10
    y.sub_(0.5)
    return before + y


def chain_of_writes(x):
    y = x * 1.5
    y += 1
    y *= 2
    y.clamp_(0, 6)
    return y - x


def view_that_nobody_reads_later(x):
    y = (x * 2).flatten(1)
    return y.relu_().sum(1)


def view_made_after_the_write(x):
    y = x * 2
    y.sigmoid_()
    return y.flatten(1)


def write_to_the_input(x):
    x.sub_(0.5)
    return x * 2


def write_to_a_copy_that_is_the_tensor(x):
    y = x * 2
    z = y.contiguous()
    z.relu_()
    return y + z


FUNCTIONS = [
    relu_on_a_fresh_tensor,
    result_is_not_used,
    tensor_and_result_are_both_used,
    reader_before_and_reader_after,
    chain_of_writes,
    view_that_nobody_reads_later,
    view_made_after_the_write,
    write_to_the_input,
    write_to_a_copy_that_is_the_tensor,
]


def write_through_a_slice(x):
    y = x * 2
    y[:, :1] += 1
    return y


def write_to_the_base_of_a_view(x):
    y = x * 2
    view = y.flatten(1)
    y.relu_()
    return view.sum(1)


def write_to_one_of_two_chunks(x):
    a, b = (x * 2).chunk(2, dim=2)
    a.relu_()
    return a + b


CONFLICTS = [
    write_through_a_slice,
    write_to_the_base_of_a_view,
    write_to_one_of_two_chunks,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_in_place_operators_become_functional(function):
    module = Function(function)
    exported = export(module)
    assert any(n.target._schema.is_mutable for n in calls(exported.graph))
    functionalize(exported.graph)
    exported.graph.lint()
    exported.recompile()
    assert not any(n.target._schema.is_mutable for n in calls(exported.graph))
    check_equal(module, exported)


@pytest.mark.parametrize("function", CONFLICTS, ids=lambda f: f.__name__)
def test_a_write_seen_through_another_view_is_not_guessed(function):
    exported = export(Function(function))
    before = str(exported.graph)
    with pytest.raises(AliasConflictError):
        functionalize(exported.graph)
    assert str(exported.graph) == before


@pytest.mark.parametrize("function", FUNCTIONS + CONFLICTS, ids=lambda f: f.__name__)
def test_the_front_end_computes_every_one_of_them(function):
    module = Function(function)
    graph = models.trace_module(module)
    assert not any(n.target._schema.is_mutable for n in calls(graph.module.graph))
    check_equal(module, graph.module)


def calls(graph):
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def test_a_write_to_the_models_state_is_refused_with_its_line():
    with pytest.raises(
        UnsupportedError, match=r"add_.*test_passes_clean.py:\d+.*'calls'|state 'calls'"
    ):
        models.trace_module(Counter())


# Dropout.


def test_dropout_that_is_off_disappears():
    module = nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d(0.3), nn.AlphaDropout(0.2))
    exported = export(module)
    assert sum("dropout" in t for t in targets(exported.graph)) == 3
    clean(exported.graph)
    exported.recompile()
    assert targets(exported.graph) == ["aten.relu.default"]
    check_equal(module, exported)


def test_in_place_dropout_that_is_off_disappears():
    module = nn.Sequential(nn.ReLU(), nn.Dropout(0.5, inplace=True), nn.Sigmoid())
    exported = export(module)
    clean(exported.graph)
    exported.recompile()
    assert targets(exported.graph) == ["aten.relu.default", "aten.sigmoid.default"]
    check_equal(module, exported)


def test_active_dropout_is_refused():
    exported = export(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), train=True)
    with pytest.raises(UnsupportedError, match=r"dropout with p=0.5 is active.*model.eval"):
        clean(exported.graph)


# No-ops and dead nodes.


def test_noops_disappear():
    def function(x):
        y = x.contiguous().clone().to(torch.float32).detach()
        y = F.pad(y[:, 0:], (0, 0, 0, 0))
        return torch.sigmoid(y).type_as(x)

    module = Function(function)
    graph = models.trace_module(module)
    assert targets(graph.module.graph) == ["aten.sigmoid.default"]
    check_equal(module, graph.module)


def test_operators_that_do_something_stay():
    def function(x):
        y = x.to(torch.float64)[:, 1:]
        return F.pad(y, (1, 0, 0, 0)).to(torch.float32)

    module = Function(function)
    graph = models.trace_module(module)
    kinds = [t.split(".")[1] for t in targets(graph.module.graph)]
    assert kinds == ["to", "slice", "pad", "to"]
    check_equal(module, graph.module)


def test_dead_nodes_disappear():
    graph = fx.Graph()
    x = graph.placeholder("x")
    live = graph.call_function(aten.relu.default, (x,))
    dead = graph.call_function(aten.sigmoid.default, (x,))
    graph.call_function(aten.tanh.default, (dead,))
    graph.output(live)
    clean(graph)
    assert [n.name for n in graph.nodes] == [x.name, live.name, "output"]
