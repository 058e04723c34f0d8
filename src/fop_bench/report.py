"""Statistics over the seeds as text, tables as Markdown, files that are whole or as they were."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which then takes its name; an OSError in between leaves the old file."""
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
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


def plus_minus(values: pd.Series, digits: int, scale: float = 1.0) -> str:
    """Format mean ± sample standard deviation of what is not NaN: one value alone, none as a dash."""
    if values.count() == 0:
        return "–"
    mean = f"{values.mean() * scale:.{digits}f}"
    return mean if values.count() == 1 else f"{mean} ± {values.std() * scale:.{digits}f}"


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
