"""Tables as Markdown, and statistics over the seeds as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev, variance


def markdown_table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Lay out rows under their headings as a Markdown table."""
    head = list(head)
    head_line, *body = ("| " + " | ".join(map(str, line)) + " |" for line in [head, *rows])
    return "\n".join([head_line, "|" + "---|" * len(head), *body])


def section(title: str, note: str, rows: Sequence[Mapping[str, object]]) -> str:
    """Return a table with heading and note as Markdown, or "" without rows; a row maps headings to cells."""
    if not rows:
        return ""
    table = markdown_table(rows[0], (row.values() for row in rows))
    return f"## {title}\n\n{note}\n\n{table}"


def number(value: float, digits: int) -> str:
    """Format a number with decimals, or from a million on, as of a training gone wrong, with an exponent."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def plus_minus(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """Format mean ± sample standard deviation of what is not NaN: one value alone, none as a dash."""
    known = [scale * value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    mean = number(fmean(known), digits)
    return mean if len(known) == 1 else f"{mean} ± {number(stdev(known), digits)}"


def compare(ours: Iterable[float], theirs: Iterable[float], *, low: bool) -> str | None:
    """Compare two means, of which the higher, or with ``low`` the lower, is ahead; None for single values."""
    a, b = ([value for value in each if not math.isnan(value)] for each in (ours, theirs))
    if min(len(a), len(b)) < 2:
        return None
    pooled = ((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / (len(a) + len(b) - 2)
    gain = fmean(b) - fmean(a) if low else fmean(a) - fmean(b)
    if abs(gain) <= math.sqrt(pooled):
        return "within the spread"
    return "ahead" if gain > 0 else "behind"
