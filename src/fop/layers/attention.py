"""The projections of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fop.layers.base import LayerOptions, RowLayer
from fop.layers.statistics import FactorSums


class PackedLayer(RowLayer):
    """The query, key and value projections of one packed weight (3E, E), as three groups.

    One use of the weight reaches ``count`` of them from ``first`` on: all where query, key and value are one
    tensor.
    """

    def __init__(
        self, embed_dim: int, *, bias: bool, options: LayerOptions, first: int = 0, count: int = 3
    ) -> None:
        super().__init__(3, embed_dim, embed_dim, bias=bias, options=options)
        self.first, self.count = first, count

    def uses(self, rows: slice) -> PackedLayer:
        """Return the layer of a use of some rows of the weight."""
        E = self.out_dim
        first, count = rows.start // E, (rows.stop - rows.start) // E
        return PackedLayer(E, bias=self.bias, options=self.options, first=first, count=count)

    def leading_dims(self, x: Tensor) -> int:
        return x.dim() - 1

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        x_RI, b_RO = x.flatten(0, -2), b.flatten(0, -2)
        matrix = b.new_zeros(3 * self.out_dim, self.in_dim)
        bias = b.new_zeros(3 * self.out_dim)
        reached = slice(self.first * self.out_dim, (self.first + self.count) * self.out_dim)
        matrix[reached] = b_RO.T @ x_RI.to(b.dtype)
        bias[reached] = b_RO.sum(0)
        return self.to_matrix(matrix, bias if self.bias else None)

    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        sums = super().factor_sums(x, b)
        reached = torch.zeros(3, dtype=sums.a.dtype, device=sums.a.device)
        reached[self.first : self.first + self.count] = 1
        # Groups that this use does not reach: their rows come from other inputs.
        mask = reached.reshape(-1, *[1] * (sums.a.dim() - 1))
        return FactorSums(sums.a * mask, sums.g, sums.samples, sums.rows * reached)

    def input_columns(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, -1, self.in_dim).mT.expand(-1, 3, -1, -1)

    def output_columns(self, b: Tensor) -> Tensor:
        columns = b.reshape(b.shape[0], -1, self.count, self.out_dim).permute(0, 2, 3, 1)
        before, after = self.first, 3 - self.first - self.count
        return torch.nn.functional.pad(columns, (0, 0, 0, 0, before, after))
