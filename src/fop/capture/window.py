"""What the backward passes between two optimizer steps have gathered for one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fop.layers import FactorSums

# A gradient that was scaled as a whole reproduces the scaled fingerprint to rounding; clipping single
# elements or adding noise moves it far more. Lenient enough for a float16 round trip.
_FINGERPRINT_TOLERANCE = 1e-3


@dataclass
class Part:
    """The contribution of one backward pass (which may use the layer several times).

    Attributes:
        samples: N of this pass.
        half: S1 = Σ b āᵀ over the first h = ⌊N/2⌋ samples as gradient matrix, None if there is no pair.
        sums: Kronecker statistics, None if none are due.
    """

    samples: int
    half: Tensor | None = None
    sums: FactorSums | None = None
    splittable: bool = True

    def add_use(self, other: Part) -> None:
        """Add another use of the layer in the same backward pass."""
        if other.samples != self.samples:
            self.splittable = False
        self.splittable &= other.splittable
        if self.half is not None and other.half is not None:
            self.half = self.half + other.half
        if self.sums is not None and other.sums is not None:
            self.sums.add_use(other.sums)


@dataclass
class Fingerprint:
    """Two inner products that tell later whether the gradient was scaled as a whole, or changed otherwise."""

    gg: Tensor
    gs: Tensor
    version: int


class Window:
    """Everything gathered for one layer since its gradient was last None or zero."""

    def __init__(self) -> None:
        self.half: Tensor | None = None
        self.samples: int | None = None
        self.paired = True
        self.sums: FactorSums | None = None
        self.fingerprint: Fingerprint | None = None
        # Device-side veto, for what cannot be known on the host without a transfer.
        self.clean: Tensor | None = None

    def add(self, part: Part) -> None:
        """Add a finished backward pass."""
        if part.sums is not None:
            if self.sums is None:
                self.sums = part.sums
            else:
                self.sums.add_batch(part.sums)
        # One formula gives g1 - g2 from the summed halves only if all passes were split in the same ratio.
        alike = part.splittable and self.samples in (None, part.samples)
        if part.half is None or not alike or not self.paired:
            self.paired, self.half = False, None
            return
        self.samples = part.samples
        self.half = part.half if self.half is None else self.half.add_(part.half)

    def take_fingerprint(self, gradient: Tensor, half: Tensor) -> None:
        """Remember the weight's gradient as autograd left it; ``half`` is S1 in the weight's shape."""
        flat = gradient.to(half.dtype).reshape(-1)
        self.fingerprint = Fingerprint(
            torch.dot(flat, flat), torch.dot(flat, half.reshape(-1)), gradient._version
        )

    def difference(self, average: Tensor, gradient: Tensor, half: Tensor) -> Tensor | None:
        """Return Gd = g1 - g2 as gradient matrix, or None without a pair.

        Args:
            average: Ga, the gradient matrix of p.grad as it is now.
            gradient: the weight's p.grad as it is now.
            half: S1 in the weight's shape.

        g1 = (N/h)·S1 and g2 = (N/(N-h))·(g - S1). If p.grad was scaled as a whole since the backward pass
        (unscaling, norm clipping), S1 follows; after any other change the difference is 0, which makes
        the step K-FAC's.
        """
        if self.half is None or self.samples is None or self.fingerprint is None:
            return None
        first = self.samples // 2
        second = self.samples - first
        own = self.samples / second
        S1: Tensor = self.half.to(average.dtype)
        trusted = self.clean
        if gradient._version != self.fingerprint.version:
            scale, same = self._scale_since(gradient, half)
            S1 = S1 * scale.to(S1.dtype)
            trusted = same if trusted is None else trusted & same
        difference = torch.add(S1 * (self.samples / first + own), average, alpha=-own)
        if trusted is not None:
            difference = torch.where(trusted, difference, torch.zeros_like(difference))
        return difference

    def _scale_since(self, gradient: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        assert self.fingerprint is not None
        flat, S1 = gradient.to(half.dtype).reshape(-1), half.reshape(-1)
        gg, gs = torch.dot(flat, flat), torch.dot(flat, S1)
        was = self.fingerprint
        scale = torch.where(was.gg > 0, (gg / was.gg).sqrt(), torch.zeros_like(gg))
        scale = torch.nan_to_num(scale, nan=0.0, posinf=0.0)
        bound = _FINGERPRINT_TOLERANCE * (gg * torch.dot(S1, S1)).sqrt()
        return scale, (gs - scale * was.gs).abs() <= bound
