"""The handshake of the ranks before their first step, and after a state was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from fop.binding import Binding, Bindings, Groups
from fop.capture import is_sharded
from fop.distributed.assignment import Plan, make_plan
from fop.distributed.buckets import Channel, explained
from fop.distributed.options import Distribution, portable
from fop.options import DEFAULTS
from fop.torch_internals import group_timeout

# What must be the same on all ranks, by a name that a user understands.
Description: TypeAlias = dict[str, Any]


def describe(
    groups: Sequence[Mapping[str, Any]], bindings: Bindings, distribution: Distribution | None
) -> Description:
    """Return what this rank says of its model and options; ValueError if it is on several devices."""
    check_devices((param for group in groups for param in group["params"]), bindings.names)
    said: Description = {"the options of distributed": str(portable(distribution))}
    said["the number of parameter groups"] = len(groups)
    for index, group in enumerate(groups):
        said |= {f"{key} of parameter group {index}": group[key] for key in [*DEFAULTS, "step"]}
        said[f"the number of parameters of group {index}"] = len(group["params"])
        for number, param in enumerate(group["params"]):
            name = bindings.names.get(param, f"parameter {number} of group {index}")
            said[f"parameter {number} of group {index}"] = name
            said[f"the shape of {name}"] = tuple(param.shape)
            said[f"the dtype of {name}"] = str(param.dtype)
            said[f"whether {name} is trained"] = param.requires_grad
            said[f"the kind of device of {name}"] = param.device.type
            said[f"how {name} steps"] = bindings.reasons.get(param, "")
    for each in bindings:
        said[f"the layer of {each.name}"] = (each.kind, each.curvature.entries(each.layer), each.modules)
    return said


def check_devices(params: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ValueError unless all parameters of this rank are on one device."""
    first: tuple[str, Any] | None = None
    for param in params:
        name = names.get(param, "a parameter")
        if first is not None and param.device != first[1]:
            raise ValueError(
                f"{name} is on {param.device} and {first[0]} on {first[1]}: between ranks all parameters of "
                "a rank must be on one device; move the model there, or give distributed=False"
            )
        first = first or (name, param.device)


def check_agreement(said: Sequence[Description]) -> None:
    """Raise ValueError, naming the first difference, unless all ranks have said the same."""
    first = said[0]
    for rank, other in enumerate(said):
        for key in {**first, **other}:
            here, there = first.get(key, "nothing"), other.get(key, "nothing")
            # Not `!=`: a NaN differs from itself.
            if repr(here) != repr(there):
                raise ValueError(
                    f"the ranks disagree on {key}: it is {here!r} on rank 0 and {there!r} on rank {rank}. "
                    "Build the model and the optimizer alike on all ranks"
                )


def open_channels(group: dist.ProcessGroup, sent: dict[str, float]) -> tuple[Channel, Channel | None]:
    """Open a channel between all ranks, and one between those of this rank's parity.

    The second is None where the number of ranks is odd. Both count bytes in ``sent``.
    """
    ranks = dist.get_process_group_ranks(group)
    everyone = Channel(_like(group, ranks), sent)
    if everyone.size % 2:
        return everyone, None
    own = everyone.rank % 2
    if len(ranks) == dist.get_world_size():
        # All ranks of the world are here, and take part in making both.
        return everyone, Channel([_like(group, ranks[side::2]) for side in (0, 1)][own], sent)
    return everyone, Channel(_like(group, ranks[own::2]), sent)


def _like(group: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup:
    """Return a new process group of these ranks with the backend and the timeout of another."""
    # Ranks outside of ``group`` know nothing of this. Only then: torch gives such groups names that differ
    # where some ranks are in more groups than others.
    subset = dist.get_world_size(group) < dist.get_world_size()
    timeout, backend = group_timeout(group), dist.get_backend(group)
    with explained("addresses (new_group)", group):
        made: dist.ProcessGroup = dist.new_group(
            ranks, timeout=timeout, backend=backend, use_local_synchronization=subset
        )
    return made


def plan_for(bindings: Sequence[Binding], options: Distribution, ranks: int, groups: Groups) -> Plan:
    """Return who owns which weight."""
    sizes = [binding.curvature.size(binding.name) for binding in bindings]
    # A mean over groups would be no better: the plan needs the order of magnitude.
    interval = int(next(iter(groups.values()))["curvature_interval"])
    return make_plan(sizes, ranks, curvature_interval=interval, ranks_per_node=options.ranks_per_node)


def shake_hands(
    bindings: Sequence[Binding],
    description: Description,
    options: Distribution,
    channel: Channel,
    groups: Groups,
) -> Plan:
    """Compare model and options with the other ranks, drop the curvature that others own; return the plan.

    ValueError if ranks disagree, or if options or shards are such that ranks cannot work together.
    """
    mine = {"description": description, "has": [binding.curvature.held for binding in bindings]}
    said = channel.gather_objects(mine, "the model and the options")
    check_agreement([each["description"] for each in said])
    # After the exchange, so that no rank waits for one that has raised an error.
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
    _check_shards([param for binding in bindings for param in binding.params], channel)
    plan = plan_for(bindings, options, channel.size, groups)
    for index, (binding, owner) in enumerate(zip(bindings, plan.owners, strict=True)):
        if owner != channel.rank:
            binding.curvature.drop()
        binding.curvature.ready = said[owner]["has"][index]
    return plan


def _check_shards(params: Sequence[Tensor], channel: Channel) -> None:
    for param in filter(is_sharded, params):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        first = len(placements) == 1 and placements[0].is_shard(0)
        ranks = mesh.mesh.flatten().tolist() if first else []
        if ranks != dist.get_process_group_ranks(channel.group):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor with placements {placements} over "
                f"{mesh}; parameters may be sharded by fully_shard along dimension 0 over all ranks of the "
                "process group. Use that, or exclude the layer with layer_options"
            )
