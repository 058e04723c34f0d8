"""One process on its own: where the gradients, the curvature and the updates of a step come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from fop.distributed import Plan
from fop.optim.agreement import Description
from fop.optim.block import Block
from fop.optim.curvature import Inverter, Rescues, schedule_refresh
from fop.optim.update import Move

Groups: TypeAlias = Mapping[Tensor, dict[str, Any]]


class Solo:
    """What a step needs, from this process alone; `Team` gives the same from several ranks.

    Attributes:
        plan: which rank owns which block; None on one process.
        sent: bytes sent to other ranks, by category.
    """

    plan: Plan | None

    def __init__(self) -> None:
        self.plan = None
        self.sent: dict[str, float] = {}
        self._inverter = Inverter()

    def see(self, root: nn.Module) -> None:
        """Be told of a model, with what wraps it."""

    def watch(self, blocks: Iterable[Block], groups: Groups) -> None:
        """Be told of the blocks there are, and of the parameter group of every parameter."""

    def schedule(self, block: Block) -> None:
        """Change what the capture of a block must gather in the coming backward pass."""

    def label(self) -> None:
        """Be told that the user labels the backward passes of the coming step.

        Raises:
            ValueError: where the pair cannot come from labels.
        """

    def owned(self, blocks: Sequence[Block], groups: Groups) -> list[Block]:
        """Return the blocks whose curvature this process keeps."""
        return list(blocks)

    def unsettle(self) -> None:
        """Be told that the state was replaced."""
        self._inverter.forget()

    def allow_scaler(self) -> None:
        """Raise RuntimeError where a `GradScaler` would not see the overflow of all ranks."""

    def begin(self, groups: Groups, describe: Callable[[], Description]) -> None:
        """Begin a step; p.grad is unscaled.

        Args:
            groups: parameter group of every parameter.
            describe: returns what must be the same on all ranks.

        Raises:
            ValueError: ranks disagree.
        """

    def clip(self, params: Iterable[Tensor], max_norm: float) -> None:
        """Scale all gradients together to a norm of at most ``max_norm``."""
        nn.utils.clip_grad_norm_(list(params), max_norm)

    def takes_part(self, block: Block) -> bool:
        """Tell whether a block has a gradient in this step."""
        return block.weight.grad is not None

    def refresh(
        self, blocks: Sequence[Block], groups: Groups, loss_scale: Tensor | None
    ) -> tuple[list[Block], Rescues]:
        """Take the statistics that blocks have gathered into their curvature.

        Args:
            blocks: those that take part in the step.
            groups: parameter group of every parameter.
            loss_scale: 0-dim, what the loss was multiplied with in the backward pass; None for 1.

        Returns:
            The blocks whose statistics were not finite, and the rescues.
        """
        due: list[Block] = []
        fresh: list[tuple[Tensor, Tensor | None]] = []
        for block in blocks:
            if (statistics := block.capture.window.statistics) is not None:
                due.append(block)
                fresh.append(statistics.factors(groups[block.weight]["loss_reduction"], loss_scale))
        came = self._inverter.take(blocks, groups)
        refused, rescues = self._inverter.refresh(due, fresh, [groups[block.weight] for block in due])
        schedule_refresh([block for block in due if block not in refused], groups)
        return refused, came + rescues

    def moves(self, blocks: Sequence[Block], groups: Groups) -> list[Move]:
        """Return what blocks that have a curvature are about to do."""
        return [self._move(block, groups) for block in blocks]

    def _move(self, block: Block, groups: Groups) -> Move:
        group = groups[block.weight]
        pair, samples = block.pair(group), block.samples_of(group)
        direction = block.direction(pair, group, samples)
        block.note(direction, pair, group)
        length = block.squared_length(direction, pair.average, groups, samples)
        return Move(block.parts(direction.update), length)

    def agree(self, refused: Tensor) -> Tensor:
        """Return whether any rank found a gradient that is not finite; ``refused``: whether this one did."""
        return refused

    def abandon(self) -> None:
        """Forget what was gathered for a step that will not be taken."""
