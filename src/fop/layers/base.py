"""What every kind of layer must be able to tell about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FactorSums:
    """Unnormalised Kronecker statistics of one or several uses of a layer.

    Attributes:
        a: Σ ā āᵀ over all rows, (groups, in, in).
        g: Σ b bᵀ over all rows, (groups, out, out); b as autograd gives it.
        samples: N, the size of the batch dimension.
        rows: number of rows summed over, N·R (Linear) or N·T (convolution).
    """

    a: Tensor
    g: Tensor
    samples: int
    rows: int

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A = (1/N) Σ ā āᵀ and G = (1/rows) Σ (N b)(N b)ᵀ."""
        # Two factors N, not N²: b bᵀ is tiny at large batch, and N² alone can leave float32's exact range.
        return self.a / self.samples, self.g * self.samples * (self.samples / self.rows)

    def add_use(self, other: FactorSums) -> None:
        """Add another use of the layer on the same samples (a module called twice in one forward pass)."""
        self.a += other.a
        self.g += other.g
        self.samples = max(self.samples, other.samples)
        self.rows += other.rows

    def add_batch(self, other: FactorSums) -> None:
        """Add another batch (gradient accumulation)."""
        self.a += other.a
        self.g += other.g
        self.samples += other.samples
        self.rows += other.rows


class Layer(ABC):
    """Geometry of one layer: how its inputs and output gradients become rows and gradient matrices.

    The gradient matrix has shape (groups, out, in), with the bias as one more last column if ``bias``.
    A layer holds sizes only, never tensors or the module.
    """

    groups: int
    out_dim: int
    in_dim: int
    bias: bool

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Shape of the gradient matrix: (groups, out, in), the bias column included."""
        return self.groups, self.out_dim, self.in_dim + self.bias

    @abstractmethod
    def batched(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and output gradient with the batch as dim 0, even if the module was called without."""

    @abstractmethod
    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the gradient matrix Σ b āᵀ of the given samples; x and b as from ``batched``."""

    @abstractmethod
    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        """Return the Kronecker statistics of the given samples; x and b as from ``batched``."""

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight-shaped and bias-shaped tensors as one gradient matrix, in at least float32."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.to(dtype).reshape(self.groups, self.out_dim, self.in_dim)
        if not self.bias:
            return matrix
        column = (
            matrix.new_zeros(self.groups, self.out_dim, 1)
            if bias is None
            else bias.to(dtype).reshape(self.groups, self.out_dim, 1)
        )
        return torch.cat([matrix, column], dim=-1)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the parts of a gradient matrix in the shapes of ``weight`` and of the bias."""
        part = matrix[..., : self.in_dim].reshape(weight.shape)
        return part, matrix[..., self.in_dim].reshape(-1) if self.bias else None


def with_ones(a: Tensor, sums: Tensor, rows: int) -> Tensor:
    """Return Σ ā āᵀ for ā = (row, 1), from Σ row rowᵀ (groups, in, in) and Σ row (groups, in)."""
    size = a.shape[-1] + 1
    extended = a.new_empty(*a.shape[:-2], size, size)
    extended[..., :-1, :-1] = a
    extended[..., -1, :-1] = sums
    extended[..., :-1, -1] = sums
    extended[..., -1, -1] = rows
    return extended


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of ``x`` are summed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
