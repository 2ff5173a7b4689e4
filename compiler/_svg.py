"""Small charts as inline SVG: labelled figures in, markup in the colors of the page out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = 6  # of the page's style: --c0 … --c5

_WIDTH, _LABEL, _VALUE = 480, 124, 108
_ROW = 26
_ROOM = 1.4  # for whiskers, as a multiple of the longest bar
_THICK = f'height="{_ROW - 10}" rx="3"'
_BAND = 'stroke-width="6" stroke-opacity="0.35" fill="none"'
_PLOT = 220  # height of a line chart


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its value, the text beside it, where a whisker ends, and its color."""

    label: str
    value: float
    text: str
    whisker: float | None = None
    color: int = 0


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Return horizontal bars from zero, in the order given; nothing without bars."""
    if not bars:
        return ""
    # One disturbed call in a hundred must not make the bars themselves too short to compare.
    farthest = _ROOM * max(bar.value for bar in bars)
    largest = max(max(bar.value, min(bar.whisker or 0.0, farthest)) for bar in bars) or 1.0
    scale = (_WIDTH - _LABEL - _VALUE - 8) / largest
    rows = [_bar(bar, index * _ROW, scale) for index, bar in enumerate(bars)]
    return _svg(title, len(bars) * _ROW + 4, "".join(rows))


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str
) -> str:
    """Return lines over a logarithmic x axis (batch sizes), from zero; nothing without points."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    xs = sorted({point[0] for point in points})
    top = _round_up(max(point[1] for point in points))
    left, right, bottom = 64, _WIDTH - 16, _PLOT - 34

    def place(point: tuple[float, float]) -> tuple[float, float]:
        span = math.log(xs[-1] / xs[0]) or 1.0
        across = math.log(point[0] / xs[0]) / span if len(xs) > 1 else 0.5
        return left + across * (right - left), bottom - point[1] / top * (bottom - 30)

    body = [_gridline(place((xs[0], top * share))[1], top * share, right) for share in (0, 0.5, 1)]
    body += [_text(place((one, 0))[0], bottom + 16, f"{one:g}", "middle") for one in xs]
    body.append(_text((left + right) / 2, _PLOT - 4, x, "middle"))
    body.append(_text(4, 12, y, "start"))
    for index, (name, line) in enumerate(series.items()):
        color = f"var(--c{index % COLORS})"
        spots = [place(point) for point in sorted(line)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        body.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>')
        for (a, b), (at, value) in zip(spots, sorted(line), strict=True):
            hint = escape(f"{name}: {value:.4g} at {at:g}")
            body.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{color}">'
                f"<title>{hint}</title></circle>"
            )
    return _svg(title, _PLOT, "".join(body)) + _legend(enumerate(series))


def column_chart(
    title: str, columns: Sequence[Bar], *, unit: str, legend: Mapping[int, str]
) -> str:
    """Return upright columns from zero, one narrow one per value, told apart by their hints.

    `legend` says what each color is.
    """
    if not columns:
        return ""
    top = _round_up(max(column.value for column in columns))
    left, right, bottom = 64, _WIDTH - 4, _PLOT - 14
    step = (right - left) / len(columns)
    body = [_gridline(bottom - share * (bottom - 30), top * share, right) for share in (0, 0.5, 1)]
    body.append(_text(4, 12, unit, "start"))
    for index, column in enumerate(columns):
        height = max(column.value, 0.0) / top * (bottom - 30)
        body.append(
            f'<rect x="{left + index * step:.1f}" y="{bottom - height:.1f}" '
            f'width="{max(0.8 * step, 1):.1f}" height="{max(height, 1):.1f}" '
            f'fill="var(--c{column.color % COLORS})">'
            f"<title>{escape(f'{column.label}: {column.text}')}</title></rect>"
        )
    return _svg(title, _PLOT, "".join(body)) + _legend(legend.items())


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Return rows of (label, percent, low, high) on one axis that ends at 100 %."""
    if not rows:
        return ""
    start = 10 * math.floor(min(row[2] for row in rows) / 10)
    start = min(start, 90)
    left, right = _LABEL, _WIDTH - _VALUE - 30

    def across(percent: float) -> float:
        return left + (percent - start) / (100 - start) * (right - left)

    bottom = len(rows) * _ROW
    body = []
    for tick in (start, (start + 100) / 2, 100):
        x = across(tick)
        body.append(f'<path d="M{x:.1f} 2V{bottom}" stroke="var(--line)" fill="none"/>')
        body.append(_text(x, bottom + 15, f"{tick:g} %", "middle"))
    for index, (label, percent, low, high) in enumerate(rows):
        y, color = index * _ROW + _ROW / 2, f"var(--c{index % COLORS})"
        body += [
            _text(_LABEL - 8, y + 4, _shorten(label), "end"),
            f'<path d="M{across(low):.1f} {y}H{across(high):.1f}" stroke="{color}" {_BAND}/>',
            f'<circle cx="{across(percent):.1f}" cy="{y}" r="4.5" fill="{color}"/>',
            _text(_WIDTH - 2, y + 4, f"{percent:.2f} ({low:.1f} to {high:.1f})", "end"),
        ]
    return _svg(title, bottom + 22, "".join(body))


def _legend(names: Iterable[tuple[int, str]]) -> str:
    spans = "".join(
        f'<span><i style="background:var(--c{index % COLORS})"></i>{escape(name)}</span>'
        for index, name in names
    )
    return f'<p class="legend">{spans}</p>'


def _bar(bar: Bar, top: float, scale: float) -> str:
    middle, width = top + _ROW / 2, max(bar.value * scale, 1.0)
    color = f"var(--c{bar.color % COLORS})"
    parts = [
        f"<g><title>{escape(f'{bar.label}: {bar.text}')}</title>",
        _text(_LABEL - 8, middle + 4, _shorten(bar.label), "end"),
        f'<rect x="{_LABEL}" y="{top + 5:.1f}" width="{width:.1f}" {_THICK} fill="{color}"/>',
    ]
    if bar.whisker is not None and bar.whisker > bar.value:
        end = min(_LABEL + bar.whisker * scale, _WIDTH - _VALUE - 8)
        parts.append(
            f'<path d="M{_LABEL + width:.1f} {middle:.1f}H{end:.1f}M{end:.1f} {middle - 5:.1f}v10" '
            'stroke="var(--soft)" fill="none"/>'
        )
    return "".join([*parts, _text(_WIDTH - 2, middle + 4, bar.text, "end"), "</g>"])


def _gridline(y: float, value: float, right: float) -> str:
    line = f'<path d="M64 {y:.1f}H{right}" stroke="var(--line)" fill="none"/>'
    return line + _text(58, y + 4, f"{value:,.0f}" if value >= 10 else f"{value:g}", "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, body: str) -> str:
    # It shrinks to the width of a phone; on anything narrower it scrolls inside of its own box.
    return (
        f'<div class="scroll"><svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}">{body}</svg></div>'
    )


def _shorten(label: str) -> str:
    return label if len(label) <= 20 else f"…{label[-19:]}"


def _round_up(value: float) -> float:
    """Return the next round number that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    return next(step * power for step in steps if step * power >= value * 0.999999)
