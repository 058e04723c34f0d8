"""Tensors on their way between ranks: symmetric matrices as packed triangles, and sketches of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

# A prime, so that it shares no period with the dimensions of a layer.
SKETCH = 127


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
    return torch.where(_from_bottom(half, d, M.device), bottom, top)


def unpack_symmetric(P: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices (groups, d, d) of `pack_symmetric`'s rectangles; diagonals unchanged."""
    if P.dim() < 3:
        return P
    half = P.shape[1]
    upper = torch.cat([P[:, :, 1:], P[:, : d - half, :d].flip(1, 2)], dim=1).triu()
    return upper + upper.triu(1).mT


def _from_bottom(half: int, d: int, device: torch.device) -> Tensor:
    column = torch.arange(d + 1, device=device)
    return column[None, :] <= torch.arange(half, device=device)[:, None]


def sketch(V: Tensor) -> Tensor:
    """Return a linear sketch of V, (127,): the sums over the elements whose index leaves the same remainder.

    A scaling of V scales it alike; other changes do not. Being linear, the sketch of a mean over ranks is the
    mean of their sketches.
    """
    flat = V.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SKETCH))
    return padded.view(-1, SKETCH).sum(0)


def scale_between(was: Tensor, now: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return by what a gradient was scaled, from its sketches, and whether that was all that happened.

    Args:
        was: sketch before.
        now: sketch after.
        tolerance: how much of ``now`` may be left unexplained.

    Returns:
        The scale, and a bool, both 0-dim.
    """
    scale = torch.nan_to_num(torch.dot(now, was) / torch.dot(was, was), nan=0.0, posinf=0.0, neginf=0.0)
    rest = torch.linalg.vector_norm(now - scale * was)
    return scale, rest <= tolerance * torch.linalg.vector_norm(now)
