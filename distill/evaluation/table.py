"""Results of several models as text."""

from collections.abc import Mapping
from typing import Any

ROLES = ("base", "student")  # before teachers


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison of base, student and teachers as aligned text."""
    header = ("model", "accuracy", "95% interval", "forward KL", "reverse KL", "length", "cut off")
    metrics = list(dict.fromkeys(n for fields in results.values() for n in fields if "/" in n))
    rows = [(*header, *metrics)]
    for role in sorted(results, key=lambda role: (*ROLES, role).index(role)):
        r = results[role]
        has_accuracy, has_kl = r["accuracy"] is not None, r["forward_kl"] is not None
        rows.append(
            (
                role,
                f"{r['accuracy']:.1%}" if has_accuracy else "-",
                f"{r['accuracy_low']:.1%} - {r['accuracy_high']:.1%}" if has_accuracy else "-",
                f"{r['forward_kl']:.4f}" if has_kl else "-",
                f"{r['reverse_kl']:.4f}" if has_kl else "-",
                f"{r['mean_length']:.1f}",
                f"{r['truncated']:.1%}",
                *("-" if r.get(name) is None else f"{r[name]:.4g}" for name in metrics),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
