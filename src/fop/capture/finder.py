"""Finding the modules that own bare parameters, at the first forward pass."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from itertools import islice
from traceback import walk_stack
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fop.torch_internals import current_trace, is_exporting

Entered: TypeAlias = tuple[Any, Any] | None
Seen: TypeAlias = Callable[[nn.Module, Any, Mapping[str, Any]], Entered]


class FirstForwardHook:
    """A global forward hook that shows every root module once, until ``remove`` is called.

    ``seen``, a bound method held by weak reference, is called with each module and its arguments; it may
    return others. ``used`` says whether any module was called.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = weakref.WeakMethod(seen)
        self.used = False
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handle = register_module_forward_pre_hook(self._before)

    # ``kwargs`` if the module comes from another process, with a hook of this number that took them.
    def _before(self, module: nn.Module, args: tuple[Any, ...], *kwargs: Mapping[str, Any]) -> Any:
        # Whoever records or exports a model wants nothing else in it, and may run it with other parameters.
        if not is_exporting() and current_trace() is None:
            return self._show(module, args, *kwargs)
        return None

    # A look at a whole model is nothing to trace; the next call of the model is compiled without it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _show(self, module: nn.Module, args: tuple[Any, ...], *kwargs: Mapping[str, Any]) -> Any:
        seen = self._seen()
        if seen is None:
            self.remove()
        elif module not in self._known:
            self.used = True
            if not all(isinstance(param, nn.Parameter) for param in module.parameters()):
                # torch.func runs it with other tensors in the place of its parameters.
                return None
            # Its children's own forward passes, which follow, need no look of their own.
            self._known.update(module.modules())
            entered = seen(module, args, kwargs[0] if kwargs else _keywords(module))
            return entered if entered is None or kwargs else entered[0]
        return None

    def remove(self) -> None:
        """Take the global hook away."""
        self._handle.remove()


def _keywords(module: nn.Module) -> Mapping[str, Any]:
    """Return the keyword arguments of the running call of ``module``, which such hooks are not given."""
    for frame, _ in islice(walk_stack(sys._getframe(1)), 9):
        given = frame.f_locals.get("kwargs")
        if frame.f_locals.get("self") is module and isinstance(given, Mapping):
            return given
    return {}
