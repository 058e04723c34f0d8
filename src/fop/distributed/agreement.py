"""Whether all ranks have the same model and options; what they say of themselves, and where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fop.binding import Bindings
from fop.distributed.options import Distribution, portable
from fop.options import DEFAULTS

Description = dict[str, Any]


def describe(
    groups: Sequence[Mapping[str, Any]], bindings: Bindings, distribution: Distribution | None
) -> Description:
    """Return everything that must be the same on all ranks, by a name that a user understands.

    Raises:
        ValueError: the parameters of this rank are on several devices.
    """
    check_devices((param for group in groups for param in group["params"]), bindings.names)
    said: Description = {"the options of distributed": str(portable(distribution))}
    said["the number of parameter groups"] = len(groups)
    for index, group in enumerate(groups):
        for key in [*DEFAULTS, "step"]:
            said[f"{key} of parameter group {index}"] = group[key]
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


def check_agreement(said: Sequence[Description]) -> None:
    """Raise ValueError, naming the first difference, unless all ranks have said the same."""
    for rank, other in enumerate(said):
        first = said[0]
        for key in [*first, *(key for key in other if key not in first)]:
            here, there = first.get(key, "nothing"), other.get(key, "nothing")
            # Not `!=`: a NaN differs from itself.
            if repr(here) != repr(there):
                raise ValueError(
                    f"the ranks disagree on {key}: it is {here!r} on rank 0 and {there!r} on rank {rank}. "
                    "Build the model and the optimizer alike on all ranks"
                )


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
