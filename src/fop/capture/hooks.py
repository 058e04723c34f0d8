"""Hooks on the modules that use a weight, in eager mode and under torch.compile."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.attention import ProjectionMode, rows_of
from fop.capture.batch import Attention, Batch
from fop.capture.compiled import key_of, tap
from fop.capture.lifetime import InertCopy, in_place
from fop.capture.recorder import Recorder, Use
from fop.capture.sharded import is_sharded, stands_for
from fop.layers import PackedLayer
from fop.torch_internals import current_transform, is_exporting


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter by its dotted name, without computing anything that is parametrized."""
    *path, last = name.split(".")
    owner: nn.Module | None = module
    for part in path:
        owner = owner._modules.get(part) if owner is not None else None
    return None if owner is None else owner._parameters.get(last)


class ModuleUse(Use):
    """What the two kinds of use have in common."""

    def intact(self, weight: Tensor) -> bool:
        """Return whether the module is alive, still has the weight under its name, and has the hooks."""
        module = self.module()
        if module is None or not self.uses(weight, module):
            return False
        return all(in_place(handle) for handle in self.handles)

    def uses(self, weight: Tensor, module: nn.Module) -> bool:
        """Return whether the module has the weight under its name, or what FSDP put there while it runs."""
        current = parameter_of(module, self.names[0])
        return current is weight or stands_for(current, weight)

    def follow_shards(self, recorder: Recorder, module: nn.Module) -> None:
        """Let the recorder watch the whole tensors that FSDP puts in the place of its shards."""
        whole = (None if name is None else parameter_of(module, name) for name in self.names)
        pairs = zip(whole, recorder.params, strict=False)
        recorder.stand_in({now: param for now, param in pairs if now is not None})


class ForwardUse(ModuleUse):
    """A module whose own input and output are the weight's."""

    def register(self) -> list[RemovableHandle]:
        """Put the hooks on the module."""
        module = self.module()
        assert module is not None
        self.key = key_of(module, self.names[0], self)
        # Before the hooks of others: one that replaces the output must not come between it and its gradient.
        self.handles = [module.register_forward_hook(_ForwardHook(self), with_kwargs=True, prepend=True)]
        return self.handles

    def forward(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Record one call of the module; under torch.compile the output goes through an operator of ours."""
        if torch.compiler.is_compiling():
            if not (torch.is_grad_enabled() and output.requires_grad) or is_exporting():
                return None
            copied: Tensor = tap(self.layer.observed(module, x), output, self.key, self.watch.traced_size())
            return copied
        recorder = self.recorder() if current_transform() is None else None
        # A shallow copy or a replica of the module shares the hook, but is not the module.
        if recorder is not None and self.module() is module and self.uses(recorder.weight, module):
            if is_sharded(recorder.weight):
                self.follow_shards(recorder, module)
            recorder.observe(self.layer, self.layer.observed(module, x), output, self.watch.batch())
        return None

    def compiled(self, x: Tensor, b: Tensor, batch: Batch) -> None:
        """Take the gradient of an output that went through `tap`."""
        recorder = self.recorder()
        if recorder is not None and recorder.wants:
            recorder.record(self.layer, x, b, batch)


class AttentionUse(ModuleUse):
    """A `MultiheadAttention`, which uses its weights in functions."""

    def register(self) -> list[RemovableHandle]:
        """Put the hooks on the module."""
        module = self.module()
        assert module is not None
        # torch keeps function modes for each thread.
        self._local = threading.local()
        self.handles = [
            module.register_forward_pre_hook(_EnterAttention(self), with_kwargs=True),
            module.register_forward_hook(_LeaveAttention(self), always_call=True),
        ]
        return self.handles

    def enter(self, module: nn.MultiheadAttention, query: Tensor) -> None:
        """Begin to see the module's projections."""
        # A compiled attention is one graph, in which nobody can look for the weight.
        if torch.compiler.is_compiling() or current_transform() is not None:
            return
        recorder = self.recorder()
        if recorder is None or self.module() is not module or self._mode is not None:
            return
        # Not without the hook that ends it, if somebody has cleared hooks.
        if torch.is_grad_enabled() and in_place(self.handles[1]):
            if is_sharded(recorder.weight):
                self.follow_shards(recorder, module)
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
        recorder, module = self.recorder(), self.module()
        weight = None if module is None else parameter_of(module, self.names[0])
        if recorder is None or weight is None or (rows := rows_of(weight, used)) is None:
            return
        layer = self.layer.uses(rows) if isinstance(self.layer, PackedLayer) else self.layer
        recorder.observe(layer, x.detach(), output, self._local.batch)


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
