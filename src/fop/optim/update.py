"""How a parameter moves: momentum and decoupled weight decay, and AdamW for what is not preconditioned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fop.capture import local


class Move(NamedTuple):
    """What one block is about to do.

    Attributes:
        parts: its parameters (this rank's part of them), and the update of each in the same shape.
        length: 0-dim, lr²·⟨update, gradient⟩ over the whole block; not finite if update or gradient is not.
        used: 0-dim bool, false for a layer that no rank has used, which stays as it is; None for true.
    """

    parts: list[tuple[Tensor, Tensor]]
    length: Tensor
    used: Tensor | None = None


def apply_moves(
    moves: Sequence[Move],
    kl_clip: float | None,
    groups: Mapping[Tensor, Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
) -> tuple[Tensor, Tensor]:
    """Update the parameters of blocks; those whose update is not finite stay as they are.

    Args:
        moves: at least one.
        kl_clip: κ, None for no clip.
        groups: parameter group of every parameter.
        states: state of every parameter.

    Returns:
        The KL clip's factor, and for each block whether its update was finite.
    """
    home = moves[0].length.device
    lengths = torch.stack([move.length.to(home) for move in moves])
    finite = torch.isfinite(lengths)
    total = torch.where(finite, lengths, 0).sum()
    scale = torch.ones_like(total)
    if kl_clip is not None:
        # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
        scale = torch.where(total > kl_clip, (kl_clip / total).sqrt(), scale)
    for index, (parts, _, used) in enumerate(moves):
        moving = finite[index] if used is None else finite[index] & used.to(home)
        for param, part in parts:
            fine = moving.to(part.device)
            # Not a product: 0 times NaN is NaN.
            update = torch.where(fine, part * scale.to(part.device, part.dtype), 0)
            move(param, update, fine, groups[param], states[param])
    return scale, finite


def clip_moves(
    moves: Sequence[Move], squares: Sequence[Tensor], rest: Sequence[Tensor], max_norm: float
) -> list[Move]:
    """Scale the gradients of a step together, as `torch.nn.utils.clip_grad_norm_`, after its moves were made.

    Args:
        moves: an update grows as its gradient does, so these are scaled.
        squares: squared norm of the gradient behind each move.
        rest: all other gradients, scaled in place.
        max_norm: the norm that all together may have.

    Returns:
        The moves from the scaled gradients.
    """
    total = torch.stack([*squares, *(gradient.square().sum().to(squares[0]) for gradient in rest)]).sum()
    coefficient = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in rest:
        gradient.mul_(coefficient.to(gradient))
    return [
        Move([(p, part * coefficient.to(part)) for p, part in parts], length * coefficient**2, used)
        for parts, length, used in moves
    ]


def move(param: Tensor, part: Tensor, fine: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Decay the weights (decoupled), then move them with `torch.optim.SGD`'s momentum, if ``fine``.

    Args:
        param: the parameter, changed in place.
        part: its update, same shape; zeros where not ``fine``.
        fine: 0-dim bool on the parameter's device; if false, parameter and momentum stay as they are.
        group: its parameter group.
        state: its state; holds ``momentum_buffer``.
    """
    momentum = group["momentum"] * _carried(group)
    if group["momentum"]:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=part.dtype)
        buffer = local(state["momentum_buffer"])
        buffer.mul_(_if(fine, momentum, 1.0, part)).add_(part)
        part = torch.add(part, buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    rate = _if(fine, group["lr"], 0.0, part)
    param = local(param)
    if group["weight_decay"]:
        param.mul_((1 - rate * group["weight_decay"]).to(param.dtype))
    param.add_((part * rate).to(param.dtype), alpha=1.0 if group["maximize"] else -1.0)


def adamw_step(
    params: Sequence[Tensor],
    group: Mapping[str, Any],
    states: Mapping[Tensor, dict[str, Any]],
    agree: Callable[[Tensor], Tensor] = lambda refused: refused,
) -> Tensor:
    """Step parameters of one device and dtype by torch's AdamW; return whether the step was refused.

    A gradient that is not finite refuses the step of all of them; ``agree`` makes that of what other ranks
    found in their parts of the gradients, too.
    """
    device = params[0].device
    make_adamw_state(params, states)
    weights = [local(param) for param in params]
    gradients = [
        _laid_out_as(weight, local(param.grad))
        for param, weight in zip(params, weights, strict=True)
        if param.grad is not None
    ]
    # A shard may be empty: a parameter with fewer rows than there are ranks.
    found = [gradient.abs().amax() for gradient in gradients if gradient.numel()]
    refused = ~torch.isfinite(torch.stack(found)).all() if found else torch.zeros((), dtype=torch.bool)
    refused = agree(refused.to(device))
    # The fused kernel reads found_inf on the device and then leaves everything as it is; where torch has no
    # such kernel, and for slices of larger tensors, which it would walk through as if they were dense, the
    # flag must be read here.
    averages, squares = ([local(states[param][key]) for param in params] for key in ("exp_avg", "exp_avg_sq"))
    dense = all(m.stride() == weight.stride() for m, weight in zip(averages, weights, strict=True))
    fused = dense and device.type in ("cpu", "cuda")
    if not fused and bool(refused):
        return refused
    adamw(
        weights,
        gradients,
        averages,
        squares,
        [],
        [states[param]["step"] for param in params],
        fused=fused,
        found_inf=refused.float() if fused else None,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=_adamw_lr(group),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    return refused


def make_adamw_state(params: Iterable[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Make AdamW's state of the parameters that have none."""
    for param in params:
        if "exp_avg" not in states[param]:
            states[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for key in ("exp_avg", "exp_avg_sq"):
                states[param][key] = torch.zeros_like(param)


def _carried(group: Mapping[str, Any]) -> float:
    """Return the share of the momentum that a rise of the learning rate leaves.

    The KL clip bounded past updates at the rate of their time; a higher one (warm-up) must not carry them
    further than that.
    """
    if group["kl_clip"] is None or group["lr"] <= group["last_lr"]:
        return 1.0
    return float(group["last_lr"] / group["lr"])


def _laid_out_as(param: Tensor, gradient: Tensor) -> Tensor:
    # The fused kernel takes parameter and gradient for two runs of memory in the same order.
    if gradient.stride() == param.stride():
        return gradient
    return torch.empty_like(param).copy_(gradient)


def _if(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    # torch.where of two numbers would round them to float32; new_tensor would wait for the device.
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _adamw_lr(group: Mapping[str, Any]) -> float:
    """Return the AdamW path's learning rate, which follows the schedule of ``lr``."""
    if group["base_lr"] == 0:
        return group["adamw_lr"] if group["lr"] > 0 else 0.0
    return float(group["adamw_lr"] * group["lr"] / group["base_lr"])
