"""The paper's tables with what was measured here beside every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fop_bench.defaults_report import markdown_table
from fop_bench.paper import LABELS, PAPER_TABLES, PaperTable, Value
from fop_bench.report import plus_minus
from fop_bench.run_records import Run, of_one_commit, read_runs
from fop_bench.study_groups import Group, Target, studies
from fop_bench.summary import Statistic

NOT_RUN = "not run yet"

# These change the optimizers, or map them: no contender in them is the one that the paper's table means.
ELSEWHERE = ("map", "ablation", "formula")


def paper_page(folders: Sequence[Path], commit: str | None = None) -> str:
    """Give the paper's four tables as Markdown, with what the runs in these folders say beside every cell.

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
    """Give the paper's table of a recipe with the runs' results, and what must be known about them."""
    table = PAPER_TABLES[recipe]
    groups = _final_groups([run for run in runs if run["recipe"] == recipe])
    cells = {
        (contender, column): _cell(
            table, value, [group for group in groups.get(contender, ()) if _in(group, column)]
        )
        for contender, values in table.values.items()
        for column, value in zip(table.columns, values, strict=True)
    }
    used = [group for each in groups.values() for group in each]
    return [_laid_out(table, cells), _about(recipe, table, used)]


def _final_groups(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Give a contender's groups: of the comparison, or of the first other study that it is in."""
    groups: dict[str, list[Group]] = {}
    taken: set[tuple[str, str, int]] = set()
    for study in studies([run for run in runs if not str(run["study"]).startswith(ELSEWHERE)]):
        for group in study.groups():
            key = (study.task, group.contender, group.batch_size)
            if key not in taken:
                taken.add(key)
                groups.setdefault(group.contender, []).append(group)
    return groups


def _in(group: Group, column: int | str) -> bool:
    return column == (group.batch_size if isinstance(column, int) else group.runs[0]["task"])


def _cell(table: PaperTable, value: Value | None, groups: Sequence[Group]) -> str:
    ours = "; ".join(
        _measured(table, group) + (_which(table, group) if len(groups) > 1 else "") for group in groups
    )
    return f"paper {_reported(value)} · {f'ours {ours}' if ours else NOT_RUN}"


def _which(table: PaperTable, group: Group) -> str:
    return (
        f", {group.runs[0]['task']}" if isinstance(table.columns[0], int) else f", batch {group.batch_size}"
    )


def _reported(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]} / {value[1]:.1f}" if isinstance(value, tuple) else f"{value:.2f}"


def _measured(table: PaperTable, group: Group) -> str:
    n, lost = len(group.runs), f", {group.diverged} diverged" if group.diverged else ""
    if table.target is None:
        accuracy = group.final("accuracy")
        error = None if accuracy is None else Statistic(1 - accuracy.mean, accuracy.std, accuracy.n)
        return f"{plus_minus(error, 2, scale=100.0)} (n={n}{lost})"
    # The paper's target, whatever the recipe's own is.
    reached = group.reached(Target("accuracy", table.target))
    if reached.count == 0:
        return f"not reached (0 of {n}{lost})"
    share = f"n={n}" if reached.all else f"reached by {reached.count} of {n}{lost}"
    time = plus_minus(reached.seconds, 1, scale=1 / table.unit[0])
    return f"{plus_minus(reached.epochs, 1)} / {time} ({share})"


def _laid_out(table: PaperTable, cells: Mapping[tuple[str, int | str], str]) -> str:
    gpus = dict(zip(table.columns, table.gpus, strict=False))
    names = {
        column: f"{column} ({gpus[column]} GPU{'s' * (gpus[column] > 1)})" if gpus else str(column)
        for column in table.columns
    }
    if table.upright:
        return markdown_table(
            ["optimizer", *names.values()],
            [
                [LABELS[contender], *(cells[contender, column] for column in table.columns)]
                for contender in table.values
            ],
        )
    return markdown_table(
        ["batch", *(LABELS[contender] for contender in table.values)],
        [
            [names[column], *(cells[contender, column] for contender in table.values)]
            for column in table.columns
        ],
    )


def _about(recipe: str, table: PaperTable, groups: Sequence[Group]) -> str:
    if not groups:
        return f"None of it is measured yet; to run it: `fop-bench run {recipe}`."
    runs = [run for group in groups for run in group.runs]
    devices = sorted({str(run["environment"]["device"]) for run in runs})
    data = sorted({str(run["data"]) for run in runs})
    lines = [f"Ours: `fop-bench run {recipe}` on {', '.join(devices)}; data: {', '.join(data)}"]
    if table.target is not None:
        epochs = {group.batch_size: group.runs[0]["epochs"] for group in groups}
        trained = ", ".join(f"{number} at batch {size}" for size, number in sorted(epochs.items()))
        lines.append(f"epochs of a whole run: {trained}")
        if any(run["environment"]["processor"] == "cpu" for run in runs):
            lines.append("times are processor time")
    return "; ".join(lines) + "."
