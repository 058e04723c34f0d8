"""Large factors, which are kept as blocks along their diagonal.

A factor of side d in k blocks of side c = ⌈d/k⌉ is (groups·k, c, c), the blocks of a group one after another.
Where k·c is more than d, the last rows and columns of a group's last block are zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def factor_shape(groups: int, side: int, block_dim: int, *, bias: bool = False) -> tuple[int, int, int]:
    """Return the shape of factors of this side, in as few blocks of at most ``block_dim`` as it takes.

    The ``bias`` is one more row and column, which does not count.
    """
    count = max(1, -(-side // block_dim))
    block = -(-(side + bias) // count)
    return groups * count, block, block


def in_blocks(entries: Tensor, count: int, side: int, *, rest: Tensor | None = None) -> Tensor:
    """Return what belongs to the sides of factors, (..., groups, d), by block: (..., groups·k, c).

    What is left of the last block gets zeros, or the ``rest``, (groups, 1).
    """
    if padding := count * side - entries.shape[-1]:
        if rest is None:
            entries = F.pad(entries, (0, padding))
        else:
            entries = torch.cat([entries, rest.expand(-1, padding)], -1)
    return entries.reshape(*entries.shape[:-2], -1, side)


def diagonal(M: Tensor, groups: int, side: int) -> Tensor:
    """Return the diagonals of factors as (groups, d), whatever is kept of them."""
    entries = M if M.dim() == 2 else M.diagonal(dim1=-2, dim2=-1)
    return entries.reshape(groups, -1)[:, :side]


def blocks_product(M: Tensor, V: Tensor) -> Tensor:
    """Return M V for blocks M, (groups·k, c, c), and V (groups, d, n)."""
    groups, d, n = V.shape
    count, side = len(M) // groups, M.shape[-1]
    if padding := count * side - d:
        V = F.pad(V, (0, 0, 0, padding))
    return torch.bmm(M, V.reshape(-1, side, n)).reshape(groups, -1, n)[:, :d]
