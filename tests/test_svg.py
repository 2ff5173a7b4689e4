"""Charts: lengths and places of what is drawn, against the figures."""

import re

import pytest

from dfqc.compiler._svg import Bar, bar_chart, line_chart
from pages import Page


def widths(svg):
    return [float(w) for w in re.findall(r'<rect[^>]*width="([\d.]+)"', svg)]


def test_bars_are_as_long_as_their_values():
    found = widths(bar_chart("t", [Bar("a", 2.0, "2"), Bar("b", 1.0, "1"), Bar("c", 0.0, "0")]))
    assert found[1] / found[0] == pytest.approx(0.5, abs=1e-3)
    assert found[2] == 1.0  # a line, so that it is seen
    assert found[0] < 480


def test_an_outlier_does_not_make_the_bars_short():
    plain = widths(bar_chart("t", [Bar("a", 2.0, "2")]))
    disturbed = bar_chart("t", [Bar("a", 2.0, "2", whisker=900.0)])
    assert widths(disturbed)[0] == pytest.approx(plain[0] / 1.4, rel=1e-3)
    assert max(float(x) for x in re.findall(r"H([\d.]+)M", disturbed)) <= 480


def test_lines_go_through_their_points():
    svg = line_chart("t", {"net": [(1, 100.0), (8, 200.0), (64, 50.0)]}, x="batch", y="img/s")
    spots = [(float(a), float(b)) for a, b in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x1, y1), (x2, y2), (x3, y3) = spots
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # equal factors are equally far apart
    assert y2 < y1 < y3  # more is higher, and y grows downwards
    assert (y3 - y1) / (y3 - y2) == pytest.approx(50 / 150, abs=1e-2)


def test_text_is_escaped_and_nothing_is_drawn_of_nothing():
    text = "".join(Page(bar_chart("<t>", [Bar('<b>"&', 1.0, "<x>")])).text)
    assert '<b>"&' in text
    assert bar_chart("t", []) == line_chart("t", {}, x="x", y="y") == ""
    Page(line_chart("t", {"<n>": [(1, 0.0)]}, x="<", y=">"))
