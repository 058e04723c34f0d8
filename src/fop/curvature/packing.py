"""Symmetric matrices as packed triangles, as they travel between ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a packed factor: (groups, ⌈d/2⌉, d + 1) of (groups, d, d); diagonals stay."""
    if len(shape) < 3:
        return shape
    groups, d, _ = shape
    return groups, (d + 1) // 2, d + 1


def pack_symmetric(M: Tensor) -> Tensor:
    """Return the upper triangle of M (groups, d, d) as a rectangle, see `packed_shape`; diagonals unchanged.

    Row i of the rectangle is row i of the triangle behind row d-1-i, reversed: both together are d + 1 long.
    No table of indices is needed, which for a factor of 4608² would be larger than the factor.
    """
    if M.dim() < 3:
        return M
    d = M.shape[-1]
    half = (d + 1) // 2
    top = torch.nn.functional.pad(M[:, :half], (1, 0))
    bottom = torch.nn.functional.pad(M.flip(1, 2)[:, :half], (0, 1))
    column, row = torch.arange(d + 1, device=M.device), torch.arange(half, device=M.device)
    return torch.where(column <= row[:, None], bottom, top)


def unpack_symmetric(P: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices (groups, d, d) of `pack_symmetric`'s rectangles; diagonals unchanged."""
    if P.dim() < 3:
        return P
    half = P.shape[1]
    upper = torch.cat([P[:, :, 1:], P[:, : d - half, :d].flip(1, 2)], dim=1).triu()
    return upper + upper.triu(1).mT
