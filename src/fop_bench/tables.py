"""Tables as Markdown, and statistics over the seeds as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


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


def plus_minus(values: pd.Series, digits: int, scale: float = 1.0) -> str:
    """Format mean ± sample standard deviation of what is not NaN: one value alone, none as a dash."""
    if values.count() == 0:
        return "–"
    mean = number(values.mean() * scale, digits)
    return mean if values.count() == 1 else f"{mean} ± {number(values.std() * scale, digits)}"


def compare(ours: pd.Series, theirs: pd.Series, *, low: bool) -> str | None:
    """Compare two means, of which the higher, or with ``low`` the lower, is ahead; None for single values."""
    counts = ours.count(), theirs.count()
    if min(counts) < 2:
        return None
    squares = (counts[0] - 1) * ours.var() + (counts[1] - 1) * theirs.var()
    gain = theirs.mean() - ours.mean() if low else ours.mean() - theirs.mean()
    if abs(gain) <= math.sqrt(squares / (sum(counts) - 2)):
        return "within the spread"
    return "ahead" if gain > 0 else "behind"
