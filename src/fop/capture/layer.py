"""Capture of one weight: from hooks on the modules that use it and on its gradient to a `Window`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.batch import Batch, Layout, ModelWatch
from fop.capture.hooks import AccumulatedHook, UseHook, watch_output
from fop.capture.lifetime import remove_all
from fop.capture.sharded import is_sharded
from fop.capture.window import Part, Window
from fop.layers import Layer, Statistics


@dataclass
class SubBatch:
    """Which half of the gradient pair the user says that backward passes make up; shared by all captures."""

    index: int | None = None


class LayerCapture:
    """Watches one weight; between two optimizer steps its ``window`` holds what backward passes gathered.

    Args:
        layer: layout of the gradient matrix.
        weight: the weight.
        bias: the bias, if it belongs to the same block.
        sub_batch: what the user says of running backward passes.

    Attributes:
        paired: whether the gradient pair is wanted (FOP) or only statistics (K-FAC).
        due: whether statistics are wanted of the coming backward pass.
        counted: whether the number of samples is wanted in every step.
        averaged: whether the last backward pass was one after which somebody averages p.grad over ranks.
        apart: whether the gradient is taken away after a pass that averages (FSDP, and lean layers).
        anew: whether the last pass began with a gradient that it knew nothing of: None, zeroed, or changed.
        continues: whether the last pass added to a gradient that was still there, where ``apart``.
        completed: called when a backward pass has given all gradients of the block, with these by parameter;
            None for nobody to call.

    The hooks know the capture by weak reference only: dropping the optimizer drops the capture.
    """

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, sub_batch: SubBatch) -> None:
        self.layer = layer
        self.weight = weight
        self.params = [weight] if bias is None else [weight, bias]
        self.paired = True
        self.due = True
        self.counted = False
        self.averaged = False
        self.apart = is_sharded(weight)
        self.continues = False
        self.anew = True
        self.completed: Callable[[dict[Tensor, Tensor]], None] | None = None
        self.window = Window(layer, self.params)
        self._sub_batch = sub_batch
        self._parts: dict[int, Part] = {}
        # Which tensor p.grad was, and its version, when the window last took it in; None while that is empty.
        self._version: tuple[int, int] | None = None
        # Backward pass around the last one, and whether that had parts before.
        self._outer, self._continued = -1, False
        self._uses: list[UseHook] = []
        self._handles: list[RemovableHandle] = []
        self._watched: set[Tensor] = set()
        # Unsharded tensors that FSDP puts in the place of parameters while a module runs.
        self._stand_ins: dict[Tensor, Tensor] = {}
        self._arrived: dict[Tensor, Tensor] = {}
        weakref.finalize(self, remove_all, self._handles)

    def attach(self, use: UseHook) -> None:
        """Watch one more module that uses the weight."""
        self._uses.append(use)
        self._handles += use.register()
        # A compiled forward pass cannot do it.
        self.watch_gradients()

    def belongs_to(self, watch: ModelWatch) -> None:
        """Take what is known of the batch from this model."""
        for use in self._uses:
            use.watch = watch

    @property
    def modules(self) -> list[nn.Module]:
        """The modules watched."""
        return [module for use in self._uses if (module := use.module()) is not None]

    @property
    def intact(self) -> bool:
        """Whether every module is alive, still uses the weight, and still has the hooks."""
        return all(use.intact(self.weight) for use in self._uses)

    def detach(self) -> None:
        """Watch no longer."""
        remove_all(self._handles)
        self._handles.clear()

    def clear(self) -> None:
        """Forget what was gathered: the gradients were zeroed, or a step has used it."""
        self.window = Window(self.layer, self.params)
        self._parts.clear()
        self._version = None
        self._outer = -1
        self._arrived = {}
        self.averaged = False

    def averaging_ended(self) -> None:
        """Take p.grad as it is now for what the backward passes gave."""
        if (gradient := self.weight.grad) is not None and self._version is not None:
            self._version = _state(gradient)

    def _restart(self) -> None:
        """Forget the gradients of the passes so far, not their statistics."""
        window = Window(self.layer, self.params)
        window.statistics, window.samples = self.window.statistics, self.window.samples
        self.window = window

    @property
    def wants(self) -> bool:
        """Whether anything is wanted of the coming backward pass."""
        return self.paired or self.due or self.counted

    def ready_for(self, output: Tensor) -> bool:
        """Tell whether a backward pass from ``output`` can be watched, and get ready for it.

        Not whether anything is wanted of it: that may change until then, and checkpointing expects the same
        tensors to be kept when it repeats a forward pass.
        """
        if not (torch.is_grad_enabled() and output.requires_grad and self.weight.requires_grad):
            return False
        self.watch_gradients()
        return True

    def watch_gradients(self) -> None:
        """Be told when the gradients of the parameters are complete."""
        whole = [param for param in self.params if not is_sharded(param)]
        for param in [*whole, *self._stand_ins]:
            # A frozen parameter takes no hook; it may be thawed later.
            if param.requires_grad and param not in self._watched:
                self._handles.append(param.register_post_accumulate_grad_hook(AccumulatedHook(self)))
                self._watched.add(param)

    def stand_in(self, unsharded: Mapping[Tensor, Tensor]) -> None:
        """Watch these tensors in place of parameters, of which this rank has a shard only."""
        self._stand_ins |= unsharded

    def observe(self, layer: Layer, x: Tensor, output: Tensor, batch: Batch) -> None:
        """Arrange that the gradient of ``output`` meets ``x`` in the backward pass."""
        if self.ready_for(output):
            watch_output(self, layer, x, output, batch)

    @torch.no_grad()
    def collect(self, layer: Layer, x: Tensor | None, b: Tensor, batch: Batch, outer: int = -1) -> None:
        """Take one use of the weight out of a running backward pass.

        Args:
            layer: how this use sees the weight.
            x: its input, None if it was changed since the forward pass.
            b: gradient of its output.
            batch: what is known of the batch.
            outer: the backward pass that repeated the forward pass (reentrant checkpointing), -1 if none.
        """
        if x is None:
            layout = Layout(0, 0, problem="its input was changed in place")
        elif x.is_nested or x.layout is not torch.strided:
            x, layout = None, Layout(0, 0, problem="its input is sparse or nested")
        else:
            layout = batch.layout(layer, x)
        task = torch._C._current_graph_task_id()
        if task not in self._parts:
            # Leftovers of passes that never reached the weight, as torch.autograd.grad for its inputs.
            self._parts.clear()
            self._open_window()
            # Every repeated part runs a backward pass of its own; together they are one.
            self._continued = outer != -1 and outer == self._outer
            self._outer = outer
            if not self._continued:
                self.window.begin(layout.samples if layout.problem is None else 0, self._sub_batch.index)
        with torch.autocast(b.device.type, enabled=False):
            part = self._part(layer, x, b, layout)
        if task in self._parts:
            self._parts[task].add_use(part)
        else:
            self._parts[task] = part

    @torch.no_grad()
    def accumulated(self, param: Tensor) -> None:
        """Move the finished backward pass into the window: it is in p.grad now."""
        if (gradient := param.grad) is None:
            return
        param = self._stand_ins.get(param, param)
        if param is self.weight:
            part = self._parts.pop(torch._C._current_graph_task_id(), None)
            if part is None:
                self.window.drop_pair("its gradient came by a path that no hook saw")
            else:
                self.window.add(part, continued=self._continued)
                if not (self.averaged and self._version is not None):
                    self.window.compare(gradient)
            self._version = _state(gradient)
        if self.paired or self.due:
            self.window.remember(param, gradient)
        if self.completed is not None:
            self._arrived[param] = gradient
            if all(each in self._arrived or not each.requires_grad for each in self.params):
                arrived, self._arrived = self._arrived, {}
                self.completed(arrived)

    def _part(self, layer: Layer, x: Tensor | None, b: Tensor, layout: Layout) -> Part:
        part = Part(layout.samples, problem=layout.problem, precise=torch.finfo(b.dtype).bits > 16)
        if x is None or not x.numel() or not b.numel():
            part.problem = part.problem or "its batch is empty"
            return part
        x, b = layout.batched(x), layout.batched(b)
        first = layout.samples // 2 * layout.rows
        if first == 0:
            part.problem = part.problem or "a batch of 1 has no halves"
        if self.paired and self.window.split and part.problem is None:
            part.half = layer.gradient(x[:first], b[:first])
        if self.due:
            sums = layer.factor_sums(x, b)
            sums.samples = layout.samples
            part.statistics = Statistics({layer.swapped: sums})
            if part.half is not None:
                part.whole = part.half + layer.gradient(x[first:], b[first:])
        return part

    def _open_window(self) -> None:
        """Start afresh unless this pass adds to a gradient that the window already describes."""
        gradient = self.weight.grad
        if self.apart:
            live = next((whole for whole, own in self._stand_ins.items() if own is self.weight), self.weight)
            self.continues = live.grad is not None
            # A shard's gradient is there after a pass that was averaged, unless somebody has zeroed it.
            self.anew = self.averaged and gradient is None and is_sharded(self.weight)
            if self.anew:
                self.clear()
            elif not self.continues:
                self._restart()
            return
        self.anew = gradient is None or _state(gradient) != self._version
        if gradient is None:
            self.clear()
        elif _state(gradient) != self._version:
            self.clear()
            # Zeros are as good as None; anything else is a gradient whose halves nobody knows.
            self.window.clean = gradient.count_nonzero() == 0


def _state(gradient: Tensor) -> tuple[int, int]:
    """Return what changes when p.grad is replaced, or changed in place."""
    return id(gradient), gradient._version
