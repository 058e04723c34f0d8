"""How far a step goes: a share of the weight's norm, or η* (17) and the KL clip.

Its direction is of `fop.correction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.correction import Directions, inner, ratio
from fop.curvature import LEAST_SIGNAL, NOISE_DECAY

# In the state: the norm that a weight which has been zero is taken to have, see `lengths`; 0 for others.
REFERENCE_NORM = "reference_norm"
# In the state: the slope of the loss along the momentum, ⟨v, Ga⟩ of the last step (a bias counts with the
# weight's momentum), and the radius, by which share of its length a weight moves since steps have gone too
# far, (2,), see `after_overshoot`.
REACH = "reach"
# How many times a slope must have been turned round for a step to have gone too far; what is then left of the
# length, by what that grows again in every step, and the least.
TURNED, SHORTER, LONGER, LEAST_RADIUS = 2.0, 0.5, 1.02, 0.05
# In the state: the root mean square of a matrix when AdamW first moved it; 0 for zeros, or if unknown.
INITIAL_SIZE = "initial_size"
# About how many numbers the weights have that are stepped together, unless one has more.
TOGETHER = 2**24
# ν before any noise was measured, as in batches of one sample: all counts as noise.
UNMEASURED = 1.0


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
        noise: ν ∈ [0, 0.99], the share of noise in the gradient, or `UNMEASURED`; None if sub-batches are
            not wanted.
        along: with ``step_length="weight"`` ⟨weight, Ga⟩, ‖Ga‖², ⟨momentum, Ga⟩ and ⟨update, Ga⟩, (4,); of
            sharded weights the last alone, else 0. The last two are of the bias, too.
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


def scale_updates(
    directions: Directions, eta: float | None, corrected: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the updates η·F̂⁻¹·Gc (18), their alignment ⟨update, Ga⟩, and η; (n,) both.

    η is ``eta``, or η* = ⟨Ga, F̂⁻¹·Gc⟩ / ⟨Gc, F̂⁻¹·Gc⟩ (17), which is 1 where no contrasts have corrected Ga.
    """
    updates, alignment = directions.updates, directions.alignment
    if not corrected and (eta is None or eta == 1.0):
        return updates, alignment, torch.ones_like(alignment)
    if corrected and eta is None:
        scale = ratio(alignment, directions.squared_norm, otherwise=1.0)
    else:
        scale = torch.full_like(alignment, 1.0 if eta is None else eta)
    # Not in place: an approximation may solve for the gradient itself.
    return list(torch._foreach_mul(updates, scale.unbind())), scale * alignment, scale


def noise_share(before: Tensor, norms: Tensor | None, trusted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ν ∈ [0, 0.99], the share of noise in ‖Ga‖², with the `Directions.noise` of a step taken in.

    Both are averaged over about ten steps, and then divided; returned are ν, (n,), and the averages, (n, 2),
    which were ``before``. What is not finite or not ``trusted`` does not count, nor a step without
    sub-batches (None). As long as nothing did ν is `UNMEASURED`.
    """
    averages = before
    if norms is not None:
        good = torch.isfinite(norms).all(1)
        if trusted is not None:
            good = good & trusted
        averages = torch.where(good[:, None], torch.lerp(norms, before, NOISE_DECAY), before)
    noise, whole = averages.unbind(1)
    return torch.where(whole > 0, (noise / whole).clamp(0, 1 - LEAST_SIGNAL), UNMEASURED), averages


def along_gradients(
    gradients: Sequence[Sequence[tuple[Tensor, Tensor]]],
    states: Mapping[Tensor, Mapping[str, Any]],
    mine: Callable[[Tensor], Tensor] = Tensor.detach,
) -> list[Tensor]:
    """Return ⟨weight, Ga⟩, ‖Ga‖², and ⟨momentum, Ga⟩ of weight and bias, (n,) each.

    ``gradients`` are (parameter, gradient) of each weight and of its bias, if any; ``mine`` returns this
    rank's part of a tensor.
    """
    of_weights, past = [of_one[0][1] for of_one in gradients], []
    weights = [mine(of_one[0][0]).to(of_one[0][1].dtype) for of_one in gradients]
    for of_one in gradients:
        held = [(states.get(param, {}).get("momentum_buffer"), g) for param, g in of_one]
        known = [(mine(v).to(g.dtype), g) for v, g in held if v is not None]
        # Two lists, of weight and bias.
        past.append(inner(*zip(*known, strict=True)).sum() if known else of_weights[0].new_zeros(()))
    return [inner(weights, of_weights), inner(of_weights, of_weights), torch.stack(past)]


def kl_scale(lengths: Tensor, kl_clip: float) -> Tensor:
    """Return the scale of all updates, min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩)) (Ba et al. 2017).

    ``lengths`` are lr²·⟨update, gradient⟩ of every weight, 1-d; those that are not finite do not count.
    """
    total = torch.where(torch.isfinite(lengths), lengths, 0).sum()
    # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
    return torch.where(total > kl_clip, (kl_clip / total).sqrt(), 1)


def after_overshoot(
    states: Sequence[dict[str, Any]], along: Tensor, noise: Tensor, momentum: float, good: Tensor
) -> tuple[Tensor, Tensor]:
    """Return by what the momenta of n weights are multiplied, and their radii, (n,) both.

    Slope and radius are kept in the weights' ``states``; ``along`` is `Update.along`, (n, 4).

    A step that went too far turns round the slope of the loss along it. Where ⟨v, Ga⟩ of the momentum v is
    below 0, and below -2 times what it was one step before, v becomes ν·v (O'Donoghue & Candès 2015 take 0,
    wherever it is below 0), and the weight moves by 2^(ν - 1) of its length, which grows again by 2 % a step;
    by a twentieth at least.
    F̂⁻¹ makes directions smaller where gradients are larger, so that momentum would carry weights on while
    the loss grows. Only weights that are ``good`` take the step.
    """
    for state in states:
        if REACH not in state:
            state[REACH] = torch.stack([along.new_zeros(()), along.new_ones(())])
    held = [state[REACH] for state in states]
    before = torch.stack(held)
    slope, radius = before.unbind(1)
    _, _, past, ahead = along.unbind(1)
    too_far = past < -TURNED * slope.clamp(min=0)
    kept = torch.where(too_far, noise, 1)
    radius = (radius * torch.where(too_far, SHORTER ** (1 - noise), LONGER)).clamp(LEAST_RADIUS, 1)
    now = torch.stack([momentum * kept * past + ahead, radius], 1)
    now = torch.where((good & torch.isfinite(now[:, 0]))[:, None], now, before)
    torch._foreach_copy_(held, list(now.unbind()))
    return kept, now[:, 1]


class Sums(NamedTuple):
    """What must be known of n weights and of u, by what they are to move; (n,) each.

    Attributes:
        square: ‖u‖² of weight and bias. A bias is a weight whose input is 1: it counts as one on inputs of
            the size that the others have; otherwise the units of the inputs would decide which of the two it
            is of.
        own: ‖weight‖².
        rows: Σ ‖row of u‖ of an embedding; 0 for others.
        product: ⟨weight, u⟩.
        of_weight: ‖u‖² of the weight alone.
        along: ⟨weight, Ga⟩, and
        gradient: ‖Ga‖².
    """

    square: Tensor
    own: Tensor
    rows: Tensor
    product: Tensor
    of_weight: Tensor
    along: Tensor
    gradient: Tensor

    def times(self, kept: Tensor) -> Sums:
        """Return those of the weights times a number."""
        own, product, along = self.own * kept * kept, self.product * kept, self.along * kept
        return self._replace(own=own, product=product, along=along)


def measure(
    weights: Sequence[Tensor], us: Sequence[Sequence[Tensor]], inputs: Tensor, rows: Sequence[int]
) -> Tensor:
    """Return the first five numbers of `Sums`, (n, 5); of shards, to be added up.

    ``us`` are u, each of a weight and of its bias, if any; ``inputs`` are the mean squares of the other
    inputs of a bias, (n,); ``rows`` is not 0 for an embedding.
    """
    first, zero = [each[0] for each in us], inputs.new_zeros(())
    weights = [weight.to(u.dtype) for weight, u in zip(weights, first, strict=True)]
    biases = [each[1] if len(each) > 1 else zero for each in us]
    by_row = [
        torch.linalg.vector_norm(u, dim=1).sum() if count else zero
        for u, count in zip(first, rows, strict=True)
    ]
    of_weight = inner(first, first)
    square = of_weight + inner(biases, biases) / inputs
    own, product = inner(weights, weights), inner(weights, first)
    return torch.stack([square, own, torch.stack(by_row), product, of_weight], 1)


class Lengths(NamedTuple):
    """How far weights are to move along u, (n,) of n weights.

    Attributes:
        share: s, by which share of lr·‖weight‖; 0 for weights that stay.
        factor: s·‖weight‖ / ‖u‖, and
        rate: that times the learning rate, negative if it goes up.
        turns: whether the step turns a weight, see `turn`; (bool).
        cosine: of weight and gradient, c.
        signal: the share of the gradient's part along the weight that is signal.
        reference: the norm that a weight which has been zero is taken to have; 0 for others.
    """

    share: Tensor
    factor: Tensor
    rate: Tensor
    turns: Tensor
    cosine: Tensor
    signal: Tensor
    reference: Tensor


def lengths(
    sums: Sums,
    updates: Sequence[Update],
    inputs: Tensor,
    good: Tensor,
    reference: Tensor,
    noise: Tensor,
    radius: Tensor,
    sizes: Tensor,
    group: Mapping[str, Any],
) -> Lengths:
    """Return how far weights of a parameter group move: those that are ``good`` by s·lr·‖weight‖.

    s is ``radius`` (`after_overshoot`), times what follows from the ``noise`` ν, (n,) both.

    That is 1, or, if the length is annealed at the momentum μ, the share of signal in the average of updates
    that momentum makes: its squared norm has all of an update's signal, 1 - ν, and (1 - μ)/(1 + μ) of its
    noise. (That is heavy ball's; it is taken with Nesterov momentum, too.) At a rate that stays, steps of
    full length would in the end be noise, and lengthen the weight. Where nothing moves s is 0.

    A weight of exactly 0 has no norm, and no gradient tells the units of what it is to give. It is taken to
    be as long as one whose outputs have the size 1. This ``reference`` stands for the weight's norm as long
    as that is smaller.

    ``sizes`` are `Binding.sizes`, (n, 3). Of an embedding, of whose rows a batch uses few, as much of the
    norm counts as rows move, (Σ ‖row‖)² / Σ ‖row‖² of them.
    """
    own, square, one = sums.own.sqrt(), sums.square, torch.ones_like(sums.own[0])
    typical, entries, rows = sizes.unbind(1)
    reference = torch.where(own > 0, reference, typical / inputs.sqrt())
    signal, share, known = 1 - noise, radius, all(u.noise is not None for u in updates)
    # Which schedulers of torch set.
    anneal = "initial_lr" not in group if group["anneal"] == "auto" else group["anneal"]
    if anneal and known:
        least = signal.clamp(min=LEAST_SIGNAL)
        share = radius * least / (least + (1 - least) * (1 - group["momentum"]) / (1 + group["momentum"]))
    # Momentum alone does not move a weight: however small it is, it would be stretched.
    moves = (square > 0) & (torch.stack([u.length.to(one) for u in updates]) != 0) & good
    norm = torch.where(moves, square, 1).sqrt()
    length = share * torch.maximum(own, reference) / norm
    length = torch.where(rows > 0, length * sums.rows / (rows.sqrt() * norm), length)
    factor = torch.where(moves, length, 0)
    rate = factor * (-group["lr"] if group["maximize"] else group["lr"])
    cosine = ratio(sums.along, own * sums.gradient.sqrt(), otherwise=0.0)
    turns = (rate != 0) & (own >= reference) & (entries > 1)
    signal = signal * (entries.sqrt() * cosine.abs()).clamp(max=1)
    return Lengths(torch.where(moves, share, 0), factor, rate, turns, cosine, signal, reference)


def turn(
    own: Tensor, product: Tensor, of_weight: Tensor, reach: Lengths, *, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a and b of the step a·W - b·u that turns weights as W - rate·u does, and changes norms less.

    A step across a weight lengthens it, with momentum more so: by ½ℓ² for the relative length ℓ = rate·‖u‖ /
    ‖W‖, in the long run without bounds. So the logarithm of the norm changes by a share of what the step
    would change, and for the rest by -ℓ·c, as much of ℓ as the gradient lies along the weight, c = cos(W,
    Ga). The share is that of signal, 1 - ν, times √n·|c| of n entries, 1 at most: of a gradient that is noise
    about 1, and 0 for a weight whose norm the loss does not depend on (one that a normalisation follows),
    which keeps its norm.

    A weight that has not its reference norm yet, and one number alone, which cannot turn, move by -rate·u.
    The first arguments are ‖W‖², ⟨W, u⟩ and ‖u‖². They broadcast: an embedding turns by row, with those of
    its rows. ``kept`` is what decay leaves of the weights, and they are of that.
    """
    rate, cosine, share = reach.rate, reach.cosine, reach.signal
    turns = reach.turns & (own > 0) & (of_weight > 0)
    own = torch.where(turns, own, 1)
    # From here on in units of the weight's norm.
    inward = torch.where(turns, rate * product / own, 0)
    length = torch.where(turns, rate.abs() * of_weight.sqrt() / own.sqrt(), 0)
    across = (length.square() - inward.square()).clamp(min=0).sqrt()
    turning = length * (1 - cosine.square()).clamp(min=0).sqrt() / torch.where(across > 0, across, 1)
    after = (1 - 2 * inward + length.square()).clamp(min=torch.finfo(own.dtype).tiny)
    # A row may be far shorter than the others, whose gradient it is.
    change = share * after.log() / 2 - (1 - share) * cosine * rate.sign() * length.clamp(max=1)
    scale = change.exp() / (1 + (turning * across).square()).sqrt()
    a, b = scale * (1 + turning * inward), scale * turning * rate
    a, b = torch.where(turns, a, 1), torch.where(turns, b, rate)
    return a if kept is None else a * kept, b


def row_products(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖W‖², ⟨W, u⟩ and ‖u‖² of every row, (rows, 1)."""
    own, product, square = ((a * b).sum(1, keepdim=True) for a, b in ((weight, weight), (weight, u), (u, u)))
    return own, product, square


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


def signed_rate(group: Mapping[str, Any]) -> float | Tensor:
    """Return the learning rate, negative if it goes up."""
    rate: float | Tensor = group["lr"]
    return -rate if group["maximize"] else rate


def same_rate(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two groups have one learning rate; those on a device are not read."""
    same: bool = not isinstance(one["lr"], Tensor) and one["lr"] == other["lr"]
    return same


def adamw_rate(group: Mapping[str, Any], size: float = 0.0) -> float | Tensor:
    """Return the AdamW path's learning rate, which follows the schedule of ``lr``.

    An entry moves by about the rate. With ``step_length="weight"`` and a ``size``, the root mean square of a
    parameter's entries, it is at most ``lr`` times that: so far a weight moves on the FOP path, too.
    """
    lr, adamw_lr = group["lr"], group["adamw_lr"]
    started = (lr > 0).to(lr) if isinstance(lr, Tensor) else lr > 0
    rate: float | Tensor = adamw_lr * lr / group["base_lr"] if group["base_lr"] else adamw_lr * started
    if not size or group["step_length"] != "weight":
        return rate
    return torch.minimum(rate, lr * size) if isinstance(rate, Tensor) else min(rate, lr * size)
