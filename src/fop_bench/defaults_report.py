"""Markdown tables of the defaults measurement, made from its JSON lines alone."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fop_bench.run_records import of_defaults

SHOWN = 12

Runs = list[dict[str, Any]]


def read_runs(path: Path) -> Runs:
    """Read one study; raises ValueError naming the line if one is broken."""
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
        runs = read_runs(path)
        if runs:
            parts += _study(path.stem, runs)
    report = folder / "README.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _study(name: str, runs: Runs) -> list[str]:
    tasks = sorted({run["task"] for run in runs})
    where = {json.dumps(run["environment"], sort_keys=True) for run in runs}
    diverged = sum(run["diverged"] for run in runs)
    head = [
        f"## {name}",
        f"To repeat: `fop-bench defaults {name} --data CIFAR10 --out FOLDER`; CIFAR-10 as an image folder "
        "(without `--data` only the digits).",
        f"{len(runs)} runs on {len(tasks)} tasks, {diverged} diverged. Measured on: "
        + "; ".join(f"`{each}`" for each in sorted(where)),
    ]
    return head + (_comparison(tasks, runs) if name == "comparison" else _regrets(tasks, runs))


def _regrets(tasks: Sequence[str], runs: Runs) -> list[str]:
    best = {task: max(_accuracy(run) for run in runs if run["task"] == task) for task in tasks}
    regrets: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        regrets[_label(run["options"])][run["task"]].append(100 * (best[run["task"]] - _accuracy(run)))
    complete = {
        label: {task: statistics.fmean(values) for task, values in each.items()}
        for label, each in regrets.items()
        if len(each) == len(tasks)
    }
    rows = sorted(complete.items(), key=lambda item: statistics.fmean(item[1].values()))
    table = markdown_table(
        ["options", "mean regret", "worst regret", *tasks],
        (
            [label, f"{statistics.fmean(each.values()):.2f}", f"{max(each.values()):.2f}"]
            + [f"{each[task]:.2f}" for task in tasks]
            for label, each in rows[:SHOWN]
        ),
    )
    marginal: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        label = _label(run["options"])
        for key, value in run["options"].items():
            if label in complete:
                marginal[key, str(value)].append(statistics.fmean(complete[label].values()))
    by_value = markdown_table(
        ["option", "value", "median of the mean regrets", "best", "worst"],
        (
            [key, value, f"{statistics.median(each):.2f}", f"{min(each):.2f}", f"{max(each):.2f}"]
            for (key, value), each in sorted(marginal.items())
        ),
    )
    shown = f"The best {min(SHOWN, len(rows))} of {len(rows)} combinations, by mean regret over the tasks:"
    return [shown, table, "Every value of an option, over all values of the others:", by_value]


def _comparison(tasks: Sequence[str], runs: Runs) -> list[str]:
    parts = [
        "Every learning rate of every optimizer, other options at their defaults; mean ± standard deviation "
        "over n seeds of final accuracy (%) and training loss. Nothing is selected. "
        "The runs shared the processor, so there are no times here."
    ]
    for task in tasks:
        groups: dict[tuple[str, float], Runs] = defaultdict(list)
        for run in runs:
            if run["task"] == task:
                groups[run["optimizer"], run["options"]["lr"]].append(run)
        rows = [
            [
                optimizer,
                f"{lr:g}",
                str(len(each)),
                str(sum(run["diverged"] for run in each)),
                _spread([100 * _accuracy(run) for run in each], ".2f"),
                _spread([run["train_loss"] for run in each if run["train_loss"] is not None], ".4f"),
            ]
            for (optimizer, lr), each in sorted(groups.items())
        ]
        head = ["optimizer", "lr", "n", "diverged", "accuracy %", "training loss"]
        parts += [f"### {task}", markdown_table(head, rows)]
    return parts


def _accuracy(run: Mapping[str, Any]) -> float:
    return 0.0 if run["accuracy"] is None else float(run["accuracy"])


def _label(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows under their headings as a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
