"""AdamW for the parameters that take no FOP step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fop.capture import local
from fop.step_size import INITIAL_SIZE, adamw_rate


def adamw_step(
    params: Sequence[Tensor],
    group: Mapping[str, Any],
    states: Mapping[Tensor, dict[str, Any]],
    agree: Callable[[Tensor], Tensor],
) -> Tensor:
    """Step parameters of one device and dtype by torch's AdamW; return whether the step was refused.

    A gradient that is not finite refuses the step of all of them; ``agree`` makes that of what other ranks
    found in their parts of the gradients, too.
    """
    device = params[0].device
    make_adamw_state(params, group, states)
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
    # such kernel (complex parameters, other devices), and for slices of larger tensors, which it would walk
    # through as if they were dense, the flag must be read here.
    averages, squares = ([local(states[param][key]) for param in params] for key in ("exp_avg", "exp_avg_sq"))
    dense = all(m.stride() == weight.stride() for m, weight in zip(averages, weights, strict=True))
    fused = dense and device.type in ("cpu", "cuda") and not params[0].is_complex()
    if not fused and bool(refused):
        return refused
    steps = [states[param]["step"] for param in params]
    # A rate on the device is then one tensor for all parameters of one size.
    rate_of = functools.cache(functools.partial(adamw_rate, group))
    by_rate: dict[float | Tensor, list[int]] = {}
    for n, param in enumerate(params):
        by_rate.setdefault(rate_of(states[param].get(INITIAL_SIZE, 0.0)), []).append(n)
    for rate, alike in by_rate.items():
        # CUDA's kernel reads a float32.
        rate = rate.float() if isinstance(rate, Tensor) and rate.is_cuda else rate
        adamw(
            [weights[n] for n in alike],
            [gradients[n] for n in alike],
            [averages[n] for n in alike],
            [squares[n] for n in alike],
            [],
            [steps[n] for n in alike],
            fused=fused,
            found_inf=refused.float() if fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            # A square of float16 is 0 from 2e-4 down, and its root no measure of the gradient.
            eps=max(group["eps"], 1e-8) if params[0].dtype is torch.float16 else group["eps"],
            maximize=group["maximize"],
        )
    return refused


def make_adamw_state(
    params: Sequence[Tensor], group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Make AdamW's state of the parameters of a group that have none."""
    for param in params:
        state = states[param]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(param)
        # (channels, 1, 1) is no matrix but a scale of each channel, which may begin near 0.
        matrix = sum(side > 1 for side in param.shape) > 1
        if group["step_length"] == "weight" and matrix and INITIAL_SIZE not in state:
            entries = param.detach().abs()
            total = entries.to(torch.promote_types(entries.dtype, torch.float32)).square().sum()
            # Of all ranks, where the parameter is sharded.
            total = total.full_tensor() if hasattr(total, "full_tensor") else total
            size = math.sqrt(float(total) / max(1, param.numel()))
            state[INITIAL_SIZE] = size if math.isfinite(size) else 0.0


def _laid_out_as(param: Tensor, gradient: Tensor) -> Tensor:
    # The fused kernel takes parameter and gradient for two runs of memory in the same order.
    if gradient.stride() == param.stride():
        return gradient
    return torch.empty_like(param).copy_(gradient)
