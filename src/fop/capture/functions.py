"""Seeing functions that use a weight while a module runs: products, convolutions, embeddings."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fop.correction import ratio
from fop.layers import FUNCTIONS, FactorSums, FunctionCall, Layer, RowSampler, function_call
from fop.layers.blocks import in_blocks
from fop.torch_internals import leaf_of, running_modules, top_function_mode, view_base

# Takes a call of a function; returns whether it was of a weight of its own.
Sees = Callable[[FunctionCall], bool]
# Takes a function that is none of `FUNCTIONS`, and its arguments.
Passes = Callable[[Any, tuple[Any, ...]], None]


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


class _Mode(TorchFunctionMode):
    """Shows function calls to those who watch in its thread, the latest first, until one takes the call."""

    def __init__(self, watchers: list[_Watcher]) -> None:
        super().__init__()
        self.watchers = watchers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in FUNCTIONS:
            call = function_call(func, args, kwargs, output)
            any(watcher.sees(call) for watcher in reversed(self.watchers))
        elif _has_gradient(output):
            for watcher in self.watchers:
                if watcher.passes is not None:
                    watcher.passes(func, args)
        return output


def _has_gradient(output: Any) -> bool:
    if isinstance(output, tuple | list):
        return any(map(_has_gradient, output))
    return isinstance(output, Tensor) and output.requires_grad


class _Watcher(NamedTuple):
    """Somebody who watches functions while a module runs; ``passes`` is shown the other functions, too."""

    module: nn.Module
    sees: Sees
    passes: Passes | None


class _Thread(threading.local):
    """Who watches in one thread; function modes are by thread, too."""

    def __init__(self) -> None:
        self.watchers: list[_Watcher] = []
        self.mode: _Mode | None = None


_thread = _Thread()


class _Arguments(tuple[Any, ...]):
    """Arguments of a call of a module, which its frame holds for as long as it runs, however it ends.

    A named tuple without names: torch (hooks on backward passes, pytree) and others make arguments like given
    ones by ``type(args)(*values)``, but for plain tuples.
    """

    ends: list[_End]
    _fields: tuple[str, ...] = ()

    def __new__(cls, *values: Any) -> _Arguments:
        return super().__new__(cls, values)

    @classmethod
    def _make(cls, values: Iterable[Any]) -> _Arguments:
        return cls(*values)

    def _asdict(self) -> dict[str, Any]:
        return {}


class _End:
    """Ends a watch with the frame of the call, where no hook does: after KeyboardInterrupt, for instance."""

    def __init__(self, watcher: _Watcher) -> None:
        self.watcher = watcher

    def __del__(self) -> None:
        # Another hook may have replaced the arguments of a call that still runs.
        if self.watcher in _thread.watchers and self.watcher.module not in running_modules():
            end_watch(self.watcher.module, self.watcher.sees)


def begin_watch(
    module: nn.Module, args: tuple[Any, ...], sees: Sees, passes: Passes | None = None
) -> tuple[Any, ...]:
    """Show ``sees`` the functions that run in a call of a module; return its arguments, to be used for it."""
    watcher = _Watcher(module, sees, passes)
    # Who knows what a module does with a weight comes before who wants to find out.
    _thread.watchers.insert(0 if passes else len(_thread.watchers), watcher)
    if _thread.mode is None:
        _thread.mode = _Mode(_thread.watchers)
        _thread.mode.__enter__()  # type: ignore[no-untyped-call]
    arguments = _Arguments(*args)
    arguments.ends = [*getattr(args, "ends", ()), _End(watcher)]
    return arguments


def watches(sees: Sees) -> bool:
    """Return whether a watch has begun in this thread that has not ended."""
    return any(watcher.sees == sees for watcher in _thread.watchers)


def end_watch(module: nn.Module, sees: Sees) -> None:
    """End the latest watch that has begun in this thread in a call of a module for ``sees``, if any."""
    for index in reversed(range(len(_thread.watchers))):
        if _thread.watchers[index].module is module and _thread.watchers[index].sees == sees:
            del _thread.watchers[index]
            break
    mode = _thread.mode
    if mode is not None and not _thread.watchers and top_function_mode() is mode:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _thread.mode = None


class Source(NamedTuple):
    """Where a weight that a function was given comes from.

    Attributes:
        leaf: the parameter.
        turned: whether the function was given its transpose.
        computed: whether it was given something computed from it, of the same shape, and not a copy.
    """

    leaf: Tensor
    turned: bool = False
    computed: bool = False


def source_of(used: Any) -> Source | None:
    """Return the source of a weight that a function was given; None if there is no single one."""
    if not isinstance(used, Tensor):
        return None
    if used.is_leaf:
        return Source(used)
    base = view_base(used)
    if base is not None and base.is_leaf and used.dim() == 2 and used.stride() == base.stride()[::-1]:
        return Source(base, turned=True) if used.shape == base.shape[::-1] else None
    found = leaf_of(used)
    return None if found is None else Source(found[0], computed=found[1])


def rows_of(weight: Tensor, used: Tensor) -> slice | None:
    """Return which rows of ``weight`` the tensor ``used`` is, None if it is another tensor."""
    if used is weight:
        return slice(0, weight.shape[0])
    if view_base(used) is not weight or used.dim() != 2 or used.shape[1] != weight.shape[1]:
        return None
    first = (used.storage_offset() - weight.storage_offset()) // weight.stride(0)
    return slice(first, first + used.shape[0])


class ComputedLayer:
    """A layer whose function was given f(weight): what `Layer` says of f(weight), said of the weight.

    Gradients go through the derivative of f. Rows of G are scaled by how long it makes each row of a
    gradient: exact if f scales the rows, as weight normalisation nearly does.
    """

    def __init__(self, layer: Layer, used: Tensor, weight: Tensor) -> None:
        self._layer, self._used, self._weight = layer, used, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the gradient matrix of these samples, of the weight."""
        return self._of_weight(self._layer.gradient(x, b))

    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        """Return the Kronecker statistics of these samples, of the weight."""
        sums, gradient = self._layer.factor_sums(x, b, sampler), self._layer.gradient(x, b)
        lengths = [torch.linalg.vector_norm(each, dim=2) for each in (gradient, self._of_weight(gradient))]
        scale = ratio(lengths[1], lengths[0], otherwise=1.0).to(sums.a.dtype)
        assert sums.g is not None
        scale = in_blocks(scale, len(sums.g) // len(scale), sums.g.shape[-1])
        both = scale.square() if sums.g.dim() == 2 else scale[:, None] * scale[..., None]
        return FactorSums(sums.a, sums.g * both, sums.samples, sums.rows)

    def _of_weight(self, matrix: Tensor) -> Tensor:
        gradient = self._layer.weight_from_matrix(matrix, self._used.shape).to(self._used.dtype)
        # The running backward pass has not come to f yet, and needs what f has saved.
        (result,) = torch.autograd.grad(self._used, self._weight, gradient, retain_graph=True)
        return self._layer.to_matrix(result, None)
