"""Steps in a CUDA graph: learning rates that a captured step reads from the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def capturing() -> bool:
    """Return whether this thread's work is being captured in a CUDA graph."""
    started = torch.backends.cuda.is_built() and torch.cuda.is_initialized()
    return started and torch.cuda.is_current_stream_capturing()


class Rates:
    """The learning rate of every parameter group on the device, at the same place in all steps."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def fill(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take the rates of now, unless this would be captured, and done again by every replay."""
        if capturing():
            return
        devices = {str(param.device) for group in groups for param in group["params"]}
        if len(devices) > 1:
            raise ValueError(
                f"capturable=True, and the parameters are on {', '.join(sorted(devices))}; a graph is of one "
                "device: put them all on one, or leave capturable out"
            )
        for index, group in enumerate(groups):
            device = group["params"][0].device
            dtype = reduce(torch.promote_types, (param.dtype for param in group["params"]), torch.float32)
            if index == len(self._held):
                self._held.append(torch.empty((), dtype=dtype, device=device))
            elif (self._held[index].device, self._held[index].dtype) != (device, dtype):
                self._held[index] = torch.empty((), dtype=dtype, device=device)
            self._held[index].fill_(group["lr"])

    def of(self, groups: Sequence[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return the group of every parameter, with the rate on the device as its ``lr``."""
        self.fill(groups)
        own = [{**group, "lr": rate} for group, rate in zip(groups, self._held, strict=True)]
        return {param: group for group in own for param in group["params"]}


def check_capturable(options: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for options with which no step can be captured."""
    if options.get("step_length", "weight") != "weight":
        raise ValueError(
            f"capturable=True, and {place} has step_length={options['step_length']!r}, whose clip and "
            "momentum follow the learning rate on the host; use 'weight', or leave capturable out"
        )
    if options.get("inverse_delay"):
        raise ValueError(
            f"capturable=True, and {place} has inverse_delay={options['inverse_delay']}: inverses of another "
            "thread would come while a graph reads them; use inverse_delay=0, or leave capturable out"
        )


def check_capture(*, capturable: bool, due: bool) -> None:
    """Raise RuntimeError where a step is being captured that cannot be."""
    if not capturing():
        return
    if not capturable:
        raise RuntimeError("a step is captured in a CUDA graph; make the optimizer with capturable=True")
    if due:
        raise RuntimeError(
            "this step renews the curvature, which no CUDA graph can hold: capture one in which "
            "optimizer.curvature_due is False, with a curvature_interval above 1"
        )
