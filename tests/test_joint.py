import math

import pytest
import torch
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler import joint, plugins
from dfqc.compiler.errors import UsageError
from dfqc.compiler.joint import Point, Way
from dfqc.compiler.passes import prune as pruning
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options, restore
from dfqc.compiler.plan import make_plan
from dfqc.compiler.spec import parse_bits

IMAGES = models.images(16, seed=4)


def point(size, distance, *, bits=4, params=1, macs=1, part=0.3):
    return Point("macs", part, bits, size, params, macs, distance)


def plan_at(folded, bits):
    target = plugins.load("target", "ort").TARGET
    return make_plan(folded, target, parse_bits(f"w{bits or 4}a32"), [], ends=None)


def weight_bytes(folded, plan):
    """What the weights alone take at their bits."""
    bits = {name: layer.weight.bits for name, layer in plan.layers.items() if layer.weight}
    sizes = {n: folded.module.get_parameter(f"{n}.weight").numel() for n in bits}
    return sum(bits[name] * sizes[name] for name in bits) // 8


def cut(original, way):
    amount = {"channels": way.part} if way.share == "channels" else {way.share: 1 - way.part}
    decision = pruning.choose(original, pruning.Options(**amount, criterion="restored"))
    return restore(original, decision.keep, Options())


def measured(widths, way=None):
    original = quantized.traced("plain")
    smaller = cut(original, way) if way else original
    functions = (IMAGES, plan_at, weight_bytes)
    return joint.measure(original, smaller, *functions, widths=widths, way=way)


@pytest.fixture(scope="module")
def points():
    ways = (None, Way("channels", 0.3), Way("macs", 0.3))
    return [point for way in ways for point in measured((2, 8), way)]


def test_every_way_and_width_is_a_network_of_its_own(points):
    made = [(None, 0.0), ("channels", 0.3), ("macs", 0.3)]
    assert [(p.share, p.part, p.bits) for p in points] == [
        (*m, bits) for m in made for bits in (2, 8)
    ]
    whole, channels, macs = points[1::2]
    assert channels.params < whole.params
    assert channels.macs < whole.macs
    assert macs.macs <= 0.7 * whole.macs
    assert macs.params != channels.params
    assert [p.bytes for p in points[::2]] == [p.bytes // 4 for p in points[1::2]]
    assert points[1].distance < 1e-2 * points[0].distance  # 8 bits against 2


def test_without_widths_the_plan_says_the_bits():
    (whole,) = measured((None,))
    (expected,) = measured((4,))
    assert whole.bits is None
    assert whole.distance == expected.distance


def test_the_distance_is_the_divergence_of_the_rounded_network(points):
    original = quantized.traced("plain")
    folded = fold(original)
    rounded = joint._round(folded, original, plan_at(folded, 2))
    with torch.no_grad():
        wanted = original.module(IMAGES).double()
        found = rounded.module(IMAGES).double()
    expected = F.kl_div(
        found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert points[0].distance == pytest.approx(float(expected), rel=1e-6)
    for name, layer in plan_at(folded, 2).layers.items():
        values = rounded.module.get_parameter(f"{name}.weight").flatten(1)
        assert layer.weight.bits == 2
        assert max(len(set(row.tolist())) for row in values) <= 4


def test_the_front_is_what_nothing_else_beats():
    given = [point(100, 0.5), point(50, 0.9), point(80, 0.4), point(80, 0.6), point(200, 0.1)]
    front = joint.find_front(given, ["bytes"])
    assert [(p.bytes, p.distance) for p in front] == [(50, 0.9), (80, 0.4), (200, 0.1)]
    marked = joint.to_json(given, {"bytes": 80})
    assert [row["front"] for row in marked] == [False, True, True, False, True]
    assert [row["within"] for row in marked] == [False, True, True, True, False]


def test_the_front_is_of_what_is_limited():
    small, quick = point(10, 0.5, macs=30), point(20, 0.5, macs=10)
    beaten = point(20, 0.6, macs=20)
    given = [small, quick, beaten]
    assert joint.find_front(given, ["bytes"]) == [small]
    assert joint.find_front(given, ["macs"]) == [quick]
    assert joint.find_front(given, ["bytes", "macs"]) == [small, quick]
    near = point(20, 0.4, macs=20)
    assert joint.find_front([*given, near], ["bytes", "macs"]) == [small, quick, near]


def test_no_point_of_a_front_beats_another(points):
    for costs in (["bytes"], ["macs"], ["bytes", "macs"]):
        front = joint.find_front(points, costs)
        ranks = [[*(getattr(p, c) for c in costs), p.distance] for p in points]
        for p, rank in zip(points, ranks, strict=True):
            beaten = any(
                other != rank and all(a <= b for a, b in zip(other, rank, strict=True))
                for other in ranks
            )
            assert (p in front) is not beaten


@pytest.mark.parametrize(("limit", "size"), [(50, 50), (99, 80), (150, 80), (10_000, 200)])
def test_the_nearest_that_fits_is_chosen(limit, size):
    given = [point(100, 0.5), point(50, 0.9), point(80, 0.4), point(200, 0.1)]
    assert joint.choose(given, {"bytes": limit}).bytes == size


def test_all_limits_are_kept():
    given = [point(10, 0.1, macs=30), point(30, 0.2, macs=10), point(20, 0.3, macs=20)]
    assert joint.choose(given, {"bytes": 20}) is given[0]
    assert joint.choose(given, {"macs": 20}) is given[1]
    assert joint.choose(given, {"bytes": 20, "macs": 20}) is given[2]
    with pytest.raises(
        UsageError, match=r"--size \(15\) and --macs \(15\): no network .* 20 bytes, 20"
    ):
        joint.choose(given, {"bytes": 15, "macs": 15})


def test_of_equals_the_least_pruned_is_chosen():
    given = [point(50, 0.5, params=7), point(50, 0.5, params=9)]
    assert joint.choose(given, {"bytes": 60}).params == 9


def test_a_limit_that_nothing_reaches_names_the_smallest():
    given = [point(90, 0.1), point(50, math.inf, part=0.7, bits=2, macs=5)]
    with pytest.raises(UsageError, match=r"--size: 10 bytes .* 50 .*70% of the macs.*w2"):
        joint.choose(given, {"bytes": 10})
    with pytest.raises(UsageError, match=r"--macs: 0 multiply-adds .* 1 .*--prune-residual"):
        joint.choose(given, {"bytes": 90, "macs": 0})
