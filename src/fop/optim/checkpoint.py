"""State dicts: checked before anything changes, restored in the precision they were saved in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fop.optim.options import DEFAULTS

Shape: TypeAlias = tuple[int, int, int]

_OURS = ("A", "G", "A_inv", "G_inv", "momentum_buffer")


def check_state_dict(saved: Any, groups: Sequence[Mapping[str, Any]], shapes: Mapping[Tensor, Shape]) -> None:
    """Raise ValueError unless ``saved`` fits these parameter groups.

    Args:
        saved: what `state_dict` of an optimizer gave.
        groups: the parameter groups that it would be loaded into.
        shapes: gradient matrix (groups, out, in) of every weight whose layer is known already.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"a state_dict is a dict with the keys 'state' and 'param_groups'; got "
            f"{sorted(saved) if isinstance(saved, Mapping) else repr(saved)}. Pass what "
            "optimizer.state_dict() returned"
        )
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


def _allowed_shapes(
    state: Mapping[str, Any], param: Tensor, known: Shape | None
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
        rows = param.shape[0] if param.dim() > 1 else 0
        row = param.numel() // max(1, rows)
        matrices = [known] if known else [(0, rows, row), (0, rows, row + 1)]
        # Only grouped convolutions have more than one block; without the layer the factors tell how many.
        G = state.get("G")
        blocks = known[0] if known else (G.shape[0] if isinstance(G, Tensor) and G.dim() == 3 else 1)
        out = known[1] if known else rows // max(1, blocks)
        columns = sorted({in_dim for _, _, in_dim in matrices})
        allowed["A"] = [(blocks, size, size) for size in columns]
        allowed["G"] = [(blocks, out, out)]
        if state.keys() & {"A_inv", "G_inv"}:
            A = state.get("A")
            allowed["A_inv"] = [tuple(A.shape)] if isinstance(A, Tensor) else allowed["A"]
            allowed["G_inv"] = allowed["G"]
    return allowed


def _check_entry(state: Mapping[str, Any], name: str, allowed: list[tuple[int, ...]], label: str) -> None:
    value = state.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the state of {label} needs a tensor {name!r}; got {value!r}")
    if tuple(value.shape) not in allowed:
        raise ValueError(
            f"{name!r} of {label} has shape {tuple(value.shape)} in the state_dict and must have "
            f"{' or '.join(map(str, allowed))}: it belongs to another model"
        )


def restore_precision(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Put our tensors back as saved: torch casts every state tensor to its parameter's dtype."""
    for old, new in zip(saved["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            dtype = torch.promote_types(param.dtype, torch.float32)
            for name, value in saved["state"].get(key, {}).items():
                if name in _OURS:
                    state[param][name] = value.to(param.device, dtype, copy=True)
                elif name in ("step", "complete"):
                    state[param][name] = value.to(param.device, copy=True)
