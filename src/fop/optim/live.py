"""Every optimizer alive: two on one parameter would take each other's gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

live: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def refuse_driven(optimizer: Optimizer, params: Sequence[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ValueError for a parameter that another live optimizer drives."""
    if not _driven(optimizer, params):
        return
    # An optimizer that nobody can reach any more may still wait for the collector.
    gc.collect()
    for param in _driven(optimizer, params):
        label = f"{names.get(param, 'a parameter')} {tuple(param.shape)}"
        raise ValueError(
            f"{label} is already driven by another live FOP or KFAC; delete that optimizer and what holds it "
            "(del optimizer, scheduler, trainer), or give each its own parameters"
        )


def _driven(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    groups = [group for other in live if other is not optimizer for group in other.param_groups]
    others = {param for group in groups for param in group["params"]}
    return [param for param in params if param in others]
