"""One Kronecker-factored layer inside the optimizer: its curvature, its direction, its update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.algebra import (
    Curvature,
    DiagonalBlock,
    Direction,
    KroneckerBlock,
    Rung,
    fop_direction,
    kfac_direction,
)
from fop.capture import LayerCapture
from fop.optim.discovery import FoundLayer

# In place of a step: the inverses are there, but were never computed.
NEVER = -1


class GradPair(NamedTuple):
    """The two gradients of a step as their mean and difference, as gradient matrices.

    Attributes:
        average: Ga.
        difference: Gd = g1 - g2; None if there is one gradient only.
        trusted: 0-dim bool, whether ``difference`` may be believed; it is 0 where not.
        why: why there is no pair, where there is none.
    """

    average: Tensor
    difference: Tensor | None
    trusted: Tensor | None
    why: str


class PairCount:
    """How many steps had no gradient pair, and why the last one had none; counted on the device."""

    def __init__(self) -> None:
        self._without = 0
        self._distrusted: Tensor | None = None
        self._trusted: Tensor | None = None
        self._why: str | None = None
        self._torn = _CHANGED

    def count(self, trusted: Tensor | None, why: str, torn: str | None = None) -> None:
        """Add one step.

        Args:
            trusted: 0-dim bool, whether the pair was believed; None for a step without one.
            why: why there was none.
            torn: why one is not believed.
        """
        self._trusted, self._why, self._torn = trusted, None, torn or _CHANGED
        if trusted is None:
            self._without += 1
            self._why = why
        else:
            self._distrusted = (~trusted).long() + (0 if self._distrusted is None else self._distrusted)

    def report(self) -> tuple[int, str | None]:
        """Return the number of steps without a pair, and why the last step was one of them, if it was."""
        distrusted = 0 if self._distrusted is None else int(self._distrusted)
        if self._trusted is not None and not bool(self._trusted):
            return self._without + distrusted, self._torn
        return self._without + distrusted, self._why


# What else can be wrong is decided on the device, without a word.
_CHANGED = (
    "p.grad is not what the layer's own backward pass gave (changed since, not finite, not zeroed before, "
    "or other paths in the loss)"
)


class Block:
    """A weight, with the bias that belongs to it: capture and curvature.

    Args:
        found: the layer.
        capture: what watches it.
        state: the optimizer's state of the weight; it holds A, G, A_inv, G_inv, ``refreshed_at``,
            ``refresh_at`` and ``complete`` (whether p.grad is all that the hooks see), so that a checkpoint
            is complete. A diagonal curvature has no G.
    """

    def __init__(self, found: FoundLayer, capture: LayerCapture, state: dict[str, Any]) -> None:
        self.name = found.name
        self.kind = type(found.uses[0].module).__name__
        self.views = tuple(use.layer for use in found.uses)
        self.modules = tuple(use.name for use in found.uses)
        self.layer = found.layer
        self.weight = found.weight
        self.bias = found.bias
        self.state = state
        self.capture = capture
        self.rescues: Counter[Rung] = Counter()
        self.last: Direction | None = None
        # Between ranks: whether the owner, another rank, has a curvature; None where it is here.
        self.elsewhere: bool | None = None
        # Between ranks: whether the gradient goes to the owner, and p.grad is None.
        self.lean = False
        # Whether the last gradient came without curvature, so that AdamW took the step.
        self.by_adamw = False
        self.pairs = PairCount()
        self._seen = False
        shapes = self.layer.factor_shapes
        if any(key in state and tuple(state[key].shape) != shape for key, shape in shapes.items()):
            # Loaded before the layer was known, from a run with other layer options or bias: start afresh.
            for key in ("A", "G", "A_inv", "G_inv", "refresh_at", "refreshed_at", "complete"):
                state.pop(key, None)

    def newly_unseen(self) -> bool:
        """Tell whether the weight has a gradient that, unlike the one before, its modules know nothing of."""
        capture = self.capture
        seen = self.weight.grad is None or not capture.wants or capture.window.samples > 0
        was_seen, self._seen = self._seen, seen
        return was_seen and not seen

    @property
    def params(self) -> list[Tensor]:
        """The weight, and the bias if it belongs to the block."""
        return self.capture.params

    @property
    def ready(self) -> bool:
        """Whether there is a curvature to precondition with."""
        return self.holds_curvature if self.elsewhere is None else self.elsewhere

    @property
    def holds_curvature(self) -> bool:
        """Whether it is in this process."""
        return "A_inv" in self.state and self.state.get("refreshed_at", 0) != NEVER

    def schedule(self, options: Mapping[str, Any]) -> None:
        """Tell the capture what the coming backward pass must gather."""
        self.capture.paired = options["beta"] != 0.0
        # A state that was saved by one of several ranks lacks the curvature that others owned.
        self.capture.due = self.state.get("refresh_at", 0) <= options["step"] or not self.ready
        self.capture.counted = options["loss_reduction"] == "sum"

    def curvature(self) -> Curvature:
        """Return F and F̂⁻¹ of this layer."""
        state = self.state
        if "G" not in state:
            return DiagonalBlock(state["A"], state["A_inv"])
        return KroneckerBlock(state["A"], state["G"], state["A_inv"], state["G_inv"])

    def gradient(self) -> Tensor:
        """Return p.grad of weight and bias as gradient matrix."""
        assert self.weight.grad is not None
        return self.layer.to_matrix(self.weight.grad, None if self.bias is None else self.bias.grad)

    def samples_of(self, options: Mapping[str, Any]) -> int:
        """Return by what p.grad is divided to be the gradient of a mean: 1, or N of a loss that is a sum."""
        return max(1, self.capture.window.samples) if options["loss_reduction"] == "sum" else 1

    def pair(self, options: Mapping[str, Any]) -> GradPair:
        """Return the gradient pair that this process has gathered, Ga as p.grad is now."""
        average, window = self.gradient(), self.capture.window
        known = None
        if options["beta"] != 0.0:
            known = window.difference(average, self.state.get("complete"), options["loss_reduction"])
        difference, trusted = known or (None, None)
        if difference is not None and self.bias is not None and self.bias.grad is None:
            self.layer.bias_part(difference).zero_()
        return GradPair(average, difference, trusted, window.why)

    def direction(self, pair: GradPair, options: Mapping[str, Any], samples: int | Tensor) -> Direction:
        """Return the FOP direction, or K-FAC's where there is no gradient pair.

        Args:
            pair: the gradients.
            options: the parameter group of the weight.
            samples: what `samples_of` returns.
        """
        beta, eta = options["beta"], options["eta"]
        fixed_beta = None if beta == "adaptive" else float(beta)
        fixed_eta = None if eta == "adaptive" else float(eta)
        average, difference = pair.average, pair.difference
        if options["loss_reduction"] == "sum":
            average = average / samples
            difference = None if difference is None else difference / samples
        if difference is None:
            return kfac_direction(self.curvature(), average, eta=fixed_eta)
        direction = fop_direction(self.curvature(), average, difference, beta=fixed_beta, eta=fixed_eta)
        assert pair.trusted is not None
        return direction._replace(beta=torch.where(pair.trusted, direction.beta, 0))

    def note(self, direction: Direction, pair: GradPair, options: Mapping[str, Any]) -> None:
        """Keep for the diagnostics how a step went: the scalars, not the update."""
        self.last = direction._replace(update=direction.alignment)
        if options["beta"] != 0.0:
            self.pairs.count(pair.trusted, pair.why)

    def squared_length(
        self,
        direction: Direction,
        average: Tensor,
        groups: Mapping[Tensor, Mapping[str, Any]],
        samples: int | Tensor,
    ) -> Tensor:
        """Return lr²·⟨update, gradient⟩, this layer's term of the KL clip, from Ga in ``average``."""
        rate = float(groups[self.weight]["lr"])
        if self.bias is None or groups[self.bias]["lr"] == rate:
            return direction.alignment * rate**2
        terms = [
            groups[param]["lr"] ** 2 * (part * gradient).sum()
            for (param, part), (_, gradient) in zip(
                self.parts(direction.update), self.parts(average), strict=True
            )
        ]
        total = torch.stack(terms).sum()
        return total / samples if groups[self.weight]["loss_reduction"] == "sum" else total

    def parts(self, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, its part of a gradient matrix) for the parameters that take part in a step."""
        weight_part, bias_part = self.layer.from_matrix(update, self.weight)
        parts: list[tuple[Tensor, Tensor]] = [(self.weight, weight_part)]
        if self.bias is not None and bias_part is not None and self.steps_bias():
            parts.append((self.bias, bias_part))
        return parts

    def steps_bias(self) -> bool:
        """Whether the bias takes part in a step: whether it has a gradient."""
        if self.bias is None:
            return False
        return self.bias.requires_grad if self.lean else self.bias.grad is not None
