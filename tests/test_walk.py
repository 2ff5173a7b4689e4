import numpy as np
import pytest
import torch

import quantized
from dfqc.compiler.quantize._walk import Walk

CPU = torch.device("cpu")


@pytest.mark.parametrize("paired", [False, True])
def test_a_walk_shows_both_networks_inputs(paired):
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    state = quantized.quantize(graph, plan)
    images = quantized.calib(6).images
    shown = {}

    def decide(layer, module, quantized_inputs, floats):
        shown[layer.name] = torch.cat(quantized_inputs), floats and torch.cat(floats)
        return module.weight.detach() * 1, module.bias

    walk = Walk(graph, plan, state.acts, paired=paired, device=CPU)
    walk.run(images, decide, batch=4, deadline=None)
    assert list(shown) == list(plan.layers)
    conv1 = graph.module.get_submodule("conv1")
    with torch.inference_mode():
        first = torch.relu(conv1(images))
    quantized_input, float_input = shown["layer1.conv1"]
    if paired:
        np.testing.assert_allclose(float_input, first, atol=1e-5)
    else:
        assert float_input is None
    grid = state.acts[plan.layers["layer1.conv1"].input]
    codes = quantized_input / grid.scale
    np.testing.assert_allclose(codes, codes.round(), atol=1e-3)
    assert len(codes.round().unique()) <= 16


def test_the_float_network_is_not_touched_by_what_was_decided():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    state = quantized.quantize(graph, plan)
    images = quantized.calib(6).images
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    shown = {}

    def decide(layer, module, _quantized, floats):
        shown[layer.name] = torch.cat(floats)
        return torch.zeros_like(module.weight), None

    Walk(graph, plan, state.acts, paired=True, device=CPU).run(
        images, decide, batch=4, deadline=None
    )
    with torch.inference_mode():
        inputs = []
        hook = graph.module.get_submodule("head.fc").register_forward_hook(
            lambda _m, args, _out: inputs.append(args[0])
        )
        graph.module(images)
        hook.remove()
    np.testing.assert_allclose(shown["head.fc"], inputs[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in graph.module.state_dict().items())


def test_an_image_costs_what_is_alive_at_the_fullest_point():
    graph = quantized.folded("plain")
    plan = quantized.plan(graph, "w4a16")
    # The stem's output (8, 16, 16), and behind it the rectified one.
    single = Walk(graph, plan, {}, paired=False, device=CPU).bytes_per_image
    assert single == 2 * 4 * 8 * 16 * 16
    assert Walk(graph, plan, {}, paired=True, device=CPU).bytes_per_image == 2 * single
