"""State dicts: checked before anything changes, restored in the precision they were saved in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq")
_OURS = ("A", "G", "A_inv", "G_inv", "momentum_buffer")


def check_state_dict(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], options: set[str]
) -> None:
    """Raise ValueError unless ``saved`` fits these parameter groups.

    Args:
        saved: what `state_dict` of an optimizer gave.
        groups: the parameter groups that it would be loaded into.
        options: keys that every saved group must have.
    """
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"a state_dict has the keys 'state' and 'param_groups'; got {sorted(saved)}. Pass what "
            "optimizer.state_dict() returned"
        )
    if len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"the state_dict has {len(saved['param_groups'])} parameter groups, not {len(groups)}; "
            "make the optimizer with the same groups before loading"
        )
    for index, (old, new) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        missing = (options | {"step", "base_lr"}) - old.keys()
        if missing:
            raise ValueError(
                f"parameter group {index} of the state_dict lacks {sorted(missing)}: it was not saved by FOP"
            )
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"parameter group {index} of the state_dict has {len(old['params'])} parameters, not "
                f"{len(new['params'])}: it belongs to another model"
            )
        for key, param in zip(old["params"], new["params"], strict=True):
            _check_parameter(saved["state"].get(key, {}), param, f"parameter {key} (group {index})")


def _check_parameter(state: Mapping[str, Any], param: Tensor, label: str) -> None:
    for key in _LIKE_PARAMETER:
        if key in state and state[key].shape != param.shape:
            raise ValueError(
                f"{label} has shape {tuple(param.shape)}, but its {key} in the state_dict has "
                f"{tuple(state[key].shape)}: it belongs to another model"
            )
    if "A" not in state:
        return
    groups, out_dim, _ = state["G"].shape
    in_dim = param[0].numel() if param.dim() > 1 else 0
    fits = groups * out_dim == param.shape[0] and state["A"].shape[-1] in (in_dim, in_dim + 1)
    if not fits or state["A"].shape[0] != groups:
        raise ValueError(
            f"{label} has shape {tuple(param.shape)}, but its curvature in the state_dict has factors "
            f"{tuple(state['A'].shape)} and {tuple(state['G'].shape)}: it belongs to another model"
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
                elif name == "step":
                    state[param][name] = value.to(param.device, copy=True)
