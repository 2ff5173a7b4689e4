import math

import pytest
import torch
from torch.nn import functional as F

import models
import quantized
from dfqc.compiler import joint, plugins
from dfqc.compiler.errors import UsageError
from dfqc.compiler.joint import Point
from dfqc.compiler.passes import prune as pruning
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.restore import Options, restore
from dfqc.compiler.plan import make_plan
from dfqc.compiler.spec import parse_bits

IMAGES = models.images(16, seed=4)


def point(size, distance, part=0.0, bits=4):
    return Point(part, bits, size, 1, 1, distance)


def plan_at(folded, bits):
    target = plugins.load("target", "ort").TARGET
    return make_plan(folded, target, parse_bits(f"w{bits}a32"), [], ends=None)


def weight_bytes(folded, plan):
    """What the weights alone take at their bits."""
    bits = {name: layer.weight.bits for name, layer in plan.layers.items() if layer.weight}
    sizes = {n: folded.module.get_parameter(f"{n}.weight").numel() for n in bits}
    return sum(bits[name] * sizes[name] for name in bits) // 8


def cut(original):
    def smaller(part):
        if part > 0.5:
            return None
        decision = pruning.choose(original, pruning.Options(channels=part, criterion="restored"))
        return restore(original, decision.keep, Options())

    return smaller


@pytest.fixture(scope="module")
def points():
    original = quantized.traced("plain")
    arguments = (original, IMAGES, cut(original), plan_at, weight_bytes)
    return joint.measure(*arguments, widths=(2, 8), parts=(0.0, 0.3, 0.9))


def test_every_part_and_width_is_a_network_of_its_own(points):
    assert [(p.part, p.bits) for p in points] == [(0.0, 2), (0.0, 8), (0.3, 2), (0.3, 8)]
    whole, smaller = points[1], points[3]
    assert smaller.params < whole.params
    assert smaller.macs < whole.macs
    assert [p.bytes for p in points[::2]] == [p.bytes // 4 for p in points[1::2]]
    assert points[1].distance < 1e-2 * points[0].distance  # 8 bits against 2


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
    front = joint.find_front(given)
    assert [(p.bytes, p.distance) for p in front] == [(50, 0.9), (80, 0.4), (200, 0.1)]
    marked = joint.to_json(given)
    assert [row["front"] for row in marked] == [False, True, True, False, True]


@pytest.mark.parametrize(("limit", "size"), [(50, 50), (99, 80), (150, 80), (10_000, 200)])
def test_the_nearest_that_fits_is_chosen(limit, size):
    given = [point(100, 0.5), point(50, 0.9), point(80, 0.4), point(200, 0.1)]
    assert joint.choose(given, limit).bytes == size


def test_of_equals_the_least_pruned_is_chosen():
    assert joint.choose([point(50, 0.5, 0.3), point(50, 0.5, 0.1)], 60).part == 0.1


def test_a_limit_that_nothing_reaches_names_the_smallest():
    with pytest.raises(UsageError, match=r"--size: 10 bytes .* 50 .*70% of the channels.*w2"):
        joint.choose([point(90, 0.1), point(50, math.inf, 0.7, 2)], 10)
