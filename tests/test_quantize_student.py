import pytest
import torch
from torch import nn

import models
import quantized
from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams, WeightGrid
from dfqc.compiler.graph import blocks, copy_graph
from dfqc.compiler.quantize._latent import LatentGrid, LatentWeight
from dfqc.compiler.quantize._rounding import Units
from dfqc.compiler.quantize._student import Student, StudentOptions
from dfqc.compiler.simulate import simulated
from dfqc.compiler.spec import QScheme

CPU = torch.device("cpu")
IMAGES = models.images(8, seed=3)
KINDS = [
    {},
    {"relative": True},
    {"latent": "float"},
    {"per_tensor": True},
    {"weight_grid": "minmax", "act_grid": "ema", "latent": "float"},
    {"weight_grid": "minmax", "act_grid": "fixed", "per_tensor": True},
]


def start(net="residual", bits="w3a3", *rules):
    graph = quantized.folded(net)
    return graph, quantized.quantize(graph, quantized.plan(graph, bits, *rules))


def student_of(graph, state, **options):
    return Student(graph, state, StudentOptions(**options), device=CPU)


def train(student, steps=6, rate=2e-3):
    wanted = student.features(IMAGES)[0].detach().flip(0)
    rates = dict.fromkeys(("weights", "weight_scales", "act_scales", "biases"), rate)
    optimizer = torch.optim.Adam(student.parameter_groups(**rates))
    student.observe(True)
    for _ in range(steps):
        (student(IMAGES) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        student.hold()
    student.observe(False)
    return student


def outputs(graph, state):
    with torch.no_grad():
        return simulated(graph, state, integer=False).module(IMAGES)


@pytest.mark.parametrize("bits", ["w3a3", "w4a4", "w2a16"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_student_and_simulation_of_its_state_are_equal(bits, options):
    graph, state = start(bits=bits)
    student = student_of(graph, state, **options)
    before = outputs(graph, student.state())
    train(student)
    found = student.state()
    with torch.no_grad():
        assert torch.equal(student(IMAGES), outputs(graph, found))
        torch.testing.assert_close(student(IMAGES), student.features(IMAGES)[0], rtol=0, atol=0)
    with_gradients = student(IMAGES).detach()  # the same codes, divided in another order
    torch.testing.assert_close(with_gradients, outputs(graph, found), rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, outputs(graph, found))


@pytest.mark.parametrize("net", ["plain", "depthwise", "concat", "squeeze_excite", "grouped"])
def test_every_structure_begins_at_its_start(net):
    graph, state = start(net, "w4a4")
    for relative in (False, True):
        student = student_of(graph, state, relative=relative)
        found = student.state()
        assert all(torch.equal(w.codes, state.weights[n].codes) for n, w in found.weights.items())
        assert found.acts == state.acts
        with torch.no_grad():
            assert torch.equal(student(IMAGES), outputs(graph, state))


@pytest.mark.parametrize("net", ["plain", "depthwise", "concat"])
def test_every_code_and_grid_is_one_that_the_plan_allows(net):
    graph, state = start(net, "w2a4")
    for options in KINDS:
        found = train(student_of(graph, state, **options)).state()
        for name, weight in found.weights.items():
            scheme = state.plan.layers[name].weight
            rows = weight.codes.flatten(1).int()
            assert rows.min() >= scheme.quant_min
            assert rows.max() <= scheme.quant_max
            spread = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
            assert (spread < scheme.levels).all()
            assert weight.scale.shape == (len(weight.codes),)
            assert (weight.scale > 0).all()
            assert (len(set(weight.scale.tolist())) == 1) or not options.get("per_tensor")
        assert list(found.acts) == list(state.plan.quantizers)


def test_gradients_are_those_of_lsq():
    torch.manual_seed(0)
    layer = nn.Linear(50, 4)
    scale = layer.weight.detach().abs().amax(1) / 5
    grid = WeightGrid(scale, torch.tensor([-4.0, -4, -7, 0]), 8)
    ones = torch.ones(4)
    module = LatentWeight(layer, grid, Units(ones, ones), None)
    module.scale_ratio.requires_grad_(True)
    up = torch.randn(4, 50)
    module(torch.eye(50)).backward(up.t())
    position = layer.weight.detach().double() / scale.double()[:, None]
    low = grid.low.double()[:, None]
    inside = (position >= low) & (position <= low + 7)
    slope = torch.where(inside, position.round() - position, position.clamp(low, low + 7))
    wanted = (up.double() * slope).sum(1) / (50 * 3) ** 0.5
    torch.testing.assert_close(module.latent.grad.double(), (up * inside).double())
    torch.testing.assert_close(
        module.scale_ratio.grad.double().flatten(), wanted, rtol=1e-4, atol=1e-5
    )


def test_the_gradient_of_an_activation_step_is_divided_as_in_lsq():
    scheme = QScheme(3, signed=False, symmetric=False)
    x = torch.randn(5, 20)
    grids = [LatentGrid(QParams(0.2, 2), scheme, CPU, kind="learned", relative=False)]
    grids.append(LatentGrid(QParams(0.2, 2), scheme, CPU, kind="learned", relative=True))
    for grid in grids:
        grid.ratio.requires_grad_(True)
        grid(x).sum().backward()
    code = (x / 0.2).clamp(-2, 5)
    slope = torch.where(code == x / 0.2, code.round() - x / 0.2, code.round())
    wanted = slope.sum() / (20 * 7) ** 0.5
    torch.testing.assert_close(grids[0].ratio.grad, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grids[1].ratio.grad, wanted * 0.2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_following_grid_is_the_exponential_mean_of_what_it_saw(symmetric):
    scheme = QScheme(4, signed=symmetric, symmetric=symmetric)
    grid = LatentGrid(QParams(1.0, 0), scheme, CPU, kind="ema", relative=True, decay=0.75)
    batches = [torch.randn(3, 7) * (i + 1) for i in range(9)]
    grid(batches[0])
    assert grid.qparams() == QParams(1.0, 0)  # nobody asked it to follow
    grid.observe(True)
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches:
        low = 0.75 * low + 0.25 * float(batch.min())
        high = 0.75 * high + 0.25 * float(batch.max())
        grid(batch)
    wanted = affine.affine_qparams(low, high, scheme)
    found = grid.qparams()
    assert found.scale == pytest.approx(wanted.scale, rel=1e-6)
    assert found.zero_point == wanted.zero_point
    grid.observe(False)
    grid(100 * batches[0])
    assert grid.qparams() == found


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.0, 5.0), (0.0, 0.0), (-2.0, -1.0), (1.0, 2.0)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_a_grid_of_tensors_is_the_grid_of_numbers(bounds, symmetric, signed):
    scheme = QScheme(5, signed=signed, symmetric=symmetric)
    wanted = affine.affine_qparams(*bounds, scheme)
    scale, zero = affine.moving_grid(*torch.tensor(bounds).double(), scheme)
    assert QParams(float(scale), int(zero)) == wanted


def test_biases_are_snapped_as_the_file_has_them():
    bias, scale = torch.randn(6), torch.rand(6) + 0.1
    codes = affine.bias_codes(bias, 0.3, scale)
    found = affine.snap_bias(bias, torch.tensor(0.3), scale)
    assert torch.equal(found, codes.float() * affine.bias_scale(0.3, scale))


def test_pruned_weights_stay_zero():
    graph = copy_graph(quantized.folded("residual"))
    module = graph.module.get_submodule("layer1.conv1")
    gone = torch.rand_like(module.weight) < 0.5
    with torch.no_grad():
        module.weight[gone] = 0
    state = quantized.quantize(graph, quantized.plan(graph, "w3a4"))
    for options in KINDS:
        found = train(student_of(graph, state, **options), rate=2e-2).state()
        codes = found.weights["layer1.conv1"].codes
        assert (codes[gone] == 0).all()
        assert codes[~gone].count_nonzero() > 0


def test_features_are_the_outputs_of_the_blocks():
    graph, state = start("residual", "w32a32")
    student = student_of(graph, state)
    logits, found = student.features(IMAGES)
    exits = [block.exit for block in blocks(graph)]
    assert student.exits == tuple(exits)
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Recorder(graph.module).run(IMAGES)
    assert len(found) == len(exits)
    for name, value in zip(exits, found, strict=True):
        torch.testing.assert_close(value, values[name])
    torch.testing.assert_close(logits, graph.module(IMAGES))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_snapshot_brings_everything_back(options):
    graph, state = start()
    student = train(student_of(graph, state, **options))
    saved, wanted = student.snapshot(), student.state()
    train(student, rate=5e-3)
    other = student_of(graph, state, **options)
    for one in (student, other):
        one.restore(saved)
        found = one.state()
        assert found.acts == wanted.acts
        for name, weight in wanted.weights.items():
            assert torch.equal(found.weights[name].codes, weight.codes)
            assert torch.equal(found.weights[name].scale, weight.scale)
        assert all(torch.equal(found.biases[n], b) for n, b in wanted.biases.items())


def test_groups_leave_out_what_is_not_learned():
    graph, state = start(bits="w3a8")
    groups = student_of(graph, state).parameter_groups(
        weights=0.1, weight_scales=0.2, act_scales=0.3, biases=0.0, decay=0.5
    )
    # Activations of 8 bits keep their steps, and rates of 0 leave out the biases.
    assert [group["name"] for group in groups] == ["weights", "weight_scales"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    groups = student_of(graph, state, weight_grid="minmax").parameter_groups(
        weights=0.1, weight_scales=0.2, biases=0.1
    )
    assert [group["name"] for group in groups] == ["weights", "biases"]


def test_a_bias_that_outgrows_its_grid_makes_room():
    graph, state = start()
    student = student_of(graph, state)
    layer = student.layers["conv1"]
    with torch.no_grad():
        layer.bias_ratio[0] = 3e6
        layer.scale_ratio[0] = 1e-6
    found = student.state()
    with torch.no_grad():
        assert torch.equal(student(IMAGES), outputs(graph, found))  # refuses what overflows
