"""Hooks on models and on the modules that use a weight, in eager mode and under torch.compile."""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fop.capture.batch import AttentionBatch, Batch, tensors_in
from fop.capture.compiled import AMBIGUOUS, UNKNOWN, key_of, tap
from fop.capture.functions import ComputedLayer, begin_watch, end_watch, rows_of, source_of, watches
from fop.capture.sharded import stands_for
from fop.layers import FunctionCall, Layer, PackedLayer
from fop.torch_internals import (
    checkpointed_in,
    current_backward_pass,
    current_trace,
    current_transform,
    is_exporting,
    running_modules,
    untraced_hook,
)

if TYPE_CHECKING:
    from fop.capture.recorder import Recorder

Target = TypeVar("Target")
BatchSize: TypeAlias = Callable[..., int]


class Hook(Generic[Target]):
    """A hook that calls a method of its target, held by weak reference; a copy of the hook does nothing.

    A module that was pickled in another process has copies, whose numbers hooks of this one may have: these
    are then given keyword arguments, as the copies were, even where they did not ask for them.
    """

    def __init__(self, target: Target, method: Callable[..., Any]) -> None:
        self.target: Callable[[], Target | None] = weakref.ref(target)
        self.method = method

    @untraced_hook
    def __call__(self, *args: Any) -> Any:
        target = self.target()
        # What a hook computes must not become a part of a model that torch.jit.trace records.
        return None if target is None or current_trace() is not None else self.method(target, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        # Without a name of this library: a pickled model is loaded where it is not installed, too.
        return getattr, (contextlib.nullcontext(), "__exit__")


def in_place(handle: RemovableHandle) -> bool:
    """Return whether a hook is where it was put."""
    return handle.id in (handle.hooks_dict_ref() or ())


def remove_all(handles: list[RemovableHandle]) -> None:
    """Remove hooks, also when their owner is gone."""
    for handle in handles:
        handle.remove()
    handles.clear()


class _Passes:
    """What is known of the forward passes of a model in one thread."""

    def __init__(self) -> None:
        # Forward passes of the model that are running, the inner ones last.
        self.running: list[Batch] = []
        self.last: Batch | None = None
        # Modules that were called one by one since the last round.
        self.called: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Thread(threading.local):
    """Others run the same model, as one that trains and one that evaluates.

    It holds an object and not the values: torch.compile could not trace a change of them before torch 2.6.
    """

    def __init__(self) -> None:
        self.state = _Passes()


class ModelWatch:
    """Hooks on a model that note the size of the batch in each of its forward passes.

    ``batch_size`` gives it from the model's arguments; None to find it out.
    """

    def __init__(self, root: nn.Module, batch_size: BatchSize | None) -> None:
        self.batch_size = batch_size
        self.thread = _Thread()
        self.handles: list[RemovableHandle] = []
        self.sequence_first = False
        self.register(root)
        weakref.finalize(self, remove_all, self.handles)

    def register(self, root: nn.Module) -> None:
        """Put the hooks on the model, instead of those that are there."""
        remove_all(self.handles)
        if isinstance(root, torch.jit.ScriptModule):
            return
        self._before(root, ModelWatch.enter)
        self.handles.append(root.register_forward_hook(Hook(self, ModelWatch.leave), always_call=True))
        # Scripts also call the modules of a model one by one, from a method of their own.
        for child in parts_called(root):
            self._before(child, ModelWatch.enter_child)
        for module in root.modules():
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
                self._before(module, ModelWatch.enter_sequence)
                self.sequence_first = True

    def _before(self, module: nn.Module, method: Callable[..., Any]) -> None:
        self.handles.append(module.register_forward_pre_hook(Hook(self, method), with_kwargs=True))

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass."""
        thread = self.thread.state
        if not torch.compiler.is_compiling() and thread.running and root not in running_modules()[1:]:
            # A pass that was interrupted, by KeyboardInterrupt for instance, has left its batch.
            thread.running.clear()
        batch = thread.last = Batch()
        batch.see([*args, *kwargs.values()])
        if self.batch_size is not None:
            batch.tell(self.batch_size(*args, **kwargs))
        thread.running.append(batch)

    def leave(self, root: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """End a forward pass."""
        thread = self.thread.state
        if thread.running:
            batch = thread.running.pop()
            if not torch.compiler.is_compiling():
                outputs = {x.shape[0] for x in tensors_in(rest[-1:]) if x.dim() > 0}
                if batch.size not in outputs:
                    batch.doubt(outputs)

    def enter_child(self, child: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a call of a child of the model, which tells the batch if the model itself was not called."""
        thread = self.thread.state
        if not thread.running and torch.compiler.is_compiling():
            return
        batch = self.batch()
        if not thread.running and current_backward_pass() == -1:
            if child in thread.called:
                # The next round; the last one may have been an evaluation, which nobody asked about.
                batch = thread.last = Batch()
                thread.called.clear()
            thread.called.add(child)
        if batch.size is None and not batch.sizes:
            batch.see([*args, *kwargs.values()])

    def enter_sequence(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a call of a module with ``batch_first=False``."""
        x = args[0] if args else kwargs.get("query", kwargs.get("input"))
        if isinstance(x, PackedSequence):
            self.batch().sequences.add((len(x.batch_sizes), int(x.batch_sizes[0])))
        elif isinstance(x, Tensor) and x.dim() == 3:
            self.batch().sequences.add((x.shape[0], x.shape[1]))

    def traced_size(self) -> int:
        """Return the size of the batch for `tap`, in a forward pass that torch.compile traces."""
        running = self.thread.state.running
        batch = running[-1] if running else Batch()
        if self.sequence_first or batch.sizes:
            return AMBIGUOUS
        return UNKNOWN if batch.size is None else batch.size

    def batch(self) -> Batch:
        """Return what is known of the batch of the running forward pass."""
        thread = self.thread.state
        if thread.running:
            return thread.running[-1]
        # A module that runs in the backward pass is being recomputed (reentrant checkpointing); otherwise
        # somebody calls the modules one by one, until the backward pass asks for what was seen.
        if thread.last is None or (thread.last.asked and current_backward_pass() == -1):
            thread.last = Batch()
        return thread.last


def parts_called(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a model that may be called, those in lists and dictionaries included.

    But for those of torch.jit.script, which take no hooks.
    """
    for child in root.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from parts_called(child)
        elif not isinstance(child, torch.jit.ScriptModule):
            yield child


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter by its dotted name, without computing anything that is parametrized."""
    *path, last = name.split(".")
    owner: nn.Module | None = module
    for part in path:
        owner = owner._modules.get(part) if owner is not None else None
    return None if owner is None else owner._parameters.get(last)


class ModuleUse(ABC):
    """One module that uses a weight, and the hooks on it.

    ``names`` are the owner's for weight and bias, dotted where a submodule has them; None for no bias. The
    owner is the module itself if no other is given.
    """

    def __init__(
        self,
        recorder: Recorder,
        layer: Layer,
        module: nn.Module,
        names: tuple[str, str | None],
        watch: ModelWatch,
        owner: nn.Module | None = None,
    ) -> None:
        self.recorder, self.module = weakref.ref(recorder), weakref.ref(module)
        self.owner = weakref.ref(module if owner is None else owner)
        self.layer, self.names, self.watch = layer, names, watch
        self.handles = self.register(module)

    @abstractmethod
    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on the module."""

    def uses(self, weight: Tensor, module: nn.Module) -> bool:
        """Return whether the module has the weight under its name, or what FSDP put there while it runs."""
        name = self.names[0]
        current = parameter_of(module, name) if "." in name else module._parameters.get(name)
        return current is weight or stands_for(current, weight)

    def follow_shards(self, recorder: Recorder, module: nn.Module) -> None:
        """Let the recorder watch the whole tensors that FSDP puts in the place of its shards."""
        whole = (None if name is None else parameter_of(module, name) for name in self.names)
        pairs = zip(whole, recorder.params, strict=False)
        recorder.stand_ins |= {now: param for now, param in pairs if now is not None}


class ForwardUse(ModuleUse):
    """A module whose own input and output are the weight's."""

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        self.key = key_of(module, self.names[0], self)
        hook = Hook(self, ForwardUse.forward)
        # Before the hooks of others: one that replaces the output must not come between it and its gradient.
        return [module.register_forward_hook(hook, with_kwargs=True, prepend=True)]

    def forward(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        """Record one call of the module; under torch.compile the output goes through an operator of ours."""
        # Without keyword arguments where quantisation has put it back; a hook may have replaced the output.
        kwargs, output = rest[0] if len(rest) > 1 else {}, rest[-1]
        # Not `next(..., None)`, which torch 2.5 cannot trace.
        inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        if not inputs or not isinstance(output, Tensor):
            return None
        x = inputs[0]
        normalised = self.layer.normalised
        if torch.compiler.is_compiling():
            if not (torch.is_grad_enabled() and output.requires_grad) or is_exporting():
                return None
            x = x.detach() if normalised is None else normalised(module, x)
            copied: Tensor = tap(x, output, self.key, self.watch.traced_size())
            return copied
        recorder = self.recorder() if current_transform() is None else None
        # A shallow copy or a replica of the module shares the hook, but is not the module.
        if recorder is not None and self.module() is module and self.uses(recorder.weight, module):
            if recorder.sharded:
                self.follow_shards(recorder, module)
            if normalised is None:
                return recorder.observe(self.layer, x, output, self.watch.batch(), module)
            recorder.observe(self.layer, normalised(module, x), output, self.watch.batch())
        return None

    def compiled(self, x: Tensor, b: Tensor, batch: Batch) -> None:
        """Take the gradient of an output that went through `tap`."""
        recorder = self.recorder()
        if recorder is not None and recorder.wants:
            recorder.record(self.layer, x, b, batch)


class FunctionUse(ModuleUse):
    """A module in which a function uses the weight, its own or another module's."""

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        return [
            module.register_forward_pre_hook(Hook(self, type(self).enter), with_kwargs=True),
            module.register_forward_hook(Hook(self, FunctionUse.leave), always_call=True),
        ]

    def uses(self, weight: Tensor, module: nn.Module) -> bool:
        current = self.current()
        return current is weight or stands_for(current, weight)

    def current(self) -> Tensor | None:
        """Return the weight as its owner has it now."""
        owner = self.owner()
        return None if owner is None else parameter_of(owner, self.names[0])

    def enter(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """Begin to see the functions in a call of the module."""
        # A compiled module is one graph, in which nobody can look for the weight.
        if torch.compiler.is_compiling() or current_transform() is not None:
            return None
        recorder, owner = self.recorder(), self.owner()
        # A shallow copy or a replica of the module shares the hook, but is not the module.
        if recorder is None or owner is None or self.module() is not module or watches(self.sees):
            return None
        # Not without the hook that ends it, if somebody has cleared hooks.
        if not (torch.is_grad_enabled() and in_place(self.handles[1])):
            return None
        if recorder.sharded:
            self.follow_shards(recorder, owner)
        return begin_watch(module, args, self.sees), kwargs

    def leave(self, module: nn.Module, *_: Any) -> None:
        end_watch(module, self.sees)

    def sees(self, call: FunctionCall) -> bool:
        """Record a call of a function if it uses the weight; return whether it does."""
        source, recorder = source_of(call.given["weight"]), self.recorder()
        if source is None or recorder is None or source.leaf is not self.current():
            return False
        if len(recorder.uses) > 1 and running_modules()[0] is not self.module():
            # Another module inside this one uses the weight, too, and has a use of its own.
            return False
        layer = call.layer(turned=source.turned, bias=self.layer.bias, options=self.layer.options)
        if layer is None or layer.matrix_shape != self.layer.matrix_shape:
            return False
        module = self.module()
        if module is None or checkpointed_in(module):
            return False
        if source.computed:
            layer = cast(Layer, ComputedLayer(layer, call.given["weight"], source.leaf))
        if current_transform() is None:
            recorder.observe(layer, call.given["input"], call.output, self.watch.batch())
        return True


class AttentionUse(FunctionUse):
    """A `MultiheadAttention`, which uses its weights in functions."""

    def enter(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        entered = super().enter(module, args, kwargs)
        if entered is not None:
            query = args[0] if args else kwargs["query"]
            assert isinstance(module, nn.MultiheadAttention)
            self._running.batch = AttentionBatch.of(module, query, self.watch.batch())
        return entered

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        self._running = _Running()
        return super().register(module)

    def sees(self, call: FunctionCall) -> bool:
        recorder, weight, used = self.recorder(), self.current(), call.given["weight"]
        if recorder is None or weight is None or (rows := rows_of(weight, used)) is None:
            return False
        layer = self.layer.uses(rows) if isinstance(self.layer, PackedLayer) else self.layer
        recorder.observe(layer, call.given["input"], call.output, self._running.batch)
        return True


class _Running(threading.local):
    """The batch of the call of an attention module that is running in one thread."""

    batch: AttentionBatch
