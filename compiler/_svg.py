"""Small charts as inline SVG: labelled figures in, markup in the colors of the page out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = 6  # of the page's style: --c0 … --c5

_WIDTH, _LABEL, _VALUE = 640, 170, 132
_ROW = 26
_ROOM = 1.4  # for whiskers, as a multiple of the longest bar
_THICK = f'height="{_ROW - 10}" rx="3"'
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
    legend = "".join(
        f'<span><i style="background:var(--c{index % COLORS})"></i>{escape(name)}</span>'
        for index, name in enumerate(series)
    )
    return _svg(title, _PLOT, "".join(body)) + f'<p class="legend">{legend}</p>'


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
    # Wider than a phone: it scrolls inside of its own box, so that its text stays readable.
    return (
        f'<div class="scroll"><svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}">{body}</svg></div>'
    )


def _shorten(label: str) -> str:
    return label if len(label) <= 26 else f"…{label[-25:]}"


def _round_up(value: float) -> float:
    """Return the next round number that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    return next(step * power for step in steps if step * power >= value * 0.999999)
