"""State dicts: checked before anything changes, restored in the precision they were saved in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fop.binding import Binding, Bindings
from fop.capture import local
from fop.curvature import (
    AVERAGING_WEIGHT,
    KINDS,
    NEVER,
    NOISE,
    NOTHING_PENDING,
    entry_names,
    expected_entries,
)
from fop.layers import Layer
from fop.options import DEFAULTS, check_shared, checked
from fop.step_size import INITIAL_SIZE, REACH, REFERENCE_NORM

# Options that a state_dict of an earlier version lacks, and how it was without them.
_NEWER = {
    "sub_batches": 2,
    "step_length": "paper",
    "anneal": False,
    "damping_kind": "absolute",
    "statistics_rows": None,
    "fisher": "empirical",
}
_COUNTS = {"refreshed_at", "refresh_at", "inverse_at"}  # numbers of steps in the state of a weight


def check_state_dict(
    saved: Any, groups: Sequence[Mapping[str, Any]], layers: Mapping[Tensor, Layer]
) -> dict[str, Any]:
    """Return ``saved`` with the options that an earlier version did not have.

    ``layers`` are those known already, by weight. ValueError if it does not fit these parameter groups, or
    holds what no step could use.
    """
    check_form(saved)
    if len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"the state_dict has {len(saved['param_groups'])} parameter groups, not {len(groups)}; "
            "make the optimizer with the same groups before loading"
        )
    needed = DEFAULTS.keys() - {*_NEWER} | {"params", "step", "base_lr", "last_lr"}
    loaded = []
    for index, (old, new) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if missing := needed - old.keys():
            raise ValueError(
                f"parameter group {index} of the state_dict lacks {sorted(missing)}: it was not saved by FOP"
            )
        try:
            loaded.append(checked({**_NEWER, **old}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameter group {index} of the state_dict: {error}") from None
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"parameter group {index} of the state_dict has {len(old['params'])} parameters, not "
                f"{len(new['params'])}: it belongs to another model"
            )
        for key, param in zip(old["params"], new["params"], strict=True):
            label = f"parameter {key} (group {index}) of shape {tuple(param.shape)}"
            state = saved["state"].get(key, {})
            if not isinstance(state, Mapping):
                raise ValueError(f"the state of {label} must be a dict; got {state!r}")
            curvature = expected_entries(state, param.shape, layers.get(param))
            inverted = any(name in state for kind in KINDS.values() for name in kind.inverses)
            needed_counts = {"refreshed_at", "refresh_at"} if inverted else set()
            for name in _COUNTS & (state.keys() | needed_counts):
                if not isinstance(state.get(name), int):
                    raise ValueError(
                        f"the state of {label} needs a whole number {name!r}; got {state.get(name)!r}: it "
                        "was not saved by FOP"
                    )
            weight = state.get(AVERAGING_WEIGHT, 1.0)
            if not isinstance(weight, float) or not 0 < weight <= 1:
                raise ValueError(
                    f"the state of {label} needs a number in (0, 1] as {AVERAGING_WEIGHT!r}; got {weight!r}: "
                    "it was not saved by FOP"
                )
            size = state.get(INITIAL_SIZE, 0.0)
            if not isinstance(size, float) or not 0 <= size < math.inf:
                raise ValueError(
                    f"the state of {label} needs a number of at least 0 as {INITIAL_SIZE!r}; got {size!r}: "
                    "it was not saved by FOP"
                )
            for name, shape in {**_other_entries(state, param), **curvature}.items():
                _check_entry(state, name, shape, label)
    check_shared(loaded, "the state_dict's param_groups")
    return {**saved, "param_groups": loaded}


def check_form(saved: Any) -> None:
    """Raise ValueError unless ``saved`` is what `state_dict` of an optimizer gives."""
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"a state_dict is a dict with the keys 'state' and 'param_groups'; got "
            f"{sorted(saved) if isinstance(saved, Mapping) else repr(saved)}. Pass what "
            "optimizer.state_dict() returned"
        )
    state, groups = saved["state"], saved["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"'state' of a state_dict must be a dict; got a {type(state).__name__}")
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"'param_groups' of a state_dict must be a list of dicts; got {groups!r}")
    for index, group in enumerate(groups):
        if not isinstance(group.get("params", []), Sequence):
            raise ValueError(
                f"'params' of parameter group {index} of the state_dict must be a list of numbers; got "
                f"{group['params']!r}"
            )


def _other_entries(state: Mapping[str, Any], param: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the entries that a state must have beside its curvature, given those it has."""
    shape = tuple(param.shape)
    entries: dict[str, tuple[int, ...]] = {}
    if "momentum_buffer" in state:
        entries["momentum_buffer"] = shape
    entries |= {name: () for name in ("complete", REFERENCE_NORM) if name in state}
    entries |= {name: (2,) for name in (NOISE, REACH) if name in state}
    if state.keys() & {"exp_avg", "exp_avg_sq", "step"}:
        entries |= {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    return entries


def _check_entry(state: Mapping[str, Any], name: str, shape: tuple[int, ...], label: str) -> None:
    value = state.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"the state of {label} needs a tensor {name!r}; got {value!r}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name!r} of {label} has shape {tuple(value.shape)} in the state_dict and must have "
            f"{shape}: it belongs to another model, or to other layer_options"
        )
    # A square may overflow in float16; its parameter then stays where it is.
    value = local(value)
    if bool((value.isnan() if name == "exp_avg_sq" else ~value.isfinite()).any()):
        raise ValueError(
            f"{name!r} of {label} is not finite in the state_dict; load one from before training diverged"
        )
    if name == REACH and not 0 < (share := float(value[1])) <= 1:
        raise ValueError(
            f"the second number of {name!r} of {label} must be in (0, 1]; got {share}: not saved by FOP"
        )


def restore_precision(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Put our tensors back as saved: torch casts every state tensor to its parameter's dtype."""
    for old, new in zip(saved["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    state[param][name] = value.to(param.device, _dtype(name, value, param), copy=True)


def enter_state(binding: Binding, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Let the state of an optimizer hold that of a binding, which takes a step."""
    state[binding.weight] = binding.state
    for bias in binding.params[1:]:
        # torch.distributed.checkpoint takes a parameter without any state for one that was left out.
        state.setdefault(bias, {})["in_block_of_weight"] = True


def asks_for_state(groups: Sequence[Mapping[str, Any]], bindings: Bindings) -> bool:
    """Return whether a step is to do nothing but make the state.

    So does torch.distributed.checkpoint before it loads: it reads only into what is there.
    """
    if any(not group["lr"] == group["step"] == 0 for group in groups):
        return False
    if any(binding.recorder.samples for binding in bindings):
        return False
    gradients = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def make_state(
    binding: Binding,
    *,
    owned: bool,
    groups: Mapping[Tensor, Mapping[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """Make a binding's state as before the first step; the curvature's tensors only where it is ``owned``."""
    weight, curvature, own = binding.weight, binding.curvature, binding.state
    device = local(weight).device
    for name, shape in curvature.entries(binding.layer).items() if owned else ():
        own[name] = torch.zeros(shape, dtype=_dtype(name, weight, weight), device=device)
    complete = torch.ones((), dtype=torch.bool, device=device)
    own |= {"refreshed_at": NEVER, "refresh_at": 0, "complete": complete}
    if owned and groups[weight]["inverse_delay"] and curvature.by_inversion:
        own |= NOTHING_PENDING
        if groups[weight]["damping"] == "adaptive":
            dtype = _dtype("inverse_damping", weight, weight)
            own["inverse_damping"] = torch.zeros((), dtype=dtype, device=device)
    if owned:
        own[NOISE] = torch.zeros(2, dtype=_dtype(NOISE, weight, weight), device=device)
    if groups[weight]["step_length"] == "weight":
        dtype = _dtype(REFERENCE_NORM, weight, weight)
        own[REFERENCE_NORM] = torch.zeros((), dtype=dtype, device=device)
        own[REACH] = torch.tensor([0.0, 1.0], dtype=dtype, device=device)
        if owned:
            own[AVERAGING_WEIGHT] = 1.0
    enter_state(binding, state)
    for param in binding.params:
        if groups[param]["momentum"]:
            dtype = _dtype("momentum_buffer", param, param)
            state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)


Places: TypeAlias = dict[Tensor, tuple[torch.device, torch.dtype]]


def follow_moves(state: Mapping[Tensor, dict[str, Any]], params: Iterable[Tensor]) -> None:
    """Move the state of parameters that have moved, as by ``model.to``."""
    for param in params:
        entries = state.get(param, {})
        for name, value in entries.items():
            if isinstance(value, Tensor):
                entries[name] = value.to(param.device, _dtype(name, value, param))


def _dtype(name: str, value: Tensor, param: Tensor) -> torch.dtype:
    # Others may keep counts and masks in the state.
    if name == "step" or not (value.is_floating_point() or value.is_complex()):
        return value.dtype
    kept = "momentum_buffer", REFERENCE_NORM, REACH, NOISE, "inverse_damping"
    ours = name in kept or name in entry_names()
    return torch.promote_types(param.dtype, torch.float32) if ours else param.dtype
