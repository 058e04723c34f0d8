"""Options of distributed training, and whether there is any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

DistributedLike: TypeAlias = Mapping[str, Any] | Literal[False] | None

_CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": ("compatible", "lean"),
    "pair": ("parity", "halves"),
    "factor_dtype": (torch.bfloat16,),
}


@dataclass(frozen=True)
class Distribution:
    """How ranks work together.

    Attributes:
        mode: "compatible", p.grad is the mean over all ranks after ``backward()``; or "lean", the gradients
            of preconditioned layers go to their owners alone and p.grad is None.
        pair: "parity", even ranks give g1 and odd ranks g2; "halves", every rank splits its batch; None for
            parity where the number of ranks is even, and halves where it is odd.
        group: process group; None for DistributedDataParallel's, or all ranks.
        factor_dtype: dtype of curvature factors on the wire; None for their own.
        ranks_per_node: spread owners evenly over nodes, too.
    """

    mode: Literal["compatible", "lean"] = "compatible"
    pair: Literal["parity", "halves"] | None = None
    group: dist.ProcessGroup | None = None
    factor_dtype: torch.dtype | None = None
    ranks_per_node: int | None = None


def checked_distribution(given: DistributedLike) -> Distribution | None:
    """Return the options, None for ``False``; ValueError or TypeError for what is no option."""
    if given is False:
        return None
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"distributed={given!r} must be a dict of options, such as {{'mode': 'lean'}}, or False for "
            "ranks that train models of their own"
        )
    options, known = dict(given or {}), [field.name for field in fields(Distribution)]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"distributed: unknown option {name!r}; the options are {', '.join(known)}")
        if name in _CHOICES and value is not None and value not in _CHOICES[name]:
            allowed = " or ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"distributed: {name}={value!r} must be {allowed}")
    per_node, group = options.get("ranks_per_node"), options.get("group")
    if per_node is not None and (type(per_node) is not int or per_node < 1):
        raise ValueError(f"distributed: ranks_per_node={per_node!r} must be a whole number, 1 or more")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "distributed: this rank is not in the process group given as 'group'; make the optimizer on the "
            "ranks of the group only, or give a group with all ranks that train the model"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"distributed: group={group!r} must be a process group, as torch.distributed.new_group(ranks) "
            "returns"
        )
    return Distribution(**options)


def portable(distribution: Distribution | None) -> Distribution | None:
    """Return the options without the process group, which can be neither copied nor pickled."""
    return None if distribution is None else replace(distribution, group=None)
