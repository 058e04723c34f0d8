"""Tables for the terminal and as Markdown, JSON for the record; the tables of `demo` and `overhead`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from fop_bench.demo import TARGET, TRAIN_SIZE, Entry
from fop_bench.optimizers import BUILDERS
from fop_bench.overhead import Measurement
from fop_bench.summary import plus_minus

T = TypeVar("T")


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
    """A table for the terminal or a README; a change in its first ``sections`` columns starts a section."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    sections: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        note: str,
        items: Iterable[T],
        columns: Sequence[tuple[str, Callable[[T], object]]],
        sections: int = 1,
    ) -> Sheet:
        """Make a row of every item, with a heading and a function of the item for every column."""
        rows = [[str(cell(item)) for _, cell in columns] for item in items]
        return cls(title, note, [heading for heading, _ in columns], rows, sections)

    def table(self) -> Table:
        """Lay it out for the terminal."""
        table = Table(title=self.title, caption=self.note)
        for heading in self.head:
            table.add_column(heading, justify="left" if heading in ("optimizer", "model") else "right")
        for number, row in enumerate(self.rows):
            if number and row[: self.sections] != self.rows[number - 1][: self.sections]:
                table.add_section()
            table.add_row(*row)
        return table

    def markdown(self, level: int = 2) -> str:
        """Lay it out as Markdown."""
        return "\n\n".join([f"{'#' * level} {self.title}", self.note, markdown_table(self.head, self.rows)])


def _demo_sheet(entries: Sequence[Entry]) -> Sheet:
    return Sheet.of(
        f"Digits CNN: mean ± std over the seeds; target {TARGET:.0%} test accuracy",
        f"To target: over the seeds that reached it, without evaluation. {TRAIN_SIZE} is full batch.",
        entries,
        [
            ("batch", lambda each: each.batch_size),
            ("optimizer", lambda each: BUILDERS[each.optimizer][0]),
            ("lr", lambda each: f"{each.learning_rate:g}"),
            ("reached", lambda each: f"{each.summary.reached} of {each.summary.runs}"),
            ("epochs to target", lambda each: plus_minus(each.summary.epochs, 1)),
            ("seconds to target", lambda each: plus_minus(each.summary.seconds, 2)),
            ("final test accuracy %", lambda each: plus_minus(each.summary.final_accuracy, 2, 100.0)),
            ("diverged", lambda each: each.summary.diverged),
        ],
    )


def demo_table(entries: Sequence[Entry]) -> Table:
    """Lay out the demo's result, one row per batch size and optimizer."""
    return _demo_sheet(entries).table()


def demo_markdown(entries: Sequence[Entry], environment: Mapping[str, Any]) -> str:
    """Return the same table as Markdown, with the command and the machine."""
    sheet = _demo_sheet(entries)
    made = "Made by `fop-bench demo` from the runs in `demo.json`; to repeat it: `make demo`. "
    picture = "![Accuracy over training time](demo.png)"
    table = markdown_table(sheet.head, sheet.rows)
    return "\n\n".join([f"# {sheet.title}", made + sheet.note, table, picture, markdown_list(environment)])


def overhead_table(measurements: Sequence[Measurement]) -> Table:
    """Lay out time and peak memory per step, one row per workload and optimizer."""

    def scaled(value: float | None, scale: float) -> str:
        return "–" if value is None else f"{value * scale:.2f}"

    return Sheet.of(
        "Median time and peak memory of a step",
        "amortised: one curvature step per interval, the others plain; ×SGD: amortised over SGD's.",
        measurements,
        [
            ("model", lambda each: each.workload.model),
            ("batch", lambda each: each.workload.batch_size),
            ("precision", lambda each: "bf16" if each.workload.bf16 else "float32"),
            ("optimizer", lambda each: BUILDERS[each.optimizer][0]),
            ("plain ms", lambda each: scaled(each.plain_seconds, 1e3)),
            ("curvature ms", lambda each: scaled(each.curvature_seconds, 1e3)),
            ("interval", lambda each: "–" if each.interval is None else each.interval),
            ("amortised ms", lambda each: scaled(each.amortised_seconds, 1e3)),
            ("×SGD", lambda each: f"{each.ratio_to_sgd:.3f}"),
            ("plain MiB", lambda each: scaled(each.memory.plain_bytes, 2**-20)),
            ("curvature MiB", lambda each: scaled(each.memory.curvature_bytes, 2**-20)),
        ],
        sections=3,
    ).table()
