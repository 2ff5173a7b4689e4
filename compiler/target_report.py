"""The target's rules in the report: what `check` found in, a part of the page out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfqc.compiler._html import Markup, bullets, pairs, table


def rules_html(checked: Mapping[str, Any] | None) -> Markup:
    """Return the verdict, the broken rules, and how a stand-in ran the file; empty without one."""
    if not checked:
        return Markup("")
    findings = checked["findings"]
    verdict = "every rule holds" if not findings else f"{len(findings)} places break a rule"
    parts = [bullets([verdict])]
    if findings:
        columns = ("severity", "rule", "node", "message", "mend")
        parts.append(table(columns, [[row[name] for name in columns] for row in findings]))
    if ran := checked["rehearsal"]:
        parts.append(
            pairs(
                {
                    "the same file in": ran["by"],
                    "largest difference to the simulation": f"{ran['max_abs']:.3g} of outputs up "
                    f"to {ran['largest_output']:.3g}",
                    "equal arg-max": f"{ran['argmax_agreement']:.2f} % of {ran['images']} images",
                }
            )
        )
    return Markup("".join(parts))
