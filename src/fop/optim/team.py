"""Several ranks that train one model: every layer has an owner, which alone keeps and inverts its curvature."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fop.algebra import Direction, Rung, inner
from fop.capture import is_sharded, local
from fop.distributed import SKETCH, scale_between, sketch
from fop.optim.agreement import Description, check_devices
from fop.optim.block import Block, GradPair, refresh_curvature, schedule_refresh
from fop.optim.distribution import Distribution
from fop.optim.mail import Mail
from fop.optim.rounds import Routes, Sending, contribution, factors_from
from fop.optim.settling import open_channels, plan_for, settle
from fop.optim.sharing import Packet, gather_gradients, share_updates
from fop.optim.solo import Groups, Solo
from fop.optim.update import Move
from fop.optim.wrapping import Wrapping, average, lean_hook

# How far p.grad may be from a scaling of what the ranks gave, as a share of its sketch: compressed all-reduces
# and half precision round, while clipped elements and added noise move it further.
_SAME, _SAME_HALF = 1e-2, 5e-2
_TORN = (
    "p.grad is not the mean of what the ranks gave (changed since, or not finite), or a rank had no pair in its "
    "batch"
)


class Team(Solo):
    """What a step needs, from several ranks.

    Args:
        options: how they work together.

    In a backward pass every layer sends its statistics, if they are due, and its part of the gradient pair to its
    owner as soon as it has them. In `step()` owners refresh the curvature and compute the updates of their
    layers, and share these; momentum and weight decay then follow on all ranks alike.
    """

    def __init__(self, options: Distribution) -> None:
        super().__init__()
        self.options = options
        self.wrapping = Wrapping(self._meet)
        self._mail = Mail(options.factor_dtype)
        self._blocks: list[Block] = []
        self._groups: Groups = {}
        # Whether the ranks have compared notes; without that nothing can be sent.
        self._settled = False
        self._labelled = False
        self._forgets = False
        self._samples: dict[Tensor, Tensor] = {}
        self._max_norm: float | None = None

    # The ranks

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks that train the model."""
        ddp = self.wrapping.ddp
        group = self.options.group or (dist.group.WORLD if ddp is None else ddp.process_group)
        if group is None or not dist.is_initialized():
            raise RuntimeError(
                "the process group is gone, and the model is trained by several ranks; step before "
                "torch.distributed.destroy_process_group(), or make a new optimizer"
            )
        return group

    @property
    def parity(self) -> bool:
        """Whether a rank's side says which sub-batch its batch is (Algorithm 1)."""
        even = dist.get_world_size(self.group) % 2 == 0
        return not self._labelled and (self.options.pair or ("parity" if even else "halves")) == "parity"

    def see(self, root: nn.Module) -> None:
        self.wrapping.see(root)

    def _meet(self, ddp: Any) -> None:
        """Get to know the DistributedDataParallel around the model."""
        if self.options.group is not None:
            ours, theirs = (
                sorted(dist.get_process_group_ranks(group))
                for group in (self.options.group, ddp.process_group)
            )
            if ours != theirs:
                raise ValueError(
                    f"distributed: 'group' has the ranks {ours}, and DistributedDataParallel averages over "
                    f"{theirs}; give both the same process group"
                )
        if self.options.mode == "lean":
            team = weakref.ref(self)

            def is_lean(param: Tensor) -> bool:
                this = team()
                return this is not None and this.is_lean(param)

            try:
                ddp.register_comm_hook(None, lean_hook(is_lean, ddp.process_group))
            except RuntimeError as error:
                raise ValueError(
                    "distributed: mode='lean' needs a communication hook of its own, and this "
                    "DistributedDataParallel has one already; make it without, or use mode='compatible'"
                ) from error

    def watch(self, blocks: Iterable[Block], groups: Groups) -> None:
        blocks = list(blocks)
        if [block.weight for block in blocks] != [block.weight for block in self._blocks]:
            self._settled = False
        self._blocks, self._groups = blocks, groups
        for block in blocks:
            block.capture.completed = _Completed(self, block)
            self.schedule(block)

    def owned(self, blocks: Sequence[Block], groups: Groups) -> list[Block]:
        # Without a word to the others: the plan is the same on all ranks.
        plan = plan_for(blocks, self.options, dist.get_world_size(self.group), _interval(groups))
        rank = dist.get_rank(self.group)
        return [block for block, owner in zip(blocks, plan.owners, strict=True) if owner == rank]

    def unsettle(self) -> None:
        self._settled = False
        for block in self._blocks:
            block.elsewhere = None

    def schedule(self, block: Block) -> None:
        if not self._settled:
            # Which layers lack a curvature is known when the ranks have compared notes.
            block.capture.due = True
        if self.parity:
            # No half of this rank's own batch is wanted.
            block.capture.paired = False
        block.lean = self._settled and self.options.mode == "lean" and block.ready

    def label(self) -> None:
        if self.options.pair == "parity":
            raise ValueError(
                "sub_batch() labels backward passes, and distributed={'pair': 'parity'} takes the pair from "
                "the ranks; use one or the other"
            )
        if any(is_sharded(block.weight) for block in self._blocks):
            raise ValueError("sub_batch() does not go together with fully_shard; leave the pair to the ranks")
        self._labelled = True
        for block in self._blocks:
            block.capture.paired = self._paired(block)

    def _paired(self, block: Block) -> bool:
        return bool(self._groups[block.weight]["beta"] != 0.0)

    # In a backward pass

    def completed(self, block: Block, gradients: Mapping[Tensor, Tensor]) -> None:
        """Take the gradients of a block, this rank's own, as a backward pass has just given them."""
        synchronises = self.wrapping.synchronises(block.weight)
        if not synchronises and not is_sharded(block.weight):
            # The last pass shows them whole; where nobody averages, the step does.
            return
        pieces = self._contribution(block, gradients)
        if (before := self._mail.held(block)) is not None:
            pieces = self._added(block, before, pieces)
        if not (self._settled and synchronises):
            self._mail.hold(block, pieces)
            return
        if block.lean and not self._forgets:
            self._forgets = True
            _after_backward(weakref.WeakMethod(self._forget_gradients))
        self._mail.send(block, pieces, *self._outgoing())

    def _outgoing(self) -> tuple[list[Block], dict[Tensor, Sending]]:
        """Return the blocks that send something, those that are ready first first, and what each sends."""
        blocks = [block for block in reversed(self._blocks) if block.weight.requires_grad]
        return blocks, {block.weight: self._sending(block) for block in blocks}

    def _sending(self, block: Block) -> Sending:
        if not block.lean:
            return Sending.DIFFERENCE if self._paired(block) else Sending.NOTHING
        if not self._paired(block):
            return Sending.GRADIENT
        return Sending.SIDE if self.parity else Sending.BOTH

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
        sums = [old + new for old, new in zip(before, now, strict=True)]
        if len(sums) < 3:
            return sums
        if not is_sharded(block.weight):
            # p.grad, and its sketch, hold all passes so far.
            sums[1] = now[1]
        return [*sums[:2], torch.minimum(before[2], now[2])]

    def is_lean(self, param: Tensor) -> bool:
        """Tell whether a parameter's gradient goes to its owner, so that nobody else need have it."""
        return any(block.lean and any(param is own for own in block.params) for block in self._blocks)

    def _forget_gradients(self) -> None:
        # Each is one rank's alone: nobody must clip or log by it.
        self._forgets = False
        for block in self._blocks:
            if block.lean:
                for param in block.params:
                    param.grad = None

    # In a step

    def begin(self, groups: Groups, describe: Callable[[], Description]) -> None:
        if not self._settled:
            self._settle(groups, describe())
        averaged = self.wrapping.ddp is not None or any(map(is_sharded, groups))
        if self._mail.empty:
            outgoing = self._outgoing()
            for block in outgoing[0]:
                pieces = self._mail.held(block)
                if not averaged and block.weight.grad is not None:
                    pieces = self._contribution(
                        block, {p: p.grad for p in block.params if p.grad is not None}
                    )
                self._mail.send(block, pieces or [], *outgoing)
        if not averaged:
            self._average([param for param in groups if param.requires_grad])
        self._mail.collect()
        sides = [block for block in self._blocks if block.lean and self._sending(block) is Sending.SIDE]
        if sides := [block for block in sides if block.weight.requires_grad]:
            self._mail.swap_sides(sides)
        if any(group["loss_reduction"] == "sum" for group in groups.values()):
            self._count_samples()
        self._labelled = False

    def _settle(self, groups: Groups, description: Description) -> None:
        check_devices(groups, {})
        routes = self._mail.routes
        ranks, side = (routes.ranks, routes.side) if routes else open_channels(self.group, self.sent)
        self.plan, lacking = settle(self._blocks, description, self.options, ranks, _interval(groups))
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
        if any(block.lean for block in self._blocks):
            # The norms of lean layers come with their updates.
            self._max_norm = max_norm
        else:
            super().clip(params, max_norm)

    def takes_part(self, block: Block) -> bool:
        return block.weight.requires_grad if block.lean else super().takes_part(block)

    def refresh(
        self, blocks: Sequence[Block], groups: Groups, loss_scale: Tensor | None
    ) -> tuple[list[Block], list[tuple[Block, Rung]]]:
        due = [block for block in blocks if block.capture.due]
        if not due:
            return [], []
        mail, mine, fresh = self._mail, [], []
        for block, counts in zip(due, mail.counts(due), strict=True):
            if mail.owns(block) and any(counts):
                mine.append(block)
                fresh.append(
                    factors_from(
                        block, mail.factors(block), counts, groups[block.weight], loss_scale, mail.ranks.size
                    )
                )
        bad, rescues = refresh_curvature(mine, fresh, [groups[block.weight] for block in mine])
        # What became of a layer, as its owner says: 1 taken in, 2 refused; 4 more if it has a curvature.
        said = [
            (2 if block in bad else int(block in mine)) + 4 * block.ready if mail.owns(block) else 0
            for block in due
        ]
        codes = torch.tensor(said, dtype=torch.float32).to(local(due[0].weight).device)
        mail.ranks.all_reduce(codes, "control").wait()
        refused = []
        for block, code in zip(due, map(int, codes.tolist()), strict=True):
            if not mail.owns(block):
                block.elsewhere = code >= 4
            if code % 4 == 1:
                schedule_refresh([block], groups)
                block.state["refreshed_at"] = groups[block.weight]["step"]
            elif code % 4 == 2:
                refused.append(block)
        return refused, rescues

    def moves(self, blocks: Sequence[Block], groups: Groups) -> list[Move]:
        ranks, owners = self._mail.ranks, self._mail.here.owners
        gathered: dict[Tensor, Tensor] = {}
        if any(is_sharded(block.weight) for block in blocks):
            gathered = gather_gradients(ranks, blocks, owners)
        packets: dict[Tensor, Packet] = {
            block.weight: self._packet(block, gathered.get(block.weight), groups)
            for block in blocks
            if self._mail.owns(block)
        }
        shared = share_updates(ranks, blocks, owners, packets)
        for block, (scalars, _) in zip(blocks, shared, strict=True):
            if self._paired(block):
                block.pairs.count(scalars.trusted > 0.5, _TORN, torn=_TORN)
            block.last = Direction(scalars.alignment, *scalars[2:6])
        moves = [Move(parts, scalars.length) for scalars, parts in shared]
        if self._max_norm is None:
            return moves
        return self._clipped(blocks, moves, torch.stack([scalars.norm for scalars, _ in shared]), groups)

    def _packet(self, block: Block, gathered: Tensor | None, groups: Groups) -> Packet:
        group = groups[block.weight]
        pair, samples = self._pair(block, gathered), self._samples.get(block.weight, 1)
        direction = block.direction(pair, group, samples)
        length = block.squared_length(direction, pair.average, groups, samples)
        trusted = torch.zeros_like(length) if pair.trusted is None else pair.trusted.to(length.dtype)
        norm = inner(pair.average, pair.average)
        scalars = (length, norm, direction.alignment, direction.beta, direction.eta, direction.rho, trusted)
        return Packet(torch.stack(scalars), direction.update)

    def _pair(self, block: Block, gathered: Tensor | None) -> GradPair:
        """Return the gradient pair of an owned block, from what all ranks have sent."""
        sending, sums, ranks = self._sending(block), self._mail.gradients(block), self._mail.ranks.size
        shape = block.layer.matrix_shape
        if sending is Sending.NOTHING:
            return GradPair(block.gradient() if gathered is None else gathered, None, None, _TORN)
        if sending is Sending.GRADIENT:
            return GradPair(torch.stack(sums).sum(0).view(shape) / ranks, None, None, _TORN)
        if sending is Sending.SIDE:
            first, second = (each.view(shape) for each in sums)
            difference = (first - second) * (2 / ranks)
            trusted = torch.ones((), dtype=torch.bool, device=first.device)
            return GradPair((first + second) / ranks, difference, trusted, _TORN)
        size = torch.Size(shape).numel()
        total = torch.stack(sums).sum(0)
        complete = total[-1] > ranks * len(sums) - 0.5
        if sending is Sending.BOTH:
            difference = torch.where(complete, total[size:-1].view(shape), 0)
            return GradPair(total[:size].view(shape), difference, complete, _TORN)
        pair_average = block.gradient() if gathered is None else gathered
        assert block.weight.grad is not None
        tolerance = _SAME if torch.finfo(block.weight.grad.dtype).bits > 16 else _SAME_HALF
        was = sums[-1][size : size + SKETCH]
        scale, same = scale_between(was, sketch(pair_average), tolerance)
        trusted = complete & same
        difference = torch.where(trusted, total[:size].view(shape) * scale, 0)
        return GradPair(pair_average, difference, trusted, _TORN)

    def _clipped(
        self, blocks: Sequence[Block], moves: list[Move], norms: Tensor, groups: Groups
    ) -> list[Move]:
        """Scale all gradients to ``max_grad_norm``: those of AdamW in place, of others by their updates."""
        assert self._max_norm is not None
        moving = {param for block in blocks for param in block.params}
        rest = [p.grad for p in groups if p.grad is not None and p not in moving]
        squares = [norms.sum(), *(gradient.square().sum().to(norms) for gradient in rest)]
        # As torch.nn.utils.clip_grad_norm_. An update grows as its gradient does.
        coefficient = (self._max_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in rest:
            gradient.mul_(coefficient.to(gradient))
        self._max_norm = None
        return [
            Move([(p, part * coefficient.to(part)) for p, part in parts], length * coefficient**2)
            for parts, length in moves
        ]

    def agree(self, refused: Tensor) -> Tensor:
        if not any(map(is_sharded, self._groups)):
            # All ranks have the same gradients.
            return refused
        found = refused.float()
        self._mail.ranks.all_reduce(found, "control").wait()
        return found > 0

    def allow_scaler(self) -> None:
        if self.options.mode == "lean":
            raise RuntimeError(
                "GradScaler looks for overflow in p.grad, and with distributed={'mode': 'lean'} there is none "
                "of preconditioned layers; use bfloat16 without a scaler, or mode='compatible'"
            )
        if self.wrapping.ddp is None and not any(map(is_sharded, self._groups)):
            raise RuntimeError(
                "GradScaler looks for overflow before the optimizer averages gradients, so that ranks would "
                "skip different steps; wrap the model in DistributedDataParallel, or use bfloat16"
            )

    def abandon(self) -> None:
        self._mail.abandon()
        self._labelled = False


def _interval(groups: Groups) -> int:
    # A mean over groups would be no better: the plan needs the order of magnitude.
    return int(next(iter(groups.values()))["curvature_interval"])


class _Completed:
    """Called by a capture; knows team and block weakly, since both outlive no optimizer."""

    def __init__(self, team: Team, block: Block) -> None:
        self._team, self._block = weakref.ref(team), weakref.ref(block)

    def __call__(self, gradients: dict[Tensor, Tensor]) -> None:
        team, block = self._team(), self._block()
        if team is not None and block is not None:
            team.completed(block, gradients)


def _after_backward(call: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method when the running backward pass is over, and DistributedDataParallel has finished, too."""
    engine = torch.autograd.Variable._execution_engine

    def last() -> None:
        if (method := call()) is not None:
            method()

    # Callbacks run in the order in which they were asked for, and may ask for more.
    engine.queue_callback(lambda: engine.queue_callback(last))
