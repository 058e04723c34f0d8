"""The paper's tables (arXiv:2508.13898, Tables 1 to 4), with what was measured here beside every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fop_bench.report import markdown_table
from fop_bench.run_records import Run, of_one_commit, read_runs
from fop_bench.study import reached, studies
from fop_bench.summary import plus_minus, statistic

# Epochs and time to the target, or the error in percent.
Value = tuple[int, float] | float


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper; ``values`` by contender, None where the target was not reached."""

    number: int
    title: str
    columns: Sequence[int | str]  # batch sizes, or tasks
    values: Mapping[str, Sequence[Value | None]]
    target: float | None = None  # the accuracy that epochs and time are measured to; None for errors
    unit: float = 1.0  # seconds of the table's unit of time
    gpus: Sequence[int] = ()  # how many each column used
    upright: bool = True  # the paper has a row for every contender


# As the paper names the optimizers; in Table 4 SGD is "baseline (SGD)".
LABELS = {"sgd": "SGD", "adamw": "AdamW", "shampoo": "Shampoo", "lamb": "LAMB", "kfac": "K-FAC", "fop": "FOP"}

# By recipe.
PAPER_TABLES = {
    "cifar10-resnet18": PaperTable(
        number=1,
        title="CIFAR-10, ResNet-18, epochs / seconds to 91 % top-1",
        columns=(2048, 4096, 8192, 16384, 32768, 50000),
        values={
            "sgd": ((58, 743.3), (73, 457.9), None, None, None, None),
            "adamw": ((61, 768.4), (73, 454.0), None, None, None, None),
            "kfac": ((37, 588.7), (34, 270.5), (71, 296.4), (99, 186.4), None, None),
            "fop": ((29, 475.2), (22, 181.9), (35, 157.5), (58, 121.2), (60, 90.6), (82, 84.3)),
        },
        target=0.91,
        gpus=(2, 2, 2, 2, 2, 2),
        upright=False,
    ),
    "imagenet100-t2tvit": PaperTable(
        number=2,
        title="ImageNet-100, T2T-ViT, epochs / minutes to 80.6 %",
        columns=(512, 1024, 2048, 4096),
        values={
            "adamw": ((97, 291.6), None, None, None),
            "kfac": ((42, 138.6), (49, 76.7), (57, 46.0), (87, 45.3)),
            "fop": ((44, 158.9), (41, 67.3), (48, 42.3), (49, 27.8)),
        },
        target=0.806,
        unit=60.0,
        gpus=(1, 2, 4, 8),
    ),
    "imagenet1k-resnet50": PaperTable(
        number=3,
        title="ImageNet-1K, ResNet-50, epochs / minutes to 75.9 %",
        columns=(1024, 2048, 4096, 8192),
        values={
            "sgd": ((71, 2511.1), None, None, None),
            "shampoo": ((65, 2523.1), None, None, None),
            "lamb": ((67, 2492.7), None, None, None),
            "kfac": ((35, 1336.5), None, None, None),
            "fop": ((32, 1306.1), (33, 999.5), (34, 514.9), (40, 335.1)),
        },
        target=0.759,
        unit=60.0,
        gpus=(1, 2, 4, 8),
    ),
    "cifar-lt-resnet32": PaperTable(
        number=4,
        title="CIFAR-LT, ResNet-32, top-1 error %",
        columns=("CIFAR-10-LT 100", "CIFAR-10-LT 50", "CIFAR-100-LT 100", "CIFAR-100-LT 50"),
        values={
            "sgd": (28.05, 23.55, 62.27, 56.22),
            "kfac": (28.59, 22.29, 61.78, 55.02),
            "fop": (26.65, 20.55, 58.97, 53.67),
        },
    ),
}

NOT_RUN = "not run yet"
# These change the optimizers, or map them: no contender in them is the one that the paper's table means.
ELSEWHERE = ("map", "ablation", "formula")


def paper_page(folders: Sequence[Path], commit: str | None = None) -> str:
    """Return the paper's four tables as Markdown, with what the runs in these folders say beside every cell.

    Raises:
        ValueError: a folder without runs, a broken line, or runs that no report may mix.
    """
    runs = of_one_commit([run for folder in folders for run in read_runs(folder)], commit)
    parts = [
        "# The paper's tables, and ours",
        "Lu & Armour, arXiv:2508.13898. Each cell: the paper's number (–: it reports none, the target was "
        "not reached), then ours as mean ± standard deviation over n seeds. Epochs and errors can be "
        "compared; times only on the same device, which is named below each table.",
    ]
    for recipe, table in PAPER_TABLES.items():
        parts += [f"## Table {table.number}: {table.title}", *paper_section(recipe, runs)]
    return "\n\n".join(parts) + "\n"


def paper_section(recipe: str, runs: Sequence[Run]) -> list[str]:
    """Return the paper's table of a recipe with the runs' results, and what must be known about them."""
    table = PAPER_TABLES[recipe]
    # Of a contender the group of the comparison, or of the first other study that it is in.
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for study in studies([run for run in runs if run["recipe"] == recipe]):
        if not study.name.startswith(ELSEWHERE):
            for (size, name), group in study.groups().items():
                groups.setdefault((name, size, study.task), list(group["run"]))
    by_size = isinstance(table.columns[0], int)
    cells: dict[tuple[str, int | str], str] = {}
    for contender, values in table.values.items():
        for column, value in zip(table.columns, values, strict=True):
            found = {
                task if by_size else f"batch {size}": _measured(table, group)
                for (name, size, task), group in groups.items()
                if name == contender and column == (size if by_size else task)
            }
            several = (f"{ours}, {which}" if len(found) > 1 else ours for which, ours in found.items())
            ours = f"ours {'; '.join(several)}" if found else NOT_RUN
            cells[contender, column] = f"paper {_reported(value)} · {ours}"
    return [
        _laid_out(table, cells),
        _about(recipe, table, [run for group in groups.values() for run in group]),
    ]


def _reported(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]} / {value[1]:.1f}" if isinstance(value, tuple) else f"{value:.2f}"


def _measured(table: PaperTable, group: Sequence[Run]) -> str:
    n, diverged = len(group), sum(run["diverged"] for run in group)
    lost = f", {diverged} diverged" if diverged else ""
    if table.target is None:
        errors = statistic(1 - run["curve"][-1]["accuracy"] for run in group if not run["diverged"])
        return f"{plus_minus(errors, 2, scale=100.0)} (n={n}{lost})"
    # The paper's target, whatever the recipe's own is.
    times = [reached(run, "accuracy", table.target) for run in group]
    epochs, seconds = (statistic(each) for each in zip(*times, strict=True))
    if epochs is None:
        return f"not reached (0 of {n}{lost})"
    share = f"n={n}" if epochs.n == n else f"reached by {epochs.n} of {n}{lost}"
    return f"{plus_minus(epochs, 1)} / {plus_minus(seconds, 1, scale=1 / table.unit)} ({share})"


def _laid_out(table: PaperTable, cells: Mapping[tuple[str, int | str], str]) -> str:
    names = {column: str(column) for column in table.columns}
    for column, count in zip(table.columns, table.gpus, strict=False):
        names[column] += f" ({count} GPU{'s' * (count > 1)})"
    contenders = {name: LABELS[name] for name in table.values}
    if table.upright:
        rows = [[label, *(cells[name, column] for column in names)] for name, label in contenders.items()]
        return markdown_table(["optimizer", *names.values()], rows)
    rows = [[label, *(cells[name, column] for name in contenders)] for column, label in names.items()]
    return markdown_table(["batch", *contenders.values()], rows)


def _about(recipe: str, table: PaperTable, runs: Sequence[Run]) -> str:
    if not runs:
        return f"None of it is measured yet; to run it: `fop-bench run {recipe}`."
    devices = sorted({str(run["environment"]["device"]) for run in runs})
    data = sorted({str(run["data"]) for run in runs})
    lines = [f"Ours: `fop-bench run {recipe}` on {', '.join(devices)}; data: {', '.join(data)}"]
    if table.target is not None:
        epochs = {run["batch_size"]: run["epochs"] for run in runs}
        trained = ", ".join(f"{number} at batch {size}" for size, number in sorted(epochs.items()))
        lines.append(f"epochs of a whole run: {trained}")
        if any(run["environment"]["processor"] == "cpu" for run in runs):
            lines.append("times are processor time")
    return "; ".join(lines) + "."
