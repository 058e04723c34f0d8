"""How far a step goes: learning rate, η* (17) and the KL clip; its direction is of `fop.correction`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fop.correction import Direction, ratio


class Update(NamedTuple):
    """What one weight is about to do, before learning rate, KL clip and momentum.

    Attributes:
        matrix: η·F̂⁻¹·Gc as gradient matrix (18).
        length: lr²·⟨update, gradient⟩; not finite if update or gradient is not.
        beta: mixing coefficient β (16).
        eta: step scale η (17).
        rho: ρ ∈ [0, 1], how much of the step lies where the sub-batches disagree.
        trusted: 0-dim bool, whether the sub-batch gradients were believed; None without any.
        reason: why there were none, or why they are not believed.
        used: 0-dim bool, false for a weight that no rank has used, which stays as it is; None for true.
    """

    matrix: Tensor
    length: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor
    trusted: Tensor | None = None
    reason: str = ""
    used: Tensor | None = None


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


def kl_scale(lengths: Sequence[Tensor], kl_clip: float | None) -> tuple[Tensor, Tensor]:
    """Return the scale of all updates, min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩)), and which are finite.

    ``lengths`` are lr²·⟨update, gradient⟩ of every weight, 0-dim; κ is None for no clip (Ba et al. 2017).
    """
    home = lengths[0].device
    stacked = torch.stack([length.to(home) for length in lengths])
    finite = torch.isfinite(stacked)
    total = torch.where(finite, stacked, 0).sum()
    scale = torch.ones_like(total)
    if kl_clip is not None:
        # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
        scale = torch.where(total > kl_clip, (kl_clip / total).sqrt(), scale)
    return scale, finite


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
