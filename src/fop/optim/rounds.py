"""What one rank adds to the curvature and the gradient pair of the owners: its parcels of a backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.distributed import (
    SKETCH,
    Channel,
    Outbox,
    Parcel,
    difference_weight,
    pack_symmetric,
    packed_shape,
    representative,
    scale_between,
    side_of,
    sketch,
    unpack_symmetric,
)
from fop.layers import FactorSums, Layer, Statistics
from fop.optim.block import Block, GradPair

# How far p.grad may be from a scaling of what the ranks gave, as a share of its sketch: compressed
# all-reduces and half precision round, while clipped elements and added noise move it further.
_SAME, _SAME_HALF = 1e-2, 5e-2
TORN = (
    "p.grad is not the mean of what the ranks gave (changed since, or not finite), or a rank had no pair in "
    "its batch"
)


class Sending(Enum):
    """What of a gradient goes to the owner of its layer.

    NOTHING: K-FAC's step from p.grad. DIFFERENCE: this rank's part of Gd, a sketch of its gradient, and
    whether it has a pair. GRADIENT: the gradient, to the owner. SIDE: the gradient, to where the gradients of
    its side are added up. BOTH: its part of Ga and of Gd, and whether it has a pair.
    """

    NOTHING = 0
    DIFFERENCE = 1
    GRADIENT = 2
    SIDE = 3
    BOTH = 4


@dataclass(frozen=True)
class Routes:
    """Where parcels go.

    Attributes:
        ranks: channel between all ranks.
        side: channel between the ranks of this rank's parity; None where sides are not added up apart.
        owners: owner of every block by weight.
    """

    ranks: Channel
    side: Channel | None
    owners: Mapping[Tensor, int]


def wire_dtype(block: Block) -> torch.dtype:
    """Return the dtype in which a block's gradients and updates travel."""
    return torch.promote_types(block.weight.dtype, torch.float32)


def terms_of(block: Block) -> dict[bool, Layer]:
    """Return a layer for each of the ways round in which modules use the weight, as `Statistics.terms`."""
    layers = sorted(block.views, key=lambda layer: layer.swapped)
    return {layer.swapped: layer for layer in layers}


class Round:
    """The parcels of one backward pass, or of one step.

    Args:
        routes: where they go.
        blocks: all trained blocks, those that are ready first first.
        sending: what of each block's gradient is sent.
        factor_dtype: dtype of factors on the wire, None for their own.
    """

    def __init__(
        self,
        routes: Routes,
        blocks: Sequence[Block],
        sending: Mapping[Tensor, Sending],
        factor_dtype: torch.dtype | None,
    ) -> None:
        self.task = torch._C._current_graph_task_id()
        self._routes = routes
        self._sending = sending
        self.counts: dict[Tensor, Tensor] = {}
        parcels = [parcel for block in blocks for parcel in self._parcels(block, factor_dtype)]
        self._outbox = Outbox(parcels, blocks[0].weight.device)

    def _parcels(self, block: Block, factor_dtype: torch.dtype | None) -> list[Parcel]:
        weight, to, ranks = block.weight, self._routes.owners[block.weight], self._routes.ranks
        dtype = wire_dtype(block)
        parcels = []
        if block.capture.due:
            shapes = [shape for layer in terms_of(block).values() for shape in _travelling(layer)]
            size = sum(torch.Size(shape).numel() for shape in shapes)
            wire = factor_dtype or dtype
            parcels.append(Parcel(("factors", weight), size, to, wire, "curvature factors", ranks))
        size, sending = torch.Size(block.layer.matrix_shape).numel(), self._sending[weight]
        if sending is Sending.SIDE:
            side = self._routes.side
            assert side is not None
            group_rank = representative(to, side_of(ranks.rank)) // 2
            parcels.append(Parcel(("gradient", weight), size + 1, group_rank, dtype, "gradients", side))
        elif sending is not Sending.NOTHING:
            size = {
                Sending.DIFFERENCE: size + SKETCH + 1,
                Sending.GRADIENT: size + 1,
                Sending.BOTH: 2 * size + 2,
            }[sending]
            parcels.append(Parcel(("gradient", weight), size, to, dtype, "gradients", ranks))
        return parcels

    def put(self, block: Block, pieces: Sequence[Tensor]) -> None:
        """Send what `contribution` gave, and the statistics that a block has gathered, if they are due."""
        self._put_statistics(block)
        if pieces and self._outbox.lacks(("gradient", block.weight)):
            self._outbox.put(("gradient", block.weight), pieces)

    def _put_statistics(self, block: Block) -> None:
        window = block.capture.window
        statistics = window.statistics
        if statistics is None or not self._outbox.lacks(("factors", block.weight)):
            return
        # Gather anew: what comes until the step is of another round.
        window.statistics = None
        pieces: list[Tensor] = []
        counts: list[Tensor] = []
        for swapped, layer in terms_of(block).items():
            term_pieces, term_counts = _packed(statistics.terms.get(swapped), layer, block.weight.device)
            pieces += term_pieces
            counts.append(term_counts)
        self._outbox.put(("factors", block.weight), pieces)
        self.counts[block.weight] = torch.cat(counts)

    def flush(self) -> None:
        """Start what has not been started."""
        self._outbox.flush()

    def collect(self) -> dict[Any, Tensor]:
        """Return the sums that are this rank's, by ("factors" or "gradient", weight)."""
        return self._outbox.collect()


def _travelling(layer: Layer) -> list[tuple[int, ...]]:
    """Return the shapes in which a layer's factors travel."""
    shapes = list(layer.sum_shapes.values())
    # A single one is a diagonal in the shape of the gradient.
    return shapes if len(shapes) == 1 else [packed_shape(shape) for shape in shapes]


def _packed(sums: FactorSums | None, layer: Layer, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Return the statistics of one term as they travel, and its N and numbers of rows."""
    if sums is None:
        zeros = [torch.zeros(shape, device=device) for shape in _travelling(layer)]
        return zeros, torch.zeros(1 + layer.groups, dtype=torch.float64, device=device)
    rows = torch.as_tensor(sums.rows, dtype=torch.float64, device=device).expand(layer.groups)
    counts = torch.cat([rows.new_full((1,), sums.samples), rows])
    if sums.g is None:
        return [sums.squares()], counts
    return [pack_symmetric(sums.a), pack_symmetric(sums.g)], counts


def contribution(
    block: Block,
    matrix: Tensor,
    sending: Sending,
    options: Mapping[str, Any],
    *,
    rank: int,
    ranks: int,
    parity: bool,
) -> list[Tensor]:
    """Return what a rank sends of its own gradient.

    Args:
        block: the block.
        matrix: the gradient matrix of this rank's own batch.
        sending: what is wanted.
        options: the parameter group of the weight.
        rank: this rank.
        ranks: their number.
        parity: whether the rank's side says to which half its gradient belongs (Algorithm 1); otherwise its
            own batch has two halves, and the pair is the mean over the ranks.
    """
    if sending is Sending.NOTHING:
        return []
    one = matrix.new_ones(1)
    if sending in (Sending.GRADIENT, Sending.SIDE):
        return [matrix, one]
    if parity:
        clean = block.capture.window.clean
        difference = matrix * difference_weight(rank, ranks)
        # What p.grad held before the first pass has no known halves.
        has_pair = one if clean is None else clean.to(matrix.dtype).reshape(1)
    else:
        known = block.capture.window.difference_now(
            matrix, block.state.get("complete"), options["loss_reduction"]
        )
        difference, has_pair = torch.zeros_like(matrix), matrix.new_zeros(1)
        if known is not None:
            difference, has_pair = known[0] / ranks, known[1].to(matrix.dtype).reshape(1)
    if sending is Sending.BOTH:
        return [matrix / ranks, difference, has_pair, one]
    return [difference, sketch(matrix) / ranks, has_pair]


class Received(NamedTuple):
    """What an owner has from all ranks: the pair, and a 0-dim bool, whether any rank used the layer."""

    pair: GradPair
    used: Tensor


def pair_of(
    block: Block,
    sending: Sending,
    sums: Sequence[Tensor],
    gathered: Tensor | None,
    *,
    ranks: int,
    cumulative: bool,
) -> Received:
    """Return the gradient pair of a block, from what all ranks have sent to its owner.

    Args:
        block: the block.
        sending: what each has sent.
        sums: their sums, one for each round; for `Sending.SIDE` those of even and of odd ranks.
        gathered: the gradient matrix, if p.grad is a shard of it.
        ranks: their number.
        cumulative: whether the last round in which the layer was used has Gd of all before it, too.
    """
    shape = block.layer.matrix_shape
    size = torch.Size(shape).numel()
    if sending in (Sending.NOTHING, Sending.DIFFERENCE):
        average = block.gradient() if gathered is None else gathered
        used = torch.ones((), dtype=torch.bool, device=average.device)
        if sending is Sending.NOTHING or not sums:
            return Received(GradPair(average, None, None, TORN), used)
        return Received(_difference(block, average, torch.stack(list(sums)), ranks, cumulative), used)
    rounds = torch.stack(list(sums))
    total = rounds.sum(0)
    used = total[-1] > 0.5
    if sending is Sending.SIDE:
        first, second = (each[:size].view(shape) for each in sums)
        return Received(GradPair((first + second) / ranks, (first - second) * (2 / ranks), used, TORN), used)
    if sending is Sending.GRADIENT:
        return Received(GradPair(total[:size].view(shape) / ranks, None, None, TORN), used)
    # In a round that the layer was used in, all ranks must have a pair.
    trusted = ((rounds[:, -1] > 0.5) <= (rounds[:, -2] > ranks - 0.5)).all() & used
    difference = torch.where(trusted, total[size:-2].view(shape), 0)
    return Received(GradPair(total[:size].view(shape), difference, trusted, TORN), used)


def _difference(block: Block, average: Tensor, rounds: Tensor, ranks: int, cumulative: bool) -> GradPair:
    """Return the pair from Ga and, for each round, the sums of Gd, of sketches and of flags."""
    shape = block.layer.matrix_shape
    size = torch.Size(shape).numel()
    flags = rounds[:, -1]
    # Rounds that no rank used the layer in say nothing of it.
    said = flags > 0.5
    trusted = said.any() & (said <= (flags > ranks - 0.5)).all()
    last = rounds[0]
    for each, here in zip(rounds[1:], said[1:], strict=True):
        last = torch.where(here, each, last)
    total = rounds.sum(0)
    # A shard's p.grad is the sum of what its passes gave; otherwise the last pass has seen all that it holds.
    was = (total if block.capture.apart else last)[size : size + SKETCH]
    assert block.weight.grad is not None
    tolerance = _SAME if torch.finfo(block.weight.grad.dtype).bits > 16 else _SAME_HALF
    scale, same = scale_between(was, sketch(average), tolerance)
    trusted = trusted & same
    difference = torch.where(trusted, (last if cumulative else total)[:size].view(shape) * scale, 0)
    return GradPair(average, difference, trusted, TORN)


def factors_from(
    block: Block,
    summed: Tensor,
    counts: Sequence[float],
    options: Mapping[str, Any],
    loss_scale: Tensor | None,
    ranks: int,
) -> tuple[Tensor, Tensor | None]:
    """Return A and G over the batches of all ranks.

    Args:
        block: the block.
        summed: the sums of all ranks, as `Round.put` sent them.
        counts: for every term N, then the number of rows of every group.
        options: the parameter group of the weight.
        loss_scale: 0-dim, what the loss was multiplied with in the backward pass; None for 1.
        ranks: their number. The gradient of a loss that is a mean is averaged over them, so that a sample's
            share of it is that much smaller than what its own rank saw.
    """
    flat = summed.to(wire_dtype(block))
    share = 1 / ranks**2 if options["loss_reduction"] == "mean" else 1.0
    statistics = Statistics()
    left = list(counts)
    for swapped, layer in terms_of(block).items():
        parts = []
        for shape in _travelling(layer):
            size = torch.Size(shape).numel()
            parts.append(flat[:size].view(shape))
            flat = flat[size:]
        samples, rows, left = left[0], left[1 : 1 + layer.groups], left[1 + layer.groups :]
        if not samples:
            continue
        N = round(samples)
        if len(parts) == 1:
            statistics.terms[swapped] = FactorSums(parts[0] * share, None, N, N, squared=True)
            continue
        A, G = layer.sum_shapes.values()
        a, g = unpack_symmetric(parts[0], A[-1]), unpack_symmetric(parts[1], G[-1]) * share
        counted = torch.tensor(rows, dtype=a.dtype, device=a.device)
        statistics.terms[swapped] = FactorSums(a, g, N, counted)
    return statistics.factors(options["loss_reduction"], loss_scale)
