import pytest
import torch
from pydantic import ValidationError

from classifiers import trained
from dfqc.calib import genie, noise
from dfqc.calib._generator import Generator
from dfqc.calib._pixels import Z_HIGH, Z_LOW, pixel_map
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.contracts import CalibSet, Supplies
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph
from dfqc.compiler.steps import Steps
from models import IMAGE, build, trace_tiny

CPU = torch.device("cpu")
QUICK = {"iterations": 30, "batch_size": 16, "channels": 16}
PUBLISHED = {**genie.PRESETS["max"], **QUICK}


def make(
    graph: Graph, count: int = 16, seed: int = 0, progress=None, supplies=None, **options: object
) -> CalibSet:
    rng = torch.Generator().manual_seed(seed)
    more = {} if progress is None else {"progress": progress}
    settings = genie.Options(**(QUICK | options))
    return genie.synthesize(
        graph, count, settings, rng=rng, device=CPU, supplies=supplies or Supplies(), **more
    )


def mean_distance(graph: Graph, images: torch.Tensor) -> float:
    distances = bn_distance(graph, images).values()
    return sum(distances) / len(distances)


def noise_distance(graph: Graph, kind: str) -> float:
    rng = torch.Generator().manual_seed(0)
    options = noise.Options(kind=kind)
    return mean_distance(graph, noise.synthesize(graph, 16, options, rng=rng, device=CPU).images)


@pytest.mark.parametrize("net", ["residual", "depthwise", "plain"])
def test_images_match_the_batch_norms_better_than_noise(net):
    graph = trained(net)
    calib = make(graph, iterations=60)
    assert (calib.images.shape, calib.images.dtype) == ((16, 3, 16, 16), torch.float32)
    assert calib.images.is_contiguous()
    assert not calib.images.requires_grad
    assert (calib.labels, calib.source, calib.carry) == (None, "genie", {})
    best = min(noise_distance(graph, kind) for kind in ("gaussian", "pink"))
    assert mean_distance(graph, calib.images) < 0.6 * best
    assert calib.info["loss"] < 0.3 * calib.info["first_loss"]


@pytest.mark.parametrize(
    "options",
    [PUBLISHED, {"loss": "relative"}, {"swing": False}, {"clip": False}, {"squash": "tanh"}],
    ids=["published", "relative", "no swing", "no clip", "tanh"],
)
def test_every_option_makes_the_loss_fall(options):
    info = make(trained("residual"), **options).info
    assert info["loss"] < 0.5 * info["first_loss"]


def reference_loss(z: torch.Tensor) -> float:
    """Compute the published formula in float64 with hooks on the net's own batch norms."""
    net = build("residual").double()
    total = 0.0

    def add(norm, args):
        nonlocal total
        (x,) = args
        std, mean = torch.std_mean(x, (0, 2, 3))  # divisor n - 1
        wanted = torch.sqrt(norm.running_var + 1e-6)
        errors = (mean - norm.running_mean).square() + (std - wanted).square()
        total += float(errors.mean())

    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.register_forward_pre_hook(add)
    z = z.double()
    std, mean = torch.std_mean(z, (2, 3))
    total += float((mean.square() + (std - 1).square()).sum(1).mean())
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (IMAGE.mean, IMAGE.std)
    )
    with torch.no_grad():
        net((z * 0.225 + 0.45 - mean) / std)
    return total


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("clip", [True, False])
def test_the_loss_is_the_published_formula(count, clip):
    z = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 1.5 + 0.3
    options = genie.Options(swing=False, clip=clip)
    rng = torch.Generator().manual_seed(0)
    loss = genie.make_loss(trace_tiny("residual"), count, options, rng=rng, device=CPU)
    expected = reference_loss(z.clamp(Z_LOW, Z_HIGH) if clip else z)
    assert float(loss(z)) == pytest.approx(expected, rel=1e-4)


def test_swinging_draws_a_new_shift_at_every_call():
    z = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def losses(graph: Graph, swing: bool) -> set[float]:
        rng = torch.Generator().manual_seed(0)
        loss = genie.make_loss(graph, 4, genie.Options(swing=swing), rng=rng, device=CPU)
        return {float(loss(z)) for _ in range(8)}

    assert len(losses(trace_tiny("residual"), swing=True)) > 2
    assert len(losses(trace_tiny("residual"), swing=False)) == 1
    assert len(losses(trace_tiny("depthwise"), swing=True)) == 1  # has no strides


def rates_of(options: genie.Options, losses: list[float]) -> list[tuple[float, float]]:
    """Return the rates of (latents, generator) in every iteration, given the losses."""
    generator = Generator((3, 8, 8), torch.Generator().manual_seed(0), channels=2)
    rates = genie._Rates(generator, torch.zeros(1, requires_grad=True), options)
    found = []
    for i in (steps := Steps(len(losses))):
        rates.plan(steps)
        found.append(tuple(o.param_groups[0]["lr"] for o in (rates.latents, rates.generator)))
        rates.learn_of([losses[i]])
    return found


def test_published_schedules_are_exact():
    options = genie.Options(**genie.PRESETS["max"])
    assert (options.iterations, options.batch_size, options.channels) == (4000, 128, 128)
    assert (options.squash, options.loss, options.swing) == ("tanh", "std", True)
    assert (options.beta1, options.beta2) == (0.9, 0.999)
    # Falls 300 times, then never: 101 bad iterations in a row divide the latents' rate by 10.
    latents, generator = zip(
        *rates_of(options, [0.99**i for i in range(300)] + [1.0] * 3700), strict=True
    )
    assert generator == pytest.approx([0.01 * 0.95 ** (i // 100) for i in range(4000)])
    expected = [0.1] * 401 + [0.01] * 101 + [0.001] * 101 + [1e-4] * 3397
    assert latents == pytest.approx(expected)


def test_a_shorter_run_goes_through_the_whole_published_schedule():
    options = genie.Options(**genie.PRESETS["max"])
    latents, generator = zip(*rates_of(options, [1.0] * 400), strict=True)
    assert generator == pytest.approx([0.01 * 0.95 ** (i // 10) for i in range(400)])
    # The first loss is the best; after it, 11 bad ones are more than the patience of 10.
    assert latents[:25] == pytest.approx([0.1] * 12 + [0.01] * 11 + [0.001] * 2)


def test_annealing_holds_both_rates_then_lowers_them():
    options = genie.Options(latent_lr=1.0, generator_lr=0.5)
    found = rates_of(options, [1.0] * 10)
    expected = [1.0] * 6 + [0.8, 0.6, 0.4, 0.2]
    assert [r for r, _ in found] == pytest.approx(expected)
    assert [r for _, r in found] == pytest.approx([0.5 * e for e in expected])


def test_a_warm_generator_starts_where_the_last_one_ended():
    graph = trained("residual")
    first = make(graph, generator="warm")
    assert all(t.device == CPU and not t.requires_grad for t in first.carry.values())
    again = make(graph, seed=1, generator="warm", supplies=Supplies(carry=first.carry))
    fresh = make(graph, seed=1, generator="warm")
    assert (first.info["warm"], again.info["warm"], fresh.info["warm"]) == (False, True, False)
    assert (again.info["iterations"], fresh.info["iterations"]) == (15, 30)
    assert again.info["first_loss"] < 0.8 * fresh.info["first_loss"]
    assert set(again.carry) == set(first.carry)
    assert not torch.equal(again.carry["linear.weight"], first.carry["linear.weight"])
    assert not torch.equal(again.images, first.images)
    ignored = make(graph, seed=1, supplies=Supplies(carry=first.carry))
    assert torch.equal(ignored.images, fresh.images)


def test_a_seed_decides_every_bit_and_torchs_own_is_left_alone():
    graph = trained("residual")
    before = torch.random.get_rng_state()
    first = make(graph, seed=5, iterations=5).images
    assert torch.equal(make(graph, seed=5, iterations=5).images, first)
    assert not torch.equal(make(graph, seed=6, iterations=5).images, first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clip_keeps_pixels_real():
    graph = trained("residual")
    pixels = pixel_map(graph.image, CPU)
    free, clipped = (pixels.to_z(make(graph, clip=clip).images) for clip in (False, True))
    assert ((free < Z_LOW) | (free > Z_HIGH)).float().mean() > 0.001
    assert clipped.min() > Z_LOW - 1e-4
    assert clipped.max() < Z_HIGH + 1e-4


def test_limited_seconds_mean_fewer_iterations():
    calib = make(trained("residual"), iterations=10**6, supplies=Supplies(seconds=0.3))
    assert calib.info["shortened"]
    assert 1 <= calib.info["iterations"] < 10**5
    assert not make(trained("residual"), iterations=2).info["shortened"]


def test_the_graph_is_left_as_it_was():
    graph = trained("residual")
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    make(graph, iterations=2)
    assert all(torch.equal(before[n], v) for n, v in graph.module.state_dict().items())
    assert not graph.module.training


def test_progress_ends_at_the_total():
    seen = []
    make(trained("residual"), iterations=3, progress=lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0][2].startswith("loss ")


@pytest.mark.parametrize("name", ["quick", "standard", "max"])
def test_presets_are_options(name):
    options = genie.Options(**genie.PRESETS[name])
    assert genie.count_passes(options, (3, 32, 32), 1) == options.iterations


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"latent_lr": 0}, {"beta2": 1}, {"warm_share": 2}, {"lr": 0.1}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        genie.Options(**wrong)


def test_a_net_without_batch_norm_is_refused():
    with pytest.raises(UnsupportedError, match="no batch norm"):
        make(trace_tiny("no_norm"))
