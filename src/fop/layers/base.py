"""What every kind of layer must be able to tell about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fop.layers.statistics import FactorSums

# Elements of rows that exist at a time where they must be copied (64 MiB in float32). Unfolding a large batch
# at once would take kernel-area times the memory of the activations.
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class LayerOptions:
    """Choices that may differ from layer to layer.

    Attributes:
        path: "fop", "adamw", or None for what is usual for the kind of layer.
        max_factor_dim: factors with a larger side are kept as their diagonal.
        weight_sharing: K-FAC-expand or K-FAC-reduce (Eschenhagen et al. 2023), for several rows a sample.
        batch_dim: dimension of the layer's input that counts samples; None to find out.
        curvature: which approximation in `fop.curvature`; None for what is usual for the kind of layer.
    """

    path: Literal["fop", "adamw"] | None = None
    max_factor_dim: int = 8192
    weight_sharing: Literal["expand", "reduce"] = "expand"
    batch_dim: int | None = None
    curvature: str | None = None


class Layer(ABC):
    """Geometry of one layer: how its inputs and output gradients become rows and gradient matrices.

    It holds sizes only, never tensors or the module.

    Attributes:
        matrix_shape: shape of the gradient matrix, (groups, out, in), with the bias as one more last column.
        diagonal_A, diagonal_G: whether only the diagonal of A or G is kept.
        factor_shapes: shapes of A and G, (groups, d, d) or (groups, d). One shape, that of the gradient, for
            a layer whose statistics are the gradients of single samples.
        sum_shapes: shapes of what `factor_sums` gives: those of the factors, unless ``swapped``.
    """

    # Dimension of the gradient matrix along which the bias follows the weight.
    bias_dim = 2
    # Whether `factor_sums` has the two factors the other way round than the block, see `Statistics`.
    swapped = False
    # Whether the weight is stored as (in, out).
    transposed = False
    # What the other methods take for the module's input, from the module and its input; None for the input.
    normalised: Callable[[nn.Module, Tensor], Tensor] | None = None
    # Whether the input holds the numbers of rows of the weight.
    by_index = False
    # Whether statistics of a large batch may take every k-th sample, see `fop.capture.statistics`.
    subsampled = False

    def __init__(
        self,
        groups: int,
        out_dim: int,
        in_dim: int,
        *,
        bias: bool,
        options: LayerOptions,
        diagonal_A: bool = False,
    ) -> None:
        self.groups, self.out_dim, self.in_dim = groups, out_dim, in_dim
        self.bias, self.options = bias, options
        self.bias_shape: tuple[int, ...] = (groups * out_dim,)
        columns = in_dim + bias
        self.diagonal_A = diagonal_A or in_dim > options.max_factor_dim
        self.diagonal_G = out_dim > options.max_factor_dim
        self.matrix_shape = groups, out_dim, columns
        self.factor_shapes: tuple[tuple[int, ...], ...] = (
            (groups, columns) if self.diagonal_A else (groups, columns, columns),
            (groups, out_dim) if self.diagonal_G else (groups, out_dim, out_dim),
        )
        self.sum_shapes: tuple[tuple[int, ...], ...] = self.factor_shapes

    def same_as(self, other: Layer) -> bool:
        """Return whether gradient matrices and factors of both are alike."""
        mine, others = ((type(each), each.matrix_shape, each.transposed) for each in (self, other))
        return mine == others and self.factor_shapes == other.factor_shapes

    # What a kind of layer must say

    @abstractmethod
    def leading_dims(self, x: Tensor) -> int:
        """Return how many leading dimensions of input x count samples or positions; 0 without a batch."""

    @abstractmethod
    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the gradient matrix Σ b āᵀ of these samples; x and b with the batch as dim 0."""

    @abstractmethod
    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        """Return the Kronecker statistics of these samples; x and b with the batch as dim 0."""

    # What follows from it

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor in the layout of the weight as (groups, out, in)."""
        return weight.reshape(self.groups, self.out_dim, self.in_dim)

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return (groups, out, in) in the layout of the weight, whose shape is ``shape``."""
        return matrix.reshape(shape)

    def weight_part(self, matrix: Tensor) -> Tensor:
        """Return what of a gradient matrix belongs to the weight."""
        return matrix.narrow(self.bias_dim, 0, matrix.shape[self.bias_dim] - self.bias)

    def bias_part(self, matrix: Tensor) -> Tensor:
        """Return what of a gradient matrix belongs to the bias."""
        return matrix.narrow(self.bias_dim, -1, 1)

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weight-shaped and bias-shaped tensors as one gradient matrix, in at least float32.

        A bias that is None counts as zeros.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        matrix = self.weight_matrix(weight.to(dtype))
        if not self.bias:
            return matrix
        shape = [1 if dim == self.bias_dim else size for dim, size in enumerate(matrix.shape)]
        entries = matrix.new_zeros(shape) if bias is None else bias.to(dtype).reshape(shape)
        return torch.cat([matrix, entries], dim=self.bias_dim)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what of a gradient matrix belongs to weight and bias, in their shapes."""
        bias = matrix.narrow(self.bias_dim, -1, 1).reshape(self.bias_shape) if self.bias else None
        return self.weight_from_matrix(self.weight_part(matrix), weight.shape), bias


class RowLayer(Layer):
    """A layer whose factors are covariances of rows."""

    @abstractmethod
    def input_columns(self, x: Tensor) -> Tensor:
        """Return the rows ā of x without the bias' 1, as columns: (N, groups, in, R)."""

    @abstractmethod
    def output_columns(self, b: Tensor) -> Tensor:
        """Return the rows of b as columns: (N, groups, out, R)."""

    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        dtype = statistics_dtype(b)
        a, g = (torch.zeros(shape, dtype=dtype, device=x.device) for shape in self.factor_shapes)
        rows = 0
        for x_chunk, b_chunk in self.chunks(x, b):
            # Not yet in the statistics' dtype: the rows of large inputs are views.
            a_columns = self.input_columns(x_chunk).to(dtype)
            g_columns = self.output_columns(b_chunk).to(dtype)
            if self.options.weight_sharing == "reduce":
                a_columns = a_columns.mean(-1, keepdim=True)
                g_columns = g_columns.sum(-1, keepdim=True)
            rows += a_columns.shape[0] * a_columns.shape[-1]
            _add_covariance(a, a_columns, ones=self.bias)
            _add_covariance(g, g_columns, ones=False)
        return FactorSums(a, g, x.shape[0], rows)

    def chunks(self, x: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x and b in pieces whose rows fit in memory."""
        yield x, b


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of ``x`` are summed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _add_covariance(total: Tensor, columns_NGDR: Tensor, *, ones: bool) -> None:
    """Add Σ (row, 1)(row, 1)ᵀ, or its diagonal, over all columns; without the 1 if not ``ones``."""
    dim = columns_NGDR.shape[2]
    if total.dim() == 2:
        total[:, :dim] += columns_NGDR.square().sum((0, 3))
        if ones:
            total[:, dim:] += columns_NGDR.shape[0] * columns_NGDR.shape[3]
        return
    columns_GDR = columns_NGDR.permute(1, 2, 0, 3).flatten(2)
    total[:, :dim, :dim].baddbmm_(columns_GDR, columns_GDR.mT)
    if ones:
        sums = columns_GDR.sum(-1)
        total[:, -1, :dim] += sums
        total[:, :dim, -1] += sums
        total[:, -1, -1] += columns_GDR.shape[-1]
