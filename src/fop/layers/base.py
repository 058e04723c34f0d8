"""What every kind of layer must be able to tell about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fop.layers.blocks import factor_shape, in_blocks
from fop.layers.sampling import RowSampler
from fop.layers.statistics import FactorSums

# Elements of rows that exist at a time where they must be copied (64 MiB in float32). The patches of a large
# batch at once would take kernel-area times the memory of the activations.
CHUNK_ELEMENTS = 2**24
# Covariances of twice this side are computed in blocks, which saves up to half of the products.
GRAM_BLOCK = 144


@dataclass(frozen=True)
class LayerOptions:
    """Choices that may differ from layer to layer.

    Attributes:
        path: "fop", "adamw", or None for what is usual for the kind of layer.
        max_factor_dim: factors with a larger side are kept as their diagonal.
        block_dim: factors with a larger side are kept as blocks of at most this side along their diagonal.
        weight_sharing: K-FAC-expand or K-FAC-reduce (Eschenhagen et al. 2023), for several rows a sample.
        batch_dim: dimension of the layer's input that counts samples; None to find out.
        curvature: which approximation in `fop.curvature`; None for what is usual for the kind of layer.
    """

    path: Literal["fop", "adamw"] | None = None
    max_factor_dim: int = 8192
    block_dim: int = 512
    weight_sharing: Literal["expand", "reduce"] = "expand"
    batch_dim: int | None = None
    curvature: str | None = None


class Layer(ABC):
    """Geometry of one layer: how its inputs and output gradients become rows and gradient matrices.

    It holds sizes, never the module or its tensors.

    Attributes:
        matrix_shape: shape of the gradient matrix, (groups, out, in), with the bias as one more last column.
        diagonal_A, diagonal_G: whether only the diagonal of A or G is kept.
        factor_shapes: shapes of A and G, (groups, d, d), or (groups·k, c, c) in k blocks, or (groups, d). One
            shape, that of the gradient, for a layer whose statistics are the gradients of single samples.
        sum_shapes: shapes of what `factor_sums` gives: those of the factors, unless ``swapped``.
    """

    # Which dimensions of the input count samples or positions; an input without a batch has none of them.
    leading = slice(None, -1)
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
    # Whether `gradients` and `input_gradient` are all that its backward pass computes.
    owns_backward = False

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
        columns, limit = in_dim + bias, options.block_dim
        self.diagonal_A = diagonal_A or in_dim > options.max_factor_dim
        self.diagonal_G = out_dim > options.max_factor_dim
        self.matrix_shape = groups, out_dim, columns
        self.factor_shapes: tuple[tuple[int, ...], ...] = (
            (groups, columns) if self.diagonal_A else factor_shape(groups, in_dim, limit, bias=bias),
            (groups, out_dim) if self.diagonal_G else factor_shape(groups, out_dim, limit),
        )
        self.sum_shapes: tuple[tuple[int, ...], ...] = self.factor_shapes

    def same_as(self, other: Layer) -> bool:
        """Return whether gradient matrices and factors of both are alike."""
        mine, others = ((type(each), each.matrix_shape, each.transposed) for each in (self, other))
        return mine == others and self.factor_shapes == other.factor_shapes

    # What a kind of layer must say

    @abstractmethod
    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the gradient matrix Σ b āᵀ of these samples; x and b with the batch as dim 0."""

    @abstractmethod
    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        """Return the Kronecker statistics of these samples; x and b with the batch as dim 0.

        With ``sampler`` the sums over rows are estimated, without bias, from the rows that it draws.
        """

    # What a layer that ``owns_backward`` must say, too

    def gradients(self, x: Tensor, b: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the weight, and of a ``bias`` or None, in their shapes; batch as dim 0."""
        raise NotImplementedError

    def input_gradient(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input x; x and b with the batch as dim 0, all of one dtype."""
        raise NotImplementedError

    # What follows from it

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor in the layout of the weight as (groups, out, in)."""
        return weight.reshape(self.groups, self.out_dim, self.in_dim)

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return (groups, out, in) in the layout of the weight, whose shape is ``shape``."""
        return matrix.reshape(shape)

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
        entries = matrix.narrow(self.bias_dim, 0, matrix.shape[self.bias_dim] - self.bias)
        return self.weight_from_matrix(entries, weight.shape), bias


class RowLayer(Layer):
    """A layer whose factors are covariances of rows.

    A sample has R rows, and rows are numbered sample by sample. Features are the last dimension, and all
    before it count rows, unless a layer says otherwise.
    """

    def input_rows(self, x: Tensor, output: torch.Size, entries: Tensor | None) -> Tensor:
        """Return rows ā of x without the bias' 1, (rows, groups, in), all or those of these numbers.

        ``output`` is the shape of the layer's output; groups may be 1 where they have the same rows.
        """
        return chosen_rows(x.reshape(-1, 1, self.in_dim), entries)

    @abstractmethod
    def output_rows(self, b: Tensor, entries: Tensor | None) -> Tensor:
        """Return rows of b, (rows, groups, out), all or those of these numbers."""

    def rows_per_sample(self, b: Tensor) -> int:
        """Return R."""
        return prod(b.shape[1:-1])

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        return self.to_matrix(*self.gradients(x, b, bias=self.bias))

    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        dtype = statistics_dtype(b)
        a, g = (torch.zeros(shape, dtype=dtype, device=x.device) for shape in self.factor_shapes)
        samples, rows = x.shape[0], self.rows_per_sample(b)
        reduced = self.options.weight_sharing == "reduce"
        scale = 1.0
        if sampler is not None and (kept := sampler.draw(samples, max(a.shape[-1], g.shape[-1]))) is not None:
            # One row of each of these samples is enough.
            x, b, scale = x.index_select(0, kept), b.index_select(0, kept), samples / len(kept)
        for x_chunk, b_chunk in self.chunks(x, b, all_rows=sampler is None):
            total, share = x_chunk.shape[0] * (1 if reduced else rows), x_chunk.shape[0] / x.shape[0]
            for factor in (a, g):
                of_input = factor is a
                drawn = None if sampler is None else sampler.draw(total, factor.shape[-1], share)
                chosen = self._rows(of_input, x_chunk, b_chunk, drawn, dtype)
                weight = scale * total / max(1, chosen.shape[0])
                add_covariance(factor, chosen, self.groups, ones=self.bias and of_input, scale=weight)
        return FactorSums(a, g, samples, samples * (1 if reduced else rows))

    def _rows(
        self, of_input: bool, x: Tensor, b: Tensor, entries: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        reduced = self.options.weight_sharing == "reduce"
        if reduced and entries is not None:
            x, b, entries = x.index_select(0, entries), b.index_select(0, entries), None
        rows = self.input_rows(x, b.shape, entries) if of_input else self.output_rows(b, entries)
        rows = rows.to(dtype)
        if not reduced:
            return rows
        # K-FAC-reduce has one row a sample: the mean of its rows ā, and the sum of its rows of b.
        by_sample = rows.reshape(x.shape[0], -1, *rows.shape[1:])
        return by_sample.mean(1) if of_input else by_sample.sum(1)

    def chunks(self, x: Tensor, b: Tensor, *, all_rows: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x and b in pieces of samples whose rows fit in memory; not ``all_rows`` if some are drawn."""
        yield x, b


def chosen_rows(rows: Tensor, entries: Tensor | None) -> Tensor:
    """Return the rows of these numbers, all of them for None."""
    return rows if entries is None else rows.index_select(0, entries)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of ``x`` are summed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def add_covariance(total: Tensor, rows_RGD: Tensor, groups: int, *, ones: bool, scale: float) -> None:
    """Add scale·Σ (row, 1)(row, 1)ᵀ, or its diagonal or blocks, over all rows; no 1 if not ``ones``.

    Dimension 1 of the rows is 1 where all ``groups`` have the same ones.
    """
    if (blocks := len(total) // groups) > 1:
        if ones:
            rows_RGD, ones = F.pad(rows_RGD, (0, 1), value=1.0), False
        rows_RGD = in_blocks(rows_RGD, blocks, total.shape[-1])
    count, _, dim = rows_RGD.shape
    if total.dim() == 2:
        total[:, :dim].add_(rows_RGD.square().sum(0), alpha=scale)
        if ones:
            total[:, dim:] += scale * count
        return
    products = _gram(rows_RGD.movedim(0, 1)).unflatten(0, (-1, blocks))
    total.unflatten(0, (groups, blocks))[..., :dim, :dim].add_(products, alpha=scale)
    if ones:
        sums = rows_RGD.sum(0)
        total[:, -1, :dim].add_(sums, alpha=scale)
        total[:, :dim, -1].add_(sums, alpha=scale)
        total[:, -1, -1] += scale * count


def _gram(X: Tensor) -> Tensor:
    """Return XᵀX for each of a batch of matrices; of two blocks the one below the diagonal is copied."""
    dim = X.shape[-1]
    # A GPU has more time for one large product than for several small ones.
    if dim < 2 * GRAM_BLOCK or X.is_cuda:
        return torch.bmm(X.mT, X)
    half = dim // 2
    left, right = X[..., :half], X[..., half:]
    result = X.new_empty(*X.shape[:-2], dim, dim)
    result[..., :half, :half], result[..., half:, half:] = _gram(left), _gram(right)
    result[..., :half, half:] = corner = torch.bmm(left.mT, right)
    result[..., half:, :half] = corner.mT
    return result
