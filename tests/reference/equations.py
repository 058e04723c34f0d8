"""The paper's equations on dense matrices: the Kronecker block as one matrix, its inverse by a dense solve.

A gradient "matrix" of a layer has shape (groups, out, in), with the bias as last column; a Linear layer
is one group. `vec` stacks the columns of each group, so that the printed F = A ⊗ G acts as
F·vec(V) = vec(G V A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Mixing = float | Literal["adaptive"]

# The ε of equation (4): a guard against 0/0 and nothing else, so far below any real denominator.
TINY = 1e-300


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns of every group."""
    return matrix.transpose(1, 2).reshape(-1)


def unvec(vector: Tensor, like: Tensor) -> Tensor:
    groups, out, in_ = like.shape
    return vector.reshape(groups, in_, out).transpose(1, 2)


# --- curvature -------------------------------------------------------------------------------------


def split(samples: int) -> tuple[list[int], list[int]]:
    """Which samples of a batch are in each of two sub-batches: the second has those in the middle."""
    start = (samples + 1) // 2 // 2
    middle = range(start, start + samples // 2)
    return [n for n in range(samples) if n not in middle], [*middle]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """The batch whose two sub-batches are these."""
    batch = torch.cat([first, second])
    for part, samples in zip(split(len(batch)), (first, second), strict=True):
        batch[part] = samples
    return batch


def full(factor: Tensor) -> Tensor:
    """(groups, d, d) of a factor that may be kept as its diagonal, (groups, d)."""
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def dense_fisher(A: Tensor, G: Tensor) -> Tensor:
    """F = A ⊗ G as one matrix, block diagonal over the groups."""
    return torch.block_diag(*[torch.kron(A_g, G_g) for A_g, G_g in zip(A, G, strict=True)])


def dense_damped_fisher(A: Tensor, G: Tensor, damping: float) -> Tensor:
    """F̂ = (A + πγ I) ⊗ (G + γ/π I), with π of each group's own factors."""
    gamma = math.sqrt(damping)
    A_hat, G_hat = [], []
    for A_g, G_g in zip(A, G, strict=True):
        a, g = float(A_g.trace()) / len(A_g), float(G_g.trace()) / len(G_g)
        pi = math.sqrt(a / g) if a > 0 and g > 0 else 1.0
        A_hat.append(A_g + pi * gamma * torch.eye(len(A_g), dtype=A_g.dtype))
        G_hat.append(G_g + gamma / pi * torch.eye(len(G_g), dtype=G_g.dtype))
    return dense_fisher(torch.stack(A_hat), torch.stack(G_hat))


def relative_damping(factor: Tensor, damping: float, *, bias: bool) -> Tensor:
    """What is added to a factor (groups, d, d): √λ of its mean diagonal; a bias' entry is its own mean."""
    added = torch.zeros_like(factor)
    for group, matrix in zip(added, factor, strict=True):
        diagonal = matrix.diagonal().tolist()
        inputs = diagonal[:-1] if bias else diagonal
        for i, entry in enumerate(diagonal):
            mean = sum(inputs) / len(inputs) if i < len(inputs) else entry
            group[i, i] = math.sqrt(damping) * mean
    return added


def dense_relative_fisher(A: Tensor, G: Tensor, damping: float, *, bias: bool) -> Tensor:
    """F̂ where each factor is damped by itself."""
    A_hat = A + relative_damping(A, damping, bias=bias)
    return dense_fisher(A_hat, G + relative_damping(G, damping, bias=False))


def sizes(like: Tensor, A: Tensor, *, bias: bool) -> Tensor:
    """What the input of every entry of a gradient matrix is taken to be: 1, or for a bias as the others are.

    A layer with this as the input of its bias, in place of 1, has entries that are all in the unit of the
    weight: gradients times ``sizes``, steps divided by them.
    """
    result = torch.ones_like(like)
    if bias:
        diagonal = full(A).diagonal(dim1=1, dim2=2).mean(0)
        result[:, :, -1] = (diagonal[:-1].mean() / diagonal[-1]).sqrt()
    return result


# --- the step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correction:
    """Equations (4) to (17) for one layer; vectors are `vec` of gradient matrices."""

    direction: Tensor  # η F̂⁻¹ Gc
    perpendicular: Tensor  # G⊥
    beta: float
    eta: float
    rho: float


def correct(F: Tensor, F_hat: Tensor, Ga: Tensor, Gd: Tensor | None, beta: Mixing, eta: Mixing) -> Correction:
    """The direction η F̂⁻¹ (Ga + β G⊥); without a second gradient it is K-FAC's, whatever the options."""
    if Gd is None:
        return Correction(torch.linalg.solve(F_hat, Ga), torch.zeros_like(Ga), beta=0.0, eta=1.0, rho=0.0)
    s = (Gd @ F @ Ga) / (Ga @ F @ Ga + TINY)  # (4)
    perp = Gd - s * Ga  # (5)
    solved_perp = torch.linalg.solve(F_hat, perp)
    D, E = Ga @ solved_perp, perp @ solved_perp  # (13)
    B = Ga @ torch.linalg.solve(F_hat, Ga)
    rho = float(D**2 / (E * B + TINY))
    beta = float(D / (E + TINY)) if beta == "adaptive" else beta  # (16)
    Gc = Ga + beta * perp  # (6)
    solved = torch.linalg.solve(F_hat, Gc)
    eta = float((Ga @ solved) / (Gc @ solved + TINY)) if eta == "adaptive" else eta  # (17), with g_tot = Ga
    return Correction(eta * solved, perp, beta=beta, eta=eta, rho=rho)


def correct_in_sizes(
    sizes: Tensor, F: Tensor, F_hat: Tensor, Ga: Tensor, Gd: Tensor | None, beta: Mixing, eta: Mixing
) -> Correction:
    """`correct` for the layer with the inputs that `sizes`, as `vec`, says; its direction for this one."""
    T = torch.diag(sizes)
    result = correct(T @ F @ T, T @ F_hat @ T, T @ Ga, None if Gd is None else T @ Gd, beta, eta)
    return replace(result, direction=T @ result.direction)


def turned(weight: Tensor, step: Tensor, along: float, signal: float, entries: int) -> Tensor:
    """A weight after a step, by the angle that it turns and the logarithm of its norm.

    ``along`` is the cosine of the whole weight, of so many ``entries``, and its gradient; ``signal`` is
    1 - ν.
    """
    norm, far = float(weight.norm()), float(step.norm())
    if norm == 0 or far == 0:
        return weight - step
    unit = weight / norm
    across = step - (step * unit).sum() * unit
    angle = math.atan2(far * math.sqrt(1 - along**2), norm)
    share = signal * min(1.0, math.sqrt(entries) * abs(along))
    plain = math.log(float((weight - step).norm()) / norm)
    growth = share * plain - (1 - share) * along * min(1.0, far / norm)
    return norm * math.exp(growth) * (math.cos(angle) * unit - math.sin(angle) * across / across.norm())


def momentum_step(
    direction: Tensor, buffer: Tensor | None, momentum: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """(step, new buffer) with the rule of torch.optim.SGD without dampening."""
    buffer = direction if buffer is None else momentum * buffer + direction
    return (direction + momentum * buffer if nesterov else buffer), buffer
