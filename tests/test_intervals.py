"""Wilson's interval, against scipy's."""

import pytest

from dfqc.compiler.intervals import wilson

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    ("right", "images"), [(0, 10), (1, 10), (5, 10), (10, 10), (4_542, 5_000), (999, 1_000)]
)
def test_it_is_scipys(right, images):
    expected = scipy_stats.binomtest(right, images).proportion_ci(0.95, method="wilson")
    found = wilson(100 * right / images, images)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_it_is_not_empty_where_all_are_right():
    low, high = wilson(100.0, 16)
    assert (low < 85, high) == (True, 100.0)
