"""Damped inverses that always come back: Cholesky, same-shape matrices as one batch, with fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def mean_eigenvalue(M: Tensor) -> Tensor:
    """Return tr M / dim M of each group, (groups,), of a factor or of its diagonal."""
    return (M if M.dim() == 2 else M.diagonal(dim1=-2, dim2=-1)).mean(-1)


class Fallback(IntEnum):
    """What an inversion needed beyond Cholesky in the matrix's own precision."""

    NONE = 0
    FLOAT64 = 1
    DAMPING = 2
    KEPT = 3


@dataclass(frozen=True)
class Inversion:
    """The damped inverse of one factor, in its shape, or None where none was finite."""

    inverse: Tensor | None
    fallback: Fallback


def inverses_and_flags(
    factors: Sequence[Tensor], shifts: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (M + shift·I)⁻¹ for every factor M by Cholesky, and whether it can be used, 0-dim bool.

    Factors are symmetric positive semi-definite, (groups, d, d), or diagonals, (groups, d), in float32 or
    float64; each has ``shifts`` of (groups,), or of (groups, d) for damping that is relative to the factor: a
    factor of 0 then has the inverse 0. Same-shape factors are one batch. Nothing is transferred to the host.
    """
    alike: dict[tuple[torch.Size, int, torch.dtype, torch.device], list[int]] = {}
    for index, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        key = factor.shape[1:], shift.dim(), factor.dtype, factor.device
        alike.setdefault(key, []).append(index)

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
    order = range(len(factors))
    return [inverses[i] for i in order], [flags[i] for i in order]


def damped_inverses(factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[Inversion]:
    """Return what `inverses_and_flags` does, with fallbacks for the matrices that fail alone.

    These are float32 → float64 → more damping (times 10, at most six times) → no inverse, and the caller
    keeps the last good one. Transfers one flag per matrix to the host, once.
    """
    inverses, flags = inverses_and_flags(factors, shifts)
    succeeded = torch.stack(flags).tolist() if flags else []
    return [
        Inversion(inverses[i], Fallback.NONE) if ok else _fall_back(factors[i], shifts[i])
        for i, ok in enumerate(succeeded)
    ]


def _inverse(M: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M + shift·I)⁻¹ and whether it can be used; shapes as in `damped_inverses`."""
    invert = _cholesky_inverse if M.dim() == 3 else _reciprocal
    if shift.dim() == 1:
        inverse, largest, fine = invert(M.clone(), shift[:, None])
        return inverse, fine & torch.isfinite(largest)
    # In units of its mean eigenvalue: products on the way might leave the range of float32. Of a block, which
    # may be 0 where the factor is not, in those of what is added.
    mean = torch.maximum(mean_eigenvalue(M), shift.mean(-1))
    # Of less, an inverse leaves the range, too; squares of gradients that small are no numbers any more.
    some = mean > 1024 * torch.finfo(M.dtype).tiny
    unit, ones = torch.where(some, mean, 1), [1] * (M.dim() - 1)
    shift = torch.where(some[:, None], shift / unit[:, None], 1)
    inverse, largest, fine = invert(M / unit.view(-1, *ones), shift)
    scale = torch.where(some, 1 / unit, 0)
    return inverse.mul_(scale.view(-1, *ones)), fine & torch.isfinite(largest * scale)


def _reciprocal(M: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 / (M + shift), its largest entry and whether M can be inverted; M is changed."""
    damped = M.add_(shift)
    inverse = damped.reciprocal()
    fine = (torch.isfinite(damped) & (damped > 0)).all(1)
    return inverse, inverse.abs().amax(1), fine


def _cholesky_inverse(M: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (M + shift·I)⁻¹, its largest entry and whether M can be inverted; M is changed.

    M is (batch, d, d), shift (batch, 1 or d).
    """
    M.diagonal(dim1=-2, dim2=-1).add_(shift)
    L, info = torch.linalg.cholesky_ex(M)
    factored = info == 0
    # A zero on the diagonal of an unfinished L would raise for the whole batch.
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(factored[:, None], diagonal, 1))
    # Symmetric, and this way round its rows are rows in memory: torch.distributed.checkpoint keeps no
    # strides, and another layout would round otherwise after a resume.
    inverse = torch.cholesky_inverse(L).mT
    # Of positive definite matrices no entry is larger than the largest on the diagonal. An infinite one of
    # M factors without complaint.
    of_M, of_inverse = (each.diagonal(dim1=-2, dim2=-1).abs().amax(1) for each in (M, inverse))
    return inverse, of_inverse, factored & torch.isfinite(of_M)


def _fall_back(M: Tensor, shift: Tensor) -> Inversion:
    if not bool(torch.isfinite(M).all()):
        return Inversion(None, Fallback.KEPT)
    # Apple's GPUs have no float64; there the ladder goes straight to more damping.
    exact = M if M.device.type == "mps" else M.double()
    base = shift.to(exact.dtype)
    # Damping of 0 cannot be multiplied into something useful: start where float32 stops resolving M.
    floor = mean_eigenvalue(exact).clamp(min=0) * torch.finfo(torch.float32).eps
    floor = floor if base.dim() == 1 else floor[:, None]
    for attempt in range(7):
        more = base if attempt == 0 else torch.maximum(base, floor) * 10.0**attempt
        inverse, fine = _inverse(exact, more)
        result = inverse.to(M.dtype)
        if bool(fine.all()) and bool(torch.isfinite(result).all()):
            return Inversion(result, Fallback.FLOAT64 if attempt == 0 else Fallback.DAMPING)
    return Inversion(None, Fallback.KEPT)
