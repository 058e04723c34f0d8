"""A profiled curvature step: how long the inversions take, and what is sent behind the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from fop_bench.workloads import Trainer

BACKWARD = "backward"
INVERSION = "fop::inversion"
REDUCE = "gloo:reduce"

Span = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """How much of the reduces to the owners lies inside the backward pass, on one rank.

    Attributes:
        reduces: their number.
        started_inside: those that started before the backward pass ended.
        seconds: in which at least one of them was under way.
        seconds_inside: the part of these inside the backward pass.
    """

    reduces: int
    started_inside: int
    seconds: float
    seconds_inside: float


@dataclass(frozen=True)
class ProfiledStep:
    """What the profiler says of one curvature step on one rank; no overlap where nothing is reduced."""

    inversion_seconds: float
    overlap: Overlap | None


def profiled_step(trainer: Trainer, trace: Path | None) -> ProfiledStep:
    """Take a step under the profiler, and write what it saw as a Chrome trace if ``trace`` is given."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        if dist.is_initialized():
            # The profiler takes its time to start: nobody must wait for that inside the step.
            dist.barrier()
        trainer.optimizer.zero_grad(set_to_none=True)
        with record_function("forward"):
            loss = cross_entropy(trainer.model(trainer.inputs), trainer.targets)
        with record_function(BACKWARD):
            loss.backward()
        with record_function("step"):
            trainer.optimizer.step()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events = list(profiler.events())
    inversion = sum(end - start for start, end in _spans(events, INVERSION))
    (backward,) = _spans(events, BACKWARD)
    return ProfiledStep(inversion, overlap(_spans(events, REDUCE), backward))


def overlap(reduces: list[Span], backward: Span) -> Overlap | None:
    """Compare the time spans of the reduces with that of the backward pass; None without any."""
    if not reduces:
        return None
    start, end = backward
    under_way = _union(reduces)
    return Overlap(
        reduces=len(reduces),
        started_inside=sum(start <= each[0] < end for each in reduces),
        seconds=sum(b - a for a, b in under_way),
        seconds_inside=sum(max(0.0, min(b, end) - max(a, start)) for a, b in under_way),
    )


def _spans(events: Iterable[Any], name: str) -> list[Span]:
    ranges = [event.time_range for event in events if event.name == name]
    return [(each.start / 1e6, each.end / 1e6) for each in ranges]


def _union(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined
