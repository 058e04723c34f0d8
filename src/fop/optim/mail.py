"""What a rank sends to the owners between two steps, and what it gets as an owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fop.distributed import Channel
from fop.optim.block import Block
from fop.optim.rounds import Round, Routes, Sending, terms_of, wire_dtype


class Mail:
    """Rounds of parcels, one for each backward pass that averages gradients.

    Args:
        factor_dtype: dtype of curvature factors on the wire, None for their own.

    Attributes:
        routes: where parcels go; None until the ranks have compared notes.
    """

    def __init__(self, factor_dtype: torch.dtype | None) -> None:
        self.routes: Routes | None = None
        self._factor_dtype = factor_dtype
        self._rounds: list[Round] = []
        # What waits for a round: before the ranks have compared notes, and in accumulating passes of FSDP.
        self._held: dict[Tensor, list[Tensor]] = {}
        # The first round that counts, where not all do.
        self._first: dict[Tensor, int] = {}
        # Of the running step, on owners: one tensor for each round.
        self._factors: dict[Tensor, list[Tensor]] = {}
        self._gradients: dict[Tensor, list[Tensor]] = {}
        self._counts: dict[Tensor, Tensor] = {}

    @property
    def here(self) -> Routes:
        """The routes, where they are known."""
        assert self.routes is not None
        return self.routes

    @property
    def ranks(self) -> Channel:
        """The channel between all ranks."""
        return self.here.ranks

    def owns(self, block: Block) -> bool:
        """Tell whether this rank owns a block."""
        return self.here.owners[block.weight] == self.ranks.rank

    # In a backward pass

    def hold(self, block: Block, pieces: list[Tensor]) -> None:
        """Keep a contribution for the next round."""
        self._held[block.weight] = pieces

    def held(self, block: Block) -> list[Tensor] | None:
        """Return what is kept for a block, and keep it no longer."""
        return self._held.pop(block.weight, None)

    def discard(self, block: Block) -> None:
        """Let what was sent of a block before the running backward pass count for nothing."""
        self._held.pop(block.weight, None)
        running = self._rounds and self._rounds[-1].task == torch._C._current_graph_task_id()
        self._first[block.weight] = len(self._rounds) - 1 if running else len(self._rounds)

    def send(
        self,
        block: Block,
        pieces: Sequence[Tensor],
        outgoing: Callable[[], tuple[Sequence[Block], Mapping[Tensor, Sending]]],
    ) -> None:
        """Send a block's statistics and contribution in the round of the running backward pass.

        Args:
            block: the block.
            pieces: what `contribution` gave.
            outgoing: returns, for a new round, all trained blocks, those that are ready first first, and what
                of the gradient of each is sent.
        """
        if not self._rounds or self._rounds[-1].task != torch._C._current_graph_task_id():
            if self._rounds:
                self._rounds[-1].flush()
            self._rounds.append(Round(self.here, *outgoing(), self._factor_dtype))
        self._rounds[-1].put(block, pieces)

    # In a step

    @property
    def rounds(self) -> int:
        """How many rounds there were since the last step."""
        return len(self._rounds)

    def flush(self) -> None:
        """Send what is left."""
        for each in self._rounds:
            each.flush()

    def collect(self) -> None:
        """Send what is left, and wait for the sums."""
        self.flush()
        self._factors, self._gradients, self._counts = {}, {}, {}
        for index, each in enumerate(self._rounds):
            for (what, weight), tensor in each.collect().items():
                sums = self._factors if what == "factors" else self._gradients
                if index >= self._first.get(weight, 0):
                    sums.setdefault(weight, []).append(tensor)
            for weight, counts in each.counts.items():
                if index >= self._first.get(weight, 0):
                    self._counts[weight] = self._counts.get(weight, torch.zeros_like(counts)) + counts
        self._rounds, self._held, self._first = [], {}, {}

    def abandon(self) -> None:
        """Forget what was sent: all ranks skip the step."""
        if self._rounds:
            self.collect()
        self._held, self._first = {}, {}
        self._factors, self._gradients, self._counts = {}, {}, {}

    def swap_sides(self, blocks: Sequence[Block]) -> None:
        """Give the sums of this rank's side to the owner beside it, and take those of the other side.

        Args:
            blocks: those whose gradients are added up on each side apart. The sums of a block are then those
                of even and of odd ranks.
        """
        ranks, owners = self.ranks, self.here.owners
        other = ranks.rank ^ 1
        for dtype in sorted({wire_dtype(block) for block in blocks}, key=str):
            alike = [block for block in blocks if wire_dtype(block) is dtype]
            mine = [block for block in alike if self.owns(block)]
            theirs = [block for block in alike if owners[block.weight] == other]
            given = [_total(self._gradients.pop(block.weight)) for block in theirs]
            # With each gradient goes the number of ranks that have one.
            sizes = [torch.Size(block.layer.matrix_shape).numel() + 1 for block in mine]
            nothing = torch.empty(0, dtype=dtype, device=alike[0].weight.device)
            taken = ranks.swap(other, torch.cat([nothing, *given]), sum(sizes), "gradients")
            for block, part in zip(mine, taken.split(sizes), strict=True):
                own = _total(self._gradients[block.weight])
                self._gradients[block.weight] = [own, part] if ranks.rank < other else [part, own]

    def gradients(self, block: Block) -> list[Tensor]:
        """Return what the ranks have contributed to an owned block, added up, one tensor for each round."""
        return self._gradients.get(block.weight, [])

    def factors(self, block: Block) -> Tensor:
        """Return the statistics of all ranks for an owned block, packed."""
        return _total(self._factors.pop(block.weight))

    def counts(self, blocks: Sequence[Block]) -> list[list[float]]:
        """Return N and numbers of rows over all ranks, for every term of each block; waits for the device."""
        sizes = [sum(1 + layer.groups for layer in terms_of(block).values()) for block in blocks]
        zeros = torch.zeros(max(sizes), dtype=torch.float64, device=blocks[0].weight.device)
        own = [
            self._counts.get(block.weight, zeros[:size]) for block, size in zip(blocks, sizes, strict=True)
        ]
        counts = torch.cat(own)
        self.ranks.all_reduce(counts, "control").wait()
        return [part.tolist() for part in counts.split(sizes)]


def _total(sums: Sequence[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum(0)
