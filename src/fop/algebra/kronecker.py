"""Kronecker-factored curvature: products F·V, π-split damping and damped inverses that always come back.

Shapes: A_gii is (groups, in, in), G_goo is (groups, out, out), a gradient V_goi is (groups, out, in);
groups is 1 except in grouped convolutions, whose curvature is one block per group. A factor of which only the
diagonal is kept is (groups, in) or (groups, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def kronecker_product(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """Return (A ⊗ G)·V = G V A for A (groups, in, in), G (groups, out, out), V (groups, out, in)."""
    right = V * A[:, None, :] if A.dim() == 2 else V @ A
    return G[:, :, None] * right if G.dim() == 2 else G @ right


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's F = A ⊗ G and F̂⁻¹ = A_inv ⊗ G_inv; shapes as in the module's legend."""

    A: Tensor
    G: Tensor
    A_inv: Tensor
    G_inv: Tensor

    def fisher(self, V: Tensor) -> Tensor:
        """Return F·V, undamped."""
        return kronecker_product(self.A, self.G, V)

    def solve(self, V: Tensor) -> Tensor:
        """Return F̂⁻¹·V, damped."""
        return kronecker_product(self.A_inv, self.G_inv, V)


@dataclass(frozen=True)
class DiagonalBlock:
    """One layer's F as a diagonal in the shape of the gradient, and its damped inverse."""

    F: Tensor
    F_inv: Tensor

    def fisher(self, V: Tensor) -> Tensor:
        """Return F·V, undamped."""
        return self.F * V

    def solve(self, V: Tensor) -> Tensor:
        """Return F̂⁻¹·V, damped."""
        return self.F_inv * V


def damped_diagonal(F: Tensor, damping: float) -> Tensor:
    """Return 1/(F + damping), and 0 where both are 0."""
    damped = F + damping
    return torch.where(damped > 0, 1 / damped, 0)


def mean_eigenvalue(M: Tensor) -> Tensor:
    """Return tr M / dim M of each group, (groups,), of a factor or of its diagonal."""
    return (M if M.dim() == 2 else M.diagonal(dim1=-2, dim2=-1)).mean(-1)


def damping_split(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return what is added to the diagonals of A and G: (π·γ, γ/π), each of shape (groups,).

    γ = sqrt(damping), π² = (tr A / dim A) / (tr G / dim G); π = 1 where a trace is 0 (Martens & Grosse
    2015, section 6.3).
    """
    a, g = mean_eigenvalue(A), mean_eigenvalue(G)
    defined = (a > 0) & (g > 0)
    # Not the root of the quotient, which leaves float32's range where gradients are tiny.
    pi = torch.where(defined, a.sqrt() / torch.where(defined, g, 1).sqrt(), 1)
    gamma = damping**0.5
    return gamma * pi, gamma / pi


class Rung(IntEnum):
    """How far up the rescue ladder an inversion had to go."""

    NONE = 0
    FLOAT64 = 1
    DAMPING = 2
    KEPT = 3


@dataclass(frozen=True)
class Inversion:
    """The damped inverse of one factor, in its shape, or None where no rung gave a finite one."""

    inverse: Tensor | None
    rung: Rung


def damped_inverses(factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Inversion]:
    """Return (M + shift·I)⁻¹ for every factor M by Cholesky, same-shape factors as one batch.

    Args:
        factors: symmetric positive semi-definite matrices, each (groups, d, d), or diagonals, each
            (groups, d), in float32 or float64.
        shifts: damping of each group of each factor, each (groups,).

    Rescue ladder, for the matrices that fail alone: float32 → float64 → more damping (times 10, at most
    six times) → no inverse, and the caller keeps the last good one. Transfers one flag per matrix to the
    host, once, so it belongs in steps with a curvature update only.
    """
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, factor in enumerate(factors):
        alike.setdefault((factor.shape[1:], factor.dtype, factor.device), []).append(index)

    inverses: dict[int, Tensor] = {}
    flags: dict[int, Tensor] = {}
    for indices in alike.values():
        batch = torch.cat([factors[i] for i in indices])
        inverse, fine = _inverse(batch, torch.cat([shifts[i] for i in indices]))
        sizes = [factors[i].shape[0] for i in indices]
        for i, part, ok in zip(indices, inverse.split(sizes), fine.split(sizes), strict=True):
            # A view would keep the whole batch alive for as long as any one layer's inverse.
            inverses[i] = part.clone() if len(indices) > 1 else part
            flags[i] = ok.all().to(factors[0].device)
    succeeded = torch.stack([flags[i] for i in range(len(factors))]).tolist() if factors else []
    return [
        Inversion(inverses[i], Rung.NONE) if ok else _rescue(factors[i], shifts[i])
        for i, ok in enumerate(succeeded)
    ]


def _inverse(M: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M + shift·I)⁻¹ and whether it can be used; M (batch, d, d) or (batch, d), shift (batch,)."""
    if M.dim() == 3:
        return _cholesky_inverse(M, shift)
    damped = M + shift[:, None]
    inverse = damped.reciprocal()
    return inverse, (torch.isfinite(inverse) & torch.isfinite(damped) & (damped > 0)).all(1)


def _cholesky_inverse(M: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M + shift·I)⁻¹ and whether it can be used, for M (batch, d, d), shift (batch,)."""
    damped = M.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    L, info = torch.linalg.cholesky_ex(damped)
    factored = info == 0
    # A zero on the diagonal of an unfinished L would raise for the whole batch.
    L = torch.where(factored[:, None, None], L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device))
    # Symmetric, and this way round its rows are rows in memory: torch.distributed.checkpoint keeps no
    # strides, and another layout would round otherwise after a resume.
    inverse = torch.cholesky_inverse(L).mT
    # An infinite entry of M factors without complaint.
    finite = torch.isfinite(damped) & torch.isfinite(inverse)
    return inverse, factored & finite.flatten(1).all(1)


def _rescue(M: Tensor, shift: Tensor) -> Inversion:
    if not bool(torch.isfinite(M).all()):
        return Inversion(None, Rung.KEPT)
    # Apple's GPUs have no float64; there the ladder goes straight to more damping.
    exact = M if M.device.type == "mps" else M.double()
    base = shift.to(exact.dtype)
    # Damping of 0 cannot be multiplied into something useful: start where float32 stops resolving M.
    floor = mean_eigenvalue(exact).clamp(min=0) * torch.finfo(torch.float32).eps
    for attempt in range(7):
        more = base if attempt == 0 else torch.maximum(base, floor) * 10.0**attempt
        inverse, fine = _inverse(exact, more)
        result = inverse.to(M.dtype)
        if bool(fine.all()) and bool(torch.isfinite(result).all()):
            return Inversion(result, Rung.FLOAT64 if attempt == 0 else Rung.DAMPING)
    return Inversion(None, Rung.KEPT)
