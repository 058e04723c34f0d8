"""Statistics over the seeds of a measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fop_bench.training import Epoch, Run


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None for a single value) of `n` values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Summary:
    """Runs that differ in their seed only; epochs and seconds are over the `reached` runs alone."""

    runs: int
    diverged: int
    reached: int
    epochs: Statistic | None
    seconds: Statistic | None
    final_accuracy: Statistic | None


def statistic(values: Sequence[float]) -> Statistic | None:
    """Give mean and standard deviation of the values, or None if there are none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std, len(values))


def first_at(run: Run, target: float) -> Epoch | None:
    """Give the first epoch whose accuracy is at least the target, or None if there is none."""
    return next((epoch for epoch in run.curve if epoch.accuracy >= target), None)


def summarise(runs: Sequence[Run], target: float) -> Summary:
    """Sum runs up; a diverged run counts neither as reaching the target nor in the final accuracy."""
    finished = [run for run in runs if not run.diverged]
    hits = [hit for hit in (first_at(run, target) for run in finished) if hit is not None]
    return Summary(
        runs=len(runs),
        diverged=len(runs) - len(finished),
        reached=len(hits),
        epochs=statistic([hit.epoch for hit in hits]),
        seconds=statistic([hit.seconds for hit in hits]),
        final_accuracy=statistic([run.curve[-1].accuracy for run in finished]),
    )
