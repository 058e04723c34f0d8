"""Hooks that live no longer than the optimizer, and that do nothing in copies of a model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.hooks import RemovableHandle

Target = TypeVar("Target")


class InertCopy(Generic[Target]):
    """Base of hooks on modules: knows its target by weak reference, and a copy of it does nothing.

    Args:
        target: what the hook feeds.
    """

    def __init__(self, target: Target) -> None:
        self.target: Callable[[], Target | None] = weakref.ref(target)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing()

    def __reduce__(self) -> tuple[Any, ...]:
        # Without a name of this library: a pickled model is loaded where it is not installed, too.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _nothing() -> Callable[..., None]:
    """Return a callable that takes anything, returns None, and can be pickled."""
    return contextlib.nullcontext().__exit__


def in_place(handle: RemovableHandle) -> bool:
    """Tell whether a hook is where it was put."""
    return handle.id in (handle.hooks_dict_ref() or ())


def remove_all(handles: Sequence[RemovableHandle]) -> None:
    """Remove hooks, when their owner is gone."""
    for handle in handles:
        handle.remove()
