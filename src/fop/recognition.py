"""Weights that are recognised by what is computed with them, in the first forward passes of a model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from fop.capture import Hook, Source, begin_watch, end_watch, parts_called, remove_all, source_of, watches
from fop.layers import FUNCTIONS, FunctionCall
from fop.torch_internals import (
    checkpointed_in,
    current_transform,
    has_compiled,
    leaves_of,
    outside,
    running_modules,
    runs_compiled,
    view_base,
)

# Takes a call of a function, the source of its weight, and the innermost module that runs; returns whether it
# is recorded.
Found: TypeAlias = Callable[[FunctionCall, Source, nn.Module], bool]

# Passes after which nobody looks for parameters without a gradient, until one has it; twice as many the next
# time, as it may come once in many passes.
_PASSES = 16
# Functions, beside those of `fop.layers`, that may use a parameter as a weight.
_PRODUCTS = {"einsum", "bmm", "baddbmm", "addbmm", "tensordot", "bilinear", "mv", "inner", "grouped_mm"}
_PRODUCTS |= {function.__name__.strip("_") for function in FUNCTIONS}
_UNSEEN = "no function that FOP knows was seen to use it"


class Recogniser:
    """Watches functions in the first forward passes of models, but of none that torch.compile would trace.

    Attributes:
        open: whether steps must be settled.
        waiting: the parameters that no module's class tells about, and the functions that have used them.
        found: what takes the calls; held weakly, as a `weakref.WeakMethod`.
    """

    def __init__(self) -> None:
        self.open = False
        self.waiting: dict[Tensor, set[str]] = {}
        self.found: Callable[[], Found | None] = lambda: None
        # Whether forward passes are watched.
        self._looking = False
        # Passes since it began to look, whether any was watched, and how many there are at most.
        self._passes, self._watched, self._limit = 0, False, _PASSES
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove_all, self._handles)

    def watch(self, root: nn.Module, params: Iterable[Tensor]) -> None:
        """Watch the coming forward passes of a model; ``params`` are those that no class tells about."""
        self.waiting |= {param: set() for param in params if param not in self.waiting}
        self._look()
        known = root in self._roots
        self._roots.add(root)
        for part in [] if known or isinstance(root, torch.jit.ScriptModule) else [root, *parts_called(root)]:
            before, after = Hook(self, Recogniser.enter), Hook(self, Recogniser.leave)
            self._handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(part.register_forward_hook(after, always_call=True))

    def _look(self) -> None:
        """Watch the coming passes."""
        self.open = self._looking = True
        self._passes, self._watched = 0, False

    def enter(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """Begin a call of a model or of one of its parts; return its arguments, to be used for it."""
        if torch.compiler.is_compiling() or not (self._looking and torch.is_grad_enabled()):
            return None
        if watches(self.sees) or current_transform() is not None or runs_compiled():
            return None
        self._passes += 1
        # torch.compile would trace the mode that watches.
        if has_compiled(module):
            return None
        self._watched = True
        return begin_watch(module, args, self.sees, self.passes), kwargs

    def leave(self, module: nn.Module, *_: Any) -> None:
        """End a call, which is watched if it was the first to begin."""
        end_watch(module, self.sees)

    def sees(self, call: FunctionCall) -> bool:
        """Take a call of a function; return whether it is recorded."""
        used, found, modules = call.given["weight"], self.found(), running_modules()
        if found is None or not modules or not (torch.is_grad_enabled() and isinstance(used, Tensor)):
            return False
        source, alone = None if used.is_complex() else source_of(used), checkpointed_in(modules[0])
        known = source is not None and not alone and not _computes_weight(call, modules)
        if source is not None and known and found(call, source, modules[0]):
            return True
        # The second matrix of a product may be an activation, and all of a model be leaves of that.
        leaves = leaves_of(used)[0] if call.name.startswith("F.") else []
        for function in [call.function, checkpoint][: 1 + alone]:
            self.passes(function, (used, *leaves))
        return False

    def passes(self, function: Any, args: tuple[Any, ...]) -> None:
        """Take a call of a function that is no layer."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        bases = [base for each in tensors if (base := view_base(each)) is not None]
        for each in self.waiting.keys() & {*tensors, *bases}:
            name = getattr(function, "__name__", "").strip("_")
            self.waiting[each] |= {name} - {"get", ""}

    def settle(self, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
        """Return at a step why parameters take AdamW; warn of those that may be weights."""
        used = [param for param in self.waiting if param.grad is not None]
        if used and not self._looking:
            self._limit *= 2
            self._look()
            return {}
        reasons: dict[Tensor, str] = {}
        for param in used:
            functions = self.waiting[param]
            if not self._watched:
                reasons[param] = "functions are not seen under torch.compile, nor outside its model's forward"
            else:
                reasons[param] = f"used by {', '.join(sorted(functions))}" if functions else _UNSEEN
        unseen = [param for param in used if not self.waiting[param] or self.waiting[param] & _PRODUCTS]
        warn_of_unseen({param: reasons[param] for param in unseen}, names)
        for param in reasons:
            del self.waiting[param]
        if self._passes and not self.waiting:
            self.close()
        elif self._passes >= (self._limit if any(param.requires_grad for param in self.waiting) else 1):
            self._looking = False
        return reasons

    def close(self) -> None:
        """Watch no longer."""
        self.open = self._looking = False
        self.waiting.clear()
        self._roots.clear()
        remove_all(self._handles)


def warn_of_unseen(reasons: Mapping[Tensor, str], names: Mapping[Tensor, str]) -> None:
    """Warn of parameters that AdamW trains, for these reasons, and that may be weights of layers."""
    if reasons:
        each = "; ".join(
            f"{names.get(param) or f'a parameter {tuple(param.shape)}'}: {why}"
            for param, why in reasons.items()
        )
        warnings.warn(
            f"AdamW trains parameters that may be weights of layers ({each}). FOP knows linear, convolution "
            "and embedding functions and matrix products; with path='adamw' in layer_options for their "
            "modules you are not warned",
            UserWarning,
            stacklevel=outside(),
        )


def _computes_weight(call: FunctionCall, modules: list[nn.Module]) -> bool:
    """Return whether a product is not of samples, but of two parameters, or in a parametrization."""
    x = call.given.get("input")
    base = view_base(x) if isinstance(x, Tensor) else None
    return isinstance(x if base is None else base, nn.Parameter) or any(
        isinstance(each, ParametrizationList) for each in modules
    )
