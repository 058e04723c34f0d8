"""Capture of one layer: from hooks on its module and its weight to a `Window`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.window import Part, Window
from fop.layers import Layer


class LayerCapture:
    """Watches one module; between two optimizer steps its ``window`` holds what backward passes gathered.

    Args:
        module: the live module.
        layer: its geometry.
        weight: the module's weight.
        bias: the module's bias, if it belongs to the same block.

    Attributes:
        paired: whether the gradient pair is wanted (FOP) or only statistics (K-FAC).
        due: whether statistics are wanted of the coming backward pass.

    The hooks know the capture by weak reference only: dropping the optimizer drops the capture.
    """

    def __init__(self, module: nn.Module, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        self.module = module
        self.layer = layer
        self.weight = weight
        self.params = [weight] if bias is None else [weight, bias]
        self.paired = True
        self.due = True
        self.window = Window()
        self._parts: dict[int, Part] = {}
        # Version of p.grad when the window last took it in; None while the window is empty.
        self._version: int | None = None
        # Before the hooks of others: one that replaces the output must not come between it and its gradient.
        hook = module.register_forward_hook(_ForwardHook(self), with_kwargs=True, prepend=True)
        self._handles: list[RemovableHandle] = [hook]
        self._watched: set[Tensor] = set()
        weakref.finalize(self, _remove_all, self._handles)

    def clear(self) -> None:
        """Forget what was gathered: the gradients were zeroed, or a step has used it."""
        self.window = Window()
        self._parts.clear()
        self._version = None

    def observe(self, x: Tensor, output: Tensor) -> None:
        """Arrange that the gradient of ``output`` meets ``x`` in the backward pass."""
        if not (self.paired or self.due):
            return
        if not (torch.is_grad_enabled() and output.requires_grad and self.weight.requires_grad):
            return
        for param in self.params:
            # A frozen parameter takes no hook; it may be thawed later.
            if param.requires_grad and param not in self._watched:
                self._handles.append(param.register_post_accumulate_grad_hook(_AccumulatedHook(self)))
                self._watched.add(param)
        # An in-place operation on a view (3-d inputs of Linear, unbatched ones of Conv2d) would cut the view,
        # and a hook on it, out of the graph.
        base = output._base
        source = base if base is not None and base.numel() == output.numel() else output
        source.register_hook(_OutputHook(self, x.detach(), output.shape))

    @torch.no_grad()
    def collect(self, x: Tensor | None, b: Tensor) -> None:
        """Take one use of the layer out of a running backward pass."""
        task = torch._C._current_graph_task_id()
        if task not in self._parts:
            # Leftovers of passes that never reached the weight, as torch.autograd.grad for its inputs.
            self._parts.clear()
            self._open_window()
        with torch.autocast(b.device.type, enabled=False):
            part = Part(0, splittable=False) if x is None else self._part(*self.layer.batched(x, b))
        if task in self._parts:
            self._parts[task].add_use(part)
        else:
            self._parts[task] = part

    @torch.no_grad()
    def accumulated(self, param: Tensor) -> None:
        """Move the finished backward pass into the window: it is in p.grad now."""
        if param.grad is None:
            return
        if param is self.weight:
            part = self._parts.pop(torch._C._current_graph_task_id(), None)
            if part is None:
                # The weight got a gradient by a path that no hook saw, e.g. used through a function.
                self.window.drop_pair()
            else:
                self.window.add(part)
                self.window.compare(param.grad)
            self._version = param.grad._version
        if self.paired:
            self.window.remember(param, param.grad)

    def difference(self, average: Tensor, complete: Tensor | None = None) -> Tensor | None:
        """Return Gd = g1 - g2 as gradient matrix, or None if this step has no pair.

        Args:
            average: Ga, the gradient matrix of p.grad.
            complete: 0-dim bool, whether p.grad is known to be all that the hooks see; None if not known.
        """
        difference = self.window.difference(average, self.params, complete)
        if difference is not None and self.layer.bias and self.params[-1].grad is None:
            # A frozen bias has no second gradient either.
            difference[..., -1] = 0
        return difference

    def _part(self, x: Tensor, b: Tensor) -> Part:
        part = Part(samples := x.shape[0], precise=torch.finfo(b.dtype).bits > 16)
        first = samples // 2
        if self.paired and first > 0:
            part.half = self.layer.gradient(x[:first], b[:first])
        if self.due and x.numel() and b.numel():
            part.sums = self.layer.factor_sums(x, b)
            if part.half is not None:
                part.whole = part.half + self.layer.gradient(x[first:], b[first:])
        return part

    def _open_window(self) -> None:
        """Start afresh unless this pass adds to a gradient that the window already describes."""
        gradient = self.weight.grad
        if gradient is None:
            self.clear()
        elif gradient._version != self._version:
            self.clear()
            # Zeros are as good as None; anything else is a gradient whose halves nobody knows.
            self.window.clean = gradient.count_nonzero() == 0


class _ForwardHook:
    """Module hook; a deep copy or a pickle of the module carries a hook that does nothing."""

    def __init__(self, capture: LayerCapture | None) -> None:
        self._capture = (lambda: None) if capture is None else weakref.ref(capture)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        capture = self._capture()
        # A shallow copy or a replica of the module shares the hook, but is not the module.
        if capture is not None and capture.module is module:
            capture.observe(args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForwardHook:
        return _ForwardHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ForwardHook, (None,)


class _OutputHook:
    """Tensor hook: holds the input until the gradient of the output arrives, exactly as autograd does."""

    def __init__(self, capture: LayerCapture, x: Tensor, shape: torch.Size) -> None:
        self._capture = weakref.ref(capture)
        self._x: Tensor | None = x
        self._shape = shape
        self._version = x._version

    def __call__(self, b: Tensor) -> None:
        capture, x = self._capture(), self._x
        if not _graph_is_kept():
            self._x = None
        if x is not None and x._version != self._version:
            # Changed in place since; legal where autograd kept a copy of its own, as under autocast.
            x = None
        if capture is not None:
            capture.collect(x, b.reshape(self._shape))


class _AccumulatedHook:
    """Hook on a parameter: its gradient of this backward pass is complete."""

    def __init__(self, capture: LayerCapture) -> None:
        self._capture = weakref.ref(capture)

    def __call__(self, param: Tensor) -> None:
        if (capture := self._capture()) is not None:
            capture.accumulated(param)


def _graph_is_kept() -> bool:
    """Tell whether the running backward pass was called with retain_graph=True."""
    # Private, and absent from some versions; without it a second pass through the graph has no pair.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else False


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
