import itertools

import numpy as np
import pytest

import quantized
from dfqc.backends import ort, trt
from dfqc.compiler.allocate import (
    IMAGES,
    WIDTHS,
    Effect,
    Option,
    choose,
    free_layers,
    images_for,
    table_from_json,
    table_to_json,
    total,
    widths,
)
from dfqc.compiler.errors import UsageError
from dfqc.compiler.spec import Bits, parse_rule


def random_options(seed, layers=5, widths=(2, 3, 4, 8)):
    """Errors that fall with the bits, by about a factor of four a bit, and costs like weights'."""
    rng = np.random.default_rng(seed)
    options = {}
    for index in range(layers):
        count, scale = int(rng.integers(1, 60)), float(rng.uniform(0.1, 10))
        errors = sorted((scale * 4.0**-b * rng.uniform(0.5, 2) for b in widths), reverse=True)
        options[f"layer{index}"] = [
            Option(b, b * count, e) for b, e in zip(widths, errors, strict=True)
        ]
    return options


def brute_force(options, budget):
    best = np.inf
    for picks in itertools.product(*options.values()):
        if sum(p.cost for p in picks) <= budget:
            best = min(best, sum(p.error for p in picks))
    return best


def ends_of(options):
    return (sum(f(o.cost for o in found) for found in options.values()) for f in (min, max))


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_better(seed):
    options = random_options(seed)
    least, most = ends_of(options)
    for budget in np.linspace(least, most, 23).astype(int):
        cost, error = total(options, choose(options, int(budget)))
        assert cost <= budget
        assert error == pytest.approx(brute_force(options, budget), rel=1e-12)


def test_more_budget_is_never_worse_also_where_costs_are_rounded():
    # Prime counts have no common divisor, and their range is far beyond the steps of the solver.
    counts = (999_983, 1_299_709, 15_485_863, 32_452_843)
    rng = np.random.default_rng(3)
    options = {
        str(c): [Option(b, b * c, float(4.0**-b * s)) for b in WIDTHS]
        for c, s in zip(counts, rng.uniform(0.1, 10, 4), strict=True)
    }
    least, most = ends_of(options)
    errors = []
    for budget in np.linspace(least, most, 97).astype(int):
        cost, error = total(options, choose(options, int(budget)))
        assert cost <= budget
        errors.append(error)
        assert error >= brute_force(options, budget) - 1e-15
        # At most a step per layer is lost: what is found is at least as good as that allows.
        loss = len(counts) * -(-(most - least) // (1 << 18))
        if budget - loss >= least:
            assert error <= brute_force(options, budget - loss) + 1e-15
    assert errors == sorted(errors, reverse=True)
    assert set(choose(options, most).values()) == {8}


def test_more_bits_that_seem_worse_are_no_trap():
    options = {
        "a": [Option(2, 20, 0.5), Option(3, 30, 0.1), Option(4, 40, 0.3), Option(8, 80, 0.2)],
        "b": [Option(2, 2, 1.0), Option(8, 8, 0.0)],
    }
    assert choose(options, 49) == {"a": 3, "b": 8}
    assert choose(options, 70) == {"a": 3, "b": 8}  # four bits cost more and seem worse
    assert choose(options, 88) == choose(options, 10_000) == {"a": 8, "b": 8}


def test_equal_costs_take_the_better_width():
    stored = {"a": [Option(2, 4, 3.0), Option(3, 4, 1.0), Option(4, 4, 0.2), Option(8, 8, 0.1)]}
    assert choose(stored, 4) == {"a": 4}
    assert choose(stored, 8) == {"a": 8}
    same = {"a": [Option(b, 8, 4.0**-b) for b in WIDTHS]}  # a target that packs nothing
    assert choose(same, 8) == {"a": 8}


def test_too_small_a_budget_names_the_smallest():
    with pytest.raises(UsageError, match="below the smallest reachable sum of costs, 22"):
        choose({"a": [Option(2, 20, 1.0)], "b": [Option(2, 2, 1.0), Option(8, 8, 0.0)]}, 21)


def test_free_are_layers_under_no_rule_and_no_end():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4", "layer1.*=w8a8", "layer2.conv2=w32a32")
    rules = [parse_rule("layer1.*=w8a8"), parse_rule("layer2.conv2=w32a32")]
    free = ("layer2.downsample.0", "layer2.conv1")
    assert free_layers(plan, rules, ends=Bits(8, 8)) == free
    assert free_layers(plan, rules, ends=None) == ("conv1", *free, "head.fc")


def test_candidates_are_what_the_target_accepts():
    import dataclasses

    assert widths(ort.TARGET) == widths(trt.TARGET) == (2, 3, 4, 6, 8)
    assert widths(dataclasses.replace(ort.TARGET, weight_bits=(4, 5, 8))) == (4, 8)


def test_large_networks_are_measured_on_fewer_images():
    assert images_for(41_000_000, 20, 5) == IMAGES  # a ResNet-20
    assert images_for(570_000_000, 28, 5) == IMAGES  # a MobileNet
    assert images_for(4_100_000_000, 54, 5) == 8  # a ResNet-50


def test_a_table_is_read_back():
    table = {"a.b": {2: Effect(0.5, 0.25, 93.75), 8: Effect(0.0, None, None)}}
    assert table_from_json(table_to_json(table)) == table
    assert table["a.b"][2].sqnr_db == pytest.approx(3.0103, abs=1e-4)
    assert table["a.b"][8].sqnr_db is None
