"""Markdown tables of the defaults measurement, made from its JSON lines alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from fop_bench.report import markdown_table, plus_minus, statistic, write_page
from fop_bench.run_records import of_defaults

SHOWN = 12


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read one study, lines of either runner; raises ValueError naming a broken line."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            runs.append(of_defaults(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON (a killed run?); delete that line"
            ) from error
    return runs


def write_report(folder: Path) -> Path:
    """Write ``folder``/README.md from all studies in ``folder``; return its path."""
    parts = [
        "# Defaults: the measurement",
        "Made by `fop-bench defaults` from the JSON lines in this folder; do not edit. Every line holds its "
        "commit, versions and device. Accuracy is on the validation part after the last epoch; *regret* is "
        "the distance to the best accuracy that any run of the study had on that task, in percentage points; "
        "a diverged run counts as accuracy 0.",
    ]
    for path in sorted(folder.glob("*.jsonl")):
        if lines := read_runs(path):
            parts += _study(path.stem, lines)
    return write_page(folder, parts)


def _study(name: str, lines: list[dict[str, Any]]) -> list[str]:
    runs = pd.DataFrame(lines)
    runs["accuracy"] = 100 * runs["accuracy"].astype(float).fillna(0.0)
    where = sorted({json.dumps(each, sort_keys=True) for each in runs["environment"]})
    head = [
        f"## {name}",
        f"To repeat: `fop-bench defaults {name} --data CIFAR10 --out FOLDER`; CIFAR-10 as an image folder "
        "(without `--data` only the digits).",
        f"{len(runs)} runs on {runs['task'].nunique()} tasks, {runs['diverged'].sum()} diverged. "
        f"Measured on: {'; '.join(f'`{each}`' for each in where)}",
    ]
    return head + (_comparison(runs) if name == "comparison" else _regrets(runs))


def _regrets(runs: pd.DataFrame) -> list[str]:
    runs["label"] = [", ".join(f"{key}={value}" for key, value in each.items()) for each in runs["options"]]
    runs["regret"] = runs.groupby("task")["accuracy"].transform("max") - runs["accuracy"]
    tasks = runs.pivot_table(index="label", columns="task", values="regret", sort=False).dropna()
    tasks = tasks.sort_index(axis="columns")
    # Rounded, so that combinations with equal regrets keep their order.
    means = tasks.mean(axis="columns").round(9).sort_values(kind="stable")
    best = tasks.loc[means.index[:SHOWN]]
    best.insert(0, "mean regret", best.mean(axis="columns"))
    best.insert(1, "worst regret", best.drop(columns="mean regret").max(axis="columns"))
    table = markdown_table(
        ["options", *best], ([label, *(f"{each:.2f}" for each in row)] for label, *row in best.itertuples())
    )
    # One row for every run and option, with the mean regret of the run's combination.
    values = runs["options"].map(lambda each: [(key, str(value)) for key, value in each.items()])
    marginal = pd.DataFrame({"value": values, "regret": runs["label"].map(means)}).explode("value").dropna()
    spread = marginal.groupby("value")["regret"].agg(["median", "min", "max"])
    by_value = markdown_table(
        ["option", "value", "median of the mean regrets", "best", "worst"],
        ([*value, *(f"{each:.2f}" for each in row)] for value, *row in spread.itertuples()),
    )
    shown = f"The best {len(best)} of {len(means)} combinations, by mean regret over the tasks:"
    return [shown, table, "Every value of an option, over all values of the others:", by_value]


def _comparison(runs: pd.DataFrame) -> list[str]:
    parts = [
        "Every learning rate of every optimizer, other options at their defaults; mean ± standard deviation "
        "over n seeds of final accuracy (%) and training loss. Nothing is selected. "
        "The runs shared the processor, so there are no times here."
    ]
    runs["lr"] = [options["lr"] for options in runs["options"]]
    head = ["optimizer", "lr", "n", "diverged", "accuracy %", "training loss"]
    for task, of_task in runs.groupby("task"):
        rows = []
        for (optimizer, lr), each in of_task.groupby(["optimizer", "lr"]):
            accuracy, loss = (statistic(each[name].astype(float)) for name in ("accuracy", "train_loss"))
            counts = [len(each), each["diverged"].sum()]
            rows.append([optimizer, f"{lr:g}", *counts, plus_minus(accuracy, 2), plus_minus(loss, 4)])
        parts += [f"### {task}", markdown_table(head, rows)]
    return parts
