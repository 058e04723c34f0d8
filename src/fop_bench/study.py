"""The runs of `fop-bench run` as studies of a data frame, and the tables of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from fop_bench.records import Record
from fop_bench.tables import compare, markdown_table, plus_minus

# Known contenders stand in this order, the others behind them.
ORDER = ("sgd", "adamw", "lamb", "shampoo-blocks", "soap", "muon", "kfac", "fop")
KEYS = ("recipe", "task", "study", "phase", "contender", "label", "batch_size", "epochs", "seed", "diverged")
SIDE = ["batch_size", "contender"]
UNITS = ("epochs", "seconds")
NAN = math.nan


@dataclass(frozen=True)
class Study:
    """All runs of one study of a recipe on a task, one row of ``runs`` each, whose columns `_row` makes."""

    recipe: str
    task: str
    name: str
    runs: pd.DataFrame
    targets: dict[str, float]  # what its runs are to reach: at least an accuracy, at most a train_loss
    labels: dict[str, str]  # by contender, in the order of tables

    @property
    def title(self) -> str:
        return f"{self.recipe}, {self.task}, {self.name}"

    def phase(self, phase: str) -> pd.DataFrame:
        return self.runs[self.runs["phase"] == phase]

    @property
    def is_map(self) -> bool:
        """Whether it has final runs of many options and no tuning, as earlier versions made them."""
        options = self.phase("final").groupby(SIDE, observed=True)["options"].nunique()
        return self.phase("tuning").empty and bool((options > 1).any())

    def groups(self) -> dict[tuple[int, str], pd.DataFrame]:
        """Return the final runs by batch size and contender; ValueError if a group has several options."""
        found = dict(tuple(self.phase("final").groupby(SIDE, observed=True)))
        for (size, contender), group in found.items():
            if len(options := sorted(set(group["options"]))) > 1:
                raise ValueError(
                    f"{self.title}: {contender} at batch {size} has final runs with several options: "
                    f"{'; '.join(options)}; keep those of one only"
                )
        return found


def studies(runs: Sequence[Record]) -> list[Study]:
    """Sort runs into studies, comparisons first; raises ValueError if runs of one have different targets."""
    if not runs:
        return []
    table = pd.DataFrame([_row(run) for run in runs])
    others = sorted(set(table["contender"]) - set(ORDER))
    table["contender"] = pd.Categorical(table["contender"], [*ORDER, *others], ordered=True)
    found = []
    for (recipe, task, name), of in table.groupby(["recipe", "task", "study"]):
        targets = {json.dumps(run["targets"], sort_keys=True): run["targets"] for run in of["run"]}
        labels = dict(of.groupby("contender", observed=True)["label"].first())
        found.append(study := Study(recipe, task, name, of, next(iter(targets.values())), labels))
        if len(targets) > 1:
            several = " and ".join(sorted(targets))
            raise ValueError(
                f"runs of {study.title} have different targets, {several}; keep those of one only"
            )
    return sorted(found, key=lambda each: (each.recipe, each.task, each.name != "comparison", each.name))


def _row(run: Record) -> dict[str, Any]:
    """Return the keys, the options as text, the accuracies (NaN for a diverged run), and times by target."""
    curve = [] if run["diverged"] else run["curve"]
    accuracies = [epoch["accuracy"] for epoch in curve] or [NAN]
    row = {key: run[key] for key in KEYS} | {"options": options_text(run), "run": run}
    row |= {"accuracy": accuracies[-1], "best": max(accuracies), "mean": fmean(accuracies)}
    row["train_loss"] = curve[-1]["train_loss"] if curve else NAN
    for kind, value in run["targets"].items():
        row |= zip((f"{kind} {unit}" for unit in UNITS), reached(run, kind, value), strict=True)
    return row


def reached(run: Record, kind: str, target: float) -> tuple[float, float]:
    """Return the epochs and seconds until a run reached a target; NaN if it never did, or diverged."""
    for epoch in () if run["diverged"] else run["curve"]:
        if epoch[kind] >= target if kind == "accuracy" else epoch[kind] <= target:
            return float(epoch["epoch"]), float(epoch[clock(run)])
    return NAN, NAN


def clock(run: Record) -> str:
    """Name the time of a run: that of the processor on a CPU, which other runs share, else the wall's."""
    return "processor_seconds" if run["environment"]["processor"] == "cpu" else "seconds"


def options_text(run: Record) -> str:
    """Write a run's options; old records may also name what decided a sample's half of its batch."""
    halves = run.get("halves", "random")
    options = run["options"] | ({} if halves == "random" else {"halves": halves})
    each = (f"{v:g}" if type(v) in (int, float) else str(v) for v in options.values())
    return ", ".join(map("=".join, zip(options, each, strict=True)))


def target_label(kind: str, value: float) -> str:
    """Name a target as tables do."""
    return f"accuracy ≥ {100 * value:g} %" if kind == "accuracy" else f"loss ≤ {value:g}"


# Final runs


def comparison_table(study: Study) -> str:
    """Return a row a batch size, contender and options; the best mean of runs that all have it is bold."""
    head = ["batch", "optimizer", "options", "n", "diverged"]
    for kind, value in study.targets.items():
        head += [f"{target_label(kind, value)}: reached", *UNITS]
    head += ["final accuracy %", "best accuracy %", "final train loss"]
    texts, scores = [], []
    for (size, *_), group in study.phase("final").groupby([*SIDE, "options"], observed=True):
        first, n = group.iloc[0], len(group)
        text: list[object] = [size, first["label"], first["options"], n, group["diverged"].sum()]
        score = {}  # by column; the lowest is the best
        for kind in study.targets:
            epochs, seconds = (group[f"{kind} {unit}"] for unit in UNITS)
            text.append(f"{epochs.count()} of {n}")
            for times, digits in ((epochs, 1), (seconds, 2 if seconds.mean() < 10 else 1)):
                score[len(text)] = times.mean() if times.count() == n > 1 else NAN
                text.append(plus_minus(times, digits))
        score[len(text)] = -group["accuracy"].mean() if group["accuracy"].count() > 1 else NAN
        text += [plus_minus(group[name], 2, 100.0) for name in ("accuracy", "best")]
        texts.append([*text, plus_minus(group["train_loss"], 4)])
        scores.append(score)
    cells = pd.DataFrame(texts).astype(str)
    ranks = pd.DataFrame(scores).reindex(columns=cells.columns)
    best_of_all = ranks == ranks.groupby(cells[0]).transform("min")
    return markdown_table(head, cells.mask(best_of_all, "**" + cells + "**").to_numpy())


def fop_table(study: Study) -> str | None:
    """Say how many times fewer epochs and seconds FOP takes than every other; None without it or others."""
    groups, rows = study.groups(), []
    for (size, name), other in groups.items():
        fop = groups.get((size, "fop"))
        if fop is not None and name != "fop":
            columns = [f"{kind} {unit}" for kind in study.targets for unit in UNITS]
            ratios = (_ratio(fop[column], other[column]) for column in columns)
            final = compare(fop["accuracy"], other["accuracy"], low=False) or "–"
            rows.append([size, other["label"].iloc[0], *ratios, final])
    labels = [target_label(kind, value) for kind, value in study.targets.items()]
    head = [heading for label in labels for heading in (f"{label}: epochs", "seconds")]
    return markdown_table(["batch", "against", *head, "final accuracy"], rows) if rows else None


def _ratio(ours: pd.Series, theirs: pd.Series) -> str:
    if ours.isna().any() or theirs.isna().any():
        return f"– (FOP {ours.count()} of {len(ours)}, it {theirs.count()} of {len(theirs)})"
    ratio = theirs.mean() / ours.mean()
    if min(len(ours), len(theirs)) == 1:
        return f"{ratio:.2f} (single runs)"
    # The two vary independently of each other, by seeds of their own.
    error = ratio * math.hypot(theirs.std() / theirs.mean(), ours.std() / ours.mean())
    return f"{ratio:.2f} ± {error:.2f}, {compare(ours, theirs, low=True)}"


def options_table(study: Study) -> str | None:
    """Return all options of the final runs, the fixed ones too; None where the lines do not hold them."""
    rows = []
    for (size, _), group in study.groups().items():
        if (options := group["run"].iloc[0].get("all_options")) is not None:
            text = ", ".join(f"`{key}={value}`" for key, value in options.items()) or "–"
            rows.append([size, group["label"].iloc[0], text])
    return markdown_table(["batch", "optimizer", "all options given"], rows) if rows else None


# Tuning, and whether it is a fair comparison


def tuning_table(study: Study) -> str:
    """Return every tuning run, and which options went into the final runs."""
    chosen = {key: group["options"].iloc[0] for key, group in study.groups().items()}
    rows = []
    for _, run in study.phase("tuning").sort_values(["batch_size", "contender"], kind="stable").iterrows():
        used = chosen.get((run["batch_size"], run["contender"])) == run["options"]
        accuracies = ["–" if run["diverged"] else f"{100 * run[key]:.2f}" for key in ("mean", "accuracy")]
        ends = [*accuracies, "yes" if run["diverged"] else "no", "chosen" if used else ""]
        rows.append([*run[["batch_size", "label", "options", "seed"]], *ends])
    head = ["batch", "optimizer", "options", "seed", "mean accuracy %", "final accuracy %", "diverged", ""]
    return markdown_table(head, rows)


def unfair(study: Study) -> list[str]:
    """Say, loudly, everything in which contenders of a study were not treated alike."""
    found = []
    for size, runs in study.runs.groupby("batch_size"):
        tuning, final = (runs[runs["phase"] == phase] for phase in ("tuning", "final"))
        for what, of, column in (
            ("TUNING: tuning runs", tuning, None),
            ("SEEDS: seeds of the final runs", final, "seed"),
            ("EPOCHS: epochs", runs.drop_duplicates(["contender", "epochs"]), "epochs"),
        ):
            each = [of[of["contender"] == name] for name in study.labels]
            values = [
                "/".join(map(str, sorted(one[column]))) or "none" if column else str(len(one)) for one in each
            ]
            if len(set(values)) > 1:
                said = ", ".join(map(" ".join, zip(study.labels.values(), values, strict=True)))
                found.append(f"UNEQUAL {what} at batch {size}: {said}.")
    where = [run["environment"] for run in study.runs["run"]]
    if len(devices := {each["device"] for each in where}) > 1:
        found.append(f"SEVERAL DEVICES: {', '.join(sorted(devices))}; seconds are not of one machine.")
    if any(each["processor"] == "cpu" and each["threads"] != 1 for each in where):
        found.append("SEVERAL THREADS: processor seconds are the sum over the threads, not a run's time.")
    return found
