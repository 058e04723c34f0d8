"""Ranks that run out of batches before others: the protocol of `torch.distributed.algorithms.Join`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fop.capture import InertCopy
from fop.distributed import Channel


class Stepping(Protocol):
    """What is asked of an optimizer."""

    def shadow_step(self) -> None:
        """Take a step with the other ranks, without a batch."""


class Shadow:
    """Steps along on a rank that has no batch left; what `Join` asks for as ``join_hook``.

    Args:
        optimizer: held weakly.
    """

    def __init__(self, optimizer: Stepping) -> None:
        self._optimizer = weakref.ref(optimizer)

    def main_hook(self) -> None:
        """Take part in one step of the others."""
        if (optimizer := self._optimizer()) is not None:
            optimizer.shadow_step()

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
        if optimizer is not None and not is_enabled(optimizer):
            optimizer.shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._first.post_hook(is_last_joiner)


class _JoinHookOf(InertCopy[Any]):
    """In the place of ``ddp.join_hook``."""

    def __init__(self, optimizer: Any, ddp: Any) -> None:
        super().__init__(optimizer)
        self._ddp = weakref.ref(ddp)

    def __call__(self, **options: Any) -> Any:
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
    if is_enabled(ddp) and not is_enabled(optimizer) and "join_hook" not in vars(ddp):
        raise RuntimeError(
            "the optimizer met this DistributedDataParallel inside of its join(), which knows nothing of the "
            "optimizer's exchanges; use `with Join([ddp_model, optimizer]):` (torch.distributed.algorithms), "
            "or make the optimizer from the wrapped model, FOP(ddp_model, ...)"
        )
    ddp.join_hook = _JoinHookOf(optimizer, ddp)


def is_enabled(joinable: Any) -> bool:
    """Tell whether an optimizer or a DistributedDataParallel is inside a `Join`."""
    config = getattr(joinable, "_join_config", None)
    return config is not None and bool(config.enable)


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
