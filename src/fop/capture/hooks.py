"""Hooks on models and on the modules that use a weight, in eager mode and under torch.compile."""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fop.capture.attention import ProjectionMode, rows_of
from fop.capture.batch import AttentionBatch, Batch
from fop.capture.compiled import AMBIGUOUS, UNKNOWN, key_of, tap
from fop.capture.sharded import stands_for
from fop.layers import Layer, PackedLayer
from fop.torch_internals import current_backward_pass, current_transform, is_exporting, untraced_hook

if TYPE_CHECKING:
    from fop.capture.recorder import Recorder

Target = TypeVar("Target")


class Hook(Generic[Target]):
    """A hook that calls a method of its target, held by weak reference; a copy of the hook does nothing."""

    def __init__(self, target: Target, method: Callable[..., Any]) -> None:
        self.target: Callable[[], Target | None] = weakref.ref(target)
        self.method = method

    @untraced_hook
    def __call__(self, *args: Any) -> Any:
        target = self.target()
        return None if target is None else self.method(target, *args)

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
    """Hooks on a model that note the size of the batch in each of its forward passes."""

    def __init__(self, root: nn.Module) -> None:
        self._thread = _Thread()
        self.handles: list[RemovableHandle] = []
        self.sequence_first = False
        self.register(root)
        weakref.finalize(self, remove_all, self.handles)

    def register(self, root: nn.Module) -> None:
        """Put the hooks on the model, instead of those that are there."""
        remove_all(self.handles)
        self._before(root, ModelWatch.enter)
        self.handles.append(root.register_forward_hook(Hook(self, ModelWatch.leave), always_call=True))
        # Scripts also call the modules of a model one by one, from a method of their own.
        for child in _children(root):
            self._before(child, ModelWatch.enter_child)
        for module in root.modules():
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
                self._before(module, ModelWatch.enter_sequence)
                self.sequence_first = True

    def _before(self, module: nn.Module, method: Callable[..., None]) -> None:
        self.handles.append(module.register_forward_pre_hook(Hook(self, method), with_kwargs=True))

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass."""
        batch = self._thread.state.last = Batch()
        batch.see([*args, *kwargs.values()])
        self._thread.state.running.append(batch)

    def leave(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward pass."""
        if self._thread.state.running:
            self._thread.state.running.pop()

    def enter_child(self, child: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a call of a child of the model, which tells the batch if the model itself was not called."""
        thread = self._thread.state
        if not thread.running and torch.compiler.is_compiling():
            return
        batch = self.batch()
        if not thread.running and current_backward_pass() == -1:
            if child in thread.called:
                # The next round; the last one may have been an evaluation, which nobody asked about.
                batch = thread.last = Batch()
                thread.called.clear()
            thread.called.add(child)
        if batch.size is None:
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
        size = self._thread.state.running[-1].size if self._thread.state.running else None
        return AMBIGUOUS if self.sequence_first else UNKNOWN if size is None else size

    def batch(self) -> Batch:
        """Return what is known of the batch of the running forward pass."""
        thread = self._thread.state
        if thread.running:
            return thread.running[-1]
        # A module that runs in the backward pass is being recomputed (reentrant checkpointing); otherwise
        # somebody calls the modules one by one, until the backward pass asks for what was seen.
        if thread.last is None or (thread.last.asked and current_backward_pass() == -1):
            thread.last = Batch()
        return thread.last


def _children(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a model, those in lists and dictionaries of modules included."""
    for child in root.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
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

    ``names`` are the module's for weight and bias, dotted where a submodule owns them; None for no bias.
    """

    def __init__(
        self,
        recorder: Recorder,
        layer: Layer,
        module: nn.Module,
        names: tuple[str, str | None],
        watch: ModelWatch,
    ) -> None:
        self.recorder, self.module = weakref.ref(recorder), weakref.ref(module)
        self.layer, self.names, self.watch = layer, names, watch
        self.handles = self.register(module)

    @abstractmethod
    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on the module."""

    def intact(self, weight: Tensor) -> bool:
        """Return whether the module is alive, still has the weight under its name, and has the hooks."""
        module = self.module()
        has = module is not None and self.uses(weight, module)
        return has and all(in_place(handle) for handle in self.handles)

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
            x = x.detach() if normalised is None else normalised(module, x)
            recorder.observe(self.layer, x, output, self.watch.batch())
        return None

    def compiled(self, x: Tensor, b: Tensor, batch: Batch) -> None:
        """Take the gradient of an output that went through `tap`."""
        recorder = self.recorder()
        if recorder is not None and recorder.wants:
            recorder.record(self.layer, x, b, batch)


class _Running(threading.local):
    """The call of an attention module that is running in one thread; function modes are by thread, too."""

    mode: ProjectionMode | None = None
    batch: Batch


class AttentionUse(ModuleUse):
    """A `MultiheadAttention`, which uses its weights in functions."""

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        self._running = _Running()
        return [
            module.register_forward_pre_hook(Hook(self, AttentionUse.enter), with_kwargs=True),
            module.register_forward_hook(Hook(self, AttentionUse.leave), always_call=True),
        ]

    def enter(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin to see the module's projections."""
        # A compiled attention is one graph, in which nobody can look for the weight.
        if torch.compiler.is_compiling() or current_transform() is not None:
            return
        recorder, running = self.recorder(), self._running
        if recorder is None or self.module() is not module or running.mode is not None:
            return
        # Not without the hook that ends it, if somebody has cleared hooks.
        if torch.is_grad_enabled() and in_place(self.handles[1]):
            if recorder.sharded:
                self.follow_shards(recorder, module)
            query = args[0] if args else kwargs["query"]
            running.batch = AttentionBatch.of(module, query, self.watch.batch())
            running.mode = ProjectionMode(self._seen)
            running.mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (mode := self._running.mode) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._running.mode = None

    def _seen(self, used: Tensor, x: Tensor, output: Tensor) -> None:
        recorder, module = self.recorder(), self.module()
        weight = None if module is None else parameter_of(module, self.names[0])
        if recorder is None or weight is None or (rows := rows_of(weight, used)) is None:
            return
        layer = self.layer.uses(rows) if isinstance(self.layer, PackedLayer) else self.layer
        recorder.observe(layer, x.detach(), output, self._running.batch)
