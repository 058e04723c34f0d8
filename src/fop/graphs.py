"""Steps in a CUDA graph: rates that a captured step reads from the device, and what a graph cannot follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def capturing() -> bool:
    """Return whether this thread's work is being captured in a CUDA graph."""
    started = torch.backends.cuda.is_built() and torch.cuda.is_initialized()
    return started and torch.cuda.is_current_stream_capturing()


class Rates:
    """The learning rate of every parameter group on the device, ``held`` at the same place in all steps."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def fill(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take the rates of now, unless this would be captured, and done again by every replay."""
        params = [param for group in groups for param in group["params"]]
        devices = {param.device for param in params}
        if len(devices) > 1:
            raise ValueError(
                f"capturable=True, and the parameters are on {', '.join(sorted(map(str, devices)))}; a graph "
                "is of one device: put them all on one, or leave capturable out"
            )
        wide = any(param.dtype in (torch.float64, torch.complex128) for param in params)
        like = torch.empty(
            (), dtype=torch.float64 if wide else torch.float32, device=next(iter(devices), None)
        )
        fits = len(self.held) == len(groups) and all(
            (held.device, held.dtype) == (like.device, like.dtype) for held in self.held
        )
        if capturing():
            if not fits:
                raise RuntimeError(
                    "parameters are new, or have moved: take one step that is not captured before the capture"
                )
            return
        if not fits:
            self.held = [torch.empty_like(like) for _ in groups]
        for held, group in zip(self.held, groups, strict=True):
            held.fill_(group["lr"])

    def of(self, groups: Sequence[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return the group of every parameter, with the rate on the device as its ``lr``."""
        self.fill(groups)
        own = [{**group, "lr": rate} for group, rate in zip(groups, self.held, strict=True)]
        return {param: group for group in own for param in group["params"]}


class Captured:
    """What a captured step reads and cannot follow; holding it keeps its memory as long as the graph may run.

    ``options`` are those of every group, ``states`` the optimizer's, ``tensors`` what it reads beside them,
    and ``params`` the parameters.
    """

    def __init__(
        self,
        options: list[Any],
        states: Mapping[Tensor, Mapping[str, Any]],
        tensors: Iterable[Tensor],
        params: Iterable[Tensor],
    ) -> None:
        self._options = options
        of_states = [v for state in states.values() for v in state.values() if isinstance(v, Tensor)]
        self._tensors = [*of_states, *tensors]
        # The memory of a parameter may be another while it is the same object.
        self._trained = [(p, (p.requires_grad, p.data_ptr(), p.device, p.dtype)) for p in params]

    def differs(self, other: Captured) -> str:
        """Return what is another in ``other``, and "" if nothing is."""
        if len(self._trained) != len(other._trained) or any(
            one is not two or before != now
            for (one, before), (two, now) in zip(self._trained, other._trained, strict=True)
        ):
            return "parameters (trained, frozen, moved or replaced)"
        if len(self._tensors) != len(other._tensors) or any(
            one is not two for one, two in zip(self._tensors, other._tensors, strict=True)
        ):
            return "the optimizer's state (loaded, moved or new)"
        return "" if self._options == other._options else "options in param_groups"


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


def check_capture(params: Sequence[Tensor], *, capturable: bool, due: bool, scaled: bool) -> None:
    """Raise RuntimeError where a step is being captured that cannot be."""
    if not capturable:
        raise RuntimeError("a step is captured in a CUDA graph; make the optimizer with capturable=True")
    if scaled:
        raise RuntimeError(
            "a step with a GradScaler cannot be captured: whether it is skipped is decided on the host; "
            "use bfloat16, which needs no scaler"
        )
    if any(param.is_complex() for param in params):
        raise RuntimeError(
            "a step with complex parameters cannot be captured: their AdamW reads a flag on the host; leave "
            "them out, or capture no steps"
        )
    if due:
        raise RuntimeError(
            "this step renews the curvature, which no CUDA graph can hold: capture one in which "
            "optimizer.curvature_due is False, with a curvature_interval above 1"
        )
