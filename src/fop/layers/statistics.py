"""Kronecker statistics on their way from backward passes to factors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fop.layers.blocks import in_blocks

Reduction = Literal["mean", "sum"]


@dataclass
class FactorSums:
    """Unnormalised statistics of one or several uses of a layer.

    Attributes:
        a: Σ ā āᵀ over all rows, (groups, in, in), or its diagonal, (groups, in).
        g: Σ b bᵀ likewise, b as autograd gives it. None where ``a`` holds the samples' own gradients, (N,
            rows, columns), whose mean square is the curvature.
        samples: N, the number of samples.
        rows: number of rows summed over, N·R; a tensor (groups,) where the groups differ.
        squared: whether ``a`` is, where g is None, the sum of the squares already, (1, rows, columns).
    """

    a: Tensor
    g: Tensor | None
    samples: int
    rows: int | Tensor
    squared: bool = False

    def factors(self, reduction: Reduction = "mean") -> tuple[Tensor, Tensor | None]:
        """Return A = (1/N) Σ ā āᵀ and G = (1/rows) Σ (N b)(N b)ᵀ; b bᵀ without N for a loss that is a sum."""
        N = self.samples
        # Two factors N, not N²: b bᵀ is tiny at large batch, and N² alone can leave float32's exact range.
        if self.g is None:
            squares = self.squares()
            return (squares * N if reduction == "mean" else squares / N), None
        g = self.g * N if reduction == "mean" else self.g / N
        rows = self.rows
        if isinstance(rows, Tensor):
            # A number for every group, which may have several blocks.
            rows = rows.to(g.dtype).repeat_interleave(len(g) // len(rows)).reshape(-1, *[1] * (g.dim() - 1))
        return self.a / N, g * (N / rows)

    def squares(self) -> Tensor:
        """Return the sum of the squares of the samples' own gradients, (1, rows, columns)."""
        return self.a if self.squared else self.a.square().sum(0, keepdim=True)

    def add_use(self, other: FactorSums) -> None:
        """Add another use of the layer on the same samples (a module called twice in one forward pass)."""
        # Gradients of batches that do not fit together are kept as if they were of other samples.
        self._add(other, by_sample=self.a.shape == other.a.shape)
        self.samples = max(self.samples, other.samples)

    def add_batch(self, other: FactorSums) -> None:
        """Add another batch (gradient accumulation)."""
        self._add(other, by_sample=False)
        self.samples += other.samples

    def _add(self, other: FactorSums, *, by_sample: bool) -> None:
        if self.g is None and not by_sample:
            self.a = torch.cat([self.a, other.a])
            return
        self.a += other.a
        if self.g is not None and other.g is not None:
            self.g += other.g
        self.rows = self.rows + other.rows


@dataclass
class Statistics:
    """Statistics of all uses of a weight, by whether they see it transposed (a tied embedding)."""

    terms: dict[bool, FactorSums] = field(default_factory=dict)

    def add(self, other: Statistics, *, same_samples: bool) -> None:
        """Add other uses on the same samples, or another batch."""
        for key, sums in other.terms.items():
            if key not in self.terms:
                self.terms[key] = sums
            elif same_samples:
                self.terms[key].add_use(sums)
            else:
                self.terms[key].add_batch(sums)

    def scale(self, by: float) -> None:
        """Make the statistics those of output gradients that are ``by`` times as large."""
        for sums in self.terms.values():
            if sums.g is None:
                sums.a *= by
            else:
                sums.g *= by**2

    def spoil(self, norm: Tensor) -> None:
        """Make the statistics NaN if ``norm``, that of the gradient, is not finite."""
        for sums in self.terms.values():
            sums.a += 0 * norm.to(sums.a.dtype)

    def factors(self, reduction: Reduction, loss_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Return A and G of the weight, or A alone where the statistics are gradients of single samples.

        ``loss_scale``, 0-dim, is what the loss was multiplied with in the backward pass; None for 1.
        """
        pairs = []
        for transposed, sums in self.terms.items():
            A, G = sums.factors(reduction)
            if loss_scale is not None:
                inverse = loss_scale.to(A.device, A.dtype).reciprocal()
                # One after the other: the square of a large scale leaves float32's range.
                A, G = (A * inverse * inverse, None) if G is None else (A, G * inverse * inverse)
            pairs.append((G, A) if transposed and G is not None else (A, G))
        if len(pairs) > 1:
            return _joined([(A, G) for A, G in pairs if G is not None])
        A, G = pairs[0]
        return (A,) if G is None else (A, G)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return one Kronecker product for a sum of them: means weighted by trace, the trace of the sum kept."""
    traces = [(_trace(A), _trace(G)) for A, G in pairs]
    weights = [a * g for a, g in traces]
    total = torch.stack(weights).sum(0)

    def mean(side: int) -> Tensor:
        terms = []
        for pair, trace, weight in zip(pairs, traces, weights, strict=True):
            share = weight / torch.where(trace[side] > 0, trace[side], 1)
            terms.append(_scaled(pair[side], share / torch.where(total > 0, total, 1)))
        return _scaled(functools.reduce(_added, terms), total.sqrt())

    return mean(0), mean(1)


def _trace(M: Tensor) -> Tensor:
    # A weight that is tied has one group, whose factors may have several blocks.
    return (M if M.dim() == 2 else M.diagonal(dim1=-2, dim2=-1)).sum()[None]


def _scaled(M: Tensor, by: Tensor) -> Tensor:
    return M * by.reshape(-1, *[1] * (M.dim() - 1))


def _added(M: Tensor, other: Tensor) -> Tensor:
    if M.dim() == other.dim():
        return M + other
    dense, diagonal = (M, other) if M.dim() == 3 else (other, M)
    return dense + torch.diag_embed(in_blocks(diagonal, *dense.shape[:2]))
