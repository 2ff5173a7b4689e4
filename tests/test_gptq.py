import dataclasses

import pytest
import torch
from pydantic import ValidationError

import models
import quantized
from dfqc.compiler import affine
from dfqc.compiler.contracts import CalibSet, QuantizerSupplies
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import copy_graph, layer_nodes
from dfqc.compiler.moments import folded_moments
from dfqc.compiler.quantize import gptq, rtn
from dfqc.compiler.quantize._columns import factorize, output_errors
from dfqc.compiler.quantize._hessian import hessian_bytes, measure_moments
from dfqc.compiler.simulate import simulated

CPU = torch.device("cpu")


def quantize(graph, plan, count=32, supplies=None, **options):
    return gptq.quantize(
        graph, quantized.calib(count), plan, gptq.Options(**options),
        rng=torch.Generator(), device=CPU, supplies=supplies or QuantizerSupplies(),
    )  # fmt: skip


def smooth_images(count, seed):
    """Images whose neighbors are alike, as those of natural images are."""
    images = models.images(count, seed=seed)
    return 4 * torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)


def layer_sqnr(graph, state, name):
    """SQNR of one layer's output in the quantized network, on unseen images."""
    outputs = []
    for g in (graph, simulated(graph, state, integer=False)):
        layer = g.module.get_submodule(name)
        hook = layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        with torch.inference_mode():
            g.module(smooth_images(64, 9))
        hook.remove()
    return affine.sqnr_db(*outputs)


@pytest.mark.parametrize(
    ("net", "last"), [("plain", "body.0"), ("residual", "layer2.conv2"), ("depthwise", "project.0")]
)
def test_a_deep_layers_output_is_nearer_than_with_nearest_codes(net, last):
    graph = quantized.folded(net)
    plan = quantized.plan(graph, "w3a8", ends=None)
    calib = CalibSet(smooth_images(64, 1), None, "test")
    rounded = [
        module.quantize(graph, calib, plan, module.Options(), rng=torch.Generator(), device=CPU)
        for module in (rtn, gptq)
    ]
    nearest, compensated = (layer_sqnr(graph, state, last) for state in rounded)
    assert compensated > nearest + 1


@pytest.mark.parametrize("net", ["residual", "depthwise"])
def test_batch_norms_alone_help_too(net):
    graph = quantized.folded(net)
    plan = quantized.plan(graph, "w3a8")
    state = quantize(
        graph, plan, hessian="bn", supplies=QuantizerSupplies(unfolded=quantized.traced(net))
    )
    plain = quantized.quantize(graph, plan)
    assert state.info["rounded_to_nearest"] == []
    assert state.acts == plain.acts
    changed = [n for n in state.weights
               if not torch.equal(state.weights[n].codes, plain.weights[n].codes)]  # fmt: skip
    assert set(changed) >= {p.name for p in plan.layers.values() if p.exported.weight == 3}


def test_bn_needs_the_unfolded_graph():
    graph = quantized.folded("residual")
    with pytest.raises(UsageError, match="hessian=bn needs the model with its batch norms"):
        quantize(graph, quantized.plan(graph), hessian="bn")


@pytest.mark.parametrize(
    "unused",
    [{"asymmetric": False}, {"shift_damping": 0.1}, {"images": 256}, {"norms": 0.5}],
    ids=str,
)
def test_bn_refuses_what_it_would_not_use(unused):
    graph, (name,) = quantized.folded("residual"), unused
    supplies = QuantizerSupplies(unfolded=quantized.traced("residual"))
    with pytest.raises(UsageError, match=f"would not use {name}: leave it out"):
        quantize(graph, quantized.plan(graph), hessian="bn", supplies=supplies, **unused)


def test_layers_that_no_norm_describes_are_named(caplog):
    graph, unfolded = quantized.folded("concat"), quantized.traced("concat")
    plan = quantized.plan(graph, "w4a8")
    supplies = QuantizerSupplies(unfolded=unfolded)
    state = quantize(graph, plan, hessian="bn", supplies=supplies)
    named = state.info["rounded_to_nearest"]
    assert set(named) == set(state.weights) - set(folded_moments(unfolded, graph))
    assert 0 < len(named) < len(state.weights)
    (record,) = [r for r in caplog.records if r.name == gptq.__name__]
    assert record.levelname == "WARNING"
    told = f"{len(named)} of {len(state.weights)} layers rounded to nearest: {', '.join(named)}"
    assert told in record.getMessage()


@pytest.mark.parametrize(
    ("source", "used"), [("genie", True), ("noise/smooth", True), ("images/real.npz", False)]
)
def test_batch_norms_give_their_share_of_the_hessian_of_synthetic_images(monkeypatch, source, used):
    graph, unfolded = quantized.folded("plain"), quantized.traced("plain")
    plan, calib = quantized.plan(graph, "w3a8"), quantized.calib(16)
    known, seen = folded_moments(unfolded, graph), {}
    whole = gptq.blend_moments

    def blend(measured, derived, part):
        mixed = whole(measured, derived, part)
        seen[len(seen)] = (measured, derived, part, mixed)
        return mixed

    monkeypatch.setattr(gptq, "blend_moments", blend)

    def codes(**options):
        state = gptq.quantize(
            graph, dataclasses.replace(calib, source=source), plan, gptq.Options(**options),
            rng=torch.Generator(), device=CPU, supplies=QuantizerSupplies(unfolded=unfolded),
        )  # fmt: skip
        assert state.info.get("layers_with_norms", 0) == len(seen)
        return {name: weight.codes for name, weight in state.weights.items()}

    without = codes(norms=0)
    assert not seen
    found = codes()
    assert len(seen) == (len(known) if used else 0)
    assert used != all(torch.equal(found[name], without[name]) for name in found)
    for measured, derived, part, mixed in seen.values():
        assert part == 0.25
        expected = (1 - part) * measured.quantized + part * derived.quantized
        torch.testing.assert_close(mixed.quantized, expected)
        difference = (1 - part) * (measured.cross - measured.quantized)
        torch.testing.assert_close(mixed.cross - mixed.quantized, difference)
        assert mixed.quantized_mean is measured.quantized_mean


@pytest.mark.parametrize(
    ("net", "source", "why"),
    [("plain", "images/real.npz", "given images count alone"),
     ("no_norm", "noise/smooth", "no batch norms are known")],
)  # fmt: skip
def test_a_share_of_batch_norms_that_would_not_be_used_is_refused(net, source, why):
    graph, calib = quantized.folded(net), dataclasses.replace(quantized.calib(8), source=source)
    with pytest.raises(UsageError, match=f"norms=0.5 would not be used: .*{why}; leave it out"):
        gptq.quantize(
            graph, calib, quantized.plan(graph), gptq.Options(norms=0.5), rng=torch.Generator(),
            device=CPU, supplies=QuantizerSupplies(unfolded=quantized.traced(net)),
        )  # fmt: skip


def layer_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    conv = torch.nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(16, 6, 8, 8, generator=generator).cumsum(3).relu()
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
    return conv, x


PLAIN = {"search": False, "sweeps": 0}


@pytest.mark.parametrize("options", [PLAIN, PLAIN | {"refits": 2}, {}], ids=str)
def test_every_channel_is_at_least_as_good_as_nearest(options):
    conv, x = layer_problem()
    moments = measure_moments(conv, [x], limit=10**6)
    rows = conv.weight.detach().flatten(1)
    scheme = quantized.plan(quantized.folded("plain"), "w4a8").layers["body.0"].weight
    grid = rtn.weight_grid(rows, scheme, "mse")
    chosen = gptq.Options(damping=0.0, **options)
    codes, refitted = gptq.round_weight(rows, moments, grid, None, chosen)
    nearest = affine.round_to_grid(rows, grid, 0)
    patches = torch.nn.functional.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    found, plain = (
        (patches @ (rows.double() - c.double() * s.double()[:, None]).T).square().mean(0)
        for c, s in ((codes, refitted.scale), (nearest.codes, nearest.scale))
    )
    assert (found <= plain * (1 + 1e-6)).all()
    assert found.sum() < 0.7 * plain.sum()
    if options == PLAIN:
        assert torch.equal(refitted.scale, grid.scale)


def layer_grids(bits):
    """A layer's weights, its moments and grid, and the error of what `round_weight` finds."""
    conv, x = layer_problem()
    moments = measure_moments(conv, [x], limit=10**6)
    rows = conv.weight.detach().flatten(1)
    scheme = quantized.plan(quantized.folded("plain"), f"w{bits}a8").layers["body.0"].weight
    grid = rtn.weight_grid(rows, scheme, "mse")

    def errors(least=None, **options):
        chosen = gptq.Options(**options)
        codes, found = gptq.round_weight(rows, moments, grid, least, chosen)
        damped = factorize(moments.quantized, chosen.damping, chosen.order).hessian
        return output_errors(rows, codes, damped, found), found

    return grid, errors


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_search_and_descent_each_lower_the_error_of_the_output(bits):
    grid, errors = layer_grids(bits)
    plain, _ = errors(**PLAIN)
    searched, scales = errors(sweeps=0)
    descended, kept = errors(search=False)
    both, _ = errors()
    for found, share in ((searched, 0.98), (descended, 1.0)):
        assert (found <= plain).all()
        assert found.sum() < share * plain.sum()
    assert (both <= searched).all()
    assert torch.equal(kept.scale, grid.scale)
    assert not torch.equal(scales.scale, grid.scale)
    held, bounded = errors(least=grid.scale)
    assert (bounded.scale >= grid.scale).all()
    assert (held <= plain).all()


def test_eight_bits_are_enough_as_they_are():
    grid, errors = layer_grids(8)
    found, scales = errors()
    assert torch.equal(found, errors(**PLAIN)[0])
    assert torch.equal(scales.scale, grid.scale)


def test_refits_respect_the_smallest_scale():
    conv, x = layer_problem()
    moments = measure_moments(conv, [x], limit=10**6)
    rows = conv.weight.detach().flatten(1)
    scheme = quantized.plan(quantized.folded("plain"), "w4a8").layers["body.0"].weight
    grid = rtn.weight_grid(rows, scheme, "mse")
    _, refitted = gptq.round_weight(rows, moments, grid, grid.scale, gptq.Options(refits=2))
    assert (refitted.scale >= grid.scale).all()


def test_weights_on_the_grid_stay():
    graph = copy_graph(quantized.folded("plain"))
    plan = quantized.plan(graph, "w4a8")
    state = quantized.quantize(graph, plan, weights="minmax")
    for name, layer in plan.layers.items():
        module = graph.module.get_submodule(name)
        real = affine.dequantize_weight(state.weights[name], layer.weight.axis)
        module.weight = torch.nn.Parameter(real, requires_grad=False)
    again = quantize(graph, plan, weights="minmax", asymmetric=False)
    for name, weight in again.weights.items():
        assert torch.equal(weight.codes, state.weights[name].codes)


def test_dead_channels_leave_room_for_their_bias():
    graph = copy_graph(quantized.folded("no_norm"))
    conv = graph.module.get_submodule("conv2")
    conv.weight[:4] *= 1e-12
    conv.bias[:4] = torch.tensor([3.0, -3.0, 1e-3, 0.0])
    plan = quantized.plan(graph, "w4a8", ends=None)
    state = quantize(graph, plan)
    weight, grid = state.weights["conv2"], state.acts[plan.layers["conv2"].input]
    codes = affine.bias_codes(conv.bias, grid.scale, weight.scale)
    assert codes.abs().max() <= affine.BIAS_LIMIT * (1 + 1e-6)


def test_batches_and_calls_do_not_change_the_result():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    first, second = quantize(graph, plan), quantize(graph, plan)
    for name, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[name].codes)
        assert torch.equal(weight.scale, second.weights[name].scale)
    assert all(torch.equal(before[k], v) for k, v in graph.module.state_dict().items())
    assert all(torch.equal(first.biases[n], graph.module.get_submodule(n).bias)
               for n in first.biases)  # fmt: skip


def test_memory_bounds_the_images():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    state = quantize(graph, plan, supplies=QuantizerSupplies(memory_bytes=3 << 20))
    assert 1 <= state.info["images"] < 32
    assert quantize(graph, plan, images=5).info["images"] == 5


@pytest.mark.parametrize("hessian", ["images", "bn"])
def test_without_time_the_rest_is_rounded_to_nearest(hessian):
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    supplies = QuantizerSupplies(unfolded=quantized.traced("residual"), seconds=0.0)
    state = quantize(graph, plan, supplies=supplies, hessian=hessian)
    plain = quantized.quantize(graph, plan)
    assert state.info["shortened"]
    assert state.info["rounded_to_nearest"] == list(plan.layers)
    for name, weight in state.weights.items():
        assert torch.equal(weight.codes, plain.weights[name].codes)


def test_progress_counts_the_layers():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    seen = []
    gptq.quantize(
        graph, quantized.calib(8), plan, gptq.Options(), rng=torch.Generator(), device=CPU,
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    count = len(plan.layers)
    assert [s for s in seen if s[2] == "rounding"] == [
        (i + 1, count, "rounding") for i in range(count)
    ]


@pytest.mark.parametrize(
    "wrong", [{"damping": -1}, {"images": 0}, {"order": "best"}, {"unknown": 1}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        gptq.Options(**wrong)


def test_a_hessian_that_does_not_fit_is_not_made_and_the_layer_is_named():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a8")
    sizes = {n: hessian_bytes(graph.module.get_submodule(n)) for n in plan.layers}
    largest = max(sizes.values())
    assert 0 < sum(size == largest for size in sizes.values()) < len(sizes)
    state = gptq.quantize(
        *(graph, quantized.calib(), plan, gptq.Options()),
        rng=torch.Generator(),
        device=torch.device("cpu"),
        supplies=QuantizerSupplies(memory_bytes=2 * largest - 2),
    )
    wanted = [name for name, size in sizes.items() if size == largest]
    assert state.info["rounded_to_nearest"] == wanted
    nearest = quantized.quantize(graph, plan)
    assert torch.equal(state.weights[wanted[0]].codes, nearest.weights[wanted[0]].codes)


def test_the_largest_hessian_is_counted():
    graph = quantized.folded("residual")
    layers = [graph.module.get_submodule(name) for name, _ in layer_nodes(graph)]
    largest = max(hessian_bytes(layer) for layer in layers)
    assert gptq.count_bytes(gptq.Options(), graph, 1) >= largest > 0
