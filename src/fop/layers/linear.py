"""`torch.nn.Linear`, and GPT-2's `Conv1D`, with any number of leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from fop.layers.base import LayerOptions, RowLayer, chosen_rows


class LinearLayer(RowLayer):
    """Rows of A are the input rows (with a 1 for the bias), rows of G the output gradients.

    The weight of a ``transposed`` layer is stored as (in, out).
    """

    owns_backward = True

    def __init__(
        self, out_dim: int, in_dim: int, *, bias: bool, options: LayerOptions, transposed: bool = False
    ) -> None:
        super().__init__(1, out_dim, in_dim, bias=bias, options=options)
        self.transposed = transposed

    def gradients(self, x: Tensor, b: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        # Not flatten, which vectorized Jacobians do not know.
        rows = b.shape[:-1].numel()
        x_RI, b_RO = x.reshape(rows, x.shape[-1]).to(b.dtype), b.reshape(rows, b.shape[-1])
        return x_RI.T @ b_RO if self.transposed else b_RO.T @ x_RI, b_RO.sum(0) if bias else None

    def input_gradient(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return b @ (weight.T if self.transposed else weight)

    def output_rows(self, b: Tensor, entries: Tensor | None) -> Tensor:
        return chosen_rows(b.reshape(-1, 1, self.out_dim), entries)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return (weight.T if self.transposed else weight)[None]

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].T if self.transposed else matrix[0]
