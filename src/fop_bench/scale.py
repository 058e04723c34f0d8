"""What several ranks pay for a step on this machine: time, bytes, and the curvature that each keeps."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from fop import FOP, KFAC
from fop.curvature import entry_names
from fop_bench.architectures import Architecture, architecture_of
from fop_bench.cost_model import INTERVAL, Method, Traffic, factor_bytes, plan_for, traffic
from fop_bench.scale_trace import ProfiledStep, profiled_step
from fop_bench.workloads import LEARNING_RATE, MODELS, PLAIN_STEPS, Trainer, Workload, amortised, in_turns
from fop_bench.world import run_ranks

CURVATURE = entry_names()


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
class Steps:
    """What one rank has seen of one optimizer's plain steps, or of its curvature steps."""

    seconds: list[float] = field(default_factory=list)  # of every timed step
    bytes: dict[str, float] = field(default_factory=dict)  # of one step, as the optimizer counts, by category
    window: list[int] = field(default_factory=list)  # through the loopback interface, in every round
    excess: list[float] = field(default_factory=list)  # sent by gloo's reduce beyond what was counted


@dataclass(frozen=True)
class Samples:
    """What one rank has seen of one optimizer; ``factor_bytes`` are those of factors and inverses on it."""

    plain: Steps = field(default_factory=Steps)
    curvature: Steps = field(default_factory=Steps)
    factor_bytes: int = 0
    profiled: ProfiledStep | None = None


@dataclass(frozen=True)
class Carried:
    """Bytes through the loopback interface as a multiple of those counted and computed, of all ranks."""

    ratio: float  # the smallest of all rounds: what other programs send can only add to it
    expected: float  # since gloo's reduce sends more than it must; see `gloo_reduce_bytes`


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


def measure_scale(
    workload: Workload,
    ranks: int,
    modes: Sequence[str],
    rounds: int,
    seconds: float,
    traces: Path | None = None,
) -> list[Measurement]:
    """Measure all optimizers, FOP in these modes, on ``ranks`` new processes of this machine.

    The workload has the batch of one rank. Raises RuntimeError if a process failed, and TimeoutError if they
    have not ended after so many seconds. Traces of a curvature step go into the folder ``traces``.
    """
    names = ["sgd", "kfac", *(["fop"] if ranks == 1 else [f"fop-{mode}" for mode in modes])]
    # Read when a process loads torch: otherwise the profiler announces its start and end on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    by_rank = run_ranks(_measure_rank, ranks, workload, names, rounds, traces, seconds=seconds)
    architecture = architecture_of(MODELS[workload.model][0](), workload.model)
    of = {name: [samples[name] for samples in by_rank] for name in names}
    sgd = max(statistics.median(each.plain.seconds) for each in of["sgd"])
    return [_evaluate(architecture, ranks, name, of[name], sgd) for name in names]


# --- On one rank


def _measure_rank(
    workload: Workload, names: Sequence[str], rounds: int, traces: Path | None
) -> dict[str, Samples]:
    trainers = {name: _prepare(workload, name) for name in names}
    for trainer in trainers.values():
        trainer.warm_up()
    samples = {name: Samples() for name in names}
    for turns in in_turns(names, rounds):
        for name in turns:
            _take_turn(trainers[name], samples[name])
    for name, trainer in trainers.items():
        states = trainer.optimizer.state.values()
        held = sum(state[key].nbytes for state in states for key in CURVATURE if key in state)
        profiled = None
        if trainer.request_curvature():
            trace = None
            if traces is not None and dist.is_initialized() and dist.get_rank() == 0:
                trace = traces / f"trace-{dist.get_world_size()}-{name}.json.gz"
            profiled = profiled_step(trainer, trace)
        samples[name] = replace(samples[name], factor_bytes=held, profiled=profiled)
    return samples


def _prepare(workload: Workload, name: str) -> Trainer:
    torch.manual_seed(0)
    model = MODELS[workload.model][0]()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    torch.manual_seed(1 + (dist.get_rank() if dist.is_initialized() else 0))
    inputs, targets = workload.batch(torch.device("cpu"))
    return Trainer(model, CONTENDERS[name].build(model), inputs, targets, workload.bf16)


def _take_turn(trainer: Trainer, samples: Samples) -> None:
    """Take some plain steps and, where there is such a thing, a curvature step after them.

    An untimed plain step before them brings the caches back to this model.
    """
    trainer.step(curvature=False)
    _take_steps(trainer, PLAIN_STEPS, samples.plain)
    if trainer.request_curvature():
        _take_steps(trainer, 1, samples.curvature, due=True)


def _take_steps(trainer: Trainer, steps: int, seen: Steps, due: bool = False) -> None:
    optimizer = trainer.optimizer
    before = dict(optimizer.bytes_sent) if isinstance(optimizer, FOP) else {}
    at_start = _interface_bytes()
    with noting_reduces() as noted:
        for _ in range(steps):
            start = time.perf_counter()
            trainer.step(due)
            seen.seconds.append(time.perf_counter() - start)
    at_end = _interface_bytes()
    if at_start is not None and at_end is not None:
        seen.window.append(at_end - at_start)
        seen.excess.append(sum(noted))
    after = optimizer.bytes_sent if isinstance(optimizer, FOP) else {}
    counts = {what: (count - before.get(what, 0.0)) / steps for what, count in after.items()}
    seen.bytes.update({what: count for what, count in counts.items() if count})


def _interface_bytes() -> int | None:
    """Read the interface's counter while no rank sends anything; None for a single rank, or uncounted."""
    if not dist.is_initialized():
        return None
    dist.barrier()
    count = loopback_bytes()
    dist.barrier()
    return None if isinstance(count, str) else count


# --- Bytes that processes on this machine send each other, as the operating system counts them

COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")
SEGMENT = 2**20  # bytes, gloo's largest


def loopback_bytes() -> int | str:
    """Return the bytes sent through the loopback interface by all programs, or why they are not known."""
    try:
        return int(COUNTER.read_text())
    except (OSError, ValueError) as error:
        return f"the loopback interface's counter cannot be read: {error}"


def gloo_reduce_bytes(size: int, ranks: int) -> float:
    """Return the bytes that a rank sends in gloo's reduce of ``size`` bytes, on average over the ranks.

    The sums are scattered over a ring in S segments of 1 MiB at most, two or more for each rank. All but two
    are sent, where S(W-1)/W would do. Then they are gathered on one rank (gloo/reduce.cc).
    """
    if ranks == 1:
        return 0.0
    segments = max(2, math.ceil(size / SEGMENT / ranks)) * ranks
    return size * (1 - 2 / segments) + size / ranks * (ranks - 1) / ranks


@contextmanager
def noting_reduces() -> Iterator[list[float]]:
    """Note of every reduce how many bytes gloo sends beyond the n(W-1)/W that a pipeline of ranks would."""
    reduce, noted = dist.reduce, []

    def noting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        ranks = dist.get_world_size(options.get("group"))
        noted.append(gloo_reduce_bytes(tensor.nbytes, ranks) - tensor.nbytes * (ranks - 1) / ranks)
        return reduce(tensor, *args, **options)

    dist.reduce = noting
    try:
        yield noted
    finally:
        dist.reduce = reduce


# --- Over all ranks


def _evaluate(
    architecture: Architecture, ranks: int, name: str, samples: list[Samples], sgd: float
) -> Measurement:
    predicted = traffic(architecture, ranks, CONTENDERS[name].method)
    # What DistributedDataParallel sends is not counted by anybody; the interface's count includes it.
    plain_bytes, curvature_bytes = (
        _mean(each.plain for each in samples),
        _mean(each.curvature for each in samples),
    )
    counted = Traffic(predicted.wrapper, plain_bytes, curvature_bytes)
    plain = [statistics.median(each.plain.seconds) for each in samples]
    has_curvature = bool(samples[0].curvature.seconds)
    curvature = [statistics.median(each.curvature.seconds) for each in samples] if has_curvature else None
    interval = INTERVAL if has_curvature else None
    seconds = amortised(max(plain), max(curvature) if curvature else None, interval)
    baseline = traffic(architecture, ranks, "sgd").wrapper
    profiled = [each.profiled for each in samples if each.profiled is not None]
    plan = plan_for(architecture.layers, ranks)
    return Measurement(
        ranks=ranks,
        optimizer=name,
        interval=interval,
        plain_seconds=plain,
        curvature_seconds=curvature,
        amortised_seconds=seconds,
        ratio_to_sgd=seconds / sgd,
        traffic=counted,
        predicted=predicted,
        amortised_bytes=counted.amortised(),
        predicted_bytes=predicted.amortised(),
        ratio_to_ddp=counted.amortised() / baseline if baseline else None,
        transport=transport(counted, samples),
        factor_bytes=[each.factor_bytes for each in samples],
        predicted_factor_bytes=factor_bytes(architecture.layers, plan) if has_curvature else [0] * ranks,
        inversion_seconds=[each.inversion_seconds for each in profiled] or None,
        samples=samples,
    )


def _mean(of_ranks: Iterable[Steps]) -> dict[str, float]:
    counts = [each.bytes for each in of_ranks]
    whats = sorted(set().union(*counts))
    return {what: statistics.fmean(each.get(what, 0.0) for each in counts) for what in whats}


def transport(counted: Traffic, samples: list[Samples]) -> Transport:
    """Compare the operating system's count of the bytes with the optimizers' own, over all ranks."""
    ranks = len(samples)
    if ranks == 1:
        return Transport(None, None, "one rank sends nothing")
    if isinstance(why := loopback_bytes(), str):
        return Transport(None, None, why)

    def carried(seen: list[Steps], sent: Mapping[str, float], steps: int) -> Carried:
        # All ranks read the same counter, and all rounds send the same.
        total = ranks * steps * (counted.wrapper + sum(sent.values()))
        return Carried(min(seen[0].window) / total, 1 + sum(each.excess[0] for each in seen) / total)

    plain = carried([each.plain for each in samples], counted.plain, PLAIN_STEPS)
    if not samples[0].curvature.window:
        return Transport(plain, None, "no curvature steps")
    return Transport(plain, carried([each.curvature for each in samples], counted.curvature, 1), None)
