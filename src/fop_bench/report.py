"""Tables for the terminal and JSON for the record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fop_bench.defaults_report import markdown_table
from fop_bench.demo import TARGET, TRAIN_SIZE, Entry
from fop_bench.optimizers import BUILDERS
from fop_bench.overhead import Measurement
from fop_bench.summary import Statistic


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN), creating the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


DEMO_COLUMNS = (
    "batch",
    "optimizer",
    "lr",
    "reached",
    "epochs to target",
    "seconds to target",
    "final test accuracy %",
    "diverged",
)
DEMO_CAPTION = f"To target: over the seeds that reached it, without evaluation. {TRAIN_SIZE} is full batch."


def demo_table(entries: Sequence[Entry]) -> Table:
    """Lay out the demo's result, one row per batch size and optimizer."""
    title = f"Digits CNN: mean ± std over the seeds; target {TARGET:.0%} test accuracy"
    table = Table(title=title, caption=DEMO_CAPTION)
    for heading in DEMO_COLUMNS:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    previous = entries[0].batch_size
    for entry in entries:
        if entry.batch_size != previous:
            table.add_section()
            previous = entry.batch_size
        table.add_row(*_demo_cells(entry))
    return table


def demo_markdown(entries: Sequence[Entry], environment: Mapping[str, Any]) -> str:
    """Give the same table as Markdown, with the command and the machine."""
    return "\n\n".join(
        [
            f"# Digits CNN: mean ± std over the seeds; target {TARGET:.0%} test accuracy",
            "Made by `fop-bench demo` from the runs in `demo.json`; to repeat it: `make demo`. "
            + DEMO_CAPTION,
            markdown_table(DEMO_COLUMNS, [_demo_cells(entry) for entry in entries]),
            "![Accuracy over training time](demo.png)",
            "\n".join(f"- {key}: `{value}`" for key, value in environment.items()) + "\n",
        ]
    )


def _demo_cells(entry: Entry) -> list[str]:
    summary = entry.summary
    return [
        str(entry.batch_size),
        BUILDERS[entry.optimizer][0],
        f"{entry.learning_rate:g}",
        f"{summary.reached} of {summary.runs}",
        plus_minus(summary.epochs, 1),
        plus_minus(summary.seconds, 2),
        plus_minus(summary.final_accuracy, 2, scale=100.0),
        str(summary.diverged),
    ]


def overhead_table(measurements: Sequence[Measurement]) -> Table:
    """Lay out time and peak memory per step, one row per workload and optimizer."""
    table = Table(
        title="Median time and peak memory of a step",
        caption="amortised: one curvature step per interval, the others plain; ×SGD: amortised over SGD's.",
    )
    for heading in ("model", "batch", "precision", "optimizer"):
        table.add_column(heading)
    for heading in (
        "plain ms",
        "curvature ms",
        "interval",
        "amortised ms",
        "×SGD",
        "plain MiB",
        "curvature MiB",
    ):
        table.add_column(heading, justify="right")
    previous = measurements[0].workload if measurements else None
    for each in measurements:
        if each.workload != previous:
            table.add_section()
            previous = each.workload
        table.add_row(
            each.workload.model,
            str(each.workload.batch_size),
            "bf16" if each.workload.bf16 else "float32",
            BUILDERS[each.optimizer][0],
            _scaled(each.plain_seconds, 1e3),
            _scaled(each.curvature_seconds, 1e3),
            "–" if each.interval is None else str(each.interval),
            _scaled(each.amortised_seconds, 1e3),
            f"{each.ratio_to_sgd:.3f}",
            _scaled(each.memory.plain_bytes, 2**-20),
            _scaled(each.memory.curvature_bytes, 2**-20),
        )
    return table


def plus_minus(value: Statistic | None, digits: int, scale: float = 1.0) -> str:
    """Format a statistic as mean ± std, as the mean alone for a single value, or as a dash."""
    if value is None:
        return "–"
    mean = f"{value.mean * scale:.{digits}f}"
    return mean if value.std is None else f"{mean} ± {value.std * scale:.{digits}f}"


def _scaled(value: float | None, scale: float) -> str:
    return "–" if value is None else f"{value * scale:.2f}"
