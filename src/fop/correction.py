"""The direction of a step: equations 3-6, 13 and 16 of Lu & Armour (AAAI 2026), for K sub-batches.

A gradient is a matrix of shape (groups, out, in), any layout that its curvature understands. Those of n
weights come as a list, and a scalar of each, over all of the weight, as a tensor (n,) on the device. Two
sub-batches are the paper's case.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

# One of every weight.
Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


class Metric(Protocol):
    """All that the correction asks of a curvature.

    Attributes:
        trace: tr F, the mean squared length of one sample's gradient, 0-dim.
    """

    trace: Tensor

    def fisher(self, V: Tensor) -> Tensor:
        """Return F·V, undamped."""

    def solve(self, V: Tensor) -> Tensor:
        """Return F̂⁻¹·V, damped."""


class SubBatchGradients(NamedTuple):
    """The gradients of K sub-batches as their mean and their differences, as gradient matrices.

    Attributes:
        average: Ga, the gradient of the whole batch.
        contrasts: K - 1 differences, see `contrasts`; Gd = g1 - g2 for K = 2. Empty where they are not known.
        trusted: 0-dim bool, whether the contrasts may be believed; they are 0 where not. None without any.
        reason: why there are none, or why they are not believed.
    """

    average: Tensor
    contrasts: tuple[Tensor, ...] = ()
    trusted: Tensor | None = None
    reason: str = ""

    def divided(self, samples: int | Tensor) -> SubBatchGradients:
        """Return the gradients of a loss that is a mean, from those of a sum over so many samples."""
        contrasts = tuple(contrast / samples for contrast in self.contrasts)
        return self._replace(average=self.average / samples, contrasts=contrasts)


class Directions(NamedTuple):
    """Natural-gradient directions, and the scalars that decide how far they are followed, (n,).

    Attributes:
        updates: F̂⁻¹·Gc of each, same shape as the gradient.
        alignment: ⟨update, Ga⟩.
        squared_norm: ⟨Gc, F̂⁻¹·Gc⟩.
        beta: mixing coefficient β (16); with K > 2 the root of the sum of their squares.
        rho: ρ ∈ [0, 1], how much of the step lies where the sub-batches disagree; D²/(E·B) for K = 2.
        noise: squared norms in the metric F̂⁻¹ of the noise in Ga, which the contrasts show, and of Ga, (n,
            2). The noise of a mean of K has 1/(2K) of the variance of a contrast: ‖Gd/2‖² for K = 2. None
            without contrasts.
    """

    updates: list[Tensor]
    alignment: Tensor
    squared_norm: Tensor
    beta: Tensor
    rho: Tensor
    noise: Tensor | None = None


@functools.cache
def helmert(count: int) -> list[list[float]]:
    """Return K - 1 orthogonal rows of K weights, each of sum 0 and norm √2; [[1, -1]] for K = 2."""
    rows = []
    for j in range(1, count):
        scale = (2 / (j * (j + 1))) ** 0.5
        rows.append([scale] * j + [-j * scale] + [0.0] * (count - j - 1))
    return rows


def contrasts(
    sums: Sequence[Tensor], shares: Sequence[float], average: Tensor, scale: Tensor | float = 1.0
) -> tuple[Tensor, ...]:
    """Return the differences of K sub-batch gradients, Gd = g1 - g2 for K = 2 (3).

    ``sums``, times ``scale``, are what the first K - 1 sub-batches gave of ``average``, Ga; the last gave the
    rest. ``shares`` of the batch are those of all K, and add up to 1.
    """
    last = shares[-1]
    result = []
    for row in helmert(len(shares)):
        rest = row[-1] / last
        weights = [h / share - rest for h, share in zip(row, shares, strict=True)][:-1]
        total = sums[0] * (weights[0] * scale)
        for part, weight in zip(sums[1:], weights[1:], strict=True):
            total = total + part * (weight * scale)
        result.append(torch.add(total, average, alpha=rest))
    return tuple(result)


def inner(Xs: Sequence[Tensor], Ys: Sequence[Tensor]) -> Tensor:
    """Return ⟨X, Y⟩ of every pair, the sum of element-wise products, (n,)."""
    if Xs is Ys:
        return torch.stack(list(torch._foreach_norm(list(Xs)))).square()
    return torch.stack([torch.dot(X.reshape(-1), Y.reshape(-1)) for X, Y in zip(Xs, Ys, strict=True)])


def ratio(numerator: Tensor, denominator: Tensor, *, otherwise: float) -> Tensor:
    """Return the quotient, and ``otherwise`` where the denominator is 0."""
    return torch.where(denominator == 0, torch.full_like(denominator, otherwise), numerator / denominator)


def orthogonal_component(
    average: Tensors, difference: Tensors, fisher_average: Tensors, trace: Tensor
) -> tuple[Tensors, Tensor]:
    """Return G⊥ = Gd - s·Ga with ⟨Ga, F·G⊥⟩ = 0 (4, 5), exactly 0 where Gd is a multiple of Ga, and s.

    The ε of (4) is a guard against 0/0 only: with a fixed ε, scaling the loss would change the step.
    Where one gradient is a multiple of the other, up to rounding, Gd - s·Ga is rounding too: a direction that
    means nothing, and that F̂⁻¹ would amplify.
    """
    s = ratio(inner(difference, fisher_average), inner(average, fisher_average), otherwise=0.0)
    aa, dd = inner(average, average), inner(difference, difference)
    t = ratio(inner(difference, average), aa, otherwise=0.0)
    residual = torch._foreach_addcmul(difference, average, (-t).unbind())
    # A mean is off by ε times the length of its terms (the root of tr F) however much they cancel, and where
    # they do not by 0.2·√N·ε: measured are 0.7 to 14 ε up to 8,192 samples. A wider bound takes for rounding
    # what means something: β* makes up for a short G⊥, so that the step without it is another one.
    rounding = (16 * torch.finfo(s.dtype).eps) ** 2 * (1 + t * t) * (dd + aa + trace)
    parallel = inner(residual, residual) <= rounding
    # A product, as a NaN must pass through: the optimizer finds a bad gradient by it.
    kept = torch.where(parallel, 0.0, torch.ones_like(s))
    perpendicular = torch._foreach_addcmul(difference, average, (-s).unbind())
    torch._foreach_mul_(perpendicular, kept.unbind())
    return perpendicular, torch.where(parallel, t, s)


def mixing_coefficients(D: Sequence[Tensor], E: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return β* = E⁻¹·D (16) for K > 2; 0 for a contrast that adds no direction.

    D is ⟨Ga, F̂⁻¹·G⊥_j⟩ of every contrast, E ⟨G⊥_i, F̂⁻¹·G⊥_j⟩ of every pair (13).
    """
    count = len(D)
    # Elimination without pivots: E is positive semi-definite. No library call, which would wait for a GPU.
    rows, right = [list(row) for row in E], list(D)
    for k in range(count):
        for i in range(k + 1, count):
            factor = ratio(rows[i][k], rows[k][k], otherwise=0.0)
            right[i] = right[i] - factor * right[k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
            # What is left of a contrast in the span of those before it is rounding.
            rounding = 64 * torch.finfo(factor.dtype).eps * E[i][i]
            rows[i][i] = torch.where(rows[i][i] <= rounding, 0.0, rows[i][i])
    beta: list[Tensor] = [torch.zeros_like(d) for d in D]
    for k in reversed(range(count)):
        for j in range(k + 1, count):
            right[k] = right[k] - rows[k][j] * beta[j]
        beta[k] = ratio(right[k], rows[k][k], otherwise=0.0)
    return beta


def combine(
    metrics: Sequence[Metric],
    gradients: Sequence[SubBatchGradients],
    *,
    beta: float | None = None,
    units: Sequence[Tensor | None] | None = None,
) -> Directions:
    """Return F̂⁻¹·Gc for Gc = Ga + Σ β_j·G⊥_j (6), with β of (16); K-FAC's F̂⁻¹·Ga without contrasts.

    All weights have as many contrasts. ``beta`` is a fixed mixing coefficient, for K = 2; None for β*. The
    order of the sub-batches does not matter: Σ β_j·G⊥_j is the projection of Ga, in the metric of F̂⁻¹, on
    what the G⊥_j span.

    ⟨Gd, F·Ga⟩ of (4) adds up what weight and bias give, in units of their own. With ``units``, see
    `Curvature`, both are taken in those of a weight: the bias as one on inputs of the size of the others.
    """
    average = [each.average for each in gradients]
    if not gradients[0].contrasts:
        natural = [metric.solve(Ga) for metric, Ga in zip(metrics, average, strict=True)]
        B = inner(average, natural)
        return Directions(natural, B, B, torch.zeros_like(B), torch.zeros_like(B))
    # ⟨Ga, F·Ga⟩ is of the fourth power of the gradients: in float32 too much from 1e9 on, and too little
    # below 1e-10. With gradients in units of their length it is of the second; a power of two is exact.
    length = torch.stack(list(torch._foreach_norm(average)))
    unit = torch.where(length > 0, length / torch.frexp(length).mantissa, 1.0)
    average = list(torch._foreach_div(average, unit.unbind()))
    natural = [metric.solve(Ga) for metric, Ga in zip(metrics, average, strict=True)]
    B = inner(average, natural)
    fisher_average = [
        metric.fisher(Ga) if of_one is None else of_one * metric.fisher(of_one * Ga)
        for metric, Ga, of_one in zip(metrics, average, units or [None] * len(average), strict=True)
    ]
    trace = torch.stack([metric.trace.to(unit) for metric in metrics]) / unit / unit
    split = [
        orthogonal_component(average, torch._foreach_div(each, unit.unbind()), fisher_average, trace)
        for each in zip(*(each.contrasts for each in gradients), strict=True)
    ]
    del fisher_average
    perpendicular = [G for G, _ in split]
    natural_perpendicular = [
        [metric.solve(G) for metric, G in zip(metrics, each, strict=True)] for each in perpendicular
    ]
    D = [inner(average, N) for N in natural_perpendicular]
    E = [[inner(G, N) for N in natural_perpendicular] for G in perpendicular]
    # ⟨Gd, F̂⁻¹·Gd⟩ of Gd = G⊥ + s·Ga.
    of_contrasts = [E[j][j] + 2 * s * D[j] + s * s * B for j, (_, s) in enumerate(split)]
    noise = torch.stack(
        [torch.stack(of_contrasts).mean(0) / (2 * (len(D) + 1)) * unit * unit, B * unit * unit], 1
    )
    best = [ratio(D[0], E[0][0], otherwise=0.0)] if len(D) == 1 else mixing_coefficients(D, E)
    mixing = best if beta is None else [torch.full_like(B, beta)] * len(D)
    updates: Tensors = natural
    alignment, squared_norm, explained = B, B, torch.zeros_like(B)
    for j, coefficient in enumerate(mixing):
        updates = torch._foreach_addcmul(updates, natural_perpendicular[j], coefficient.unbind())
        alignment = alignment + coefficient * D[j]
        squared_norm = squared_norm + 2 * coefficient * D[j]
        explained = explained + best[j] * D[j]
    for i, row in enumerate(E):
        for j, entry in enumerate(row):
            squared_norm = squared_norm + mixing[i] * mixing[j] * entry
    overall = mixing[0] if len(mixing) == 1 else torch.linalg.vector_norm(torch.stack(mixing), dim=0)
    # One after the other: the square of a large unit leaves float32's range.
    alignment, squared_norm = alignment * unit * unit, squared_norm * unit * unit
    rho = ratio(explained, B, otherwise=0.0)
    torch._foreach_mul_(updates, unit.unbind())
    return Directions(list(updates), alignment, squared_norm, overall, rho, noise)
