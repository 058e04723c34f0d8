"""The projections of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fop.layers.base import LayerOptions, RowLayer, chosen_rows
from fop.layers.sampling import RowSampler
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
        # Groups before and after those that this use reaches.
        self._missing = first, 3 - first - count

    def uses(self, rows: slice) -> PackedLayer:
        """Return the layer of a use of some rows of the weight."""
        E = self.out_dim
        first, count = rows.start // E, (rows.stop - rows.start) // E
        return PackedLayer(E, bias=self.bias, options=self.options, first=first, count=count)

    def gradients(self, x: Tensor, b: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        b_RO, missing = b.flatten(0, -2), [size * self.out_dim for size in self._missing]
        product = b_RO.T @ x.flatten(0, -2).to(b.dtype)
        return F.pad(product, (0, 0, *missing)), F.pad(b_RO.sum(0), missing) if bias else None

    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        sums = super().factor_sums(x, b, sampler)
        reached = torch.zeros(3, dtype=sums.a.dtype, device=sums.a.device)
        reached[self.first : self.first + self.count] = 1
        # Groups that this use does not reach: their rows come from other inputs.
        a = (sums.a.unflatten(0, (3, -1)) * reached.reshape(-1, *[1] * sums.a.dim())).flatten(0, 1)
        return FactorSums(a, sums.g, sums.samples, sums.rows * reached)

    def output_rows(self, b: Tensor, entries: Tensor | None) -> Tensor:
        rows = chosen_rows(b.reshape(-1, self.count, self.out_dim), entries)
        return F.pad(rows, (0, 0, *self._missing))
