"""How a comparison of two builds reads: what `run_diff` found in, plain lines or Markdown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfqc.compiler.output import table
from dfqc.compiler.units import format_size

_MARKS = {"better": "✅ better", "worse": "⚠️ worse", "same": "same", None: "–"}
_ABSENT = "–"
_FEW = 12  # changed layers that a comment shows without being unfolded


def describe_diff(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `dfqc diff` shows."""
    before, after = result["before"], result["after"]
    lines = [f"{before['package']} ({_title(before)}) -> {after['package']} ({_title(after)})", ""]
    lines += table(("figure", "before", "after", "change", "verdict"), _figures(result, str))
    lines += ["", *_uncertainty(result)]
    lines += [f"gate     {row[0]}: {row[1]} -> {row[2]}" for row in _gates(result)]
    lines += ["", *_layer_lines(result["layers"])]
    if result["recipe"]:
        lines += ["", *table(("recipe", "before", "after"), _pairs(result["recipe"]))]
    lines += [f"note     {note}" for note in result["notes"]]
    return lines + [f"FAILED   {failure}" for failure in result["failures"]]


def markdown_diff(result: Mapping[str, Any]) -> str:
    """Return the comparison as the comment of a pull request (GitHub, GitLab, Gitea)."""
    before, after = result["before"], result["after"]
    rows = _figures(result, lambda verdict: _MARKS[None if verdict == _ABSENT else verdict])
    parts = [
        f"### dfqc: {_code(before['name'])} → {_code(after['name'])}",
        f"{_headline(result)}",
        _markdown_table(("", _title(before), _title(after), "change", ""), rows, right=(1, 2, 3)),
        *_uncertainty(result),
    ]
    if gates := _gates(result):
        parts.append(_markdown_table(("gate", "before", "after"), gates))
    parts.append(_markdown_layers(result["layers"]))
    for name in ("recipe", "environment"):
        if result[name]:
            pairs = _markdown_table((name, "before", "after"), _pairs(result[name]))
            parts.append(_folded(f"What differs in the {name}: {len(result[name])}", pairs))
    parts += [f"> {note[0].upper()}{note[1:]}." for note in result["notes"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(result: Mapping[str, Any]) -> str:
    if result["failures"]:
        return f"**Failed**: {'; '.join(result['failures'])}."
    broken = [
        row["name"] for row in result["gates"] if row["after"] and not row["after"].get("passed")
    ]
    if broken:
        return f"**Gates of the new build failed**: {', '.join(broken)}."
    named = {
        verdict: [row["name"] for row in result["figures"] if row["verdict"] == verdict]
        for verdict in ("worse", "better")
    }
    said = [f"{verdict}: {', '.join(names)}" for verdict, names in named.items() if names]
    text = "; ".join(said) or "no figure changed"
    return f"{text[0].upper()}{text[1:]}."


def _figures(result: Mapping[str, Any], mark: Any) -> list[list[str]]:
    return [
        [
            row["name"],
            _value(row["before"], row["unit"]),
            _value(row["after"], row["unit"]),
            _change(row),
            mark(row["verdict"] or _ABSENT),
        ]
        for row in result["figures"]
    ]


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return _ABSENT
    if unit == "bytes":
        return format_size(value)
    if unit == "":
        return f"{value:,.0f}"
    return f"{value:.3f} ms" if unit == "ms" else f"{value:.2f} {unit}"


def _change(row: Mapping[str, Any]) -> str:
    change, before, unit = row["change"], row["before"], row["unit"]
    if change is None:
        return _ABSENT
    if unit in ("%", "dB"):  # points, and decibels, are differences already
        return f"{change:+.2f} {'points' if unit == '%' else unit}"
    return f"{100 * change / before:+.1f} %" if before else f"{change:+g}"


def _uncertainty(result: Mapping[str, Any]) -> list[str]:
    limit = result["top1_uncertainty"]
    row = next((r for r in result["figures"] if r["name"] == "top-1"), None)
    if limit is None or row is None or row["change"] is None:
        return []
    within = "within" if abs(row["change"]) <= limit else "beyond"
    text = f"The change of top-1 is {within} what the number of images leaves uncertain"
    return [f"{text} (at most {limit:.2f} points, 95 %)."]


def _gates(result: Mapping[str, Any]) -> list[list[str]]:
    return [[g["name"], _gate(g["before"]), _gate(g["after"])] for g in result["gates"]]


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return "not set"
    value = "not measured" if gate.get("value") is None else f"{gate['value']:.4g}"
    return f"{'passed' if gate.get('passed') else 'FAILED'} ({value}, limit {gate['limit']:.4g})"


def _layer_lines(layers: Mapping[str, Any]) -> list[str]:
    lines = [_summarize_layers(layers)]
    if layers["changed"]:
        lines += table(("layer", "op", "what changed", "SQNR (dB)"), _layer_rows(layers))
    return lines


def _summarize_layers(layers: Mapping[str, Any]) -> str:
    parts = [f"{len(layers['changed'])} of {layers['count']} layers changed"]
    parts += [
        f"{len(layers[name])} {name}: {', '.join(layers[name])}"
        for name in ("added", "removed")
        if layers[name]
    ]
    return "; ".join(parts)


def _layer_rows(layers: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            str(row["op"] or _ABSENT),
            ", ".join(f"{n} {_plain(a)} -> {_plain(b)}" for n, (a, b) in row["changes"].items()),
            " -> ".join(_ABSENT if v is None else f"{v:.1f}" for v in row["sqnr_db"]),
        ]
        for row in layers["changed"]
    ]


def _markdown_layers(layers: Mapping[str, Any]) -> str:
    summary = _summarize_layers(layers)
    if not layers["changed"]:
        return f"{_escape(summary)}."
    header = ("layer", "op", "what changed", "SQNR (dB)")
    body = _markdown_table(header, _layer_rows(layers), right=(3,))
    if len(layers["changed"]) <= _FEW:
        return f"{_escape(summary)}:\n\n{body}"
    return _folded(summary, body)


def _folded(summary: str, body: str) -> str:
    # The empty lines matter: without them the table is shown as text.
    return f"<details><summary>{_escape(summary)}</summary>\n\n{body}\n\n</details>"


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    cells = [[_escape(cell) for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Keep text from names out of the markup: pipes, tags, emphasis, mentions and line ends."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("@", "@\u200b")
    for sign in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', '').split())}`"


def _pairs(changes: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    return [[name, _plain(before), _plain(after)] for name, (before, after) in changes.items()]


def _plain(value: object) -> str:
    if value is None or value == "" or value == []:
        return _ABSENT
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _title(package: Mapping[str, Any]) -> str:
    return f"{package['bits'] or _ABSENT} {package['target'] or ''}".strip()
