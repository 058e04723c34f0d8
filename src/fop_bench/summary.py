"""Statistics over the seeds of a measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fop_bench.training import Run


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None for a single value) of `n` values."""

    mean: float
    std: float | None
    n: int


def statistic(values: Iterable[float]) -> Statistic | None:
    """Return mean and standard deviation of the values that are not NaN, or None if there are none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def plus_minus(value: Statistic | None, digits: int, scale: float = 1.0) -> str:
    """Format a statistic as mean ± std, as the mean alone for a single value, or as a dash."""
    if value is None:
        return "–"
    mean = f"{value.mean * scale:.{digits}f}"
    return mean if value.std is None else f"{mean} ± {value.std * scale:.{digits}f}"


def compare(
    ours: Statistic | None, theirs: Statistic | None, *, low: bool
) -> Literal["ahead", "behind", "within the spread"] | None:
    """Compare two means by their pooled standard deviation; None, no claim, for single or missing values.

    With ``low`` the lower mean is ahead.
    """
    if ours is None or theirs is None or ours.std is None or theirs.std is None:
        return None
    squares = (ours.n - 1) * ours.std**2 + (theirs.n - 1) * theirs.std**2
    gain = theirs.mean - ours.mean if low else ours.mean - theirs.mean
    if abs(gain) <= math.sqrt(squares / (ours.n + theirs.n - 2)):
        return "within the spread"
    return "ahead" if gain > 0 else "behind"


@dataclass(frozen=True)
class Summary:
    """Runs that differ in their seed only; epochs and seconds are over the `reached` runs alone."""

    runs: int
    diverged: int
    reached: int
    epochs: Statistic | None
    seconds: Statistic | None
    final_accuracy: Statistic | None


def summarise(runs: Sequence[Run], target: float) -> Summary:
    """Sum runs up; a diverged run counts neither as reaching the target nor in the final accuracy."""
    finished = [run.curve for run in runs if not run.diverged]
    hits = [next((epoch for epoch in curve if epoch.accuracy >= target), None) for curve in finished]
    reached = [hit for hit in hits if hit is not None]
    return Summary(
        runs=len(runs),
        diverged=len(runs) - len(finished),
        reached=len(reached),
        epochs=statistic(hit.epoch for hit in reached),
        seconds=statistic(hit.seconds for hit in reached),
        final_accuracy=statistic(curve[-1].accuracy for curve in finished),
    )
