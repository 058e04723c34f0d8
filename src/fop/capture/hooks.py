"""Hooks on modules, outputs and parameters, in eager mode and under torch.compile."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.attention import ProjectionMode, rows_of
from fop.capture.batch import Attention, Batch, ModelWatch
from fop.capture.compiled import key_of, tap
from fop.capture.lifetime import InertCopy, in_place
from fop.capture.sharded import is_sharded, stands_for
from fop.layers import Layer, PackedLayer

if TYPE_CHECKING:
    from fop.capture.layer import LayerCapture


def watch_output(capture: LayerCapture, layer: Layer, x: Tensor, output: Tensor, batch: Batch) -> None:
    """Call ``capture.collect`` when the gradient of ``output`` comes; x is kept as autograd keeps its own."""
    # An in-place operation on a view (3-d inputs of Linear, unbatched convolutions) would cut the view, and a
    # hook on it, out of the graph.
    base = output._base
    source = base if base is not None and base.numel() == output.numel() else output
    node, index, hook = source.grad_fn, source.output_nr, _OutputHook(capture, layer, x, batch, output.shape)
    assert node is not None
    # On the node and not on the tensor: after hooks of the user's that change the gradient.
    node.register_prehook(lambda gradients: hook(gradients[index]))


class _Keep(torch.autograd.Function):
    """Holds a tensor where checkpointing and offloading find it, and where changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError("nothing is computed from it")


class _OutputHook:
    """Hook on an output's node: holds the input until the gradient of the output comes, as autograd does."""

    def __init__(
        self, capture: LayerCapture, layer: Layer, x: Tensor, batch: Batch, shape: torch.Size
    ) -> None:
        self._capture = weakref.ref(capture)
        self._layer = layer
        self._kept: Any = _Keep.apply(torch.empty(0, requires_grad=True), x).grad_fn  # type: ignore[no-untyped-call]
        self._shape = shape
        self._batch = batch
        self._outer = torch._C._current_graph_task_id()

    def __call__(self, b: Tensor | None) -> None:
        capture, kept = self._capture(), self._kept
        if not _graph_is_kept():
            self._kept = None
        if capture is not None and capture.wants and b is not None and not _is_batched(b):
            x = _unpacked(kept)
            capture.collect(self._layer, x, b.reshape(self._shape), self._batch, self._outer)


def _unpacked(kept: Any) -> Tensor | None:
    if kept is None:
        return None
    try:
        return kept.saved_tensors[0]  # type: ignore[no-any-return]
    except RuntimeError as error:
        # Legal where autograd kept a copy of its own, as under autocast.
        if "modified by an inplace operation" in str(error):
            return None
        raise


def _graph_is_kept() -> bool:
    """Tell whether the running backward pass was called with retain_graph=True."""
    # Private, and absent from some versions; without it a second pass through the graph has no pair.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else False


def _is_batched(b: Tensor) -> bool:
    """Tell whether several backward passes run as one (vectorized Jacobians); none of them reaches p.grad."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(b) or functorch.is_legacy_batchedtensor(b)


def _transformed() -> bool:
    """Tell whether a transformation of torch.func is running, whose tensors stand for others."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _exporting() -> bool:
    """Tell whether torch.export is tracing; an exported program is to have no operators of ours."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return bool(ask()) if ask is not None else False


class AccumulatedHook:
    """Hook on a parameter: its gradient of this backward pass is complete."""

    def __init__(self, capture: LayerCapture) -> None:
        self._capture = weakref.ref(capture)

    def __call__(self, param: Tensor) -> None:
        if (capture := self._capture()) is not None:
            capture.accumulated(param)


class UseHook(ABC):
    """One module that uses a weight.

    Args:
        capture: capture of the weight.
        layer: how this module sees the weight.
        module: the module.
        weight: the module's name for the weight, dotted where a submodule owns it.
        bias: likewise for the bias, None if it has none.
        watch: hooks on the model that the module belongs to.
    """

    def __init__(
        self,
        capture: LayerCapture,
        layer: Layer,
        module: nn.Module,
        weight: str,
        bias: str | None,
        watch: ModelWatch,
    ) -> None:
        self.capture = weakref.ref(capture)
        self.layer = layer
        self.module = weakref.ref(module)
        self.watch = watch
        self._weight = weight
        self._bias = bias
        self._handles: list[RemovableHandle] = []

    def register(self) -> list[RemovableHandle]:
        """Put the hooks on the module."""
        module = self.module()
        assert module is not None
        self._handles = self._register(module)
        return self._handles

    @abstractmethod
    def _register(self, module: nn.Module) -> list[RemovableHandle]: ...

    def intact(self, weight: Tensor) -> bool:
        """Whether the module is alive, still has the weight under its name, and has the hooks."""
        module = self.module()
        return module is not None and self.uses(weight, module) and all(map(in_place, self._handles))

    def uses(self, weight: Tensor, module: nn.Module) -> bool:
        """Whether the module has the weight under its name, or what FSDP put there while it runs."""
        return stands_for(parameter_of(module, self._weight), weight)

    def follow_shards(self, capture: LayerCapture, module: nn.Module) -> None:
        """Let the capture watch the whole tensors that FSDP puts in the place of its shards."""
        if is_sharded(capture.weight):
            names = (self._weight, self._bias)
            whole = (None if name is None else parameter_of(module, name) for name in names)
            pairs = zip(whole, capture.params, strict=False)
            capture.stand_in({now: param for now, param in pairs if now is not None})


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter by its dotted name, without computing anything that is parametrized."""
    *path, last = name.split(".")
    owner: nn.Module | None = module
    for part in path:
        owner = owner._modules.get(part) if owner is not None else None
    return None if owner is None else owner._parameters.get(last)


class ForwardUse(UseHook):
    """A module whose own input and output are the weight's."""

    def _register(self, module: nn.Module) -> list[RemovableHandle]:
        self.key = key_of(module, self._weight, self)
        # Before the hooks of others: one that replaces the output must not come between it and its gradient.
        return [module.register_forward_hook(_ForwardHook(self), with_kwargs=True, prepend=True)]

    def forward(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Watch one call of the module; under torch.compile the output goes through an operator of ours."""
        if torch.compiler.is_compiling():
            if not (torch.is_grad_enabled() and output.requires_grad) or _exporting():
                return None
            copied: Tensor = tap(self.layer.observed(module, x), output, self.key, self.watch.traced_size())
            return copied
        capture = None if _transformed() else self.capture()
        # A shallow copy or a replica of the module shares the hook, but is not the module.
        if capture is not None and self.module() is module and self.uses(capture.weight, module):
            self.follow_shards(capture, module)
            capture.observe(self.layer, self.layer.observed(module, x), output, self.watch.batch())
        return None

    def compiled(self, x: Tensor, b: Tensor, batch: Batch) -> None:
        """Take the gradient of an output that went through `tap`."""
        capture = self.capture()
        if capture is not None and capture.wants:
            capture.collect(self.layer, x, b, batch)


class AttentionUse(UseHook):
    """A `MultiheadAttention`, which uses its weights in functions."""

    def _register(self, module: nn.Module) -> list[RemovableHandle]:
        # torch keeps function modes for each thread.
        self._local = threading.local()
        return [
            module.register_forward_pre_hook(_EnterAttention(self), with_kwargs=True),
            module.register_forward_hook(_LeaveAttention(self), always_call=True),
        ]

    def enter(self, module: nn.MultiheadAttention, query: Tensor) -> None:
        """Begin to see the module's projections."""
        # A compiled attention is one graph, in which nobody can look for the weight.
        if torch.compiler.is_compiling() or _transformed():
            return
        capture = self.capture()
        if capture is None or self.module() is not module or self._mode is not None:
            return
        # Not without the hook that ends it, if somebody has cleared hooks.
        if torch.is_grad_enabled() and in_place(self._handles[1]):
            self.follow_shards(capture, module)
            self._local.batch = Attention(module, query, self.watch.batch())
            self._local.mode = mode = ProjectionMode(self._seen)
            mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """End it."""
        if (mode := self._mode) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._local.mode = None

    @property
    def _mode(self) -> ProjectionMode | None:
        return getattr(self._local, "mode", None)

    def _seen(self, used: Tensor, x: Tensor, output: Tensor) -> None:
        capture, module = self.capture(), self.module()
        weight = None if module is None else parameter_of(module, self._weight)
        if capture is None or weight is None or (rows := rows_of(weight, used)) is None:
            return
        layer = self.layer.uses(rows) if isinstance(self.layer, PackedLayer) else self.layer
        if capture.ready_for(output):
            watch_output(capture, layer, x.detach(), output, self._local.batch)


class _ForwardHook(InertCopy[ForwardUse]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        use, output = self.target(), rest[-1]
        # Without keyword arguments where quantisation has put it back; a hook may have replaced the output.
        kwargs = rest[0] if len(rest) > 1 else {}
        x = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if use is None or x is None or not isinstance(output, Tensor):
            return None
        return use.forward(module, x, output)


class _EnterAttention(InertCopy[AttentionUse]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (use := self.target()) is not None:
            assert isinstance(module, nn.MultiheadAttention)
            use.enter(module, args[0] if args else kwargs["query"])


class _LeaveAttention(InertCopy[AttentionUse]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if (use := self.target()) is not None:
            use.leave()
