"""Time and peak memory per step of the optimizers, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fop_bench.memory import PeakMemory, peak_memory
from fop_bench.optimizers import CONTENDERS
from fop_bench.workloads import Trainer, Workload, expect_curvature, prepare, request_curvature, warm_up

PLAIN_STEPS = 3  # timed plain steps in a row at every turn of an optimizer


@dataclass(frozen=True)
class Samples:
    """Seconds of every timed step."""

    plain: list[float]
    curvature: list[float]


@dataclass(frozen=True)
class Measurement:
    """What a step of one optimizer costs; times in seconds, medians over `samples`.

    `amortised_seconds` is ((interval - 1) · plain + curvature) / interval, the steady state at the default
    interval; `ratio_to_sgd` sets it against SGD's, `plain_ratio_to_sgd` sets the plain median against it.
    """

    workload: Workload
    optimizer: str
    interval: int | None
    plain_seconds: float
    curvature_seconds: float | None
    amortised_seconds: float
    ratio_to_sgd: float
    plain_ratio_to_sgd: float
    memory: PeakMemory
    samples: Samples


def measure_overhead(
    workload: Workload, device: torch.device, rounds: int, on_round: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measure every optimizer on one workload: memory first, one by one, then time, in turns."""
    memory = peak_memory(workload, device)
    trainers = {name: prepare(workload, name, device) for name in CONTENDERS}
    intervals = {name: trainer.interval for name, trainer in trainers.items()}
    for trainer in trainers.values():
        warm_up(trainer)
    samples = {name: Samples([], []) for name in CONTENDERS}
    names = list(CONTENDERS)
    for number in range(rounds):
        # A B C D, then B C D A, …: drift hits all alike, and nobody always follows the same neighbour.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _take_turn(trainers[name], samples[name])
        on_round()
    sgd = statistics.median(samples["sgd"].plain)
    return [_evaluate(workload, name, intervals[name], samples[name], memory[name], sgd) for name in names]


def _take_turn(trainer: Trainer, samples: Samples) -> None:
    """Time some plain steps and, where there is such a thing, a curvature step after them.

    An untimed plain step before them brings the caches back to this model. On a GPU the host does not
    wait between the steps, as in real training.
    """
    clock = _Clock(trainer.inputs.device)
    expect_curvature(trainer.optimizer, due=False)
    trainer.step()
    clock.mark()
    for _ in range(PLAIN_STEPS):
        expect_curvature(trainer.optimizer, due=False)
        trainer.step()
        clock.mark()
    has_curvature = request_curvature(trainer.optimizer)
    if has_curvature:
        expect_curvature(trainer.optimizer, due=True)
        trainer.step()
        clock.mark()
    seconds = clock.intervals()
    samples.plain.extend(seconds[:PLAIN_STEPS])
    samples.curvature.extend(seconds[PLAIN_STEPS:])


class _Clock:
    """Marks points in time: on the device's own stream for a GPU, on the host's clock for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        if self._cuda:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Give the seconds from each mark to the next."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in zip(self._times[:-1], self._times[1:], strict=True)]


def _evaluate(
    workload: Workload, name: str, interval: int | None, samples: Samples, memory: PeakMemory, sgd: float
) -> Measurement:
    plain = statistics.median(samples.plain)
    curvature = statistics.median(samples.curvature) if samples.curvature else None
    amortised = plain
    if curvature is not None and interval is not None:
        amortised = (plain * (interval - 1) + curvature) / interval
    return Measurement(
        workload=workload,
        optimizer=name,
        interval=interval,
        plain_seconds=plain,
        curvature_seconds=curvature,
        amortised_seconds=amortised,
        ratio_to_sgd=amortised / sgd,
        plain_ratio_to_sgd=plain / sgd,
        memory=memory,
        samples=samples,
    )


def workloads(
    models: Sequence[str], batch_sizes: Sequence[int], precisions: Sequence[bool]
) -> list[Workload]:
    """Combine models, batch sizes and precisions (True for bf16 autocast)."""
    return [
        Workload(model, batch_size, bf16)
        for model in models
        for batch_size in batch_sizes
        for bf16 in precisions
    ]
