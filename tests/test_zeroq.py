import functools

import pytest
import torch
from pydantic import ValidationError

from dfqc.calib import noise, zeroq
from dfqc.calib._pixels import Z_HIGH, Z_LOW, pixel_map
from dfqc.compiler import steps as _steps
from dfqc.compiler.calib_quality import bn_distance
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph
from dfqc.compiler.steps import Steps
from models import IMAGE, build, trace_module, trace_tiny

CPU = torch.device("cpu")
QUICK = {"iterations": 30, "batch_size": 16}


@functools.cache
def trained(name: str) -> Graph:
    """Trace a tiny net whose batch norms hold the statistics of some images, so can be matched."""
    net = build(name)
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
    rng = torch.Generator().manual_seed(9)
    blobs = torch.randn(64, 3, 4, 4, generator=rng) + 0.5 * torch.randn(64, 1, 1, 1, generator=rng)
    net.train()(torch.nn.functional.interpolate(blobs, IMAGE.size[1:], mode="bilinear"))
    return trace_module(net)


def make(graph: Graph, count: int = 16, seed: int = 0, progress=None, **options: object):
    rng = torch.Generator().manual_seed(seed)
    more = {} if progress is None else {"progress": progress}
    settings = zeroq.Options(**(QUICK | options))
    return zeroq.synthesize(graph, count, settings, rng=rng, device=CPU, **more)


def mean_distance(graph: Graph, images: torch.Tensor) -> float:
    distances = bn_distance(graph, images).values()
    return sum(distances) / len(distances)


def noise_distance(graph: Graph, kind: str = "gaussian") -> float:
    rng = torch.Generator().manual_seed(0)
    calib = noise.synthesize(graph, 16, noise.Options(kind=kind), rng=rng, device=CPU)
    return mean_distance(graph, calib.images)


@pytest.mark.parametrize(
    "net", ["residual", "depthwise", "concat", "linear_norm", "pre_activation"]
)
def test_images_match_the_batch_norms_far_better_than_noise(net):
    graph = trained(net)
    calib = make(graph, iterations=60)
    assert (calib.images.shape, calib.images.dtype) == ((16, 3, 16, 16), torch.float32)
    assert calib.images.is_contiguous()
    assert not calib.images.requires_grad
    assert (calib.labels, calib.source) == (None, "zeroq")
    best = min(noise_distance(graph), noise_distance(graph, "pink"))
    assert mean_distance(graph, calib.images) < 0.5 * best
    assert calib.info["loss"] < 0.3 * calib.info["first_loss"]


@pytest.mark.parametrize(
    "options",
    [
        {
            "statistic": "per_image",
            "loss": "std",
            "init": "gaussian",
            "schedule": "plateau",
            "lr": 0.5,
        },
        {"loss": "kl"},
        {"init": "gaussian"},
        {"clip": True},
    ],
    ids=["published", "kl", "gaussian", "clip"],
)
def test_every_option_makes_the_loss_fall(options):
    graph = trained("residual")
    calib = make(graph, **options)
    assert calib.info["loss"] < 0.5 * calib.info["first_loss"]
    assert mean_distance(graph, calib.images) < noise_distance(graph)


def test_a_seed_decides_every_bit():
    graph = trained("residual")
    first = make(graph, seed=5).images
    assert torch.equal(make(graph, seed=5).images, first)
    assert not torch.equal(make(graph, seed=6).images, first)


def test_clip_keeps_pixels_real():
    graph = trained("residual")
    pixels = pixel_map(graph.image, CPU)
    free, clipped = (pixels.to_z(make(graph, clip=clip).images) for clip in (False, True))
    assert ((free < Z_LOW) | (free > Z_HIGH)).float().mean() > 0.001
    assert clipped.min() > Z_LOW - 1e-4
    assert clipped.max() < Z_HIGH + 1e-4


def test_per_image_moments_make_every_image_match():
    """Matching the batch leaves the images free to differ; matching each does not."""
    graph = trained("residual")
    spread = []
    for statistic in ("batch", "per_image"):
        images = make(graph, iterations=60, statistic=statistic).images
        means = pixel_map(graph.image, CPU).to_z(images).mean((2, 3))
        spread.append(float(means.std(0).mean()))
    assert spread[1] < 0.5 * spread[0]


def test_the_graph_is_left_as_it_was():
    graph = trained("residual")
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    make(graph, iterations=2)
    assert all(torch.equal(before[n], v) for n, v in graph.module.state_dict().items())
    assert not graph.module.training


def test_progress_ends_at_the_total():
    seen = []
    make(trained("residual"), iterations=4, progress=lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[0][2].startswith("loss ")


@pytest.mark.parametrize("schedule", ["anneal", "plateau"])
def test_a_flat_loss_ends_it_early(schedule):
    graph, seen = trained("residual"), []
    # Steps are too small to matter, so the loss is flat from the first iteration on.
    still = {"lr": 1e-12 if schedule == "anneal" else 1e-4, "schedule": schedule}
    calib = make(graph, iterations=100, patience=10, progress=lambda *r: seen.append(r), **still)
    # 1 + 10 iterations without a gain; then annealing goes through its 50.
    assert calib.info["iterations"] == (61 if schedule == "anneal" else 11)
    assert seen[-1][:2] == (100, 100)
    patient = make(graph, iterations=70, patience=0, **still)
    assert patient.info["iterations"] == 70


def rates(options: zeroq.Options, losses: list[float]) -> list[float]:
    """Return the learning rate of every iteration, given the losses."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=options.lr)
    steps = Steps(options.iterations)
    schedule = zeroq._Anneal(optimizer, options, steps)
    found = []
    for place in steps:
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step([losses[place]])
    return found


def test_annealing_holds_then_falls_to_zero():
    falling = [0.9**i for i in range(20)]
    options = zeroq.Options(iterations=10, lr=1.0, patience=3)
    expected = [1.0] * 5 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates(options, falling) == pytest.approx(expected)
    assert rates(zeroq.Options(iterations=1, lr=1.0), falling) == [1.0]
    # Flat after the third: it turns 3 iterations later, and the fall is as long as ever.
    flat = [1.0, 0.9, 0.8] + [0.799] * 30
    options = zeroq.Options(iterations=20, lr=1.0, patience=3)
    assert rates(options, flat) == pytest.approx([1.0] * 6 + [k / 11 for k in range(10, 0, -1)])


@pytest.mark.parametrize("name", zeroq.PRESETS)
def test_presets_are_options(name):
    assert zeroq.Options(**zeroq.PRESETS[name]).iterations >= 1
    assert set(zeroq.PRESETS) == {"quick", "standard", "max"}


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"lr": 0}, {"loss": "l3"}, {"iteration": 5}, {"patience": -1}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        zeroq.Options(**wrong)


def test_a_net_without_batch_norm_is_refused():
    with pytest.raises(UnsupportedError, match=r"need it: .*zeroq; that do not: images, noise"):
        make(trace_tiny("no_norm"))


def test_reading_the_loss_seldom_changes_no_image(monkeypatch):
    """As on an accelerator, where each read makes the host wait."""
    graph, seen = trained("residual"), []
    often = make(graph, iterations=25)

    reads = _steps.Losses.__init__

    def seldom_reading(self, steps, device):
        reads(self, steps, device)
        self._every = _steps._READ_EVERY

    monkeypatch.setattr(_steps.Losses, "__init__", seldom_reading)
    seldom = make(graph, iterations=25, progress=lambda *report: seen.append(report[0]))
    assert torch.equal(often.images, seldom.images)
    assert seen == [1, 2, 3, 13, 23, 25]
