"""What ranks send to the owners of weights in a backward pass: statistics, and parts of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.binding import Binding
from fop.correction import SubBatchGradients
from fop.distributed.buckets import BucketedReduce, Channel, Entry
from fop.distributed.parity import difference_weight, representative, side_of
from fop.distributed.sketch import SKETCH, scale_between, sketch
from fop.layers import Statistics
from fop.torch_internals import current_backward_pass

# How far p.grad may be from a scaling of what the ranks gave, as a share of its sketch: compressed
# all-reduces and half precision round, while clipped elements and added noise move it further.
_SAME, _SAME_HALF = 1e-2, 5e-2
NOT_THE_MEAN = (
    "p.grad is not the mean of what the ranks gave (changed since, or not finite), or a rank had no pair in "
    "its batch"
)


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
        return {
            Sending.NOTHING: 0,
            Sending.DIFFERENCE: gradient + SKETCH + 1,
            Sending.GRADIENT: gradient + 1,
            Sending.SIDE: gradient + 1,
            Sending.BOTH: 2 * gradient + 2,
        }[self]


@dataclass(frozen=True)
class Routes:
    """Where messages go.

    Attributes:
        ranks: channel between all ranks.
        side: channel between the ranks of this rank's parity; None where sides are not added up separately.
        owners: owner of every weight.
    """

    ranks: Channel
    side: Channel | None
    owners: Mapping[Tensor, int]


def wire_dtype(binding: Binding) -> torch.dtype:
    """Return the dtype in which a weight's gradients and updates travel."""
    return torch.promote_types(binding.weight.dtype, torch.float32)


def matrix_size(binding: Binding) -> int:
    """Return the number of elements of a weight's gradient matrix."""
    return torch.Size(binding.layer.matrix_shape).numel()


class PassReduction:
    """What all ranks add up at the owners in one backward pass, or in one step.

    Args:
        routes: where it goes.
        bindings: all trained bindings, those that are ready first first.
        sending: what of each gradient is sent.
        factor_dtype: dtype of statistics on the wire, None for their own.
    """

    def __init__(
        self,
        routes: Routes,
        bindings: Sequence[Binding],
        sending: Mapping[Binding, Sending],
        factor_dtype: torch.dtype | None,
    ) -> None:
        self.task = current_backward_pass()
        self.counts: dict[Binding, Tensor] = {}
        entries: list[Entry] = []
        for binding in bindings:
            to, dtype, what = routes.owners[binding.weight], wire_dtype(binding), sending[binding]
            if binding.recorder.due:
                curvature = binding.curvature
                shapes = [s for layer in curvature.terms.values() for s in curvature.message_shapes(layer)]
                size, wire = sum(torch.Size(shape).numel() for shape in shapes), factor_dtype or dtype
                key = "statistics", binding
                entries.append(Entry(key, size, to, wire, "curvature factors", routes.ranks))
            channel = routes.ranks
            if what is Sending.SIDE:
                assert routes.side is not None
                to, channel = representative(to, side_of(channel.rank)) // 2, routes.side
            if what is not Sending.NOTHING:
                size = what.size(matrix_size(binding))
                entries.append(Entry(("gradient", binding), size, to, dtype, "gradients", channel))
        self._reduce = BucketedReduce(entries, bindings[0].weight.device)

    def put(self, binding: Binding, pieces: Sequence[Tensor]) -> None:
        """Send what `contribution` gave, and the statistics that were recorded, if they are due."""
        recorder = binding.recorder
        if recorder.statistics is not None and self._reduce.lacks(("statistics", binding)):
            # What comes until the step is of another pass.
            statistics, recorder.statistics = recorder.statistics, None
            packed, self.counts[binding] = binding.curvature.pack(statistics, binding.weight.device)
            self._reduce.put(("statistics", binding), packed)
        if pieces and self._reduce.lacks(("gradient", binding)):
            self._reduce.put(("gradient", binding), pieces)

    def flush(self) -> None:
        """Start what has not been started."""
        self._reduce.flush()

    def collect(self) -> dict[Any, Tensor]:
        """Return the sums that are this rank's, by ("statistics" or "gradient", binding)."""
        return self._reduce.collect()


class Reductions:
    """The reductions since the last step: one for each backward pass that averages gradients.

    Args:
        factor_dtype: dtype of statistics on the wire, None for their own.

    Attributes:
        routes: where messages go; None until the handshake.
    """

    def __init__(self, factor_dtype: torch.dtype | None) -> None:
        self.routes: Routes | None = None
        self._factor_dtype = factor_dtype
        self._passes: list[PassReduction] = []
        # What waits for a reduction: before the handshake, and in accumulating passes of FSDP.
        self._held: dict[Binding, list[Tensor]] = {}
        # The first pass that counts, where not all do.
        self._first: dict[Binding, int] = {}
        # Of the running step, on owners: one tensor for each pass.
        self._statistics: dict[Binding, list[Tensor]] = {}
        self._gradients: dict[Binding, list[Tensor]] = {}
        self._counts: dict[Binding, Tensor] = {}

    @property
    def ranks(self) -> Channel:
        """The channel between all ranks."""
        assert self.routes is not None
        return self.routes.ranks

    def owner(self, binding: Binding) -> int:
        """Return the owner of a weight."""
        assert self.routes is not None
        return self.routes.owners[binding.weight]

    def owns(self, binding: Binding) -> bool:
        """Return whether this rank owns a weight."""
        return self.owner(binding) == self.ranks.rank

    # In a backward pass

    def hold(self, binding: Binding, pieces: list[Tensor]) -> None:
        """Keep a contribution for the next reduction."""
        self._held[binding] = pieces

    def held(self, binding: Binding) -> list[Tensor] | None:
        """Return what is kept for a binding, and keep it no longer."""
        return self._held.pop(binding, None)

    def drop(self, binding: Binding) -> None:
        """Let what was sent of a binding before the running backward pass count for nothing."""
        self._held.pop(binding, None)
        running = self._passes and self._passes[-1].task == current_backward_pass()
        self._first[binding] = len(self._passes) - 1 if running else len(self._passes)

    def send(
        self,
        binding: Binding,
        pieces: Sequence[Tensor],
        outgoing: Callable[[], tuple[Sequence[Binding], Mapping[Binding, Sending]]],
    ) -> None:
        """Send a binding's statistics and contribution in the reduction of the running backward pass.

        Args:
            binding: the binding.
            pieces: what `contribution` gave.
            outgoing: returns, for a new reduction, all trained bindings, those ready first first, and what of
                the gradient of each is sent.
        """
        assert self.routes is not None
        if not self._passes or self._passes[-1].task != current_backward_pass():
            if self._passes:
                self._passes[-1].flush()
            self._passes.append(PassReduction(self.routes, *outgoing(), self._factor_dtype))
        self._passes[-1].put(binding, pieces)

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
        self._passes, self._held, self._first = [], {}, {}

    def discard(self) -> None:
        """Forget what was sent: all ranks skip the step."""
        if self._passes:
            self.collect()
        self._held, self._first = {}, {}
        self._statistics, self._gradients, self._counts = {}, {}, {}

    def swap_sides(self, bindings: Sequence[Binding]) -> None:
        """Give the sums of this rank's side to the owner beside it, and take those of the other side.

        Args:
            bindings: those whose gradients are added up on each side separately. The sums of a binding are
                then those of even and of odd ranks.
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
            nothing = torch.empty(0, dtype=dtype, device=alike[0].weight.device)
            taken = ranks.swap(other, torch.cat([nothing, *given]), sum(sizes), "gradients")
            for binding, part in zip(mine, taken.split(sizes), strict=True):
                own = _total(self._gradients[binding])
                self._gradients[binding] = [own, part] if ranks.rank < other else [part, own]

    def gradients(self, binding: Binding) -> list[Tensor]:
        """Return what the ranks have contributed to an owned weight, added up, one tensor for each pass."""
        return self._gradients.get(binding, [])

    def statistics(
        self, bindings: Sequence[Binding], groups: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[Binding, Statistics | None]:
        """Return the statistics of all ranks; None for what others own or nobody has. Waits for the device.

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
                mean = groups[binding.weight]["loss_reduction"] == "mean"
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
) -> list[Tensor]:
    """Return what a rank sends of its own gradient.

    Args:
        binding: the binding.
        matrix: the gradient matrix of this rank's own batch.
        sending: what is wanted.
        group: the parameter group of the weight.
        rank: this rank.
        ranks: their number.
        parity: whether the rank's side says to which sub-batch its gradient belongs (Algorithm 1); otherwise
            its own batch is split in two, and the pair is the mean over the ranks.
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
        known = sub_batches.gradients(
            matrix, binding.state.get("complete"), group["loss_reduction"], changed=False
        )
        difference, has_pair = torch.zeros_like(matrix), matrix.new_zeros(1)
        if known.trusted is not None:
            difference, has_pair = known.contrasts[0] / ranks, known.trusted.to(matrix.dtype).reshape(1)
    if sending is Sending.BOTH:
        return [matrix / ranks, difference, has_pair, one]
    return [difference, sketch(matrix) / ranks, has_pair]


class Received(NamedTuple):
    """What an owner has from all ranks: the gradients, and a 0-dim bool, whether any rank used the layer."""

    gradients: SubBatchGradients
    used: Tensor


def received(
    binding: Binding,
    sending: Sending,
    sums: Sequence[Tensor],
    gathered: Tensor | None,
    *,
    ranks: int,
    cumulative: bool,
) -> Received:
    """Return the gradients of a weight, from what all ranks have sent to its owner.

    Args:
        binding: the binding.
        sending: what each has sent.
        sums: their sums, one for each pass; for `Sending.SIDE` those of even and of odd ranks.
        gathered: the gradient matrix, if p.grad is a shard of it.
        ranks: their number.
        cumulative: whether the last pass in which the layer was used has Gd of all before it, too.
    """
    shape, size = binding.layer.matrix_shape, matrix_size(binding)

    def pair(average: Tensor, difference: Tensor, trusted: Tensor) -> SubBatchGradients:
        return SubBatchGradients(average, (difference,), trusted, NOT_THE_MEAN)

    if sending in (Sending.NOTHING, Sending.DIFFERENCE):
        average = binding.gradient() if gathered is None else gathered
        used = torch.ones((), dtype=torch.bool, device=average.device)
        if sending is Sending.NOTHING or not sums:
            return Received(SubBatchGradients(average, reason=NOT_THE_MEAN), used)
        return Received(pair(average, *_difference(binding, average, sums, ranks, cumulative)), used)
    passes = torch.stack(list(sums))
    total = passes.sum(0)
    used = total[-1] > 0.5
    if sending is Sending.SIDE:
        first, second = (each[:size].view(shape) for each in sums)
        return Received(pair((first + second) / ranks, (first - second) * (2 / ranks), used), used)
    if sending is Sending.GRADIENT:
        return Received(SubBatchGradients(total[:size].view(shape) / ranks, reason=NOT_THE_MEAN), used)
    # In a pass that the layer was used in, all ranks must have a pair.
    trusted = ((passes[:, -1] > 0.5) <= (passes[:, -2] > ranks - 0.5)).all() & used
    difference = torch.where(trusted, total[size:-2].view(shape), 0)
    return Received(pair(total[:size].view(shape), difference, trusted), used)


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
