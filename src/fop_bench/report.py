"""Statistics over the seeds, tables as Markdown, JSON for the record."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which then takes its name; what fails in between leaves the old file.

    Raises OSError with the name and the reason, for example that the disk is full.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    # torch.save makes a RuntimeError of a full disk.
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, which stays as it was: {error}") from error


def write_text(path: Path, text: str) -> Path:
    """Write a file; return its path."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write strict JSON (no NaN); return the file's path."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


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
