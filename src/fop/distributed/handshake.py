"""The handshake of the ranks before their first step, and after a state was loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fop.binding import Binding
from fop.capture import is_sharded
from fop.distributed.agreement import Description, check_agreement
from fop.distributed.assignment import Plan, make_plan
from fop.distributed.buckets import Channel
from fop.distributed.options import Distribution
from fop.distributed.parity import side_of
from fop.torch_internals import group_timeout


def open_channels(group: dist.ProcessGroup, sent: dict[str, float]) -> tuple[Channel, Channel | None]:
    """Open a channel between all ranks, and one between those of this rank's parity.

    Args:
        group: the process group that trains the model.
        sent: where bytes are counted.

    Returns:
        The channels; there is none for a parity where the number of ranks is odd.
    """
    ranks = dist.get_process_group_ranks(group)
    everyone = Channel(_like(group, ranks), sent)
    if everyone.size % 2:
        return everyone, None
    sides = [ranks[0::2], ranks[1::2]]
    own = side_of(everyone.rank)
    if len(ranks) == dist.get_world_size():
        # All ranks of the world are here, and take part in making both.
        return everyone, Channel([_like(group, side) for side in sides][own], sent)
    return everyone, Channel(_like(group, sides[own]), sent)


def _like(group: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup:
    """Return a new process group of these ranks with the backend and the timeout of another."""
    # Ranks outside of ``group`` know nothing of this. Only then: torch gives such groups names that differ
    # where some ranks are in more groups than others.
    subset = dist.get_world_size(group) < dist.get_world_size()
    made: dist.ProcessGroup = dist.new_group(
        ranks, timeout=group_timeout(group), backend=dist.get_backend(group), use_local_synchronization=subset
    )
    return made


def plan_for(bindings: Sequence[Binding], options: Distribution, ranks: int, interval: int) -> Plan:
    """Return who owns which weight."""
    return make_plan(
        [binding.curvature.size(binding.name) for binding in bindings],
        ranks,
        curvature_interval=interval,
        ranks_per_node=options.ranks_per_node,
    )


def interval_of(groups: Mapping[Tensor, Mapping[str, Any]]) -> int:
    """Return the steps between curvature updates that the plan reckons with."""
    # A mean over groups would be no better: the plan needs the order of magnitude.
    return int(next(iter(groups.values()))["curvature_interval"])


def shake_hands(
    bindings: Sequence[Binding],
    description: Description,
    options: Distribution,
    channel: Channel,
    groups: Mapping[Tensor, Mapping[str, Any]],
) -> tuple[Plan, list[Binding]]:
    """Compare with the other ranks: the same model, who owns what, which weights lack a curvature.

    Args:
        bindings: all bindings.
        description: what must be the same on all ranks.
        options: how the ranks work together.
        channel: the ranks.
        groups: parameter group of every parameter.

    Returns:
        The plan, and the bindings whose owner has no curvature. Curvature that others own is dropped.

    Raises:
        ValueError: the ranks disagree, a pair by parity is asked of an odd number of ranks, there are more
            than two sub-batches, or parameters are sharded in a way that is not known.
    """
    if options.pair == "parity" and channel.size % 2:
        raise ValueError(
            f"distributed: pair='parity' needs an even number of ranks, and there are {channel.size}; use "
            "pair='halves', or leave it out"
        )
    count = next(iter(groups.values()))["sub_batches"]
    if count > 2:
        raise ValueError(
            f"sub_batches={count} is for one process; several ranks split the batch in two, use sub_batches=2"
        )
    mine = {"description": description, "has": [binding.curvature.held for binding in bindings]}
    said = channel.gather_objects(mine, "the model and the options")
    check_agreement([each["description"] for each in said])
    _check_shards([param for binding in bindings for param in binding.params], channel)
    plan = plan_for(bindings, options, channel.size, interval_of(groups))
    lacking = []
    for index, (binding, owner) in enumerate(zip(bindings, plan.owners, strict=True)):
        has = said[owner]["has"][index]
        if owner != channel.rank:
            binding.curvature.drop()
        binding.curvature.ready = has
        if not has:
            lacking.append(binding)
    return plan, lacking


def _check_shards(params: Sequence[Tensor], channel: Channel) -> None:
    for param in params:
        if not is_sharded(param):
            continue
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        first = len(placements) == 1 and placements[0].is_shard(0)
        ranks = mesh.mesh.flatten().tolist() if first else []
        if ranks != dist.get_process_group_ranks(channel.group):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor with placements {placements} over "
                f"{mesh}; parameters may be sharded by fully_shard along dimension 0 over all ranks of the "
                "process group. Use that, or exclude the layer with layer_options"
            )
