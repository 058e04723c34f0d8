"""The runs of `fop-bench run` as studies of a data frame, and the tables of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from fop_bench.report import compare, markdown_table, plus_minus
from fop_bench.run_records import Run

# Known contenders stand in this order, the others behind them.
ORDER = ("sgd", "adamw", "lamb", "shampoo", "soap", "muon", "kfac", "fop")
KEYS = ("recipe", "task", "study", "phase", "contender", "label", "batch_size", "epochs", "seed", "diverged")
UNITS = ("epochs", "seconds")
NAN = math.nan


@dataclass(frozen=True)
class Study:
    """All runs of one study of a recipe on a task, one row of ``runs`` each.

    Columns: `KEYS`, the options as text, and what came out: final, best and mean ``accuracy``, final
    ``train_loss``, and by target "accuracy epochs", "accuracy seconds" and so on, NaN for a target that was
    missed and for a diverged run; "run" is the whole record.
    """

    recipe: str
    task: str
    name: str
    runs: pd.DataFrame

    @property
    def where(self) -> str:
        """Names it in an error."""
        return f"{self.recipe}, task {self.task}, study {self.name}"

    @property
    def targets(self) -> dict[str, float]:
        """What its runs are to reach: at least an ``accuracy``, at most a ``train_loss``."""
        return dict(self.runs["run"].iloc[0]["targets"])

    @property
    def labels(self) -> dict[str, str]:
        """Labels by contender, in the order of tables."""
        found = self.runs.sort_values("contender").drop_duplicates("contender")
        return dict(zip(found["contender"], found["label"], strict=True))

    def phase(self, phase: str) -> pd.DataFrame:
        """Return the runs of a phase."""
        return self.runs[self.runs["phase"] == phase]

    def groups(self) -> dict[tuple[int, str], pd.DataFrame]:
        """Return the final runs by batch size and contender; ValueError if a group has several options."""
        found = dict(tuple(self.phase("final").groupby(["batch_size", "contender"], observed=True)))
        for (size, contender), group in found.items():
            one_setting(group, f"{self.where}: {contender} at batch {size}")
        return found


def studies(runs: Sequence[Run]) -> list[Study]:
    """Sort runs into studies, comparisons first; raises ValueError if runs of one have different targets."""
    if not runs:
        return []
    table = pd.DataFrame([_row(run) for run in runs])
    others = sorted(set(table["contender"]) - set(ORDER))
    table["contender"] = pd.Categorical(table["contender"], [*ORDER, *others], ordered=True)
    by_name = table.groupby(["recipe", "task", "study"])
    found = [Study(recipe, task, name, each) for (recipe, task, name), each in by_name]
    for study in found:
        targets = sorted({json.dumps(run["targets"], sort_keys=True) for run in study.runs["run"]})
        if len(targets) > 1:
            raise ValueError(
                f"runs of {study.where} have different targets, {' and '.join(targets)}; "
                "keep those of one only"
            )
    return sorted(found, key=lambda each: (each.recipe, each.task, each.name != "comparison", each.name))


def _row(run: Run) -> dict[str, Any]:
    curve = [] if run["diverged"] else run["curve"]
    accuracies = [epoch["accuracy"] for epoch in curve] or [NAN]
    row = {key: run[key] for key in KEYS} | {"options": options_text(run), "run": run}
    row |= {"accuracy": accuracies[-1], "best": max(accuracies), "mean": fmean(accuracies)}
    row["train_loss"] = curve[-1]["train_loss"] if curve else NAN
    for kind, value in run["targets"].items():
        row |= {f"{kind} {unit}": each for unit, each in zip(UNITS, reached(run, kind, value), strict=True)}
    return row


def reached(run: Run, kind: str, target: float) -> tuple[float, float]:
    """Return the epochs and seconds until a run reached a target; NaN if it never did, or diverged."""
    for epoch in () if run["diverged"] else run["curve"]:
        if epoch[kind] >= target if kind == "accuracy" else epoch[kind] <= target:
            return float(epoch["epoch"]), float(epoch[clock(run)])
    return NAN, NAN


def clock(run: Run) -> str:
    """Name the time of a run: that of the processor on a CPU, which other runs share, else the wall's."""
    return "processor_seconds" if run["environment"]["processor"] == "cpu" else "seconds"


def options_text(run: Run) -> str:
    """Write a run's options, and its halves if they are not the usual random ones."""
    options = run["options"] | ({} if run["halves"] == "random" else {"halves": run["halves"]})
    return ", ".join(
        f"{key}={value:g}" if type(value) in (int, float) else f"{key}={value}"
        for key, value in options.items()
    )


def one_setting(group: pd.DataFrame, who: str) -> None:
    """Raise ValueError if runs that should differ in their seed only have several options."""
    options = sorted(set(group["options"]))
    if len(options) > 1:
        raise ValueError(
            f"{who} has final runs with several options: {'; '.join(options)}; keep those of one only"
        )


def target_label(kind: str, value: float) -> str:
    """Name a target as tables do."""
    return f"accuracy ≥ {100 * value:g} %" if kind == "accuracy" else f"loss ≤ {value:g}"


# Final runs


def comparison_table(study: Study) -> str:
    """Return a row a batch size and contender; the best mean of several runs, if all have it, is bold."""
    head = ["batch", "optimizer", "options", "n", "diverged"]
    for kind, value in study.targets.items():
        head += [f"{target_label(kind, value)}: reached", *UNITS]
    head += ["final accuracy %", "best accuracy %", "final train loss"]
    texts, scores = [], []
    for (size, _), group in study.groups().items():
        first, n = group.iloc[0], len(group)
        text: list[object] = [size, first["label"], first["options"], n, group["diverged"].sum()]
        score = [NAN] * len(text)
        for kind in study.targets:
            epochs, seconds = (group[f"{kind} {unit}"] for unit in UNITS)
            digits = 2 if seconds.mean() < 10 else 1
            text += [f"{epochs.count()} of {n}", plus_minus(epochs, 1), plus_minus(seconds, digits)]
            score += [NAN, *(each.mean() if each.count() == n > 1 else NAN for each in (epochs, seconds))]
        text += [plus_minus(group[name], 2, 100.0) for name in ("accuracy", "best")]
        text.append(plus_minus(group["train_loss"], 4))
        score += [-group["accuracy"].mean() if group["accuracy"].count() > 1 else NAN, NAN, NAN]
        texts.append(text)
        scores.append(score)
    cells, ranks = pd.DataFrame(texts).astype(str), pd.DataFrame(scores)
    best_of_all = ranks == ranks.groupby(cells[0]).transform("min")
    return markdown_table(head, cells.mask(best_of_all, "**" + cells + "**").to_numpy())


def fop_table(study: Study) -> str | None:
    """Say how many times fewer epochs and seconds FOP takes than every other; None without it or others."""
    groups, rows = study.groups(), []
    for (size, name), other in groups.items():
        fop = groups.get((size, "fop"))
        if fop is None or name == "fop":
            continue
        columns = [f"{kind} {unit}" for kind in study.targets for unit in UNITS]
        final = compare(fop["accuracy"], other["accuracy"], low=False)
        ratios = (_ratio(fop[column], other[column]) for column in columns)
        rows.append([size, other["label"].iloc[0], *ratios, final or "–"])
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

    def listed(runs: pd.DataFrame, column: str) -> list[str]:
        each = (runs[column][runs["contender"] == name] for name in study.labels)
        return ["/".join(map(str, sorted(values))) or "none" for values in each]

    for size, runs in study.runs.groupby("batch_size"):
        tuning, final = (runs[runs["phase"] == phase] for phase in ("tuning", "final"))
        treatments = {
            "TUNING: tuning runs": [str((tuning["contender"] == name).sum()) for name in study.labels],
            "SEEDS: seeds of the final runs": listed(final, "seed"),
            "EPOCHS: epochs": listed(runs.drop_duplicates(["contender", "epochs"]), "epochs"),
        }
        for what, values in treatments.items():
            if len(set(values)) > 1:
                each = map(" ".join, zip(study.labels.values(), values, strict=True))
                found.append(f"UNEQUAL {what} at batch {size}: {', '.join(each)}.")
    where = [run["environment"] for run in study.runs["run"]]
    if len(devices := {each["device"] for each in where}) > 1:
        found.append(f"SEVERAL DEVICES: {', '.join(sorted(devices))}; seconds are not of one machine.")
    if any(each["processor"] == "cpu" and each["threads"] != 1 for each in where):
        found.append("SEVERAL THREADS: processor seconds are the sum over the threads, not a run's time.")
    return found


# Maps


def maps(study: Study, batch_size: int) -> dict[str, pd.DataFrame]:
    """Return the maps of a batch size by title: FOP against K-FAC, one row a learning rate and damping.

    The columns up to "FOP train loss" are those of the table; then ``difference`` of the final accuracies, in
    points, and ``loss_ratio`` (log2), NaN where a run is missing or diverged, and ``lost``, whose runs
    diverged. Raises ValueError for a run without learning rate or damping, or several options at one point.
    """
    final = study.phase("final")[lambda runs: runs["batch_size"] == batch_size]
    parts = final["contender"].str.extract("^(?P<family>fop|kfac)(?P<ending>.*)")
    final = final.join(parts).dropna(subset="family")
    for axis in ("lr", "damping"):
        final[axis] = [run["options"].get(axis) for run in final["run"]]
        for name in final["contender"][final[axis].isna()]:
            raise ValueError(
                f"{study.where}: a run of {name} has no {axis!r} in its options; a map needs lr and damping"
            )
    found = {}
    for ending, runs in final.groupby("ending"):
        title = {"": "with KL clip", "-noclip": "without KL clip"}.get(ending, ending.strip("-"))
        where = f"{study.where}, batch {batch_size}"
        points = runs.groupby(["lr", "damping"])
        found[title] = pd.DataFrame([_point(lr, damping, each, where) for (lr, damping), each in points])
    return found


def _point(lr: float, damping: float, runs: pd.DataFrame, where: str) -> dict[str, Any]:
    sides = {label: runs[runs["family"] == name] for label, name in (("K-FAC", "kfac"), ("FOP", "fop"))}
    for label, side in sides.items():
        one_setting(side, f"{where}: {label}")
    lost = {
        label: f"{side['diverged'].sum()} of {len(side)}"
        for label, side in sides.items()
        if side["diverged"].any()
    }
    kfac, fop = (side["accuracy"] for side in sides.values())
    row: dict[str, Any] = {"lr": lr, "damping": damping, "n": f"{len(kfac)}/{len(fop)}"}
    row |= {f"{label} accuracy %": _final(side, "accuracy", 2, 100.0) for label, side in sides.items()}
    row["FOP − K-FAC"] = "–"
    row |= {f"{label} train loss": _final(side, "train_loss", 4, 1.0) for label, side in sides.items()}
    row |= {f"{label} lost": label in lost for label in sides}
    row["lost"] = "".join(f"{label} {count}\n" for label, count in lost.items())
    row |= {"difference": NAN, "loss_ratio": NAN, "verdict": None}
    if not lost and len(kfac) and len(fop):
        gap, error = 100 * (fop.mean() - kfac.mean()), 100 * math.hypot(kfac.sem(), fop.sem())
        spread = "" if math.isnan(error) else f" ± {error:.2f}"
        row["FOP − K-FAC"] = f"{'+' if gap > 0 else ''}{gap:.2f}{spread}"
        row |= {"difference": gap, "verdict": compare(fop, kfac, low=False)}
        above, below = (side["train_loss"].mean() for side in sides.values())
        row["loss_ratio"] = math.log2(above / below) if min(above, below) > 0 else NAN
    return row


def _final(side: pd.DataFrame, key: str, digits: int, scale: float) -> str:
    diverged = side["diverged"].sum()
    if side[key].count() == 0:
        return "diverged" if len(side) else "not run"
    lost = f" ({diverged} of {len(side)} diverged)" if diverged else ""
    return f"{side[key].mean() * scale:.{digits}f}{lost}"


def map_table(points: pd.DataFrame) -> str:
    """Return one row for every point: both final accuracies and losses, and the difference."""
    shown = points.loc[:, slice("lr", "FOP train loss")]
    shown = shown.assign(**{axis: shown[axis].map("{:g}".format) for axis in ("lr", "damping")})
    return markdown_table(shown, shown.to_numpy())


def map_sentence(title: str, points: pd.DataFrame) -> str:
    """Count the points at which FOP ends higher than K-FAC, lower, and within the spread."""
    compared = points[points["difference"].notna()]
    verdicts = compared["verdict"].value_counts()
    single = compared["difference"][compared["verdict"].isna()]
    parts = []
    if len(verdicts):
        counts = [verdicts.get(verdict, 0) for verdict in ("ahead", "behind", "within the spread")]
        parts.append(
            "by more than the spread (pooled standard deviation over the seeds) in {}, K-FAC higher than FOP "
            "in {}, within it in {}".format(*counts)
        )
    if len(single):
        parts.append(
            f"{'and ' if parts else ''}with single runs, which say nothing of the spread, in "
            f"{(single > 0).sum()}, lower in {(single < 0).sum()}, equal in {(single == 0).sum()}"
        )
    comparison = f"; FOP ends higher than K-FAC {', '.join(parts)}" if parts else ""
    lost = f"{points['K-FAC lost'].sum()} of K-FAC, {points['FOP lost'].sum()} of FOP"
    return (
        f"{title[:1].upper()}{title[1:]}: of {len(points)} points {len(compared)} can be compared"
        f"{comparison}. Points with a diverged run: {lost}."
    )
