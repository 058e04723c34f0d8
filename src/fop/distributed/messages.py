"""What ranks send to the owners of weights in a backward pass: statistics, and parts of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fop.binding import Binding, Groups
from fop.capture import Scaling, scalings
from fop.correction import SubBatchGradients
from fop.distributed.buckets import BucketedReduce, Channel, Entry, joined
from fop.layers import Statistics
from fop.torch_internals import current_backward_pass

# Elements of a sketch: a prime, so that it shares no period with the dimensions of a layer.
SKETCH = 127
# How far p.grad may be from a scaling of what the ranks gave, as a share of its sketch: compressed
# all-reduces and half precision round, while clipped elements and added noise move it further.
_SAME, _SAME_HALF = 1e-2, 5e-2
NOT_THE_MEAN = (
    "p.grad is not the mean of what the ranks gave (changed since, or not finite), or a rank had no pair in "
    "its batch"
)


def side_of(rank: int) -> int:
    """Return which sub-batch a rank's batch is in Algorithm 1: 0 (g1) for even ranks, 1 (g2) for odd ones."""
    return rank % 2


def difference_weight(rank: int, size: int) -> float:
    """Return what a rank's gradient weighs in Gd = g1 - g2, where g1 and g2 are means over their ranks."""
    return 1 / ((size + 1) // 2) if side_of(rank) == 0 else -1 / (size // 2)


def representative(owner: int, side: int) -> int:
    """Return the rank of a side that takes its gradients for an owner: the owner, or the one beside it.

    For an even number of ranks; neighbours are on the same node.
    """
    return owner if side_of(owner) == side else owner ^ 1


def sketch(V: Tensor) -> Tensor:
    """Return a linear sketch of V, (127,): the sums over the elements whose index leaves the same remainder.

    A scaling of V scales it alike; other changes do not. The sketch of a mean is the mean of the sketches.
    """
    flat = V.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SKETCH))
    return padded.view(-1, SKETCH).sum(0)


def scale_between(was: Tensor, now: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return by what a gradient was scaled, from its sketches, and whether that was all that happened.

    Both are 0-dim; ``tolerance`` is how much of ``now`` may be left unexplained.
    """
    scale = torch.nan_to_num(torch.dot(now, was) / torch.dot(was, was), nan=0.0, posinf=0.0, neginf=0.0)
    rest = torch.linalg.vector_norm(now - scale * was)
    return scale, rest <= tolerance * torch.linalg.vector_norm(now)


class Sending(Enum):
    """What of a gradient goes to the owner of its weight.

    NOTHING: K-FAC's step from p.grad. DIFFERENCE: this rank's part of Gd, a sketch of its gradient, and
    whether it has a pair. GRADIENT: the gradient, to the owner. SIDE: the gradient, to where the gradients of
    its side are added up. BOTH: its part of Ga and of Gd, and whether it has a pair.
    """

    NOTHING = 0
    DIFFERENCE = 1
    GRADIENT = 2
    SIDE = 3
    BOTH = 4

    def size(self, gradient: int) -> int:
        """Return how many elements travel for a gradient of this many."""
        if self is Sending.NOTHING:
            return 0
        return gradient + {Sending.DIFFERENCE: SKETCH + 1, Sending.BOTH: gradient + 2}.get(self, 1)


def wire_dtype(binding: Binding) -> torch.dtype:
    """Return the dtype in which a weight's gradients and updates travel."""
    return torch.promote_types(binding.weight.dtype, torch.float32)


def matrix_size(binding: Binding) -> int:
    """Return the number of elements of a weight's gradient matrix."""
    return torch.Size(binding.layer.matrix_shape).numel()


class PassReduction(BucketedReduce):
    """What all ranks add up at the owners in one backward pass, or in one step.

    The keys are ("statistics", binding) and ("gradient", binding). ``bindings`` are in the order in which
    they will be ready.
    """

    def __init__(
        self, reductions: Reductions, bindings: Sequence[Binding], sending: Mapping[Binding, Sending]
    ) -> None:
        self.task = current_backward_pass()
        self.counts: dict[Binding, Tensor] = {}
        entries: list[Entry] = []
        for binding in bindings:
            to, dtype, what = reductions.owner(binding), wire_dtype(binding), sending[binding]
            channel = reductions.ranks
            if binding.recorder.due:
                curvature, wire = binding.curvature, reductions.factor_dtype or dtype
                shapes = [s for layer in curvature.terms.values() for s in curvature.message_shapes(layer)]
                size = sum(torch.Size(shape).numel() for shape in shapes)
                entries.append(Entry(("statistics", binding), size, to, wire, "curvature factors", channel))
            if what is Sending.SIDE:
                assert reductions.side is not None
                to, channel = representative(to, side_of(channel.rank)) // 2, reductions.side
            if what is not Sending.NOTHING:
                size = what.size(matrix_size(binding))
                entries.append(Entry(("gradient", binding), size, to, dtype, "gradients", channel))
        super().__init__(entries, bindings[0].weight.device)

    def send(self, binding: Binding, pieces: Sequence[Tensor]) -> None:
        """Send what `contribution` gave, and the statistics that were recorded, if they are due."""
        recorder = binding.recorder
        if recorder.statistics is not None and self.lacks(("statistics", binding)):
            # What comes until the step is of another pass.
            statistics, recorder.statistics = recorder.statistics, None
            packed, self.counts[binding] = binding.curvature.pack(statistics, binding.weight.device)
            self.put(("statistics", binding), packed)
        if pieces and self.lacks(("gradient", binding)):
            self.put(("gradient", binding), pieces)


class Reductions:
    """The reductions since the last step: one for each backward pass that averages gradients.

    Attributes:
        factor_dtype: dtype of statistics on the wire, None for their own.
        ranks: channel between all ranks. The handshake sets it, as well as ``side`` and ``owners``.
        side: channel between the ranks of this rank's parity; None for an odd number of ranks.
        owners: owner of every weight.
        held: contributions that wait for a reduction: before the handshake, and in accumulating passes.
    """

    ranks: Channel
    side: Channel | None
    owners: Mapping[Tensor, int]

    def __init__(self, factor_dtype: torch.dtype | None) -> None:
        self.factor_dtype = factor_dtype
        self.held: dict[Binding, list[Tensor]] = {}
        self._passes: list[PassReduction] = []
        # The first pass that counts, where not all do.
        self._first: dict[Binding, int] = {}
        # Of the running step, on owners: one tensor for each pass.
        self._statistics: dict[Binding, list[Tensor]] = {}
        self._gradients: dict[Binding, list[Tensor]] = {}
        self._counts: dict[Binding, Tensor] = {}

    def owner(self, binding: Binding) -> int:
        """Return the owner of a weight."""
        return self.owners[binding.weight]

    def owns(self, binding: Binding) -> bool:
        """Return whether this rank owns a weight."""
        return self.owner(binding) == self.ranks.rank

    # In a backward pass

    def _running(self) -> bool:
        """Return whether the last reduction is that of the running backward pass."""
        return bool(self._passes) and self._passes[-1].task == current_backward_pass()

    def drop(self, binding: Binding) -> None:
        """Ignore what was sent of a binding before the running backward pass."""
        self.held.pop(binding, None)
        self._first[binding] = len(self._passes) - self._running()

    def send(
        self,
        binding: Binding,
        pieces: Sequence[Tensor],
        outgoing: Callable[[], tuple[Sequence[Binding], Mapping[Binding, Sending]]],
    ) -> None:
        """Send a binding's statistics and contribution in the reduction of the running backward pass.

        For a new reduction ``outgoing`` returns all trained bindings, in the order in which they will be
        ready, and what of the gradient of each is sent.
        """
        if not self._running():
            if self._passes:
                self._passes[-1].flush()
            self._passes.append(PassReduction(self, *outgoing()))
        self._passes[-1].send(binding, pieces)

    # In a step

    @property
    def count(self) -> int:
        """How many reductions there were since the last step."""
        return len(self._passes)

    def flush(self) -> None:
        """Send what is left."""
        for each in self._passes:
            each.flush()

    def collect(self) -> None:
        """Send what is left, and wait for the sums."""
        self.flush()
        self._statistics, self._gradients, self._counts = {}, {}, {}
        for index, each in enumerate(self._passes):
            for (what, binding), tensor in each.collect().items():
                sums = self._statistics if what == "statistics" else self._gradients
                if index >= self._first.get(binding, 0):
                    sums.setdefault(binding, []).append(tensor)
            for binding, counts in each.counts.items():
                if index >= self._first.get(binding, 0):
                    self._counts[binding] = self._counts.get(binding, torch.zeros_like(counts)) + counts
        self._passes, self.held, self._first = [], {}, {}

    def discard(self) -> None:
        """Forget what was sent: all ranks skip the step."""
        self.collect()
        self._statistics, self._gradients, self._counts = {}, {}, {}

    def swap_sides(self, bindings: Sequence[Binding]) -> None:
        """Give the sums of this rank's side to the owner beside it, and take those of the other side.

        The sums of these bindings are then those of even and of odd ranks.
        """
        ranks = self.ranks
        other = ranks.rank ^ 1
        for dtype in sorted({wire_dtype(binding) for binding in bindings}, key=str):
            alike = [binding for binding in bindings if wire_dtype(binding) is dtype]
            mine = [binding for binding in alike if self.owns(binding)]
            theirs = [binding for binding in alike if self.owner(binding) == other]
            given = [_total(self._gradients.pop(binding)) for binding in theirs]
            # With each gradient goes the number of ranks that have one.
            sizes = [matrix_size(binding) + 1 for binding in mine]
            flat = joined(given, dtype, alike[0].weight.device)
            taken = ranks.swap(other, flat, sum(sizes), "gradients")
            for binding, part in zip(mine, taken.split(sizes), strict=True):
                own = _total(self._gradients[binding])
                self._gradients[binding] = [own, part] if ranks.rank < other else [part, own]

    def gradients(self, binding: Binding) -> list[Tensor]:
        """Return what the ranks have contributed to an owned weight, added up, one tensor for each pass."""
        return self._gradients.get(binding, [])

    def statistics(self, bindings: Sequence[Binding], groups: Groups) -> dict[Binding, Statistics | None]:
        """Return the sums of all ranks, None for what others own or no rank has. Waits for the device.

        The gradient of a loss that is a mean is averaged over the ranks, so that a sample's share of it is
        that much smaller than what its own rank saw.
        """
        sizes = [sum(1 + layer.groups for layer in each.curvature.terms.values()) for each in bindings]
        zeros = torch.zeros(max(sizes), dtype=torch.float64, device=bindings[0].weight.device)
        own = [self._counts.get(each, zeros[:size]) for each, size in zip(bindings, sizes, strict=True)]
        counts = torch.cat(own)
        self.ranks.all_reduce(counts, "control").wait()
        found: dict[Binding, Statistics | None] = dict.fromkeys(bindings)
        for binding, part in zip(bindings, counts.split(sizes), strict=True):
            if self.owns(binding) and any(numbers := part.tolist()):
                mean = binding.statistics_reduction(groups[binding.weight]) == "mean"
                message = _total(self._statistics.pop(binding)).to(wire_dtype(binding))
                share = 1 / self.ranks.size**2 if mean else 1.0
                found[binding] = binding.curvature.unpack(message, numbers, share)
        return found


def contribution(
    binding: Binding,
    matrix: Tensor,
    sending: Sending,
    group: Mapping[str, Any],
    *,
    rank: int,
    ranks: int,
    parity: bool,
    in_step: bool,
) -> list[Tensor]:
    """Return what a rank sends of ``matrix``, the gradient of its own batch, ``in_step`` or after a pass.

    By ``parity`` the rank's side says to which sub-batch its gradient belongs (Algorithm 1); otherwise its
    own batch is split in two, and the pair is the mean over the ranks.
    """
    if sending is Sending.NOTHING:
        return []
    one = matrix.new_ones(1)
    if sending in (Sending.GRADIENT, Sending.SIDE):
        return [matrix, one]
    sub_batches = binding.recorder.sub_batches
    if parity:
        difference = matrix * difference_weight(rank, ranks)
        # What p.grad held before the first pass has no known sub-batches.
        clean = sub_batches.clean
        has_pair = one if clean is None else clean.to(matrix.dtype).reshape(1)
    else:
        # Until the step p.grad may be scaled.
        scaling = scalings([sub_batches]).get(sub_batches) if in_step else Scaling(one[0], one[0] > 0)
        complete, reduction = binding.state.get("complete"), group["loss_reduction"]
        known = sub_batches.gradients(matrix, complete, reduction, scaling)
        difference, has_pair = torch.zeros_like(matrix), matrix.new_zeros(1)
        if known.trusted is not None:
            difference, has_pair = known.contrasts[0] / ranks, known.trusted.to(matrix.dtype).reshape(1)
    if sending is Sending.BOTH:
        return [matrix / ranks, difference, has_pair, one]
    return [difference, sketch(matrix) / ranks, has_pair]


def received(
    binding: Binding,
    sending: Sending,
    sums: Sequence[Tensor],
    gathered: Tensor | None,
    *,
    ranks: int,
    cumulative: bool,
) -> tuple[SubBatchGradients, Tensor]:
    """Return the gradients of an owned weight, and a 0-dim bool, whether any rank used it.

    ``sums`` has one sum over the ranks for each pass; for `Sending.SIDE` those of even and of odd ranks.
    ``gathered`` is the gradient matrix, if p.grad is a shard of it. With ``cumulative`` the last pass in
    which the layer was used has Gd of all before it, too.
    """
    shape, size = binding.layer.matrix_shape, matrix_size(binding)

    def pair(average: Tensor, difference: Tensor, trusted: Tensor) -> SubBatchGradients:
        return SubBatchGradients(average, (difference,), trusted, NOT_THE_MEAN)

    if sending in (Sending.NOTHING, Sending.DIFFERENCE):
        average = binding.gradient() if gathered is None else gathered
        used = torch.ones((), dtype=torch.bool, device=average.device)
        if sending is Sending.NOTHING or not sums:
            return SubBatchGradients(average, reason=NOT_THE_MEAN), used
        return pair(average, *_difference(binding, average, sums, ranks, cumulative)), used
    passes = torch.stack(list(sums))
    total = passes.sum(0)
    used = total[-1] > 0.5
    if sending is Sending.SIDE:
        first, second = (each[:size].view(shape) for each in sums)
        return pair((first + second) / ranks, (first - second) * (2 / ranks), used), used
    if sending is Sending.GRADIENT:
        return SubBatchGradients(total[:size].view(shape) / ranks, reason=NOT_THE_MEAN), used
    # In a pass that the layer was used in, all ranks must have a pair.
    trusted = ((passes[:, -1] > 0.5) <= (passes[:, -2] > ranks - 0.5)).all() & used
    difference = torch.where(trusted, total[size:-2].view(shape), 0)
    return pair(total[:size].view(shape), difference, trusted), used


def _difference(
    binding: Binding, average: Tensor, sums: Sequence[Tensor], ranks: int, cumulative: bool
) -> tuple[Tensor, Tensor]:
    """Return Gd and whether it may be believed, from each pass' sums of Gd, of sketches and of flags."""
    size = matrix_size(binding)
    passes = torch.stack(list(sums))
    flags = passes[:, -1]
    # Passes that no rank used the layer in say nothing of it.
    said = flags > 0.5
    trusted = said.any() & (said <= (flags > ranks - 0.5)).all()
    last = passes[0]
    for each, here in zip(passes[1:], said[1:], strict=True):
        last = torch.where(here, each, last)
    total = passes.sum(0)
    # A shard's p.grad is the sum of what its passes gave; otherwise the last pass has seen all that it holds.
    was = (total if binding.recorder.taken else last)[size : size + SKETCH]
    assert binding.weight.grad is not None
    tolerance = _SAME if torch.finfo(binding.weight.grad.dtype).bits > 16 else _SAME_HALF
    scale, same = scale_between(was, sketch(average), tolerance)
    trusted = trusted & same
    difference = (last if cumulative else total)[:size].view(binding.layer.matrix_shape) * scale
    return torch.where(trusted, difference, 0), trusted


def _total(sums: Sequence[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum(0)
