"""Time and peak memory per step of the optimizers, side by side."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fop_bench.workloads import COMPARED, PLAIN_STEPS, Trainer, Workload, amortised, in_turns, prepare

M_MMAP_THRESHOLD = -3  # glibc's name and number
MMAP_BYTES = 64 * 1024
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes of a step above those in use before the model was built.

    On a GPU the bytes are the allocator's (`max_memory_allocated`), on a CPU the process's resident set.
    A None is explained in `missing`.
    """

    plain_bytes: int | None
    curvature_bytes: int | None
    missing: str | None


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
    trainers = {name: prepare(workload, name, device) for name in COMPARED}
    intervals = {name: trainer.interval for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.warm_up()
    samples = {name: Samples([], []) for name in COMPARED}
    for names in in_turns(COMPARED, rounds):
        for name in names:
            _take_turn(trainers[name], samples[name])
        on_round()
    sgd = statistics.median(samples["sgd"].plain)
    measured = []
    for name, seen in samples.items():
        plain = statistics.median(seen.plain)
        curvature = statistics.median(seen.curvature) if seen.curvature else None
        mean = amortised(plain, curvature, intervals[name])
        ratios = mean / sgd, plain / sgd
        measured.append(
            Measurement(workload, name, intervals[name], plain, curvature, mean, *ratios, memory[name], seen)
        )
    return measured


def _take_turn(trainer: Trainer, samples: Samples) -> None:
    """Time some plain steps and, where there is such a thing, a curvature step after them.

    An untimed plain step before them brings the caches back to this model. On a GPU the host does not wait
    between the steps, as in real training.
    """
    cuda = trainer.inputs.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(trainer.inputs.device)
    marks: list[Any] = []  # events on the device's own stream, or the host's seconds

    def step(curvature: bool) -> None:
        trainer.step(curvature)
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    for _ in range(1 + PLAIN_STEPS):
        step(curvature=False)
    if trainer.request_curvature():
        step(curvature=True)
    if cuda:
        marks[-1].synchronize()
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(marks)]
    samples.plain.extend(seconds[:PLAIN_STEPS])
    samples.curvature.extend(seconds[PLAIN_STEPS:])


# --- Peak memory, with one model alive at a time


def peak_memory(workload: Workload, device: torch.device) -> Mapping[str, PeakMemory]:
    """Measure the peak of a plain and of a curvature step for every optimizer.

    Call it while no other model is on the device.
    """
    if device.type == "cuda":
        return _measure_all(workload, device)
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(COMPARED, PeakMemory(None, None, "on a CPU only Linux's /proc tells the peak"))
    # The resident set of this process would hold what earlier measurements left behind: take a fresh one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure_all_on_cpu, workload, torch.get_num_threads()).result()


def _measure_all_on_cpu(workload: Workload, threads: int) -> Mapping[str, PeakMemory]:
    torch.set_num_threads(threads)
    # Tensors get pages of their own, so that freed ones leave the resident set at once.
    LIBC.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    try:
        _reset_peak(torch.device("cpu"))
    except OSError as error:
        return dict.fromkeys(COMPARED, PeakMemory(None, None, f"the peak cannot be reset: {error}"))
    return _measure_all(workload, torch.device("cpu"))


def _measure_all(workload: Workload, device: torch.device) -> Mapping[str, PeakMemory]:
    # Whoever comes first also pays for libraries and their workspaces, which stay: that is not counted.
    _measure(workload, "fop", device)
    return {name: _measure(workload, name, device) for name in COMPARED}


def _measure(workload: Workload, name: str, device: torch.device) -> PeakMemory:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        LIBC.malloc_trim(0)
    before = _reset_peak(device)
    trainer = prepare(workload, name, device)
    trainer.warm_up()
    _reset_peak(device)
    for _ in range(2):
        trainer.step(curvature=False)
    plain = _peak(device) - before
    _reset_peak(device)
    if not trainer.request_curvature():
        return PeakMemory(plain, None, "no curvature steps")
    trainer.step(curvature=True)
    return PeakMemory(plain, _peak(device) - before, None)


def _reset_peak(device: torch.device) -> int:
    """Forget the peak so far and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
