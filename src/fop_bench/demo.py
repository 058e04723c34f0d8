"""The demo: four optimizers on real digits at small, large and full batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fop_bench.digits import TRAIN_SIZE, Digits, digits
from fop_bench.models import digits_cnn
from fop_bench.optimizers import CONTENDERS, contender
from fop_bench.summary import Summary, summarise
from fop_bench.training import Run, Samples, train

TARGET = 0.97
TUNING_SEED = 0
SELECTION = "highest mean validation accuracy over the epochs of one run with the tuning seed"


@dataclass(frozen=True)
class Plan:
    """How many epochs each batch size gets, the same for every optimizer, and the seeds of the final runs."""

    epochs: Mapping[int, int]
    seeds: tuple[int, ...]

    def total_runs(self) -> int:
        """Count the training runs, those of the learning-rate search included."""
        rates = sum(len(each.learning_rates) for each in CONTENDERS.values())
        return len(self.epochs) * (rates + len(CONTENDERS) * len(self.seeds))


FULL = Plan(epochs={64: 10, 512: 25, TRAIN_SIZE: 50}, seeds=(1, 2, 3))
# For checks that everything works: too short for its numbers to mean anything.
QUICK = Plan(epochs={64: 2, 512: 2, TRAIN_SIZE: 2}, seeds=(1, 2))


@dataclass(frozen=True)
class Entry:
    """One optimizer at one batch size: the search, the rate it chose, the final runs and their summary."""

    batch_size: int
    optimizer: str
    learning_rate: float
    tuning: list[Run]
    runs: list[Run]
    summary: Summary


def run_demo(plan: Plan, device: torch.device, on_run: Callable[[str], None] = lambda _: None) -> list[Entry]:
    """Search the learning rates on the validation part, then train with the chosen ones and test.

    `on_run` is told what comes next before every training run.
    """
    data = digits(device)
    return [entry for batch_size in plan.epochs for entry in _compare(data, plan, batch_size, on_run)]


def _compare(data: Digits, plan: Plan, batch_size: int, on_run: Callable[[str], None]) -> list[Entry]:
    """Compare the optimizers at one batch size; they take turns, so that a slow minute slows all of them."""

    def run(name: str, rate: float, seed: int, held_out: Samples) -> Run:
        purpose = "tuning" if seed == TUNING_SEED else f"seed {seed}"
        on_run(f"batch {batch_size} · {contender(name).label} · lr {rate:g} · {purpose}")
        return train(
            digits_cnn,
            contender(name).build,
            data.train,
            held_out,
            learning_rate=rate,
            batch_size=batch_size,
            epochs=plan.epochs[batch_size],
            seed=seed,
        )

    tuning: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    grids = [each.learning_rates for each in CONTENDERS.values()]
    for rates in zip(*grids, strict=True):
        for name, rate in zip(CONTENDERS, rates, strict=True):
            tuning[name].append(run(name, rate, TUNING_SEED, data.validation))
    chosen = {name: best_learning_rate(runs) for name, runs in tuning.items()}
    final: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    for seed in plan.seeds:
        for name in CONTENDERS:
            final[name].append(run(name, chosen[name], seed, data.test))
    return [
        Entry(batch_size, name, chosen[name], tuning[name], runs, summarise(runs, TARGET))
        for name, runs in final.items()
    ]


def best_learning_rate(runs: list[Run]) -> float:
    """Choose by the mean accuracy over the epochs, which rewards speed and the end result alike.

    A diverged run loses against every other; if all diverged, the smallest learning rate is taken.
    """
    finished = [run for run in runs if not run.diverged]
    if not finished:
        return min(run.learning_rate for run in runs)
    best = max(finished, key=lambda run: statistics.fmean(epoch.accuracy for epoch in run.curve))
    return best.learning_rate
