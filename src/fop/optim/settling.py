"""How ranks compare notes before their first step, and after a state was loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fop.capture import is_sharded
from fop.distributed import Channel, LayerSize, Plan, make_plan, side_of
from fop.optim.agreement import Description, check_agreement
from fop.optim.block import Block
from fop.optim.distribution import Distribution

CURVATURE = ("A", "G", "A_inv", "G_inv")


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
    apart = dist.get_world_size(group) < dist.get_world_size()
    made: dist.ProcessGroup = dist.new_group(
        ranks, timeout=_timeout(group), backend=dist.get_backend(group), use_local_synchronization=apart
    )
    return made


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    # torch has no public way to ask; without it the new group waits as long as the backend does by default.
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return timeout
    return None


def plan_for(blocks: Sequence[Block], options: Distribution, ranks: int, interval: int) -> Plan:
    """Return who owns which block."""
    return make_plan(
        [size_of(block) for block in blocks],
        ranks,
        curvature_interval=interval,
        ranks_per_node=options.ranks_per_node,
    )


def interval_of(groups: Mapping[Tensor, Mapping[str, Any]]) -> int:
    """Return the steps between curvature updates that the plan reckons with."""
    # A mean over groups would be no better: the plan needs the order of magnitude.
    return int(next(iter(groups.values()))["curvature_interval"])


def size_of(block: Block) -> LayerSize:
    """Return the sizes of a block that the plan goes by."""
    groups, out_dim, in_dim = block.layer.matrix_shape
    shapes = block.layer.factor_shapes
    return LayerSize(
        block.name,
        groups,
        out_dim,
        in_dim,
        diagonal_A=len(shapes["A"]) == 2,
        diagonal_G="G" in shapes and len(shapes["G"]) == 2,
        single="G" not in shapes,
    )


def settle(
    blocks: Sequence[Block], description: Description, options: Distribution, channel: Channel, interval: int
) -> tuple[Plan, list[Block]]:
    """Compare notes with the other ranks: the same model, who owns what, which layers lack a curvature.

    Args:
        blocks: all blocks.
        description: what must be the same on all ranks.
        options: how the ranks work together.
        channel: the ranks.
        interval: steps between curvature updates.

    Returns:
        The plan, and the blocks whose owner has no curvature for them. Curvature that others own is dropped.

    Raises:
        ValueError: the ranks disagree, a pair by parity is asked of an odd number of ranks, or parameters are
            sharded in a way that is not known.
    """
    if options.pair == "parity" and channel.size % 2:
        raise ValueError(
            f"distributed: pair='parity' needs an even number of ranks, and there are {channel.size}; use "
            "pair='halves', or leave it out"
        )
    mine = {"description": description, "has": [block.holds_curvature for block in blocks]}
    said = channel.gather_objects(mine, "the model and the options")
    check_agreement([each["description"] for each in said])
    _check_shards([param for block in blocks for param in block.params], channel)
    plan = plan_for(blocks, options, channel.size, interval)
    lacking = []
    for index, (block, owner) in enumerate(zip(blocks, plan.owners, strict=True)):
        has = said[owner]["has"][index]
        if owner != channel.rank:
            for key in CURVATURE:
                block.state.pop(key, None)
        block.elsewhere = None if owner == channel.rank else has
        if not has:
            lacking.append(block)
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
