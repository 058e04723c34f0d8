"""When curvature is refreshed; inversions, at once for all weights or later in a background thread."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, MutableSet, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fop.curvature.base import AVERAGING_WEIGHT, NEVER, NOISE, Curvature, Damping, adaptive_damping
from fop.curvature.inversion import Fallback, Inversion, damped_inverses, inverses_and_flags
from fop.transfer import Transfer

# Every how many steps the interval between curvature updates may grow by one; see `next_refresh`.
GROWTH = 1

# The state of a weight whose inverse may come later: none is under way.
NOTHING_PENDING: dict[str, Any] = {
    "inverse_at": NEVER,
    "inverse_of": NEVER,
    "inverse_damping": 0.0,
    "inverse_relative": False,
}

Fallbacks: TypeAlias = list[tuple[Curvature, Fallback]]


class Estimate(NamedTuple):
    """What a step's statistics say of one curvature; ``group`` is the parameter group of its weight."""

    curvature: Curvature
    tensors: tuple[Tensor, ...]
    group: Mapping[str, Any]


class _Attempt(NamedTuple):
    """A refresh of one curvature of which the host does not know yet whether it succeeded.

    ``averaging_weight`` and ``refreshed_at`` are what the state had before, ``matrices`` is how many were
    inverted.
    """

    curvature: Curvature
    state: dict[str, Any]
    averaging_weight: float | None
    refreshed_at: int
    damping: Damping
    step: int
    matrices: int


def may_run_ahead(device: torch.device) -> bool:
    """Return whether waiting for the device would leave it without work."""
    return device.type == "cuda"


def _finite(estimates: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return whether all numbers of every estimate are finite, (n,)."""
    home = estimates[0][0].device
    largest = [each.to(home) for of_one in estimates for each in torch._foreach_norm(of_one, torch.inf)]
    finite = torch.stack(largest) < torch.inf
    return torch.stack([each.all() for each in finite.split([len(of_one) for of_one in estimates])])


def _dampings(estimates: Sequence[Estimate]) -> list[Damping]:
    """Return the damping of every estimate; what follows the noise is computed together."""
    alike: dict[tuple[Any, ...], list[Curvature]] = {}
    for curvature, _, group in estimates:
        if curvature.follows_noise(group):
            noise = curvature.state[NOISE]
            alike.setdefault((noise.device, noise.dtype, group["step"]), []).append(curvature)
    adaptive: dict[Curvature, Tensor] = {}
    for (*_, step), curvatures in alike.items():
        found = adaptive_damping(torch.stack([each.state[NOISE] for each in curvatures]), step)
        adaptive |= zip(curvatures, found.unbind(), strict=True)
    return [each.curvature.damping(each.group, adaptive.get(each.curvature)) for each in estimates]


def _take(estimate: Estimate, where: Tensor | None = None) -> None:
    """Take an estimate into the averages, as its group says."""
    curvature, tensors, group = estimate
    unbiased = group["step_length"] == "weight"
    curvature.update(tensors, group["stat_decay"], unbiased=unbiased, where=where)


def next_refresh(step: int, interval: int) -> int:
    """Return the step of the next curvature update after one in ``step``.

    The distance is the number of steps taken, up to ``interval``: early on the weights move far and an
    inverse is soon out of date. Updates are in steps 0, 1, 2, 4, 8 and so on.
    """
    return step + max(1, min(interval, step // GROWTH))


class Refreshed(NamedTuple):
    """What became of estimates.

    Attributes:
        refused: curvatures whose estimates were not finite, which stay as they are.
        earlier: those of the refresh before, if the host did not know then.
        fallbacks: what inversions needed, of the refresh before, too.
    """

    refused: list[Curvature]
    earlier: list[Curvature]
    fallbacks: Fallbacks


class Refresher:
    """Keeps inverses up to date, at once or some steps later from a thread of its own.

    A weight whose inverse is pending has the step from which it counts (``inverse_at``), the step of its
    factors and its damping in the state, so that a checkpoint can start the same inversion again.

    On a GPU the host does not wait for what became of a refresh, but for the first of a weight. What failed
    leaves averages or inverse as they were; `settle` finds out, at the next refresh at the latest. The next
    refresh of that weight waits, for fallbacks need it.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        # Weak: a weight whose parameter was replaced gets another curvature.
        self._jobs: MutableMapping[Curvature, _Job] = weakref.WeakKeyDictionary()
        # The last refresh, if nobody has waited for it; and what failed in it, to be told.
        self._unread: tuple[list[_Attempt], Transfer] | None = None
        self._refused: list[Curvature] = []
        self._fallbacks: Fallbacks = []
        # What failed in its own last refresh, as far as known.
        self._failed: MutableSet[Curvature] = weakref.WeakSet()

    def refresh(self, estimates: Sequence[Estimate]) -> Refreshed:
        """Take estimates into the averages and invert these.

        Where the host waits, it does so twice (are the estimates finite, did the inversions succeed), the
        second time not for inverses that are to come later.
        """
        if not estimates:
            return Refreshed([], [], [])
        self.settle()
        earlier, self._refused = self._refused, []
        fallbacks, self._fallbacks = self._fallbacks, []
        finite = _finite([each.tensors for each in estimates])
        if may_run_ahead(finite.device) and all(map(self._goes_well, estimates)):
            return Refreshed([], earlier, fallbacks + self._run_ahead(estimates, finite))
        refused, more = self._wait(estimates, finite)
        self._failed -= {each.curvature for each in estimates}
        self._failed |= {*refused, *(curvature for curvature, _ in more)}
        return Refreshed(refused, earlier, fallbacks + more)

    def _goes_well(self, estimate: Estimate) -> bool:
        """Return whether nothing speaks for waiting: there is something to keep if the refresh fails."""
        curvature, _, group = estimate
        kept = curvature.known and curvature.held
        return kept and not group["inverse_delay"] and curvature not in self._failed

    def _wait(self, estimates: Sequence[Estimate], flags: Tensor) -> tuple[list[Curvature], Fallbacks]:
        """Refresh all whose flag says that the estimate is finite; return the others, and fallbacks."""
        finite = flags.tolist()
        refused: list[Curvature] = []
        fallbacks: Fallbacks = []
        due: list[tuple[Curvature, Damping, int, int]] = []
        matrices: list[Tensor] = []
        shifts: list[Tensor] = []
        # Before the averages change: adaptive damping is that of the gradients so far.
        dampings = _dampings(estimates)
        for each, damping, fine in zip(estimates, dampings, finite, strict=True):
            curvature, group = each.curvature, each.group
            if not fine:
                refused.append(curvature)
                continue
            fallbacks += self.finish([(curvature, None)])
            _take(each)
            later = group["inverse_delay"] and curvature.by_inversion
            if later:
                curvature.state |= NOTHING_PENDING
            if later and curvature.held:
                step, delay = group["step"], group["inverse_delay"]
                curvature.state |= {"inverse_at": step + delay, "inverse_of": step}
                curvature.state |= {"inverse_damping": damping.value, "inverse_relative": damping.relative}
                curvature.pending = True
                self._jobs[curvature] = self._submit(curvature, damping)
            else:
                of_this, added = curvature.matrices(damping)
                due.append((curvature, damping, group["step"], len(of_this)))
                matrices += of_this
                shifts += added
        with torch.profiler.record_function("fop::inversion"):
            inversions = iter(damped_inverses(matrices, shifts))
        for curvature, damping, step, count in due:
            own = list(islice(inversions, count))
            fallbacks += _store(curvature, own, step, damping)
        return refused, fallbacks

    def _run_ahead(self, estimates: Sequence[Estimate], finite: Tensor) -> Fallbacks:
        """Refresh all; where an estimate or an inversion turns out to have failed, keep what was there."""
        fallbacks = self.finish([(each.curvature, None) for each in estimates])
        attempts: list[_Attempt] = []
        matrices: list[Tensor] = []
        shifts: list[Tensor] = []
        for each, damping, fine in zip(estimates, _dampings(estimates), finite.unbind(), strict=True):
            curvature, state = each.curvature, each.curvature.state
            before = state.get(AVERAGING_WEIGHT), state["refreshed_at"]
            _take(each, where=fine)
            of_this, added = curvature.matrices(damping)
            attempts.append(_Attempt(curvature, state, *before, damping, each.group["step"], len(of_this)))
            matrices += of_this
            shifts += added
        with torch.profiler.record_function("fop::inversion"):
            found = zip(*inverses_and_flags(matrices, shifts), strict=True)
        inverted: list[Tensor] = []
        for one, of_one in zip(attempts, finite.unbind(), strict=True):
            own = list(islice(found, one.matrices))
            fine = torch.stack([flag for _, flag in own]).all() if own else torch.ones_like(of_one)
            # Another device may hold this layer.
            fine = fine.to(finite.device)
            held = {name: one.state[name] for name in one.curvature.inverses}
            new = [Inversion(inverse, Fallback.NONE) for inverse, _ in own]
            _store(one.curvature, new, one.step, one.damping)
            for name, old in held.items():
                one.state[name] = torch.where((fine & of_one).to(old.device), one.state[name], old)
            inverted.append(fine)
        self._unread = attempts, Transfer(torch.stack([finite, torch.stack(inverted)], 1))
        return fallbacks

    def settle(self) -> None:
        """Find out what failed in the last refresh, if it ran ahead, so that the state is true of it."""
        if self._unread is None:
            return
        attempts, transfer = self._unread
        self._unread = None
        for one, (finite, inverted) in zip(attempts, transfer.read(), strict=True):
            # Another state may have been loaded since, or another rank have taken the weight.
            current = one.curvature.state is one.state and one.curvature.estimated
            if (finite and inverted) or not current:
                continue
            self._failed.add(one.curvature)
            one.state["refreshed_at"] = one.refreshed_at
            if not finite:
                self._refused.append(one.curvature)
                if one.averaging_weight is not None:
                    one.state[AVERAGING_WEIGHT] = one.averaging_weight
            if not inverted:
                one.curvature.fallbacks.update([Fallback.KEPT])
                self._fallbacks.append((one.curvature, Fallback.KEPT))

    def finish(self, curvatures: Iterable[tuple[Curvature, int | None]]) -> Fallbacks:
        """Let pending inverses count from now on: those due by the step that is given, or all (None)."""
        fallbacks: Fallbacks = []
        for curvature, step in curvatures:
            state = curvature.state
            if not curvature.pending or (step is not None and state["inverse_at"] > step):
                continue
            damping = Damping(state["inverse_damping"], state.get("inverse_relative", False))
            job = self._jobs.pop(curvature, None)
            if job is None or not job.inverts(curvature):
                # The state was loaded, moved or replaced in between.
                job = self._submit(curvature, damping)
            fallbacks += _store(curvature, job(), state["inverse_of"], damping)
            state["inverse_at"], curvature.pending = NEVER, False
        return fallbacks

    def _submit(self, curvature: Curvature, damping: Damping) -> _Job:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "fop-inversion")
        return _Job(self._pool, *curvature.matrices(damping))


class _Job:
    """An inversion in another thread, and on a GPU in another stream."""

    def __init__(self, pool: ThreadPoolExecutor, matrices: list[Tensor], shifts: list[Tensor]) -> None:
        device = self._device = matrices[0].device
        self._ready = torch.cuda.current_stream(device).record_event() if matrices[0].is_cuda else None
        self._done: torch.cuda.Event | None = None
        self._matrices = matrices
        self._future = pool.submit(self._run, matrices, shifts)

    def inverts(self, curvature: Curvature) -> bool:
        """Return whether these are the averages that the curvature has now."""
        now, _ = curvature.matrices(Damping(0.0, relative=False))
        return all(one is other for one, other in zip(self._matrices, now, strict=True))

    @torch.no_grad()
    def _run(self, matrices: list[Tensor], shifts: list[Tensor]) -> list[Inversion]:
        with torch.profiler.record_function("fop::inversion"):
            if self._ready is None:
                return damped_inverses(matrices, shifts)
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._ready)
                inversions = damped_inverses(matrices, shifts)
                self._done = stream.record_event()
            return inversions

    def __call__(self) -> list[Inversion]:
        inversions = self._future.result()
        if self._done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)
            for inversion in inversions:
                if inversion.inverse is not None:
                    # Its memory is of another stream, which must not reuse it while this one reads.
                    inversion.inverse.record_stream(stream)
        return inversions


def _store(curvature: Curvature, inversions: Sequence[Inversion], step: int, damping: Damping) -> Fallbacks:
    needed = [each.fallback for each in inversions if each.fallback is not Fallback.NONE]
    curvature.fallbacks.update(needed)
    if curvature.store(inversions, damping):
        curvature.state["refreshed_at"] = step
        curvature.ready = True
    return [(curvature, fallback) for fallback in needed]
