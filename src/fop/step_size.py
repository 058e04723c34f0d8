"""How far a step goes: a share of the weight's norm, or η* (17) and the KL clip.

Its direction is of `fop.correction`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.correction import Direction, inner, ratio
from fop.curvature import LEAST_SIGNAL, NOISE

# In the state: the norm that a weight which has been zero is taken to have, see `stretch`; 0 for others.
REFERENCE_NORM = "reference_norm"
# Of the averages of noise and gradient from one step to the next.
NOISE_DECAY = 0.9


class Update(NamedTuple):
    """What one weight is about to do, before momentum, learning rate, and length or KL clip.

    Attributes:
        matrix: η·F̂⁻¹·Gc as gradient matrix (18).
        length: lr²·⟨update, gradient⟩; not finite if update or gradient is not.
        beta: mixing coefficient β (16).
        eta: step scale η (17).
        rho: ρ ∈ [0, 1], how much of the step lies where the sub-batches disagree.
        trusted: 0-dim bool, whether the sub-batch gradients were believed; None without any.
        reason: why there were none, or why they are not believed.
        used: 0-dim bool, false for a weight that no rank has used, which stays as it is; None for true.
        input_square: with ``step_length="weight"`` the mean square of the inputs of a weight with a bias.
        noise: ν ∈ [0, 1), the share of noise in the gradient; None if sub-batches are not wanted.
        along: with ``step_length="weight"`` the cosine of weight and gradient; None for shards.
    """

    matrix: Tensor
    length: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor
    trusted: Tensor | None = None
    reason: str = ""
    used: Tensor | None = None
    input_square: Tensor | None = None
    noise: Tensor | None = None
    along: Tensor | None = None


def scale_update(direction: Direction, eta: float | None, corrected: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the update η·F̂⁻¹·Gc (18), its alignment ⟨update, Ga⟩, and η.

    η is ``eta``, or η* = ⟨Ga, F̂⁻¹·Gc⟩ / ⟨Gc, F̂⁻¹·Gc⟩ (17), which is 1 where no contrasts have corrected Ga.
    """
    update, alignment = direction.update, direction.alignment
    if not corrected:
        if eta is None or eta == 1.0:
            return update, alignment, torch.ones_like(alignment)
        return eta * update, eta * alignment, torch.full_like(alignment, eta)
    if eta is None:
        scale = ratio(alignment, direction.squared_norm, otherwise=1.0)
    else:
        scale = torch.full_like(alignment, eta)
    return update.mul_(scale), scale * alignment, scale


def noise_share(state: MutableMapping[str, Any], norms: Tensor | None, trusted: Tensor | None) -> Tensor:
    """Return ν ∈ [0, 0.99], the share of noise in ‖Ga‖², with the `Direction.noise` of a step taken in.

    Both are averaged in ``state`` over about ten steps, and then divided. What is not finite or not
    ``trusted`` does not count, nor a step without sub-batches (None); 0 as long as nothing did.
    """
    before = state[NOISE]
    if norms is not None:
        good = torch.isfinite(norms).all()
        if trusted is not None:
            good = good & trusted
        state[NOISE] = torch.where(good, torch.lerp(norms, before, NOISE_DECAY), before)
    noise, whole = state[NOISE].unbind()
    return torch.where(whole > 0, noise / whole, 0).clamp_(0, 1 - LEAST_SIGNAL)


def kl_scale(lengths: Tensor, kl_clip: float) -> Tensor:
    """Return the scale of all updates, min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩)) (Ba et al. 2017).

    ``lengths`` are lr²·⟨update, gradient⟩ of every weight, 1-d; those that are not finite do not count.
    """
    total = torch.where(torch.isfinite(lengths), lengths, 0).sum()
    # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
    return torch.where(total > kl_clip, (kl_clip / total).sqrt(), 1)


class Sums(NamedTuple):
    """What `stretch` and `turn` must know of a weight and of u, by what it is to move; each 0-dim.

    Attributes:
        square: ‖u‖² of weight and bias. A bias is a weight whose input is 1: it counts as one on inputs of
            the size that the others have; otherwise the units of the inputs would decide which of the two it
            is of.
        own: ‖weight‖².
        rows: Σ ‖row of u‖ of an embedding; 0 for others.
        product: ⟨weight, u⟩.
        of_weight: ‖u‖² of the weight alone.
        with_gradient: ⟨weight, gradient⟩, and
        gradient: ‖gradient‖², of shards; 0 where `Update.along` says what they are for.
    """

    square: Tensor
    own: Tensor
    rows: Tensor
    product: Tensor
    of_weight: Tensor
    with_gradient: Tensor
    gradient: Tensor


def measure(
    parts: Sequence[Tensor],
    input_square: Tensor | None,
    weight: Tensor,
    gradient: Tensor | None,
    *,
    by_row: bool,
) -> Tensor:
    """Return the numbers of `Sums`, (7,); of shards, to be added up.

    ``parts`` are u, of a weight and its bias, if any; ``input_square`` is the size of the other inputs.
    """
    of_weight, *bias = (part.square().sum() for part in parts)
    square, zero = of_weight, torch.zeros_like(of_weight)
    if bias:
        square = square + (bias[0] if input_square is None else bias[0] / input_square.to(square))
    own = torch.linalg.vector_norm(weight, dtype=square.dtype).square()
    rows = torch.linalg.vector_norm(parts[0], dim=1).sum() if by_row else zero
    weight, of_gradient = weight.to(square), (zero, zero)
    if gradient is not None:
        gradient = gradient.to(square)
        of_gradient = inner(weight, gradient), inner(gradient, gradient)
    return torch.stack([square, own, rows, inner(weight, parts[0]), of_weight, *of_gradient])


def stretch(
    sums: Sums, update: Update, reference: Tensor, typical: float, rows: int, annealed: float | None
) -> tuple[Tensor, Tensor]:
    """Return s·‖weight‖ / ‖u‖, 0 for an update u of 0, and s; both 0-dim.

    s is 1, or, if the length is ``annealed`` at this momentum μ, the share of signal in the average of
    updates that momentum makes: its squared norm has all of an update's signal, 1 - ν, and (1 - μ)/(1 + μ) of
    its noise. (That is heavy ball's; it is taken with Nesterov momentum, too.) At a rate that stays, steps of
    full length would in the end be noise, and lengthen the weight. Where nothing moves s is 0.

    A weight of exactly 0 has no norm, and no gradient tells the units of what it is to give. It is taken to
    be as long as one whose outputs have the size 1: ``typical`` for inputs of that size. This ``reference``,
    changed in place, stands for the weight's norm as long as that is smaller.

    ``rows`` is not 0 for an embedding of so many rows, of which a batch uses few: as much of the norm counts
    as rows move, (Σ ‖row‖)² / Σ ‖row‖² of them.
    """
    own, square = sums.own.sqrt(), sums.square
    size = torch.full_like(own, typical)
    if update.input_square is not None:
        size = size / update.input_square.to(size).sqrt()
    reference.copy_(torch.where(own > 0, reference, size))
    share = torch.ones_like(own)
    if update.noise is not None and annealed is not None:
        signal = 1 - update.noise.to(share)
        share = signal / (signal + (1 - signal) * (1 - annealed) / (1 + annealed))
    length = share * torch.maximum(own, reference)
    # Momentum alone does not move a weight: however small it is, it would be stretched.
    moves = (square > 0) & (update.length.to(square) != 0)
    norm = torch.where(moves, square, 1).sqrt()
    if rows:
        length = length * sums.rows / (rows**0.5 * norm)
    return torch.where(moves, length / norm, 0), torch.where(moves, share, 0)


def turn(
    weight: Tensor,
    u: Tensor,
    rate: Tensor,
    sums: Sums,
    update: Update,
    reference: Tensor,
    entries: int,
    *,
    by_row: bool,
) -> None:
    """Move a weight by -rate·u, which turns it, and change its norm by less than that would.

    A step across a weight lengthens it, with momentum more so: by ½ℓ² for the relative length ℓ = rate·‖u‖ /
    ‖weight‖, in the long run without bounds. So the logarithm of the norm changes by a share of what the step
    would change, and for the rest by -ℓ·c, as much of ℓ as the gradient lies along the weight, c =
    cos(weight, gradient). The share is that of signal, 1 - ν, times √n·|c| of n ``entries``, 1 at most: of a
    gradient that is noise about 1, and 0 for a weight whose norm the loss does not depend on (one that a
    normalisation follows), which keeps its norm. Where noise is not known all counts as noise.

    An embedding turns ``by_row``. A weight that has not its ``reference`` norm yet, and one number alone,
    which cannot turn, move by -rate·u.
    """
    along, own, product, square = update.along, sums.own, sums.product, sums.of_weight
    if along is None:
        along = ratio(sums.with_gradient / own.sqrt(), sums.gradient.sqrt(), otherwise=0.0)
    if by_row:
        own, product, square = (
            (one.to(u.dtype) * other).sum(1, keepdim=True)
            for one, other in ((weight, weight), (weight, u), (u, u))
        )
    # A rate of 0 is that of a step that is refused, whose numbers may not be finite.
    valid = (own > 0) & (square > 0) & (rate != 0) & (sums.own >= reference.square())
    if (u.shape[1:].numel() if by_row else entries) == 1:
        valid = torch.zeros_like(valid)
    own = torch.where(valid, own, 1)
    # From here on in units of the weight's norm.
    inward, length = rate * product / own, rate.abs() * square.sqrt() / own.sqrt()
    inward, length = torch.where(valid, inward, 0), torch.where(valid, length, 0)
    across = (length.square() - inward.square()).clamp(min=0).sqrt()
    turning = length * (1 - along.square()).clamp(min=0).sqrt() / torch.where(across > 0, across, 1)
    signal = 0.0 if update.noise is None else 1 - update.noise.to(own)
    share = signal * (entries**0.5 * along.abs()).clamp(max=1)
    after = (1 - 2 * inward + length.square()).clamp(min=torch.finfo(own.dtype).tiny)
    # A row may be far shorter than the others, whose gradient it is.
    change = share * after.log() / 2 - (1 - share) * along * rate.sign() * length.clamp(max=1)
    scale = change.exp() / (1 + (turning * across).square()).sqrt()
    a, b = scale * (1 + turning * inward), scale * turning
    # Rounded once: twice would change the norm of weights in half precision.
    moved = torch.where(valid, a, 1) * weight.to(u.dtype) - torch.where(valid, b, 1) * rate * u
    weight.copy_(moved)


def clip_coefficient(squares: Sequence[Tensor], max_norm: float) -> Tensor:
    """Return the scale of gradients with these squared norms, as in `torch.nn.utils.clip_grad_norm_`."""
    total = torch.stack(list(squares)).sum()
    return (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)


def momentum_of(group: Mapping[str, Any]) -> float:
    """Return the momentum of a parameter group, less where the learning rate has risen under a KL clip.

    The KL clip bounded past updates at the rate of their time; a higher one (warm-up) must not carry them
    further than that.
    """
    momentum: float = group["momentum"]
    if group["kl_clip"] is None or group["lr"] <= group["last_lr"]:
        return momentum
    return momentum * float(group["last_lr"] / group["lr"])


def adamw_rate(group: Mapping[str, Any]) -> float:
    """Return the AdamW path's learning rate, which follows the schedule of ``lr``."""
    if group["base_lr"] == 0:
        return group["adamw_lr"] if group["lr"] > 0 else 0.0
    return float(group["adamw_lr"] * group["lr"] / group["base_lr"])
