"""Parameters of which a rank holds a shard only (DTensors of `torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing what that needs."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, in the same memory; a plain tensor as it is."""
    mine: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return mine


def stands_for(current: Tensor | None, param: Tensor) -> bool:
    """Return whether ``current`` is a parameter, or what FSDP has put in its place while the module runs."""
    return current is param or (current is not None and is_sharded(param) and not is_sharded(current))
