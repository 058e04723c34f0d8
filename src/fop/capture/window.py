"""What the backward passes between two optimizer steps have gathered for one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fop.layers import Layer, Reduction, Statistics

# A gradient that was scaled as a whole reproduces its scaled norms to rounding; clipping single elements or
# adding noise moves them far more. Lenient enough for a float16 round trip.
_SAME_DIRECTION = 1e-3
# How far p.grad may be from what the hooks saw before it counts as having other parts; in half precision
# autograd and the hooks round differently.
_SAME_SUM, _SAME_SUM_HALF = 1e-2, 5e-2


@dataclass
class Part:
    """The contribution of one backward pass (which may use the weight several times).

    Attributes:
        samples: N of this pass.
        half: S1 = Σ b āᵀ over the first h = ⌊N/2⌋ samples as gradient matrix, None if there is no pair.
        whole: Σ b āᵀ over all samples, only in passes with statistics.
        statistics: Kronecker statistics, None if none are due.
        problem: why this pass has no pair of halves, None if it has one.
        precise: whether b has more than half precision.
    """

    samples: int
    half: Tensor | None = None
    whole: Tensor | None = None
    statistics: Statistics | None = None
    problem: str | None = None
    precise: bool = True

    def add_use(self, other: Part) -> None:
        """Add another use of the weight in the same backward pass."""
        if other.samples != self.samples:
            self.problem = f"its uses have batches of {self.samples} and {other.samples}"
        self.problem = self.problem or other.problem
        self.samples = max(self.samples, other.samples)
        self.precise &= other.precise
        self.half = _sum(self.half, other.half)
        self.whole = _sum(self.whole, other.whole)
        if self.statistics is None:
            self.statistics = other.statistics
        elif other.statistics is not None:
            self.statistics.add_use(other.statistics)


class Window:
    """Everything gathered for one weight since its gradient was last None or zero.

    The pair comes from the two halves of every backward pass. Where a pass cannot be split in the ratio of
    those before it, they become one sub-batch, and passes alternate from then on. Passes that the user has
    labelled are sub-batches as they are.

    Args:
        layer: layout of the gradient matrix.
        params: weight, and bias if it belongs to the block.

    Attributes:
        statistics: Kronecker statistics, None if none were due.
        samples: N of all passes together.
        clean: 0-dim bool, false if p.grad held something unknown before the first pass; None if it was None.
        complete: 0-dim bool, whether p.grad is all that the hooks saw; None where that was not looked at.
        split: whether the running backward pass is to be split in halves.
    """

    def __init__(self, layer: Layer, params: Sequence[Tensor]) -> None:
        self.statistics: Statistics | None = None
        self.samples = 0
        self.clean: Tensor | None = None
        self.complete: Tensor | None = None
        self.split = True
        self._layer = layer
        self._params = params
        self._why: str | None = None
        self._dropped = False
        self._by_user = False
        # Halves of passes: S1 of all passes, and N of the first one.
        self._half: Tensor | None = None
        self._whole: Tensor | None = None
        self._ratio_of = self._last = 0
        self._precise = True
        # Whole passes: the sub-batch of the last one, passes and samples of each sub-batch, and the gradient
        # of sub-batch 0, less p.grad if the last pass was of it.
        self._label = 0
        self._passes = [0, 0]
        self._samples = [0, 0]
        self._earlier: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}

    @property
    def why(self) -> str:
        """Why there is no pair."""
        if self._why is None and not any(self._passes):
            return "p.grad was not made by a backward pass through the layer"
        return self._why or "its backward passes were all of one sub-batch"

    def begin(self, samples: int, label: int | None) -> None:
        """Begin a backward pass: decide which sub-batch it belongs to; p.grad is still without it.

        Args:
            samples: N of the pass.
            label: the sub-batch that the user says, None for no word.
        """
        if not any(self._passes):
            self._by_user, self.split, self._label = label is not None, label is None, label or 0
        elif self._by_user != (label is not None):
            self.drop_pair("some of its backward passes were outside sub_batch()")
        elif label is not None:
            self._turn(label)
        elif not self.split:
            self._turn(1 - self._label)
        elif not self._splits_like_first(samples):
            self.split, self._half = False, None
            self._turn(1)

    def _splits_like_first(self, samples: int) -> bool:
        # One formula gives g1 - g2 from the summed halves only if all passes were split in the same ratio.
        first = self._ratio_of
        return self._half is not None and samples // 2 * first == first // 2 * samples > 0

    def _turn(self, label: int) -> None:
        """Go over to a sub-batch: from here on p.grad grows by its gradients."""
        if label != self._label and not self._dropped:
            for param in self._params:
                if param.grad is None:
                    continue
                dtype = torch.promote_types(param.grad.dtype, torch.float32)
                before = self._earlier.setdefault(param, torch.zeros_like(param.grad, dtype=dtype))
                before.add_(param.grad, alpha=1 if label else -1)
        self._label = label

    def add(self, part: Part, *, continued: bool = False) -> None:
        """Add a finished backward pass; ``continued`` if it is one with the pass before it."""
        if self.statistics is None:
            self.statistics = part.statistics
        elif part.statistics is not None and continued:
            self.statistics.add_use(part.statistics)
        elif part.statistics is not None:
            self.statistics.add_batch(part.statistics)
        self._precise &= part.precise
        if continued and part.samples != self._last and self.split:
            part.problem = f"its uses have batches of {self._last} and {part.samples}"
        self._last = part.samples
        if self.split and part.problem is None and not self._dropped:
            self._ratio_of = self._ratio_of or part.samples
            self._half, self._whole = _sum(self._half, part.half), _sum(self._whole, part.whole)
        elif self.split and not self._dropped:
            # This pass cannot be split, but whole passes may still make a pair.
            self._half, self._why = None, part.problem
        if not continued:
            self.samples += part.samples
            self._passes[self._label] += 1
            self._samples[self._label] += part.samples

    def drop_pair(self, why: str) -> None:
        """Take the K-FAC step: the gradients of the two sub-batches are not known."""
        self._dropped, self._why, self._half = True, why, None
        self._earlier.clear()

    def compare(self, gradient: Tensor) -> None:
        """Tell from a pass with statistics whether ``gradient``, the weight's, is all that the hooks saw.

        It is not where the loss has other paths to the weight: a penalty, a second use as a function.
        """
        if self._whole is None or self._half is None:
            return
        whole, half = (self._layer.weight_part(matrix) for matrix in (self._whole, self._half))
        tolerance = _SAME_SUM if self._precise else _SAME_SUM_HALF
        parts = half.square().sum() + (whole - half).square().sum()
        matrix = self._layer.weight_matrix(gradient.to(whole.dtype))
        self.complete = (whole - matrix).square().sum() <= tolerance**2 * parts

    def remember(self, param: Tensor, gradient: Tensor) -> None:
        """Remember the gradient of ``param``, weight or bias, as autograd left it."""
        self._norms[param] = self._measure(param, gradient)

    def difference(
        self, average: Tensor, complete: Tensor | None, reduction: Reduction
    ) -> tuple[Tensor, Tensor] | None:
        """Return Gd = g1 - g2 as gradient matrix, and whether it may be believed; None without a pair.

        Args:
            average: the gradient matrix of p.grad as it is now.
            complete: what `compare` told at the last statistics, None before the first.
            reduction: how the loss joins samples; decides what passes of different N weigh.

        With S1, the first sub-batch's part of p.grad, g1 = S1/share and g2 = (p.grad - S1)/(1 - share). If
        p.grad was scaled as a whole since the backward pass (unscaling, norm clipping), S1 follows; after any
        other change the difference is 0, which makes the step K-FAC's.
        """
        known = [param for param in self._params if param.grad is not None and param in self._norms]
        if not known or not self.has_pair:
            return None
        scale, trusted = self._scale_since(known)
        return self._difference(average, scale, trusted, complete, reduction)

    def difference_now(
        self, average: Tensor, complete: Tensor | None, reduction: Reduction
    ) -> tuple[Tensor, Tensor] | None:
        """Return as `difference`, in a backward pass that has just given ``average``: nothing has changed."""
        if not self.has_pair:
            return None
        one = torch.ones((), dtype=average.dtype, device=average.device)
        return self._difference(average, one, one > 0, complete, reduction)

    @property
    def has_pair(self) -> bool:
        """Whether the gradients of both sub-batches are known."""
        return not self._dropped and (all(self._passes) or self._half is not None)

    def _difference(
        self,
        average: Tensor,
        scale: Tensor,
        trusted: Tensor,
        complete: Tensor | None,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor]:
        if self._half is not None:
            share = self._ratio_of // 2 / self._ratio_of
            S1 = self._half.to(average.dtype) * scale.to(average.dtype)
            vetoes = [self.clean, complete]
        else:
            counts = self._passes if reduction == "mean" else self._samples
            share = counts[0] / sum(counts)
            S1 = self._earlier_matrix() * scale.to(average.dtype)
            S1 = S1 + average if self._label == 0 else S1
            vetoes = [self.clean]
        for veto in vetoes:
            if veto is not None:
                trusted = trusted & veto
        own = 1 / (1 - share)
        return torch.where(trusted, torch.add(S1 * (1 / share + own), average, alpha=-own), 0.0), trusted

    def _earlier_matrix(self) -> Tensor:
        weight, *bias = self._params
        return self._layer.to_matrix(self._earlier[weight], self._earlier.get(bias[0]) if bias else None)

    def _scale_since(self, known: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        was = torch.stack([self._norms[param] for param in known])
        now = torch.stack([self._measure(param, param.grad) for param in known if param.grad is not None])
        # One scale for weight and bias, from the Euclidean norm of both.
        lengths = torch.linalg.vector_norm(torch.stack([was[:, 0], now[:, 0]]), dim=1)
        scale = torch.nan_to_num(lengths[1] / lengths[0], nan=0.0, posinf=0.0)
        # Each number is compared on the scale of what it can differ by.
        two, one = now[:, :1], now[:, 1:2]
        same = (now - scale * was).abs() <= _SAME_DIRECTION * torch.cat([two, one, two, two], dim=1)
        return scale, same.all()

    def _measure(self, param: Tensor, gradient: Tensor) -> Tensor:
        """Return four numbers of a gradient that together tell a scaling from any other change.

        The 2-norm, the 1-norm (clipped elements), the sum (added ones), and the component along S1 (signs and
        order), which for a bias in halves is left out.
        """
        flat = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        two = torch.linalg.vector_norm(flat)
        along = torch.zeros_like(two)
        if self._half is not None and param is self._params[0]:
            S1 = self._layer.weight_part(self._half)
            along = _component(self._layer.weight_matrix(flat), S1)
        elif param in self._earlier:
            along = _component(flat, self._earlier[param])
        return torch.stack([two, torch.linalg.vector_norm(flat, 1), flat.sum(), along])


def _component(vector: Tensor, along: Tensor) -> Tensor:
    along = along.reshape(-1).to(vector.dtype)
    length = torch.linalg.vector_norm(along).clamp(min=torch.finfo(vector.dtype).tiny)
    component: Tensor = (vector.reshape(-1) @ along) / length
    return component


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
