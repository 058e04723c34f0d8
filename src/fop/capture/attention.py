"""Seeing the projections inside `torch.nn.MultiheadAttention`, which calls no modules for them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fop.torch_internals import view_base

# What a projection saw: the weight it was given, its input, its output.
Seen = Callable[[Tensor, Tensor, Tensor], None]


def _without_own_dispatch(function: Any) -> Callable[..., Any]:
    """Return a copy of a torch function that runs under a function mode instead of handing itself to it.

    A mode sees `multi_head_attention_forward` as one call. Only the copy lets it see the calls inside.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_attention = _without_own_dispatch(F.multi_head_attention_forward)


class ProjectionMode(TorchFunctionMode):
    """Reports all linear projections of one attention module, whichever weight they use, while active."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.linear:
            x, weight = args[:2]
            self.seen(weight, x, output)
        return output


def rows_of(weight: Tensor, used: Tensor) -> slice | None:
    """Return which rows of ``weight`` the tensor ``used`` is, None if it is another tensor."""
    if used is weight:
        return slice(0, weight.shape[0])
    if view_base(used) is not weight or used.dim() != 2 or used.shape[1] != weight.shape[1]:
        return None
    first = (used.storage_offset() - weight.storage_offset()) // weight.stride(0)
    return slice(first, first + used.shape[0])
