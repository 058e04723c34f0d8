"""How a parameter moves: momentum and decoupled weight decay, and AdamW for what is not preconditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fop.algebra import Direction
from fop.optim.block import Block


def apply_directions(
    blocks: Sequence[Block],
    directions: Sequence[Direction],
    groups: Mapping[Tensor, Mapping[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
) -> tuple[Tensor, Tensor]:
    """Update the weights of ``blocks``; those whose direction is not finite stay as they are.

    Args:
        blocks: at least one block.
        directions: the direction of each.
        groups: parameter group of every parameter.
        states: state of every parameter.

    Returns:
        The KL clip's factor, and for each block whether its direction was finite.
    """
    home = directions[0].alignment.device
    lengths = torch.stack(
        [b.squared_length(d, groups).to(home) for b, d in zip(blocks, directions, strict=True)]
    )
    finite = torch.isfinite(lengths)
    total = torch.where(finite, lengths, 0).sum()
    kl_clip = groups[blocks[0].weight]["kl_clip"]
    scale = torch.ones_like(total)
    if kl_clip is not None:
        # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
        scale = torch.where(total > kl_clip, (kl_clip / total).sqrt(), scale)
    for index, (block, direction) in enumerate(zip(blocks, directions, strict=True)):
        update, device = direction.update, direction.update.device
        fine = finite[index].to(device)
        # Not a product: 0 times NaN is NaN.
        update = torch.where(fine, update * scale.to(device, update.dtype), 0)
        for param, part in block.parts(update):
            move(param, part, fine, groups[param], states[param])
    return scale, finite


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
            state["momentum_buffer"] = part.clone()
        else:
            state["momentum_buffer"].mul_(_if(fine, momentum, 1.0, part)).add_(part)
        buffer: Tensor = state["momentum_buffer"]
        part = torch.add(part, buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    rate = _if(fine, group["lr"], 0.0, part)
    if group["weight_decay"]:
        param.mul_((1 - rate * group["weight_decay"]).to(param.dtype))
    param.add_((part * rate).to(param.dtype), alpha=1.0 if group["maximize"] else -1.0)


def adamw_step(
    params: Sequence[Tensor], group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]
) -> Tensor:
    """Step parameters of one device and dtype by torch's AdamW; return whether the step was refused.

    A gradient that is not finite refuses the step of all of them.
    """
    device = params[0].device
    for param in params:
        if "exp_avg" not in states[param]:
            states[param]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in ("exp_avg", "exp_avg_sq"):
                states[param][key] = torch.zeros_like(param)
    gradients = [_laid_out_as(param, param.grad) for param in params if param.grad is not None]
    refused = ~torch.isfinite(torch.stack([gradient.abs().amax() for gradient in gradients])).all()
    # The fused kernel reads found_inf on the device and then leaves everything as it is; where torch has no
    # such kernel, and for slices of larger tensors, which it would walk through as if they were dense, the
    # flag must be read here.
    dense = all(states[param]["exp_avg"].stride() == param.stride() for param in params)
    fused = dense and device.type in ("cpu", "cuda")
    if not fused and bool(refused):
        return refused
    adamw(
        list(params),
        gradients,
        [states[param]["exp_avg"] for param in params],
        [states[param]["exp_avg_sq"] for param in params],
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
