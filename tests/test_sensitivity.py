import pytest
import torch
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler import affine, sensitivity
from dfqc.compiler.graph import copy_graph

WIDTHS = (2, 4, 8)
NETS = ("residual", "plain", "depthwise", "concat", "pre_activation")


def measure(net, images, chunks=1, widths=WIDTHS):
    graph = quantized.folded(net)
    plan = quantized.plan(graph, "w8a8")
    rounded = sensitivity.round_weights(graph, plan, widths)
    sums = [
        sensitivity.measure_chunk(graph, plan, rounded, part, device=quantized.CPU)
        for part in images.tensor_split(chunks)
    ]
    return graph, plan, rounded, sensitivity.combine(sums)


def run_whole(graph, plan, name, weight, images):
    """Run the network from the image on with one layer's weight and a bias that undoes its mean.

    A mean over a few positions would be the change itself; that of those stays.
    """
    node = plan.layers[name].node
    exact = outputs(graph, node, images)
    changed = copy_graph(graph)
    layer = changed.module.get_submodule(name)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    moved = outputs(changed, node, images)
    axis = 1 if moved.ndim == 4 else moved.ndim - 1
    mean = (moved - exact).mean([d for d in range(moved.ndim) if d != axis])
    if moved.numel() // len(mean) < sensitivity.MEAN_OF:
        mean = torch.zeros_like(mean)
    bias = torch.zeros(len(mean)) if layer.bias is None else layer.bias.detach()
    layer.bias = torch.nn.Parameter(bias - mean, requires_grad=False)
    with torch.no_grad():
        return changed.module(images)


def outputs(graph, node, images):
    kept = {}
    module = graph.module.get_submodule(
        str(next(n.target for n in graph.module.graph.nodes if n.name == node))
    )
    handle = module.register_forward_hook(lambda m, i, o: kept.update(value=o))
    with torch.no_grad():
        graph.module(images)
    handle.remove()
    return kept["value"]


@pytest.mark.parametrize("net", NETS)
def test_the_tail_gives_what_the_whole_network_gives(net):
    images = models.images(12, seed=4)
    graph, plan, rounded, table = measure(net, images)
    assert list(table) == list(plan.layers)
    with torch.no_grad():
        exact = graph.module(images)
    for name, row in table.items():
        for bits, effect in row.items():
            axis = plan.layers[name].weight.axis
            weight = affine.dequantize_weight(rounded[name][bits], axis)
            output = run_whole(graph, plan, name, weight, images)
            noise = (output - exact).square().sum() / exact.square().sum()
            assert effect.noise == pytest.approx(float(noise), rel=1e-3, abs=1e-9)
            p, q = exact.double().softmax(1), output.double().log_softmax(1)
            kl = F.kl_div(q, p, reduction="batchmean")
            assert effect.kl == pytest.approx(float(kl), rel=1e-2, abs=1e-7)
            same = 100 * (output.argmax(1) == exact.argmax(1)).double().mean()
            assert effect.agreement == pytest.approx(float(same))


def test_fewer_bits_are_noisier_and_every_bit_is_worth_about_six_decibels():
    table = measure("residual", models.images(32), widths=(4, 6, 8))[3]
    for row in table.values():
        assert row[4].noise > row[6].noise > row[8].noise > 0
        assert 8 < row[6].sqnr_db - row[4].sqnr_db < 17
        assert row[8].agreement == 100


def test_chunks_add_up():
    images = models.images(24, seed=2)
    whole, parts = measure("residual", images)[3], measure("residual", images, chunks=2)[3]
    # The mean that bias correction takes is each chunk's own: nearly the same.
    for name, row in whole.items():
        for bits, effect in row.items():
            assert parts[name][bits].noise == pytest.approx(effect.noise, rel=0.25)


def test_the_same_images_give_the_same_table():
    images = models.images(8)
    assert measure("residual", images)[3] == measure("residual", images)[3]


def test_rounded_weights_are_those_of_the_baseline():
    graph = quantized.folded("residual")
    for bits in (3, 4):
        plan = quantized.plan(graph, f"w{bits}a8", ends=f"w{bits}a8")
        rounded = sensitivity.round_weights(graph, plan, (bits,))
        state = quantized.quantize(graph, plan)
        for name, weight in state.weights.items():
            # The baseline may widen a scale to leave room for the bias; here none needs it.
            assert torch.equal(rounded[name][bits].codes, weight.codes)
            assert torch.equal(rounded[name][bits].scale, weight.scale)


def test_images_come_in_chunks_that_fit(monkeypatch):
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w8a8")
    images = models.images(100)
    assert [len(c) for c in sensitivity.choose_chunks(graph, plan, images, WIDTHS)] == [32, 32]
    assert sum(map(len, sensitivity.choose_chunks(graph, plan, images[:5], WIDTHS))) == 5
    monkeypatch.setattr(sensitivity, "CHUNK_BYTES", 1 << 20)
    chunks = sensitivity.choose_chunks(graph, plan, images, WIDTHS)
    assert len(chunks) > 2
    assert sum(map(len, chunks)) == 64
    assert torch.equal(torch.cat(chunks), images[:64])
