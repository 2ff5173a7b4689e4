import pytest
import torch

import models
import pruning
import quantized
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.contracts import Pruned, QuantizerSupplies
from dfqc.compiler.graph import node_shapes
from dfqc.compiler.judging import count_judges
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options as RestoreOptions
from dfqc.compiler.passes.restore import restore
from dfqc.compiler.quantize import _caches, _passes, reconstruct
from dfqc.compiler.quantize._targets import make_targets
from dfqc.compiler.quantize._units import list_units, merge_blocks
from dfqc.compiler.simulate import simulated

CPU = torch.device("cpu")
IMAGES = models.images(16, seed=9)


def cut(net, ratio=0.3):
    """The original, what stays, and the folded network without the rest."""
    graph = quantized.traced(net)
    inner = {group.name for group in find_groups(graph) if not group.residual}
    keep = {name: rows for name, rows in pruning.draw(graph, ratio).items() if name in inner}
    return graph, keep, fold(remove(graph, keep))


def values(graph, images=IMAGES):
    """Return every tensor of a network by node."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Recorder(graph.module).run(images)
    return found


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "squeeze_excite"])
def test_picked_channels_are_those_that_stay(net):
    """Without restoring, a kept channel of the first changed tensors is the original's itself."""
    graph, keep, pruned = cut(net)
    assert keep
    targets = make_targets(pruned, Pruned(graph, keep), CPU)
    assert targets.picks
    left, exact, found = node_shapes(pruned), values(fold(graph)), values(pruned)
    equal = 0
    for name, rows in targets.picks.items():
        picked = exact[name].index_select(1, rows)
        assert picked.shape == found[name].shape
        equal += torch.allclose(picked, found[name], atol=1e-5)
    assert equal
    differing = {n for n, shape in left.items() if shape != targets.shapes[n]}
    assert differing == set(targets.picks) | targets.unclear
    assert targets.graph.module is not pruned.module


@pytest.mark.parametrize("kind", ["block", "layer"])
@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "squeeze_excite"])
def test_ends_of_units_are_tensors_that_are_understood(net, kind):
    graph, keep, pruned = cut(net)
    targets = make_targets(pruned, Pruned(graph, keep), CPU)
    plan = quantized.plan(pruned, "w4a4")
    blocks = targets.close_blocks(merge_blocks(pruned, set(plan.layers)))
    whole = list_units(pruned, plan, blocks, kind)
    units = targets.close_units(blocks, whole)
    ends = {end for unit in units for end in (unit.entry, unit.exit)}
    assert ends.isdisjoint(targets.unclear)
    layers = [name for unit in units for name in unit.layers]
    assert sorted(layers) == sorted(n for unit in whole for n in unit.layers)
    assert [b.entry for b in blocks[1:]] == [b.exit for b in blocks[:-1]]


def test_without_pruning_the_network_is_its_own_target():
    pruned = quantized.folded("residual")
    targets = make_targets(pruned, None, CPU)
    assert targets.graph is pruned
    assert not targets.picks
    assert not targets.unclear


def reconstruct_pruned(net, unpruned, **options):
    graph, keep, _ = cut(net, 0.5)
    restored = restore(graph, keep, RestoreOptions(method="none"))
    pruned = fold(restored)
    plan = quantized.plan(pruned, "w4a8")
    fields = {"iterations": 40, "batch_size": 8, "tune_iterations": 20, "lr_bias": 1e-2, **options}
    state = reconstruct.quantize(
        *(pruned, quantized.calib(), plan, reconstruct.Options(**fields)),
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        supplies=QuantizerSupplies(
            unfolded=restored, held_out=IMAGES, unpruned=Pruned(graph, keep) if unpruned else None
        ),
    )
    with torch.no_grad():
        wanted = quantized.folded(net).module(IMAGES).double().log_softmax(1)
        found = simulated(pruned, state, integer=False).module(IMAGES).double().log_softmax(1)
    return state, float((wanted.exp() * (wanted - found)).sum(1).mean())


@pytest.mark.parametrize("net", ["plain", "residual"])
@pytest.mark.parametrize("options", [{}, {"unit": "layer", "inputs": "mixed"}], ids=str)
def test_fitting_to_the_original_brings_the_network_nearer_to_it(net, options):
    state, near = reconstruct_pruned(net, unpruned=True, **options)
    _, far = reconstruct_pruned(net, unpruned=False, **options)
    assert near < 0.9 * far
    scores = state.info["heldout_distance"]
    assert state.info["kept"] == min(scores, key=scores.get)


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "squeeze_excite"])
def test_what_caches_hold_of_the_original_is_planned(net, unit, monkeypatch):
    """As `plan` does it: from graphs whose batch norms are not folded."""
    most = [0]

    class Watched(_caches.Budget):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            most[0] = max(most[0], self.used) if name == "used" else most[0]

    monkeypatch.setattr(_passes, "Budget", Watched)
    monkeypatch.setattr(reconstruct, "_CHOOSING", 16)  # all that there are
    chosen = {"unit": unit, "iterations": 2, "tune_iterations": 0, "skip_wide": False, "copies": 1}
    chosen["least_layers"] = 1
    reconstruct_pruned(net, unpruned=True, **chosen)
    graph, keep, _ = cut(net, 0.5)
    asked = reconstruct.Options(**chosen)
    rows = 32 - count_judges(32) + 16
    planned = rows * reconstruct._cached_values(asked, remove(graph, keep), 4, graph)
    assert most[0] <= planned <= 1.6 * most[0]
