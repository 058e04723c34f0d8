"""What several ranks pay for a step on this machine: time, bytes, and the curvature that each keeps."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from fop import FOP, KFAC
from fop_bench.architectures import Architecture, architecture_of
from fop_bench.cost_model import INTERVAL, Method, Traffic, factor_bytes, plan_for, traffic
from fop_bench.loopback import loopback_bytes, noting_reduces, why_uncounted
from fop_bench.ranks import run_ranks
from fop_bench.scale_trace import ProfiledStep, profiled_step
from fop_bench.workloads import (
    CLASSES,
    LEARNING_RATE,
    MODELS,
    Trainer,
    Workload,
    expect_curvature,
    request_curvature,
    warm_up,
)

PLAIN_STEPS = 3  # timed plain steps in a row at every turn of an optimizer
CURVATURE = ("A", "G", "A_inv", "G_inv")


@dataclass(frozen=True)
class Contender:
    """An optimizer among several ranks, and what the cost model calls it."""

    label: str
    method: Method
    build: Callable[[nn.Module], Optimizer]


def _fop(mode: str) -> Callable[[nn.Module], Optimizer]:
    return lambda model: FOP(model, lr=LEARNING_RATE, distributed={"mode": mode})


CONTENDERS: dict[str, Contender] = {
    "sgd": Contender("SGD", "sgd", lambda m: SGD(m.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)),
    "kfac": Contender("K-FAC", "kfac", lambda m: KFAC(m, lr=LEARNING_RATE)),
    "fop": Contender("FOP", "compatible", lambda m: FOP(m, lr=LEARNING_RATE)),
    "fop-compatible": Contender("FOP compatible", "compatible", _fop("compatible")),
    "fop-lean": Contender("FOP lean", "lean", _fop("lean")),
}


@dataclass(frozen=True)
class Samples:
    """What one rank has seen of one optimizer.

    Attributes:
        plain_seconds: of every timed plain step.
        curvature_seconds: of every timed curvature step.
        plain_bytes: that the optimizer counted, of a plain step, by category.
        curvature_bytes: the same of a curvature step.
        plain_window: bytes through the loopback interface during PLAIN_STEPS plain steps, in every round.
        curvature_window: the same during a curvature step.
        plain_excess: bytes that gloo's reduce sent in these beyond those that were counted, in every round.
        curvature_excess: the same of a curvature step.
        factor_bytes: of factors and inverses on this rank.
        profiled: a curvature step under the profiler.
    """

    plain_seconds: list[float] = field(default_factory=list)
    curvature_seconds: list[float] = field(default_factory=list)
    plain_bytes: dict[str, float] = field(default_factory=dict)
    curvature_bytes: dict[str, float] = field(default_factory=dict)
    plain_window: list[int] = field(default_factory=list)
    curvature_window: list[int] = field(default_factory=list)
    plain_excess: list[float] = field(default_factory=list)
    curvature_excess: list[float] = field(default_factory=list)
    factor_bytes: int = 0
    profiled: ProfiledStep | None = None


@dataclass(frozen=True)
class Carried:
    """Bytes through the loopback interface as a multiple of those counted and computed, of all ranks.

    Attributes:
        ratio: the smallest of all rounds: what other programs send can only add to it.
        expected: what it should be, since gloo's reduce sends more than it must; see `gloo_reduce_bytes`.
    """

    ratio: float
    expected: float


@dataclass(frozen=True)
class Transport:
    """What the operating system says of the bytes in each kind of step; a None is explained in `missing`."""

    plain: Carried | None
    curvature: Carried | None
    missing: str | None


@dataclass(frozen=True)
class Measurement:
    """One optimizer on so many ranks; times in seconds, medians of every rank, bytes means over the ranks."""

    ranks: int
    optimizer: str
    interval: int | None
    plain_seconds: list[float]
    curvature_seconds: list[float] | None
    amortised_seconds: float
    ratio_to_sgd: float
    traffic: Traffic
    predicted: Traffic
    amortised_bytes: float
    predicted_bytes: float
    ratio_to_ddp: float | None
    transport: Transport
    factor_bytes: list[int]
    predicted_factor_bytes: list[int]
    inversion_seconds: list[float] | None
    samples: list[Samples]


def contenders(ranks: int, modes: Sequence[str]) -> list[str]:
    """Name the optimizers that are measured on so many ranks."""
    return ["sgd", "kfac", *(["fop"] if ranks == 1 else [f"fop-{mode}" for mode in modes])]


def measure_scale(
    workload: Workload,
    ranks: int,
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    traces: Path | None = None,
) -> list[Measurement]:
    """Measure all optimizers on ``ranks`` new processes of this machine.

    Args:
        workload: model, and batch of every rank.
        ranks: number of processes.
        modes: of FOP, "compatible" or "lean".
        rounds: turns of every optimizer.
        seconds: limit for all of it.
        traces: folder for a trace of rank 0's curvature step of every optimizer that has one.

    Raises:
        RuntimeError: a process failed.
        TimeoutError: they have not ended in time.
    """
    names = contenders(ranks, modes)
    # Read when a process loads torch: otherwise the profiler announces its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    by_rank = run_ranks(_measure_rank, ranks, workload, names, rounds, traces, seconds=seconds)
    architecture = architecture_of(MODELS[workload.model][0](), workload.model)
    of = {name: [samples[name] for samples in by_rank] for name in names}
    sgd = max(statistics.median(each.plain_seconds) for each in of["sgd"])
    return [_evaluate(architecture, ranks, name, of[name], sgd) for name in names]


# On one rank


def _measure_rank(
    workload: Workload, names: Sequence[str], rounds: int, traces: Path | None
) -> dict[str, Samples]:
    trainers = {name: _prepare(workload, name) for name in names}
    for trainer in trainers.values():
        warm_up(trainer)
    samples = {name: Samples() for name in names}
    for number in range(rounds):
        # A B C D, then B C D A, …: drift hits all alike, and nobody always follows the same neighbour.
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            _take_turn(trainers[name], samples[name])
    for name, trainer in trainers.items():
        samples[name] = replace(samples[name], factor_bytes=_factor_bytes(trainer.optimizer))
        if request_curvature(trainer.optimizer):
            trace = None
            if traces is not None and dist.is_initialized() and dist.get_rank() == 0:
                trace = traces / f"trace-{dist.get_world_size()}-{name}.json.gz"
            samples[name] = replace(samples[name], profiled=profiled_step(trainer, trace))
    return samples


def _prepare(workload: Workload, name: str) -> Trainer:
    build, shape = MODELS[workload.model]
    torch.manual_seed(0)
    model = build()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))
    inputs = torch.randn(workload.batch_size, *shape)
    targets = torch.randint(CLASSES, (workload.batch_size,))
    return Trainer(model, CONTENDERS[name].build(model), inputs, targets, workload.bf16)


def _take_turn(trainer: Trainer, samples: Samples) -> None:
    """Take some plain steps and, where there is such a thing, a curvature step after them.

    An untimed plain step before them brings the caches back to this model.
    """
    expect_curvature(trainer.optimizer, due=False)
    trainer.step()
    sent = _take_steps(
        trainer, PLAIN_STEPS, samples.plain_seconds, samples.plain_window, samples.plain_excess
    )
    samples.plain_bytes.update({what: count / PLAIN_STEPS for what, count in sent.items()})
    if request_curvature(trainer.optimizer):
        expect_curvature(trainer.optimizer, due=True)
        sent = _take_steps(
            trainer, 1, samples.curvature_seconds, samples.curvature_window, samples.curvature_excess
        )
        samples.curvature_bytes.update(sent)


def _take_steps(
    trainer: Trainer, steps: int, seconds: list[float], window: list[int], excess: list[float]
) -> dict[str, float]:
    """Take steps, note their times and the bytes of the interface, and return the bytes that were counted."""
    before, at_start = _sent(trainer.optimizer), _loopback_bytes()
    noted: list[float] = []
    with noting_reduces(noted):
        for _ in range(steps):
            start = time.perf_counter()
            trainer.step()
            seconds.append(time.perf_counter() - start)
    at_end, after = _loopback_bytes(), _sent(trainer.optimizer)
    if at_start is not None and at_end is not None:
        window.append(at_end - at_start)
        excess.append(sum(noted))
    counts = {what: count - before.get(what, 0.0) for what, count in after.items()}
    return {what: count for what, count in counts.items() if count}


def _loopback_bytes() -> int | None:
    """Read the interface's counter while no rank sends anything; None for a single rank, or uncounted."""
    if not dist.is_initialized():
        return None
    dist.barrier()
    count = None if why_uncounted() else loopback_bytes()
    dist.barrier()
    return count


def _sent(optimizer: Optimizer) -> Mapping[str, float]:
    return optimizer.bytes_sent if isinstance(optimizer, FOP) else {}


def _factor_bytes(optimizer: Optimizer) -> int:
    held = [state[key] for state in optimizer.state.values() for key in CURVATURE if key in state]
    return sum(_bytes_of(tensor) for tensor in held)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Over all ranks


def _evaluate(
    architecture: Architecture, ranks: int, name: str, samples: list[Samples], sgd: float
) -> Measurement:
    contender = CONTENDERS[name]
    predicted = traffic(architecture, ranks, contender.method)
    # What DistributedDataParallel sends is not counted by anybody; the interface's count includes it.
    counted = Traffic(
        predicted.wrapper,
        _mean([each.plain_bytes for each in samples]),
        _mean([each.curvature_bytes for each in samples]),
    )
    plain = [statistics.median(each.plain_seconds) for each in samples]
    has_curvature = bool(samples[0].curvature_seconds)
    curvature = [statistics.median(each.curvature_seconds) for each in samples] if has_curvature else None
    amortised = max(plain)
    if curvature is not None:
        amortised = (max(plain) * (INTERVAL - 1) + max(curvature)) / INTERVAL
    baseline = traffic(architecture, ranks, "sgd").wrapper
    profiled = [each.profiled for each in samples if each.profiled is not None]
    plan = plan_for(architecture.layers, ranks)
    return Measurement(
        ranks=ranks,
        optimizer=name,
        interval=INTERVAL if has_curvature else None,
        plain_seconds=plain,
        curvature_seconds=curvature,
        amortised_seconds=amortised,
        ratio_to_sgd=amortised / sgd,
        traffic=counted,
        predicted=predicted,
        amortised_bytes=counted.amortised(),
        predicted_bytes=predicted.amortised(),
        ratio_to_ddp=counted.amortised() / baseline if baseline else None,
        transport=_transport(counted, samples),
        factor_bytes=[each.factor_bytes for each in samples],
        predicted_factor_bytes=factor_bytes(architecture.layers, plan) if has_curvature else [0] * ranks,
        inversion_seconds=[each.inversion_seconds for each in profiled] or None,
        samples=samples,
    )


def _mean(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    whats = sorted({what for each in of_ranks for what in each})
    return {what: sum(each.get(what, 0.0) for each in of_ranks) / len(of_ranks) for what in whats}


def _transport(counted: Traffic, samples: list[Samples]) -> Transport:
    ranks = len(samples)
    if ranks == 1:
        return Transport(None, None, "one rank sends nothing")
    if (why := why_uncounted()) is not None:
        return Transport(None, None, why)

    def carried(window: list[int], excess: float, sent: Mapping[str, float], steps: int) -> Carried:
        total = ranks * steps * (counted.wrapper + sum(sent.values()))
        return Carried(min(window) / total, 1 + excess / total)

    # All ranks read the same counter, and all rounds send the same.
    first = samples[0]
    excess = sum(each.plain_excess[0] for each in samples)
    plain = carried(first.plain_window, excess, counted.plain, PLAIN_STEPS)
    if not first.curvature_window:
        return Transport(plain, None, "no curvature steps")
    excess = sum(each.curvature_excess[0] for each in samples)
    return Transport(plain, carried(first.curvature_window, excess, counted.curvature, 1), None)
