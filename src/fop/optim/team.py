"""Several ranks that train one model: every layer has an owner, which alone keeps its curvature."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fop.algebra import Direction, inner
from fop.capture import is_sharded, local
from fop.optim.agreement import Description
from fop.optim.block import Block
from fop.optim.curvature import Rescues, schedule_refresh
from fop.optim.distribution import Distribution
from fop.optim.joining import Stepping, is_enabled, share_gradients
from fop.optim.membership import Membership
from fop.optim.report import outside
from fop.optim.rounds import TORN, Routes, Sending, contribution, factors_from, pair_of
from fop.optim.settling import interval_of, open_channels, settle
from fop.optim.sharing import Packet, Scalars, gather_gradients, share_updates
from fop.optim.solo import Groups
from fop.optim.update import Move, clip_moves
from fop.optim.wrapping import average


class Team(Membership):
    """What a step needs, from several ranks.

    Args:
        options: how they work together.
        optimizer: whose steps these are; held weakly.

    In a backward pass every layer sends its statistics, if they are due, and its part of the gradient pair to
    its owner as soon as it has them. In `step()` owners refresh the curvature, compute the updates of their
    layers and share these; momentum and weight decay then follow on all ranks alike.
    """

    def __init__(self, options: Distribution, optimizer: Stepping) -> None:
        super().__init__(options, optimizer)
        # Whether the end of the running backward pass is waited for.
        self._ends = False
        # Whether a backward pass has sent anything for the running step.
        self._had_pass = False
        self._warned = False
        # Whether the running step is one of other ranks, for which this one has no batch.
        self.shadow = False
        # Of the running step.
        self._kinds: dict[Tensor, Sending] = {}
        self._cumulative: list[Block] = []
        self._samples: dict[Tensor, Tensor] = {}
        self._max_norm: float | None = None

    # In a backward pass

    def completed(self, block: Block, gradients: Mapping[Tensor, Tensor]) -> None:
        """Take the gradients of a block, this rank's own, as a backward pass has just given them."""
        synchronises = self.wrapping.synchronises(block.weight)
        if not synchronises and not is_sharded(block.weight):
            # The last pass shows them whole; where nobody averages, the step does.
            return
        block.capture.averaged = synchronises
        if block.capture.anew and not block.lean:
            # Whoever zeroed its gradient wants nothing of the passes so far.
            self._mail.discard(block)
        if not self._ends:
            self._ends = True
            _after_backward(weakref.WeakMethod(self._backward_ended))
        pieces = self._contribution(block, gradients)
        if (before := self._mail.held(block)) is not None:
            pieces = self._added(block, before, pieces)
        if self._settled and synchronises:
            self._mail.send(block, pieces, self._outgoing)
        else:
            self._mail.hold(block, pieces)

    def _outgoing(self) -> tuple[list[Block], dict[Tensor, Sending]]:
        """Return the blocks that send something, those that are ready first first, and what each sends."""
        blocks = [block for block in reversed(self._blocks) if block.weight.requires_grad]
        return blocks, {block.weight: self._sending(block) for block in blocks}

    def _contribution(self, block: Block, gradients: Mapping[Tensor, Tensor]) -> list[Tensor]:
        bias = None if block.bias is None else gradients.get(block.bias)
        return contribution(
            block,
            block.layer.to_matrix(gradients[block.weight], bias),
            self._sending(block),
            self._groups[block.weight],
            rank=dist.get_rank(self.group),
            ranks=dist.get_world_size(self.group),
            parity=self.parity,
        )

    def _added(self, block: Block, before: list[Tensor], now: list[Tensor]) -> list[Tensor]:
        """Return the contribution of two backward passes."""
        if not self._adds_up(block) or (block.capture.apart and block.capture.continues):
            return now
        sums = [old + new for old, new in zip(before, now, strict=True)]
        if self._sending(block) is Sending.DIFFERENCE and not block.capture.apart:
            # p.grad, and its sketch, hold all passes so far.
            sums[1] = now[1]
        return sums if len(sums) < 3 else [*sums[:2], torch.minimum(before[2], now[2])]

    def _backward_ended(self) -> None:
        self._ends = False
        for block in self._blocks:
            block.capture.averaging_ended()
            if block.lean and self.wrapping.synchronises(block.weight):
                # Each is one rank's alone: nobody must clip or log by it.
                for param in block.params:
                    param.grad = None

    # In a step

    def begin(self, groups: Groups, describe: Callable[[], Description]) -> None:
        """Compare notes if need be, and get what other ranks have sent to this one as an owner."""
        # A backward pass that raised an error has no end.
        self._ends = False
        if not self._settled:
            self._settle(groups, describe())
        self._had_pass = self._mail.rounds > 0 or self.shadow
        self._warn_of_several_passes()
        self._send_rest()
        # All that follows comes after the last parcel, on every rank.
        if is_enabled(self._optimizer()) or is_enabled(self.wrapping.ddp):
            share_gradients(self._mail.ranks, list(groups), not self.shadow)
        if alone := [p for p in groups if p.requires_grad and not self.wrapping.averages(p)]:
            self._average(alone)
        self._mail.collect()
        blocks, self._kinds = self._outgoing()
        if sides := [block for block in blocks if self._kinds[block.weight] is Sending.SIDE]:
            self._mail.swap_sides(sides)
        if self._blocks and any(group["loss_reduction"] == "sum" for group in groups.values()):
            self._count_samples()
        self._cumulative = [block for block in self._blocks if not self._adds_up(block)]
        self._labelled = False

    def _warn_of_several_passes(self) -> None:
        if self._mail.rounds > 1 and not self._warned and any(block.lean for block in self._blocks):
            self._warned = True
            warnings.warn(
                "several averaged backward passes were added up for one step; with mode='lean' only "
                "optimizer.zero_grad() discards a pass, model.zero_grad() does not. Reported once",
                UserWarning,
                stacklevel=outside(),
            )

    def _send_rest(self) -> None:
        """Send what no backward pass has sent: all of it in the first step, and where nobody averages."""
        blocks, _ = self._outgoing()
        alone = [block for block in blocks if not self.wrapping.averages(block.weight)]
        if alone or not self._mail.rounds:
            for block in blocks:
                pieces = self._mail.held(block)
                if block in alone and block.weight.grad is not None:
                    gradients = {param: param.grad for param in block.params if param.grad is not None}
                    pieces = self._contribution(block, gradients)
                self._mail.send(block, pieces or [], self._outgoing)
        self._mail.flush()

    def _settle(self, groups: Groups, description: Description) -> None:
        routes = self._mail.routes
        ranks, side = (routes.ranks, routes.side) if routes else open_channels(self.group, self.sent)
        self.plan, lacking = settle(self._blocks, description, self.options, ranks, interval_of(groups))
        weights: list[Tensor] = [block.weight for block in self._blocks]
        owners = dict(zip(weights, self.plan.owners, strict=True))
        self._mail.routes = Routes(ranks, side, owners)
        for block in self._blocks:
            if block not in lacking and block.state.get("refresh_at", 0) > groups[block.weight]["step"]:
                # Gathered in case that its owner had no curvature.
                block.capture.due, block.capture.window.statistics = False, None
        self._settled = True

    def _average(self, params: list[Tensor]) -> None:
        """Average gradients that neither DistributedDataParallel nor fully_shard has averaged."""
        ranks = self._mail.ranks
        used = torch.tensor([float(param.grad is not None) for param in params]).to(params[0].device)
        ranks.all_reduce(used, "control").wait()
        wanted = [param for param, count in zip(params, used.tolist(), strict=True) if count]
        average(wanted, lambda flat: ranks.all_reduce(flat, "gradients").wait(), ranks.size)

    def _count_samples(self) -> None:
        ranks = self._mail.ranks
        counts = torch.tensor([float(block.capture.window.samples) for block in self._blocks])
        counts = counts.to(local(self._blocks[0].weight).device)
        ranks.all_reduce(counts, "control").wait()
        means = (counts / ranks.size).clamp(min=1)
        self._samples = dict(zip((b.weight for b in self._blocks), means.unbind(), strict=True))

    def clip(self, params: Iterable[Tensor], max_norm: float) -> None:
        """Scale the gradients; those of lean layers when their norms are known."""
        if any(block.lean for block in self._blocks):
            # The norms of lean layers come with their updates.
            self._max_norm = max_norm
        else:
            super().clip(params, max_norm)

    def takes_part(self, block: Block) -> bool:
        """Tell whether a block has a gradient on any rank."""
        if block.lean:
            return block.weight.requires_grad and self._had_pass
        return super().takes_part(block)

    def refresh(
        self, blocks: Sequence[Block], groups: Groups, loss_scale: Tensor | None
    ) -> tuple[list[Block], Rescues]:
        """Refresh the curvature of owned blocks from the statistics of all ranks, and tell the others."""
        # A frozen layer may have an old gradient, but has gathered nothing.
        due = [block for block in blocks if block.capture.due and block.weight.requires_grad]
        came = self._inverter.take([block for block in blocks if self._mail.owns(block)], groups)
        if not due:
            return [], came
        mail, mine, fresh = self._mail, [], []
        for block, counts in zip(due, mail.counts(due), strict=True):
            if mail.owns(block) and any(counts):
                mine.append(block)
                fresh.append(
                    factors_from(
                        block, mail.factors(block), counts, groups[block.weight], loss_scale, mail.ranks.size
                    )
                )
        bad, rescues = self._inverter.refresh(mine, fresh, [groups[block.weight] for block in mine])
        # What became of a layer, as its owner says: 1 taken in, 2 refused; 4 more if it has a curvature.
        said = [
            (2 if block in bad else int(block in mine)) + 4 * block.ready if mail.owns(block) else 0
            for block in due
        ]
        codes = torch.tensor(said, dtype=torch.float32).to(local(due[0].weight).device)
        mail.ranks.all_reduce(codes, "control").wait()
        refused = []
        for block, code in zip(due, map(int, codes.tolist()), strict=True):
            if code % 4 == 1:
                schedule_refresh([block], groups)
            elif code % 4 == 2:
                refused.append(block)
            if not mail.owns(block):
                block.elsewhere = code >= 4
                if code % 4 == 1:
                    block.state["refreshed_at"] = groups[block.weight]["step"]
        return refused, came + rescues

    def moves(self, blocks: Sequence[Block], groups: Groups) -> list[Move]:
        """Compute the updates of owned blocks, and share those of all."""
        ranks, owners = self._mail.ranks, self._mail.here.owners
        sharded = [block for block in blocks if is_sharded(block.weight)]
        gathered = gather_gradients(ranks, sharded, owners) if sharded else {}
        packets: dict[Tensor, Packet] = {
            block.weight: self._packet(block, gathered.get(block.weight), groups)
            for block in blocks
            if self._mail.owns(block)
        }
        shared = share_updates(ranks, blocks, owners, packets)
        for block, (scalars, _) in zip(blocks, shared, strict=True):
            if self._paired(block):
                block.pairs.count(scalars.trusted > 0.5, TORN, torn=TORN)
            block.last = Direction(scalars.alignment, *scalars[2:6])
        moves = [Move(parts, scalars.length, scalars.used > 0.5) for scalars, parts in shared]
        if self._max_norm is not None:
            moving = {param for block in blocks for param in block.params}
            rest = [p.grad for p in groups if p.grad is not None and p not in moving]
            squares = [scalars.norm for scalars, _ in shared]
            moves, self._max_norm = clip_moves(moves, squares, rest, self._max_norm), None
        return moves

    def _packet(self, block: Block, gathered: Tensor | None, groups: Groups) -> Packet:
        group = groups[block.weight]
        pair, used = pair_of(
            block,
            # A frozen layer that still has a gradient has sent nothing of it.
            self._kinds.get(block.weight, Sending.NOTHING),
            self._mail.gradients(block),
            gathered,
            ranks=self._mail.ranks.size,
            cumulative=block in self._cumulative,
        )
        samples = self._samples.get(block.weight, 1)
        direction = block.direction(pair, group, samples)
        length = block.squared_length(direction, pair.average, groups, samples)
        trusted = torch.zeros_like(length) if pair.trusted is None else pair.trusted.to(length.dtype)
        norm = inner(pair.average, pair.average)
        scalars = Scalars(
            length,
            norm,
            direction.alignment,
            direction.beta,
            direction.eta,
            direction.rho,
            trusted,
            used.to(norm),
        )
        return Packet(torch.stack(scalars), direction.update)

    def agree(self, refused: Tensor) -> Tensor:
        """Return whether any rank found a gradient that is not finite."""
        if not any(map(is_sharded, self._groups)):
            # All ranks have the same gradients.
            return refused
        found = refused.float()
        self._mail.ranks.all_reduce(found, "control").wait()
        return found > 0

    def abandon(self) -> None:
        """Forget what was sent for a step that no rank will take."""
        self._mail.abandon()
        self._labelled = self._ends = False


def _after_backward(call: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method when the running backward pass is over, and DistributedDataParallel has finished, too."""
    engine = torch.autograd.Variable._execution_engine

    def last() -> None:
        if (method := call()) is not None:
            method()

    # Callbacks run in the order in which they were asked for, and may ask for more.
    engine.queue_callback(lambda: engine.queue_callback(last))
