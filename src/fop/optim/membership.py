"""Which ranks train a model together, and what each of them gathers and sends for every layer."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fop.capture import is_sharded
from fop.optim.block import Block
from fop.optim.distribution import Distribution
from fop.optim.joining import Stepping, join_along
from fop.optim.mail import Mail
from fop.optim.rounds import Sending
from fop.optim.settling import interval_of, plan_for
from fop.optim.solo import Groups, Solo
from fop.optim.wrapping import Wrapping, average_lean, check_group


class Membership(Solo, ABC):
    """This rank as one of several.

    Args:
        options: how they work together.
        optimizer: whose steps these are; held weakly.
    """

    def __init__(self, options: Distribution, optimizer: Stepping) -> None:
        super().__init__()
        self.options = options
        self.wrapping = Wrapping(self._meet)
        self._optimizer = weakref.ref(optimizer)
        self._mail = Mail(options.factor_dtype)
        self._blocks: list[Block] = []
        self._block_of: dict[Tensor, Block] = {}
        self._groups: Groups = {}
        # Whether the ranks have compared notes; without that nothing can be sent.
        self._settled = False
        self._labelled = False

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
        """Look for what wraps a model."""
        self.wrapping.see(root)

    def _meet(self, ddp: Any) -> None:
        """Get to know the DistributedDataParallel around the model."""
        check_group(self.options.group, ddp)
        if (optimizer := self._optimizer()) is not None:
            join_along(ddp, optimizer)
        if self.options.mode == "lean":
            team = weakref.ref(self)

            def is_lean(param: Tensor) -> bool:
                this = team()
                return this is not None and this.is_lean(param)

            average_lean(ddp, is_lean)

    def watch(self, blocks: Iterable[Block], groups: Groups) -> None:
        """Be told by the captures of these blocks when gradients are complete."""
        blocks = list(blocks)
        if [id(block.weight) for block in blocks] != [id(block.weight) for block in self._blocks]:
            self._settled = False
        self._blocks, self._groups = blocks, groups
        self._block_of = {param: block for block in blocks for param in block.params}
        for block in blocks:
            block.capture.completed = Completed(self, block)
            self.schedule(block)

    def owned(self, blocks: Sequence[Block], groups: Groups) -> list[Block]:
        """Return the blocks that this rank owns."""
        # Without a word to the others: the plan is the same on all ranks.
        plan = plan_for(blocks, self.options, dist.get_world_size(self.group), interval_of(groups))
        rank = dist.get_rank(self.group)
        return [block for block, owner in zip(blocks, plan.owners, strict=True) if owner == rank]

    def unsettle(self) -> None:
        """Compare notes with the other ranks in the coming step."""
        super().unsettle()
        self._settled = False
        for block in self._blocks:
            block.elsewhere = None

    def schedule(self, block: Block) -> None:
        """Gather no halves for parity, and statistics in case that the owner has no curvature."""
        if not self._settled:
            # Which layers lack a curvature is known when the ranks have compared notes.
            block.capture.due = True
        if self.parity:
            # No half of this rank's own batch is wanted.
            block.capture.paired = False
        sharded = is_sharded(block.weight)
        block.lean = self._settled and self.options.mode == "lean" and block.ready and not sharded
        block.capture.apart = block.lean or sharded

    def label(self) -> None:
        """Take the pair of the coming step from passes that the user labels."""
        if self.options.pair == "parity":
            raise ValueError(
                "sub_batch() labels backward passes, and distributed={'pair': 'parity'} takes the pair from "
                "the ranks; use one or the other"
            )
        if self.options.mode == "lean":
            raise ValueError("sub_batch() does not go together with mode='lean'; leave the pair to the ranks")
        if any(is_sharded(block.weight) for block in self._blocks):
            raise ValueError("sub_batch() does not go together with fully_shard; leave the pair to the ranks")
        self._labelled = True
        for block in self._blocks:
            block.capture.paired = self._paired(block)

    def _paired(self, block: Block) -> bool:
        return bool(self._groups[block.weight]["beta"] != 0.0)

    def _sending(self, block: Block) -> Sending:
        if not block.lean:
            return Sending.DIFFERENCE if self._paired(block) else Sending.NOTHING
        if not self._paired(block):
            return Sending.GRADIENT
        return Sending.SIDE if self.parity else Sending.BOTH

    def _adds_up(self, block: Block) -> bool:
        """Tell whether the contributions of several passes are to be added; otherwise the last has it all.

        By parity p.grad of earlier passes, a mean over all ranks, cancels from Gd.
        """
        return self.parity or block.capture.apart

    def is_lean(self, param: Tensor) -> bool:
        """Tell whether a parameter's gradient goes to its owner, so that nobody else need have it."""
        block = self._block_of.get(param)
        return block is not None and block.lean

    def allow_scaler(self) -> None:
        """Raise RuntimeError where ranks would not find the same overflow."""
        if self.options.mode == "lean":
            raise RuntimeError(
                "GradScaler looks for overflow in p.grad, and with distributed={'mode': 'lean'} "
                "preconditioned layers have none; use bfloat16 without a scaler, or mode='compatible'"
            )
        if self.wrapping.ddp is None and not any(map(is_sharded, self._groups)):
            raise RuntimeError(
                "GradScaler looks for overflow before the optimizer averages gradients, so that ranks would "
                "skip different steps; wrap the model in DistributedDataParallel, or use bfloat16"
            )

    @abstractmethod
    def completed(self, block: Block, gradients: Mapping[Tensor, Tensor]) -> None:
        """Take the gradients of a block, this rank's own, as a backward pass has just given them."""


class Completed:
    """Called by a capture; knows team and block weakly, since both outlive no optimizer."""

    def __init__(self, team: Membership, block: Block) -> None:
        self._team, self._block = weakref.ref(team), weakref.ref(block)

    def __call__(self, gradients: dict[Tensor, Tensor]) -> None:
        team, block = self._team(), self._block()
        if team is not None and block is not None:
            team.completed(block, gradients)
