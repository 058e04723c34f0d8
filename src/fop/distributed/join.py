"""Ranks that run out of batches before others: the protocol of `torch.distributed.algorithms.Join`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fop.capture import Hook
from fop.distributed.buckets import Channel
from fop.torch_internals import is_joining


class Stepping(Protocol):
    """What is asked of an optimizer."""

    def step_without_batch(self) -> None:
        """Take a step with the other ranks, without a batch."""


class JoinableOptimizer:
    """What `torch.distributed.algorithms.Join` asks of an optimizer."""

    param_groups: list[dict[str, Any]]
    _distributor: Any

    @torch.no_grad()
    def step_without_batch(self) -> None:
        """Take part in a step of other ranks, for which this one has no batch left."""
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        self._distributor.without_batch = True
        self._follow_model()
        self._step()
        self._distributor.without_batch = False

    def _follow_model(self) -> None:
        raise NotImplementedError

    def _step(self) -> None:
        raise NotImplementedError

    def join_hook(self, **options: Any) -> StepAlong:
        """Return what `Join` calls on ranks without a batch."""
        return StepAlong(self)

    @property
    def join_device(self) -> torch.device:
        """The device on which `Join` may communicate."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The process group of the ranks."""
        return self._distributor.group


class StepAlong:
    """Steps along on a rank that has no batch left; what `Join` asks for as ``join_hook``.

    Args:
        optimizer: held weakly.
    """

    def __init__(self, optimizer: Stepping) -> None:
        self._optimizer = weakref.ref(optimizer)

    def main_hook(self) -> None:
        """Take part in one step of the others."""
        if (optimizer := self._optimizer()) is not None:
            optimizer.step_without_batch()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Do nothing: all ranks have taken the same steps."""


class _Both:
    """The hook of DistributedDataParallel, then ours, unless `Join` was given the optimizer too."""

    def __init__(self, first: Any, optimizer: Any) -> None:
        self._first = first
        self._optimizer = weakref.ref(optimizer)

    def main_hook(self) -> None:
        self._first.main_hook()
        optimizer = self._optimizer()
        if optimizer is not None and not is_joining(optimizer):
            optimizer.step_without_batch()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._first.post_hook(is_last_joiner)


class _JoinHookOf(Hook[Any]):
    """In the place of ``ddp.join_hook``."""

    def __init__(self, optimizer: Any, ddp: Any) -> None:
        super().__init__(optimizer, StepAlong)
        self._ddp = weakref.ref(ddp)

    def __call__(self, **options: Any) -> Any:  # type: ignore[override]
        first, optimizer = _own_join_hook(self._ddp())(**options), self.target()
        return first if optimizer is None else _Both(first, optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        # The copy of the model is in the memo before its parts are.
        return _own_join_hook(memo[id(self._ddp())])


def _own_join_hook(ddp: Any) -> Callable[..., Any]:
    hook: Callable[..., Any] = type(ddp).join_hook.__get__(ddp)
    return hook


def join_along(ddp: Any, optimizer: Any) -> None:
    """Let ``with ddp.join():`` take the optimizer's exchanges along.

    Raises:
        RuntimeError: it is too late for that.
    """
    # torch leaves a model enabled that was in a `Join` once: then it has a hook of ours already.
    if is_joining(ddp) and not is_joining(optimizer) and "join_hook" not in vars(ddp):
        raise RuntimeError(
            "the optimizer met this DistributedDataParallel inside of its join(), which knows nothing of the "
            "optimizer's exchanges; use `with Join([ddp_model, optimizer]):` (torch.distributed.algorithms), "
            "or make the optimizer from the wrapped model, FOP(ddp_model, ...)"
        )
    ddp.join_hook = _JoinHookOf(optimizer, ddp)


def share_gradients(channel: Channel, params: Sequence[Tensor], has_batch: bool) -> None:
    """Give ranks without a batch the gradients of those that have one; waits for the device.

    Args:
        channel: the ranks.
        params: all parameters, the same on all ranks; where there is a batch p.grad is the mean over ranks.
        has_batch: whether this rank has one.
    """
    home = params[0].device
    batches = torch.zeros(channel.size, device=home)
    batches[channel.rank] = float(has_batch)
    channel.all_reduce(batches, "control").wait()
    has = batches.tolist()
    if all(has):
        return
    source = has.index(1.0)
    used = torch.tensor([float(param.grad is not None) for param in params]).to(home)
    channel.broadcast(used, source, "control").wait()
    alike: dict[torch.dtype, list[Tensor]] = {}
    for param, count in zip(params, used.tolist(), strict=True):
        if count:
            alike.setdefault(param.dtype, []).append(param)
    for members in alike.values():
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in members]
        flat = torch.cat([gradient.reshape(-1) for gradient in grads])
        channel.broadcast(flat, source, "gradients").wait()
        if has_batch:
            continue
        for param, part in zip(members, flat.split([param.numel() for param in members]), strict=True):
            param.grad = part.view_as(param)
