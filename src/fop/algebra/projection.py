"""Fisher-Orthogonal Projection: equations 3-6 and 13-17 of Lu & Armour (AAAI 2026).

A layer's gradient is a tensor of shape (groups, out, in), any layout that its curvature understands;
every scalar below is a 0-dim tensor over the whole layer and stays on the device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Curvature(Protocol):
    """All that the projection asks of a layer's curvature."""

    def fisher(self, V: Tensor) -> Tensor:
        """Return F·V, undamped."""

    def solve(self, V: Tensor) -> Tensor:
        """Return F̂⁻¹·V, damped."""


class Direction(NamedTuple):
    """A layer's update before learning rate, KL clip and momentum, with the scalars it came from.

    Attributes:
        update: η·F̂⁻¹·Gc, same shape as the gradient (18).
        alignment: ⟨update, Ga⟩, what the KL clip sums over layers.
        beta: mixing coefficient β (16).
        eta: step scale η (17).
        rho: ρ = D²/(E·B) ∈ [0, 1], how much of the step lies where the sub-batches disagree.
    """

    update: Tensor
    alignment: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """Return ⟨X, Y⟩, the sum of element-wise products, as a 0-dim tensor."""
    return torch.dot(X.reshape(-1), Y.reshape(-1))


def average_and_difference(g1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ga = (g1 + g2)/2 and Gd = g1 - g2 (3)."""
    return (g1 + g2) / 2, g1 - g2


def orthogonal_component(average: Tensor, difference: Tensor, fisher_average: Tensor) -> Tensor:
    """Return G⊥ = Gd - s·Ga with ⟨Ga, F·G⊥⟩ = 0 (4, 5), exactly 0 where Gd is a multiple of Ga.

    Args:
        average: Ga.
        difference: Gd, same shape.
        fisher_average: F·Ga, same shape.

    The ε of (4) is a guard against 0/0 only: with a fixed ε, scaling the loss would change the step.
    Where one gradient is a multiple of the other, up to rounding, Gd - s·Ga is rounding too: a direction that
    means nothing, and that F̂⁻¹ would amplify.
    """
    s = _ratio(inner(difference, fisher_average), inner(average, fisher_average), otherwise=0.0)
    aa, dd = inner(average, average), inner(difference, difference)
    t = _ratio(inner(difference, average), aa, otherwise=0.0)
    apart = torch.add(difference, t * average, alpha=-1)
    rounding = (64 * torch.finfo(s.dtype).eps) ** 2 * (1 + t * t) * (dd + aa)
    # A NaN must pass through: the optimizer finds a bad gradient by it.
    return torch.where(inner(apart, apart) <= rounding, 0.0, difference - s * average)


def mixing_coefficient(D: Tensor, E: Tensor) -> Tensor:
    """Return β* = D/E (16) from D = ⟨Ga, F̂⁻¹·G⊥⟩ and E = ⟨G⊥, F̂⁻¹·G⊥⟩ (13); 0 where E = 0."""
    return _ratio(D, E, otherwise=0.0)


def step_scale(B: Tensor, D: Tensor, E: Tensor, beta: Tensor) -> Tensor:
    """Return η* = ⟨Ga, F̂⁻¹·Gc⟩ / ⟨Gc, F̂⁻¹·Gc⟩ for Gc = Ga + β·G⊥ (6, 17), from B, D, E by bilinearity."""
    return _ratio(B + beta * D, B + 2 * beta * D + beta * beta * E, otherwise=1.0)


def kfac_direction(curvature: Curvature, average: Tensor, *, eta: float | None = None) -> Direction:
    """Return the K-FAC direction F̂⁻¹·Ga: β = 0, and η = 1 unless ``eta`` fixes another."""
    natural = curvature.solve(average)
    B = inner(average, natural)
    zero = torch.zeros_like(B)
    if eta is None or eta == 1.0:
        return Direction(natural, B, zero, torch.ones_like(B), zero)
    return Direction(eta * natural, eta * B, zero, torch.full_like(B, eta), zero)


def fop_direction(
    curvature: Curvature,
    average: Tensor,
    difference: Tensor,
    *,
    beta: float | None = None,
    eta: float | None = None,
) -> Direction:
    """Return η·F̂⁻¹·(Ga + β·G⊥), the update of (18) without the learning rate.

    Args:
        curvature: the layer's F and F̂⁻¹.
        average: Ga, any shape that ``curvature`` takes.
        difference: Gd = g1 - g2, same shape.
        beta: a fixed mixing coefficient; None for β* (16).
        eta: a fixed step scale; None for η* (17).
    """
    perpendicular = orthogonal_component(average, difference, curvature.fisher(average))
    natural = curvature.solve(average)
    natural_perpendicular = curvature.solve(perpendicular)
    B = inner(average, natural)
    D = inner(average, natural_perpendicular)
    E = inner(perpendicular, natural_perpendicular)
    best = mixing_coefficient(D, E)
    mixing = best if beta is None else torch.full_like(B, beta)
    scale = step_scale(B, D, E, mixing) if eta is None else torch.full_like(B, eta)
    update = torch.addcmul(natural, natural_perpendicular, mixing).mul_(scale)
    alignment = scale * (B + mixing * D)
    return Direction(update, alignment, mixing, scale, _ratio(best * D, B, otherwise=0.0))


def _ratio(numerator: Tensor, denominator: Tensor, *, otherwise: float) -> Tensor:
    return torch.where(denominator == 0, torch.full_like(denominator, otherwise), numerator / denominator)
