"""One Kronecker-factored layer inside the optimizer: its curvature, its direction, its update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fop.algebra import (
    Direction,
    Inversion,
    KroneckerBlock,
    Rung,
    damped_inverses,
    damping_split,
    fop_direction,
    kfac_direction,
)
from fop.capture import LayerCapture
from fop.optim.discovery import FoundLayer

# Every how many steps the interval between curvature updates may grow by one; see `next_refresh`.
GROWTH = 5


class Block:
    """A layer's parameters, capture and curvature.

    Args:
        found: the layer.
        state: the optimizer's state of the weight; it holds A, G, A_inv, G_inv, ``refreshed_at``,
            ``refresh_at`` and ``complete`` (whether p.grad is all that the hooks see), so that a checkpoint
            is complete.
    """

    def __init__(self, found: FoundLayer, state: dict[str, Any]) -> None:
        self.name = found.name
        self.layer = found.layer
        self.weight = found.weight
        self.bias = found.bias
        self.state = state
        self.capture = LayerCapture(found.module, found.layer, found.weight, found.bias)
        self.rescues: Counter[Rung] = Counter()
        self.last: Direction | None = None
        # Whether the last gradient came without curvature, so that AdamW took the step.
        self.by_adamw = False
        if "A" in state and state["A"].shape[-1] != self.layer.matrix_shape[-1]:
            # Loaded before the layer was known, from a run that had a bias here or had none: start afresh.
            for key in ("A", "G", "A_inv", "G_inv", "refresh_at", "refreshed_at"):
                state.pop(key, None)

    @property
    def params(self) -> list[Tensor]:
        """The weight, and the bias if it belongs to the block."""
        return self.capture.params

    @property
    def ready(self) -> bool:
        """Whether there is a curvature to precondition with."""
        return "A_inv" in self.state and "G_inv" in self.state

    def schedule(self, options: Mapping[str, Any]) -> None:
        """Tell the capture what the coming backward pass must gather."""
        self.capture.paired = options["beta"] != 0.0
        self.capture.due = self.state.get("refresh_at", 0) <= options["step"]

    def curvature(self) -> KroneckerBlock:
        """Return F and F̂⁻¹ of this layer."""
        state = self.state
        return KroneckerBlock(state["A"], state["G"], state["A_inv"], state["G_inv"])

    def gradient(self) -> Tensor:
        """Return p.grad of weight and bias as gradient matrix."""
        assert self.weight.grad is not None
        return self.layer.to_matrix(self.weight.grad, None if self.bias is None else self.bias.grad)

    def direction(self, options: Mapping[str, Any]) -> Direction:
        """Return the FOP direction, or K-FAC's where this step has no gradient pair."""
        beta, eta = options["beta"], options["eta"]
        fixed_beta = None if beta == "adaptive" else float(beta)
        fixed_eta = None if eta == "adaptive" else float(eta)
        average = self.gradient()
        difference = None
        if fixed_beta != 0.0:
            difference = self.capture.difference(average, self.state.get("complete"))
        if difference is None:
            direction = kfac_direction(self.curvature(), average, eta=fixed_eta)
        else:
            direction = fop_direction(self.curvature(), average, difference, beta=fixed_beta, eta=fixed_eta)
        # Only the scalars are kept for the diagnostics, not the update.
        self.last = direction._replace(update=direction.alignment)
        return direction

    def squared_length(self, direction: Direction, groups: Mapping[Tensor, Mapping[str, Any]]) -> Tensor:
        """Return lr²·⟨update, gradient⟩, this layer's term of the KL clip."""
        rate = float(groups[self.weight]["lr"])
        if self.bias is None or groups[self.bias]["lr"] == rate:
            return direction.alignment * rate**2
        terms = [
            groups[param]["lr"] ** 2 * (part * param.grad).sum()
            for param, part in self.parts(direction.update)
            if param.grad is not None
        ]
        return torch.stack(terms).sum()

    def parts(self, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, its part of the update) for the parameters that have a gradient."""
        weight_part, bias_part = self.layer.from_matrix(update, self.weight)
        parts: list[tuple[Tensor, Tensor]] = [(self.weight, weight_part)]
        if self.bias is not None and bias_part is not None and self.bias.grad is not None:
            parts.append((self.bias, bias_part))
        return parts


def next_refresh(step: int, interval: int) -> int:
    """Return the step of the next curvature update after one in ``step``.

    The distance grows with the number of steps taken, up to ``interval``: early on the weights move far
    and an inverse is soon out of date.
    """
    return step + max(1, min(interval, step // GROWTH))


def refresh_curvature(
    blocks: Sequence[Block], options: Sequence[Mapping[str, Any]]
) -> tuple[list[Block], list[tuple[Block, Rung]]]:
    """Take the gathered statistics of ``blocks`` into their factors and invert these.

    Args:
        blocks: blocks whose window holds statistics.
        options: the parameter group of each.

    Returns:
        The blocks whose statistics were not finite, which keep their curvature, and the rescues.

    Transfers to the host twice (are the statistics finite, did the inversions succeed).
    """
    fresh = [block.capture.window.sums.factors() for block in blocks if block.capture.window.sums]
    finite = torch.stack(
        [(torch.isfinite(A).all() & torch.isfinite(G).all()).to(fresh[0][0].device) for A, G in fresh]
    ).tolist()
    factors: list[Tensor] = []
    shifts: list[Tensor] = []
    refused = [block for block, fine in zip(blocks, finite, strict=True) if not fine]
    updated: list[tuple[Block, int]] = []
    for block, group, (A, G), fine in zip(blocks, options, fresh, finite, strict=True):
        if not fine:
            continue
        state, decay = block.state, group["stat_decay"]
        for key, new in (("A", A), ("G", G)):
            state[key] = torch.lerp(new, state[key], decay) if key in state else new
        shift_A, shift_G = damping_split(state["A"], state["G"], group["damping"])
        factors += [state["A"], state["G"]]
        shifts += [shift_A, shift_G]
        if (complete := block.capture.window.complete) is not None:
            if (clean := block.capture.window.clean) is not None:
                # What p.grad held before says nothing about the paths into it.
                complete = torch.where(clean, complete, state.get("complete", torch.ones_like(complete)))
            state["complete"] = complete
        state["refresh_at"] = next_refresh(group["step"], group["curvature_interval"])
        updated.append((block, group["step"]))
    return refused, _store(updated, damped_inverses(factors, shifts))


def _store(blocks: Sequence[tuple[Block, int]], inversions: Sequence[Inversion]) -> list[tuple[Block, Rung]]:
    rescues: list[tuple[Block, Rung]] = []
    pairs = zip(inversions[::2], inversions[1::2], strict=True)
    for (block, step), pair in zip(blocks, pairs, strict=True):
        for inversion in pair:
            if inversion.rung is not Rung.NONE:
                block.rescues[inversion.rung] += 1
                rescues.append((block, inversion.rung))
        A, G = pair
        # The two inverses share one π, so one of them alone is not replaced.
        if A.inverse is not None and G.inverse is not None:
            block.state["A_inv"], block.state["G_inv"] = A.inverse, G.inverse
            block.state["refreshed_at"] = step
    return rescues
