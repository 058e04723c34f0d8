"""State dicts: checked before anything changes, restored in the precision they were saved in."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fop.capture import local
from fop.optim.block import NEVER, Block
from fop.optim.curvature import NOTHING_UNDER_WAY
from fop.optim.options import DEFAULTS

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_OURS = ("A", "G", "A_inv", "G_inv", "momentum_buffer")


def check_state_dict(
    saved: Any, groups: Sequence[Mapping[str, Any]], shapes: Mapping[Tensor, Shapes]
) -> None:
    """Raise ValueError unless ``saved`` fits these parameter groups.

    Args:
        saved: what `state_dict` of an optimizer gave.
        groups: the parameter groups that it would be loaded into.
        shapes: shapes of the factors of every weight whose layer is known already.
    """
    check_form(saved)
    if len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"the state_dict has {len(saved['param_groups'])} parameter groups, not {len(groups)}; "
            "make the optimizer with the same groups before loading"
        )
    needed = DEFAULTS.keys() | {"params", "step", "base_lr", "last_lr"}
    for index, (old, new) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if missing := needed - old.keys():
            raise ValueError(
                f"parameter group {index} of the state_dict lacks {sorted(missing)}: it was not saved by FOP"
            )
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"parameter group {index} of the state_dict has {len(old['params'])} parameters, not "
                f"{len(new['params'])}: it belongs to another model"
            )
        for key, param in zip(old["params"], new["params"], strict=True):
            label = f"parameter {key} (group {index}) of shape {tuple(param.shape)}"
            state = saved["state"].get(key, {})
            if "A_inv" in state and not all(
                isinstance(state.get(k), int) for k in ("refreshed_at", "refresh_at")
            ):
                raise ValueError(
                    f"the state of {label} needs whole numbers 'refreshed_at' and 'refresh_at': it was not "
                    "saved by FOP"
                )
            for name, allowed in _allowed_shapes(state, param, shapes.get(param)).items():
                _check_entry(state, name, allowed, label)


def check_form(saved: Any) -> None:
    """Raise ValueError unless ``saved`` is what `state_dict` of an optimizer gives."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"a state_dict is a dict with the keys 'state' and 'param_groups'; got "
            f"{sorted(saved) if isinstance(saved, Mapping) else repr(saved)}. Pass what "
            "optimizer.state_dict() returned"
        )


def _allowed_shapes(
    state: Mapping[str, Any], param: Tensor, known: Shapes | None
) -> dict[str, list[tuple[int, ...]]]:
    """Return the entries that ``state`` must have, given those it has, and the shapes they may have."""
    allowed: dict[str, list[tuple[int, ...]]] = {}
    if "momentum_buffer" in state:
        allowed["momentum_buffer"] = [tuple(param.shape)]
    if "complete" in state:
        allowed["complete"] = [()]
    if state.keys() & {"exp_avg", "exp_avg_sq", "step"}:
        allowed |= {"exp_avg": [tuple(param.shape)], "exp_avg_sq": [tuple(param.shape)], "step": [()]}
    if state.keys() & {"A", "G", "A_inv", "G_inv"}:
        shapes = known or _plausible(state, param)
        for name, shape in shapes.items():
            allowed[name] = [shape]
            if state.keys() & {"A_inv", "G_inv"}:
                allowed[f"{name}_inv"] = [shape]
    return allowed


def _plausible(state: Mapping[str, Any], param: Tensor) -> dict[str, tuple[int, ...]]:
    """Return factor shapes that fit a parameter whose layer is not known yet: those saved, if they fit."""
    A, G = state.get("A"), state.get("G")
    numel = param.numel()
    if isinstance(A, Tensor) and G is None and A.dim() == 3:
        return {"A": tuple(A.shape) if A.numel() in (numel, 2 * numel) else (1, 1, numel)}
    if isinstance(A, Tensor) and isinstance(G, Tensor) and min(A.dim(), G.dim()) > 1:
        (groups, columns), (_, out) = A.shape[:2], G.shape[:2]
        if groups * out * columns in (numel, numel + groups * out):
            square_A = (groups, columns, columns)[: A.dim()]
            return {"A": square_A, "G": (groups, out, out)[: G.dim()]}
    out = param.shape[0] if param.dim() > 0 else 1
    columns = numel // max(1, out)
    return {"A": (1, columns, columns), "G": (1, out, out)}


def _check_entry(state: Mapping[str, Any], name: str, allowed: list[tuple[int, ...]], label: str) -> None:
    value = state.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the state of {label} needs a tensor {name!r}; got {value!r}")
    if tuple(value.shape) not in allowed:
        raise ValueError(
            f"{name!r} of {label} has shape {tuple(value.shape)} in the state_dict and must have "
            f"{' or '.join(map(str, allowed))}: it belongs to another model, or to other layer_options"
        )


def restore_precision(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Put our tensors back as saved: torch casts every state tensor to its parameter's dtype."""
    for old, new in zip(saved["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    state[param][name] = value.to(param.device, _dtype(name, value, param), copy=True)


def enter_block(block: Block, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Let the state of an optimizer hold that of a block, which takes a step."""
    state[block.weight] = block.state
    for bias in block.params[1:]:
        # torch.distributed.checkpoint takes a parameter without any state for one that was left out.
        state.setdefault(bias, {})["in_block_of_weight"] = True


def make_block_state(
    block: Block,
    *,
    owned: bool,
    groups: Mapping[Tensor, Mapping[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """Make the state of a block's parameters as before its first step: no curvature, no momentum.

    Args:
        block: the block.
        owned: whether its curvature is kept in this process.
        groups: parameter group of every parameter.
        state: where to.
    """
    weight = block.weight
    for name, shape in block.layer.factor_shapes.items() if owned else ():
        for key in (name, f"{name}_inv"):
            dtype = _dtype(key, weight, weight)
            block.state[key] = torch.zeros(shape, dtype=dtype, device=local(weight).device)
    complete = torch.ones((), dtype=torch.bool, device=local(weight).device)
    block.state |= {"refreshed_at": NEVER, "refresh_at": 0, "complete": complete}
    if owned and groups[weight]["inverse_delay"] and "G" in block.layer.factor_shapes:
        block.state |= NOTHING_UNDER_WAY
    enter_block(block, state)
    for param in block.params:
        if groups[param]["momentum"]:
            dtype = _dtype("momentum_buffer", param, param)
            state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)


Places: TypeAlias = dict[Tensor, tuple[torch.device, torch.dtype]]


def note_places(state: Mapping[Tensor, dict[str, Any]], places: Places) -> None:
    """Note the device and dtype of every parameter that has a state."""
    places |= {param: (param.device, param.dtype) for param in state}


def follow_moves(state: Mapping[Tensor, dict[str, Any]], places: Places) -> None:
    """Move the state of parameters that have moved, as by ``model.to``, since ``places`` were noted."""
    for param, entries in state.items():
        if places.get(param) in (None, (param.device, param.dtype)):
            continue
        for name, value in entries.items():
            if isinstance(value, Tensor):
                entries[name] = value.to(param.device, _dtype(name, value, param))


def _dtype(name: str, value: Tensor, param: Tensor) -> torch.dtype:
    if name in ("step", "complete"):
        return value.dtype
    return torch.promote_types(param.dtype, torch.float32) if name in _OURS else param.dtype
