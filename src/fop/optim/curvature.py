"""How blocks take new statistics into their curvature, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fop.algebra import Inversion, Rung, damped_diagonal, damped_inverses, damping_split
from fop.capture import local
from fop.optim.block import NEVER, Block

# Every how many steps the interval between curvature updates may grow by one; see `next_refresh`.
GROWTH = 5

# The state of a block whose inverses may come later: none is under way.
NOTHING_UNDER_WAY: dict[str, Any] = {"inverse_at": NEVER, "inverse_of": NEVER, "inverse_damping": 0.0}

Rescues: TypeAlias = list[tuple[Block, Rung]]


def next_refresh(step: int, interval: int) -> int:
    """Return the step of the next curvature update after one in ``step``.

    The distance grows with the number of steps taken, up to ``interval``: early on the weights move far
    and an inverse is soon out of date.
    """
    return step + max(1, min(interval, step // GROWTH))


def schedule_refresh(blocks: Iterable[Block], groups: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Note of blocks whose curvature was refreshed when the next time is, and how far p.grad was seen."""
    for block in blocks:
        window, state, group = block.capture.window, block.state, groups[block.weight]
        if (complete := window.complete) is not None:
            if (clean := window.clean) is not None:
                # What p.grad held before says nothing about the paths into it.
                complete = torch.where(clean, complete, state.get("complete", torch.ones_like(complete)))
            state["complete"] = complete
        # Always there, so that torch.distributed.checkpoint knows where to load it to.
        state.setdefault("complete", torch.ones((), dtype=torch.bool, device=local(block.weight).device))
        state["refresh_at"] = next_refresh(group["step"], group["curvature_interval"])


class Inverter:
    """Keeps the inverses of blocks up to date, at once or some steps later from a thread of its own.

    A block whose inverse is under way has the step from which it counts (``inverse_at``), the step of its
    factors and its damping in the state, so that a checkpoint can start the same inversion again.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: dict[Tensor, _Job] = {}

    def refresh(
        self,
        blocks: Sequence[Block],
        fresh: Sequence[tuple[Tensor, Tensor | None]],
        options: Sequence[Mapping[str, Any]],
    ) -> tuple[list[Block], Rescues]:
        """Take new factors of ``blocks`` into the averages and invert these.

        Args:
            blocks: the blocks.
            fresh: A and G of each, from the statistics of this step.
            options: the parameter group of each.

        Returns:
            The blocks whose statistics were not finite, which keep their curvature, and the rescues.

        Transfers to the host twice (are the statistics finite, did the inversions succeed), the second time
        not for inverses that are to come later.
        """
        if not blocks:
            return [], []
        home = fresh[0][0].device
        finite = torch.stack([_finite(*pair).to(home) for pair in fresh]).tolist()
        refused = [block for block, fine in zip(blocks, finite, strict=True) if not fine]
        rescues: Rescues = []
        now: list[Block] = []
        steps: list[int] = []
        shifts: list[Tensor] = []
        for block, group, factors, fine in zip(blocks, options, fresh, finite, strict=True):
            if not fine:
                continue
            rescues += self.take([block])
            _average(block.state, factors, group["stat_decay"])
            if group["inverse_delay"] and factors[1] is not None:
                block.state |= NOTHING_UNDER_WAY
            if factors[1] is None:
                block.state["A_inv"] = damped_diagonal(block.state["A"], group["damping"])
                block.state["refreshed_at"] = group["step"]
            elif group["inverse_delay"] and block.holds_curvature:
                self._begin(block, group["step"], group["inverse_delay"], group["damping"])
            else:
                now.append(block)
                steps.append(group["step"])
                shifts += damping_split(block.state["A"], block.state["G"], group["damping"])
        with torch.profiler.record_function("fop::inversion"):
            inversions = damped_inverses([b.state[key] for b in now for key in ("A", "G")], shifts)
        for index, block in enumerate(now):
            rescues += _store(block, inversions[2 * index : 2 * index + 2], steps[index])
        return refused, rescues

    def take(
        self, blocks: Iterable[Block], groups: Mapping[Tensor, Mapping[str, Any]] | None = None
    ) -> Rescues:
        """Let inverses that were under way count from now on: those due by the groups' step, or all."""
        rescues: Rescues = []
        for block in blocks:
            state = block.state
            at = state.get("inverse_at", NEVER)
            if at == NEVER or (groups is not None and at > groups[block.weight]["step"]):
                continue
            if block.weight not in self._jobs:
                # The state was loaded in between.
                self._submit(block, state["inverse_damping"])
            rescues += _store(block, self._jobs.pop(block.weight)(), state["inverse_of"])
            state["inverse_at"] = NEVER
        return rescues

    def forget(self) -> None:
        """Forget what is under way: another state was loaded."""
        self._jobs.clear()

    def _begin(self, block: Block, step: int, delay: int, damping: float) -> None:
        block.state |= {"inverse_at": step + delay, "inverse_of": step, "inverse_damping": damping}
        self._submit(block, damping)

    def _submit(self, block: Block, damping: float) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fop-inversion")
        A, G = block.state["A"], block.state["G"]
        self._jobs[block.weight] = _Job(self._pool, [A, G], damping_split(A, G, damping))


class _Job:
    """An inversion in another thread, and on a GPU in another stream."""

    def __init__(self, pool: ThreadPoolExecutor, factors: list[Tensor], shifts: Sequence[Tensor]) -> None:
        self._ready = torch.cuda.current_stream().record_event() if factors[0].is_cuda else None
        self._done: torch.cuda.Event | None = None
        self._future = pool.submit(self._run, factors, shifts)

    @torch.no_grad()
    def _run(self, factors: list[Tensor], shifts: Sequence[Tensor]) -> list[Inversion]:
        with torch.profiler.record_function("fop::inversion"):
            if self._ready is None:
                return damped_inverses(factors, shifts)
            stream = torch.cuda.Stream(factors[0].device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                inversions = damped_inverses(factors, shifts)
                self._done = stream.record_event()
            return inversions

    def __call__(self) -> list[Inversion]:
        inversions = self._future.result()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        return inversions


def _average(state: dict[str, Any], fresh: tuple[Tensor, Tensor | None], decay: float) -> None:
    known = state.get("refreshed_at", 0) != NEVER
    for key, new in zip(("A", "G"), fresh, strict=True):
        if new is not None:
            state[key] = torch.lerp(new, state[key], decay) if known and key in state else new


def _finite(A: Tensor, G: Tensor | None) -> Tensor:
    finite = torch.isfinite(A).all()
    return finite if G is None else finite & torch.isfinite(G).all()


def _store(block: Block, inversions: Sequence[Inversion], step: int) -> Rescues:
    rescues: Rescues = []
    for inversion in inversions:
        if inversion.rung is not Rung.NONE:
            block.rescues[inversion.rung] += 1
            rescues.append((block, inversion.rung))
    A, G = inversions
    # The two inverses share one π, so one of them alone is not replaced.
    if A.inverse is not None and G.inverse is not None:
        block.state |= {"A_inv": A.inverse, "G_inv": G.inverse, "refreshed_at": step}
    return rescues
