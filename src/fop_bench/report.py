"""Statistics over the seeds, tables as Markdown, JSON for the record."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN), creating the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_page(folder: Path, parts: Iterable[str]) -> Path:
    """Write the paragraphs of ``folder``/README.md; return its path."""
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def markdown_table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Lay out rows under their headings as a Markdown table."""
    head = list(head)
    lines = [head, *rows]
    head_line, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join([head_line, "|" + "---|" * len(head), *body])


def section(title: str, note: str, rows: Sequence[Mapping[str, object]], level: int = 2) -> str:
    """Return a table with heading and note as Markdown, or "" without rows; a row maps headings to cells."""
    table = markdown_table(rows[0], (row.values() for row in rows)) if rows else ""
    return "\n\n".join([f"{'#' * level} {title}", note, table]) if rows else ""


# --- Statistics


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None for a single value) of `n` values."""

    mean: float
    std: float | None
    n: int


def statistic(values: Iterable[float]) -> Statistic | None:
    """Return mean and standard deviation of the values that are not NaN, or None if there are none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def plus_minus(value: Statistic | None, digits: int, scale: float = 1.0) -> str:
    """Format a statistic as mean ± std, as the mean alone for a single value, or as a dash."""
    if value is None:
        return "–"
    mean = f"{value.mean * scale:.{digits}f}"
    return mean if value.std is None else f"{mean} ± {value.std * scale:.{digits}f}"


def compare(
    ours: Statistic | None, theirs: Statistic | None, *, low: bool
) -> Literal["ahead", "behind", "within the spread"] | None:
    """Compare two means by their pooled standard deviation; None, no claim, for single or missing values.

    With ``low`` the lower mean is ahead.
    """
    if ours is None or theirs is None or ours.std is None or theirs.std is None:
        return None
    squares = (ours.n - 1) * ours.std**2 + (theirs.n - 1) * theirs.std**2
    gain = theirs.mean - ours.mean if low else ours.mean - theirs.mean
    if abs(gain) <= math.sqrt(squares / (ours.n + theirs.n - 2)):
        return "within the spread"
    return "ahead" if gain > 0 else "behind"
