"""A profiled curvature step: how long the inversions take, and what is sent behind the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from fop_bench.workloads import Trainer

Span = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """How much of the reduces to the owners lies inside the backward pass, on one rank."""

    reduces: int
    started_inside: int  # before the backward pass ended
    seconds: float  # in which at least one of them was under way
    seconds_inside: float  # the part of these inside the backward pass


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
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            trainer.optimizer.step()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    spans: dict[str, list[Span]] = {"fop::inversion": [], "backward": [], "gloo:reduce": []}
    for event in profiler.events():
        if event.name in spans:
            spans[event.name].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    inversion = sum(end - start for start, end in spans["fop::inversion"])
    (backward,) = spans["backward"]
    return ProfiledStep(inversion, overlap(spans["gloo:reduce"], backward))


def overlap(reduces: list[Span], backward: Span) -> Overlap | None:
    """Compare the time spans of the reduces with that of the backward pass; None without any."""
    if not reduces:
        return None
    start, end = backward
    inside = [(max(a, start), min(b, end)) for a, b in reduces if a < end and b > start]
    return Overlap(
        len(reduces), sum(start <= a < end for a, _ in reduces), _covered(reduces), _covered(inside)
    )


def _covered(spans: Iterable[Span]) -> float:
    """Return the time that at least one span covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
