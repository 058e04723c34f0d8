"""The paper's Tables 1 and 4 (arXiv:2508.13898), with what was measured here beside every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from fop_bench.optimizers import PEERS
from fop_bench.records import Record, of_one_commit, read_runs
from fop_bench.study import UNITS, reached
from fop_bench.tables import markdown_table, plus_minus


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper; in its text "–" where the paper reports none, the target was not reached."""

    number: int
    title: str
    text: str  # batch sizes or tasks down, contenders across
    target: float | None = None  # the accuracy that epochs and seconds are measured to; None for errors

    @property
    def cells(self) -> pd.DataFrame:
        return pd.read_csv(StringIO(self.text), sep=r"\s*\|\s*", index_col=0, engine="python", dtype=str)


# By recipe.
PAPER_TABLES = {
    "cifar10-resnet18": PaperTable(
        1,
        "CIFAR-10, ResNet-18, two GPUs, epochs / seconds to 91 % top-1",
        """
        batch | sgd        | adamw      | kfac       | fop
        2048  | 58 / 743.3 | 61 / 768.4 | 37 / 588.7 | 29 / 475.2
        4096  | 73 / 457.9 | 73 / 454.0 | 34 / 270.5 | 22 / 181.9
        8192  | –          | –          | 71 / 296.4 | 35 / 157.5
        16384 | –          | –          | 99 / 186.4 | 58 / 121.2
        32768 | –          | –          | –          | 60 / 90.6
        50000 | –          | –          | –          | 82 / 84.3
        """,
        target=0.91,
    ),
    "cifar-lt-resnet32": PaperTable(
        4,
        "CIFAR-LT, ResNet-32, top-1 error %",
        """
        task             | sgd   | kfac  | fop
        CIFAR-10-LT 100  | 28.05 | 28.59 | 26.65
        CIFAR-10-LT 50   | 23.55 | 22.29 | 20.55
        CIFAR-100-LT 100 | 62.27 | 61.78 | 58.97
        CIFAR-100-LT 50  | 56.22 | 55.02 | 53.67
        """,
    ),
}


def paper_page(folders: Sequence[Path]) -> str:
    """Return the paper's tables as Markdown, with what the runs in these folders say beside."""
    runs = of_one_commit([run for folder in folders for run in read_runs(folder)])
    parts = [
        "# The paper's tables, and ours",
        "Lu & Armour, arXiv:2508.13898. Each cell: the paper's number (–: it reports none, the target was "
        "not reached), then ours as mean ± standard deviation over n seeds. Epochs and errors can be "
        "compared; times only on the same device, which is named below each table. Tables 2 and 3 "
        "(ImageNet) have no command.",
    ]
    for recipe, table in PAPER_TABLES.items():
        parts += [f"## Table {table.number}: {table.title}", *paper_section(recipe, runs)]
    return "\n\n".join(parts) + "\n"


def paper_section(recipe: str, runs: Sequence[Record]) -> list[str]:
    """Return the paper's table of a recipe with the runs' results, and what must be known about them."""
    table, kind = PAPER_TABLES[recipe], (recipe, "comparison", "final")
    place = "task" if table.target is None else "batch_size"
    final = [run for run in runs if (run["recipe"], run["study"], run["phase"]) == kind]
    rows = []
    for at, cells in table.cells.iterrows():
        row = [at]
        for contender, cell in cells.items():
            ours = [run for run in final if (run["contender"], str(run[place])) == (contender, str(at))]
            said = f"ours {_measured(table, ours)}" if ours else "not run yet"
            row.append(f"paper {cell} · {said}")
        rows.append(row)
    head = [table.cells.index.name, *(PEERS[name].label for name in table.cells)]
    return [markdown_table(head, rows), _about(recipe, table, final)]


def _measured(table: PaperTable, group: Sequence[Record]) -> str:
    n, diverged = len(group), sum(run["diverged"] for run in group)
    lost = f", {diverged} diverged" if diverged else ""
    if table.target is None:
        errors = [1 - run["curve"][-1]["accuracy"] for run in group if not run["diverged"]]
        return f"{plus_minus(errors, 2, scale=100.0)} (n={n}{lost})"
    # The paper's target, whatever the recipe's own is.
    times = pd.DataFrame([reached(run, "accuracy", table.target) for run in group], columns=[*UNITS])
    count = times["epochs"].count()
    if count == 0:
        return f"not reached (0 of {n}{lost})"
    share = f"n={n}" if count == n else f"reached by {count} of {n}{lost}"
    return f"{plus_minus(times['epochs'], 1)} / {plus_minus(times['seconds'], 1)} ({share})"


def _about(recipe: str, table: PaperTable, runs: Sequence[Record]) -> str:
    if not runs:
        return f"None of it is measured yet; to run it: `fop-bench run {recipe}`."
    devices = sorted({str(run["environment"]["device"]) for run in runs})
    data = sorted({str(run["data"]) for run in runs})
    said = f"Ours: `fop-bench run {recipe}` on {', '.join(devices)}; data: {', '.join(data)}"
    if table.target is not None:
        epochs = sorted({run["batch_size"]: run["epochs"] for run in runs}.items())
        trained = ", ".join(f"{number} at batch {size}" for size, number in epochs)
        on_cpu = any(run["environment"]["processor"] == "cpu" for run in runs)
        said += f"; epochs of a whole run: {trained}" + ("; times are processor time" if on_cpu else "")
    return f"{said}."
