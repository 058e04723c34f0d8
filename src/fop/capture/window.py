"""What the backward passes between two optimizer steps have gathered for one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fop.layers import FactorSums

# A gradient that was scaled as a whole reproduces its scaled norms to rounding; clipping single elements or
# adding noise moves them far more. Lenient enough for a float16 round trip.
_SAME_DIRECTION = 1e-3
# How far p.grad may be from what the hooks saw before it counts as having other parts; in half precision
# autograd and the hooks round differently.
_SAME_SUM, _SAME_SUM_HALF = 1e-2, 5e-2


@dataclass
class Part:
    """The contribution of one backward pass (which may use the layer several times).

    Attributes:
        samples: N of this pass.
        half: S1 = Σ b āᵀ over the first h = ⌊N/2⌋ samples as gradient matrix, None if there is no pair.
        whole: Σ b āᵀ over all samples, only in passes with statistics.
        sums: Kronecker statistics, None if none are due.
        splittable: whether all uses of the layer were seen and have the same N.
        precise: whether b has more than half precision.
    """

    samples: int
    half: Tensor | None = None
    whole: Tensor | None = None
    sums: FactorSums | None = None
    splittable: bool = True
    precise: bool = True

    def add_use(self, other: Part) -> None:
        """Add another use of the layer in the same backward pass."""
        self.splittable &= other.splittable and other.samples == self.samples
        self.precise &= other.precise
        self.half = _sum(self.half, other.half)
        self.whole = _sum(self.whole, other.whole)
        if self.sums is None:
            self.sums = other.sums
        elif other.sums is not None:
            self.sums.add_use(other.sums)


class Window:
    """Everything gathered for one layer since its gradients were last None or zero.

    Attributes:
        sums: Kronecker statistics, None if none were due.
        half: S1 of all passes, None without a pair.
        clean: 0-dim bool, false if p.grad held something unknown before the first pass; None if it was None.
        complete: 0-dim bool, whether p.grad is all that the hooks saw; None in windows without statistics.
    """

    def __init__(self) -> None:
        self.sums: FactorSums | None = None
        self.half: Tensor | None = None
        self.clean: Tensor | None = None
        self.complete: Tensor | None = None
        self._whole: Tensor | None = None
        self._samples: int | None = None
        self._paired = True
        self._precise = True
        self._norms: dict[Tensor, Tensor] = {}

    def add(self, part: Part) -> None:
        """Add a finished backward pass."""
        if self.sums is None:
            self.sums = part.sums
        elif part.sums is not None:
            self.sums.add_batch(part.sums)
        self._whole = _sum(self._whole, part.whole)
        self._precise &= part.precise
        # One formula gives g1 - g2 from the summed halves only if all passes were split in the same ratio.
        alike = part.splittable and self._samples in (None, part.samples)
        if part.half is None or not alike or not self._paired:
            self.drop_pair()
        else:
            self._samples = part.samples
            self.half = _sum(self.half, part.half)

    def drop_pair(self) -> None:
        """Take the K-FAC step: the halves of the gradient are not known."""
        self._paired, self.half = False, None

    def compare(self, gradient: Tensor) -> None:
        """Tell from a pass with statistics whether ``gradient``, the weight's, is all that the hooks saw.

        It is not where the loss has other paths to the weight: a penalty, a second use as a function.
        """
        if self._whole is None or self.half is None:
            return
        groups, rows, _ = self.half.shape
        matrix = gradient.to(self.half.dtype).reshape(groups, rows, -1)
        whole, half = self._whole[..., : matrix.shape[-1]], self.half[..., : matrix.shape[-1]]
        tolerance = _SAME_SUM if self._precise else _SAME_SUM_HALF
        parts = half.square().sum() + (whole - half).square().sum()
        self.complete = (whole - matrix).square().sum() <= tolerance**2 * parts

    def remember(self, param: Tensor, gradient: Tensor) -> None:
        """Remember the gradient of ``param``, weight or bias, as autograd left it."""
        self._norms[param] = self._measure(gradient)

    def difference(self, average: Tensor, params: Sequence[Tensor], complete: Tensor | None) -> Tensor | None:
        """Return Gd = g1 - g2 as gradient matrix, or None without a pair.

        Args:
            average: Ga, the gradient matrix of p.grad as it is now.
            params: weight and bias.
            complete: what `compare` told at the last statistics, None before the first.

        g1 = (N/h)·S1 and g2 = (N/(N-h))·(g - S1). If p.grad was scaled as a whole since the backward pass
        (unscaling, norm clipping), S1 follows; after any other change the difference is 0, which makes
        the step K-FAC's.
        """
        if self.half is None or self._samples is None:
            return None
        first = self._samples // 2
        second = self._samples - first
        own = self._samples / second
        scale, trusted = self._scale_since(params)
        for veto in (self.clean, complete):
            if veto is not None:
                trusted = trusted & veto
        S1 = self.half.to(average.dtype) * (scale.to(average.dtype) * (self._samples / first + own))
        return torch.where(trusted, torch.add(S1, average, alpha=-own), 0.0)

    def _scale_since(self, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        known = [param for param in params if param.grad is not None and param in self._norms]
        was = torch.stack([self._norms[param] for param in known])
        now = torch.stack([self._measure(param.grad) for param in known if param.grad is not None])
        # One scale for weight and bias, from the Euclidean norm of both.
        lengths = torch.linalg.vector_norm(torch.stack([was[:, 0], now[:, 0]]), dim=1)
        scale = torch.nan_to_num(lengths[1] / lengths[0], nan=0.0, posinf=0.0)
        # Each number is compared on the scale of what it can differ by.
        two, one = now[:, :1], now[:, 1:2]
        same = (now - scale * was).abs() <= _SAME_DIRECTION * torch.cat([two, one, two, two], dim=1)
        return scale, same.all()

    def _measure(self, gradient: Tensor) -> Tensor:
        """Return four numbers of a gradient that together tell a scaling from any other change.

        The 2-norm, the 1-norm (clipped elements), the sum (added ones), and, for a weight, the component
        along S1 (signs and order).
        """
        flat = gradient.detach().reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
        two = torch.linalg.vector_norm(flat)
        along = torch.zeros_like(two)
        if self.half is not None and gradient.dim() > 1:
            columns = gradient.numel() // max(1, self.half.shape[0] * self.half.shape[1])
            S1 = self.half[..., :columns].reshape(-1).to(flat.dtype)
            along = torch.dot(flat, S1) / torch.linalg.vector_norm(S1).clamp(min=torch.finfo(flat.dtype).tiny)
        return torch.stack([two, torch.linalg.vector_norm(flat, 1), flat.sum(), along])


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
