"""Ranks that run out of batches before others: the protocol of `torch.distributed.algorithms.Join`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from fop.capture import Hook
from fop.torch_internals import is_joining


class JoinableOptimizer:
    """What `torch.distributed.algorithms.Join` asks of an optimizer."""

    param_groups: list[dict[str, Any]]
    _distributor: Any
    _follow_model: Callable[[], None]
    _step: Callable[[], None]

    @torch.no_grad()
    def step_without_batch(self) -> None:
        """Take part in a step of other ranks, for which this one has no batch left."""
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        self._distributor.without_batch = True
        try:
            self._follow_model()
            self._step()
        finally:
            self._distributor.without_batch = False

    def join_hook(self, **options: Any) -> JoinHook:
        """Return what `Join` calls on ranks without a batch."""
        return JoinHook(self)

    @property
    def join_device(self) -> torch.device:
        """The device on which `Join` may communicate."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The process group of the ranks."""
        return self._distributor.group


class JoinHook:
    """Takes the steps of the others on a rank that has no batch left.

    ``first`` is the hook of DistributedDataParallel, called before; None if `Join` has the optimizer.
    """

    def __init__(self, optimizer: JoinableOptimizer, first: Any = None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._first = first

    def main_hook(self) -> None:
        """Take part in one step of the others, unless `Join` was given the optimizer, too."""
        if self._first is not None:
            self._first.main_hook()
        optimizer = self._optimizer()
        if optimizer is not None and (self._first is None or not is_joining(optimizer)):
            optimizer.step_without_batch()

    def post_hook(self, is_last_joiner: bool) -> None:
        """End: all ranks have taken the same steps."""
        if self._first is not None:
            self._first.post_hook(is_last_joiner)


class _JoinHookOf(Hook[Any]):
    """In the place of ``ddp.join_hook``."""

    def __init__(self, optimizer: JoinableOptimizer, ddp: Any) -> None:
        super().__init__(optimizer, JoinHook)
        self._ddp = weakref.ref(ddp)

    def __call__(self, **options: Any) -> Any:  # type: ignore[override]
        first, optimizer = _own_join_hook(self._ddp())(**options), self.target()
        return first if optimizer is None else JoinHook(optimizer, first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        # The copy of the model is in the memo before its parts are.
        return _own_join_hook(memo[id(self._ddp())])


def _own_join_hook(ddp: Any) -> Callable[..., Any]:
    hook: Callable[..., Any] = type(ddp).join_hook.__get__(ddp)
    return hook


def join_along(ddp: Any, optimizer: JoinableOptimizer) -> None:
    """Let ``with ddp.join():`` take the optimizer's exchanges along; RuntimeError if it is too late."""
    # torch leaves a model enabled that was in a `Join` once: then it has a hook of ours already.
    if is_joining(ddp) and not is_joining(optimizer) and "join_hook" not in vars(ddp):
        raise RuntimeError(
            "the optimizer met this DistributedDataParallel inside of its join(), which knows nothing of the "
            "optimizer's exchanges; use `with Join([ddp_model, optimizer]):` (torch.distributed.algorithms), "
            "or make the optimizer from the wrapped model, FOP(ddp_model, ...)"
        )
    ddp.join_hook = _JoinHookOf(optimizer, ddp)
