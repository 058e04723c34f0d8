"""`torch.nn.Linear`, and GPT-2's `Conv1D`, with any number of leading dimensions."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fop.layers.base import LayerOptions, RowLayer


class LinearLayer(RowLayer):
    """Rows of A are the input rows (with a 1 for the bias), rows of G the output gradients.

    The weight of a ``transposed`` layer is stored as (in, out).
    """

    def __init__(
        self, out_dim: int, in_dim: int, *, bias: bool, options: LayerOptions, transposed: bool = False
    ) -> None:
        super().__init__(1, out_dim, in_dim, bias=bias, options=options)
        self.transposed = transposed

    def leading_dims(self, x: Tensor) -> int:
        return x.dim() - 1

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        x_RI, b_RO = x.flatten(0, -2), b.flatten(0, -2)
        weight = b_RO.T @ x_RI.to(b.dtype)
        return self.to_matrix(weight.T if self.transposed else weight, b_RO.sum(0) if self.bias else None)

    def input_columns(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, prod(x.shape[1:-1]), x.shape[-1]).mT

    def output_columns(self, b: Tensor) -> Tensor:
        return self.input_columns(b)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return (weight.T if self.transposed else weight)[None]

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].T if self.transposed else matrix[0]
