"""Statistics over the seeds, tables for the terminal and as Markdown, JSON for the record."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.table import Table


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


def markdown_list(values: Mapping[str, object]) -> str:
    """List keys with their values, as at the end of a record's page."""
    return "\n".join(f"- {key}: `{value}`" for key, value in values.items()) + "\n"


@dataclass(frozen=True)
class Sheet:
    """A table for the terminal or a README, a row a mapping from headings to cells.

    In the terminal a change in its first ``sections`` columns starts a section.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, object]]
    sections: int = 1

    @property
    def cells(self) -> list[list[str]]:
        """The rows as texts."""
        return [[*map(str, row.values())] for row in self.rows]

    def table(self) -> Table:
        """Lay it out for the terminal."""
        table = Table(title=self.title, caption=self.note)
        for heading in self.rows[0] if self.rows else ():
            table.add_column(heading, justify="left" if heading in ("optimizer", "model") else "right")
        for _, rows in groupby(self.cells, key=lambda row: row[: self.sections]):
            for row in rows:
                table.add_row(*row)
            if self.sections:
                table.add_section()
        return table

    def markdown(self, level: int = 2) -> str:
        """Lay it out as Markdown."""
        table = markdown_table(self.rows[0], self.cells)
        return "\n\n".join([f"{'#' * level} {self.title}", self.note, table])


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
