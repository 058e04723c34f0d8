"""What `torch.amp.GradScaler` did to the gradients before a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType

import torch
from torch import Tensor
from torch.optim import Optimizer

from fop.torch_internals import scale_of

# How many callers of a step are looked through for the scaler; wrappers and step hooks lie between.
_CALLERS = 16

# torch's protocol: in `GradScaler.step` an optimizer with ``_step_supports_amp_scaling`` has the attributes
# ``found_inf``, and ``grad_scale`` unless the user has called ``scaler.unscale_``.


def overflowed(optimizer: Optimizer) -> bool:
    """Return whether a scaler found infinite gradients; waits for the device, as torch does, too."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def unscale(optimizer: Optimizer, params: Iterable[Tensor]) -> Tensor | None:
    """Unscale p.grad in place if the scaler left that to the optimizer; return the loss scale, None for 1."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        inverse = scale.double().reciprocal().float()
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in (param.grad for param in params if param.grad is not None):
            by_device.setdefault(gradient.device, []).append(gradient)
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, inverse.to(device))
    elif getattr(optimizer, "found_inf", None) is not None:
        # Clipping may have come on top, so the gradients no longer tell the scale.
        scale = _scale_of_caller()
    return scale


def called_by_scaler() -> bool:
    """Return whether the function that calls this one was called by a `GradScaler`."""
    return isinstance(sys._getframe(2).f_locals.get("self"), torch.amp.GradScaler)


def _scale_of_caller() -> Tensor | None:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_CALLERS):
        if frame is None:
            break
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            return scale_of(scaler)
        frame = frame.f_back
    return None
