"""Runs of a study, grouped: those of a contender at a batch size, and what they reached."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fop_bench.run_records import Run
from fop_bench.summary import Statistic, statistic

Verdict = Literal["ahead of", "behind", "within the spread of"]

# Known contenders stand in this order, the others behind them.
ORDER = ("sgd", "adamw", "lamb", "shampoo", "soap", "muon", "kfac", "fop")


@dataclass(frozen=True)
class Target:
    """What a run is to reach: at least an accuracy, or at most a training loss."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"accuracy ≥ {100 * self.value:g} %" if self.kind == "accuracy" else f"loss ≤ {self.value:g}"

    def first(self, run: Run) -> Mapping[str, Any] | None:
        """Give the first epoch that reaches it; none of a diverged run does."""
        for epoch in () if run["diverged"] else run["curve"]:
            value = epoch[self.kind]
            if value >= self.value if self.kind == "accuracy" else value <= self.value:
                return dict(epoch)
        return None


@dataclass(frozen=True)
class Reached:
    """How many of n runs reached a target, and their epochs and seconds until then."""

    count: int
    n: int
    epochs: Statistic | None
    seconds: Statistic | None

    @property
    def all(self) -> bool:
        """Whether every run did."""
        return self.count == self.n


@dataclass(frozen=True)
class Group:
    """Final runs of a contender at a batch size, which differ in their seed only."""

    contender: str
    batch_size: int
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """The contender as tables name it."""
        return str(self.runs[0]["label"])

    @property
    def finished(self) -> list[Run]:
        """Those that did not diverge."""
        return [run for run in self.runs if not run["diverged"]]

    @property
    def diverged(self) -> int:
        """Number of those that did."""
        return len(self.runs) - len(self.finished)

    def reached(self, target: Target) -> Reached:
        """Say how many runs reached the target, and when."""
        hits = [(run, hit) for run in self.runs if (hit := target.first(run)) is not None]
        return Reached(
            len(hits),
            len(self.runs),
            statistic([hit["epoch"] for _, hit in hits]),
            statistic([hit[clock(run)] for run, hit in hits]),
        )

    def final(self, key: str) -> Statistic | None:
        """Give a value of the last epoch, over the runs that did not diverge."""
        return statistic([run["curve"][-1][key] for run in self.finished])

    def best_accuracy(self) -> Statistic | None:
        """Give the highest accuracy of any epoch, over the runs that did not diverge."""
        return statistic([max(epoch["accuracy"] for epoch in run["curve"]) for run in self.finished])


@dataclass(frozen=True)
class Study:
    """All runs of one study of a recipe on a task."""

    recipe: str
    task: str
    name: str
    runs: Sequence[Run]

    @property
    def targets(self) -> list[Target]:
        """What its runs are to reach."""
        return [Target(kind, value) for kind, value in self.runs[0]["targets"].items()]

    @property
    def batch_sizes(self) -> list[int]:
        """From the smallest to the largest."""
        return sorted({run["batch_size"] for run in self.runs})

    @property
    def labels(self) -> dict[str, str]:
        """Labels by contender, in the order of tables."""
        labels = {run["contender"]: str(run["label"]) for run in self.runs}
        return {name: labels[name] for name in sorted(labels, key=in_order)}

    def phase(self, phase: str) -> list[Run]:
        """Give the runs of a phase."""
        return [run for run in self.runs if run["phase"] == phase]

    def groups(self, batch_size: int | None = None) -> list[Group]:
        """Group the final runs, of one batch size or of all.

        Raises:
            ValueError: a contender has final runs with several options at a batch size.
        """
        found: dict[tuple[int, str], list[Run]] = defaultdict(list)
        for run in self.phase("final"):
            if batch_size in (None, run["batch_size"]):
                found[run["batch_size"], run["contender"]].append(run)
        keys = sorted(found, key=lambda key: (key[0], in_order(key[1])))
        for key in keys:
            one_setting(found[key], f"{self.recipe}, task {self.task}, study {self.name}")
        return [Group(contender, size, found[size, contender]) for size, contender in keys]


def in_order(contender: str) -> tuple[int, str]:
    """Give the sort key of a contender."""
    return (ORDER.index(contender) if contender in ORDER else len(ORDER), contender)


def studies(runs: Sequence[Run]) -> list[Study]:
    """Sort runs into studies: the comparisons first, then by name.

    Raises:
        ValueError: runs of a study have different targets.
    """
    found: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run["recipe"], run["task"], run["study"]].append(run)
    keys = sorted(found, key=lambda key: (key[0], key[1], key[2] != "comparison", key[2]))
    for key in keys:
        targets = {json.dumps(run["targets"], sort_keys=True) for run in found[key]}
        if len(targets) > 1:
            raise ValueError(
                f"runs of {key[0]}, task {key[1]}, study {key[2]} have different targets, "
                f"{' and '.join(sorted(targets))}; keep those of one only"
            )
    return [Study(*key, found[key]) for key in keys]


def one_setting(runs: Sequence[Run], where: str) -> None:
    """Raise ValueError if runs that should differ in their seed only have several options."""
    settings = sorted({settings_text(run) for run in runs})
    if len(settings) > 1:
        first = runs[0]
        raise ValueError(
            f"{where}: {first['contender']} at batch {first['batch_size']} has final runs with several "
            f"options: {'; '.join(settings)}; keep those of one only"
        )


def clock(run: Run) -> str:
    """Name the time of a run: that of the processor on a CPU, which other runs share, else the wall's."""
    return "processor_seconds" if run["environment"]["processor"] == "cpu" else "seconds"


def settings_text(run: Run) -> str:
    """Write a run's options, and its halves if they are not the usual random ones."""
    options = [f"{key}={value:g}" if _is_number(value) else f"{key}={value}" for key, value in _settings(run)]
    return ", ".join(options)


def _settings(run: Run) -> list[tuple[str, Any]]:
    halves = [] if run["halves"] == "random" else [("halves", run["halves"])]
    return [*run["options"].items(), *halves]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pooled_std(one: Statistic, two: Statistic) -> float | None:
    """Give the standard deviation of two groups about their own means; None if one is a single value."""
    if one.std is None or two.std is None:
        return None
    squares = (one.n - 1) * one.std**2 + (two.n - 1) * two.std**2
    return math.sqrt(squares / (one.n + two.n - 2))


def compare(ours: Statistic | None, theirs: Statistic | None, *, low: bool) -> Verdict | None:
    """Compare two means by their pooled standard deviation; None, no claim, if there are single values.

    Args:
        ours: the one that is "ahead of" or "behind" the other.
        theirs: the other.
        low: whether the lower one is ahead.
    """
    if ours is None or theirs is None or (spread := pooled_std(ours, theirs)) is None:
        return None
    gain = theirs.mean - ours.mean if low else ours.mean - theirs.mean
    if abs(gain) <= spread:
        return "within the spread of"
    return "ahead of" if gain > 0 else "behind"
