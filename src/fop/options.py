"""Options and parameters: checked when given, before anything is changed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fop.torch_internals import unwrapped

Schedule: TypeAlias = Callable[[int], float]
ParamsLike: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

# Measured in records/defaults; docs/defaults.md defends each in a line.
DEFAULTS: dict[str, Any] = {
    "lr": None,
    "step_length": "weight",
    "anneal": "auto",
    "momentum": None,
    "nesterov": None,
    "weight_decay": 0.0,
    "damping": None,
    "damping_kind": None,
    "stat_decay": None,
    "fisher": "empirical",
    "statistics_rows": "auto",
    "curvature_interval": None,
    "inverse_delay": 0,
    "sub_batches": 2,
    "beta": "adaptive",
    "eta": "adaptive",
    "kl_clip": 1e-3,
    "adamw_lr": None,
    "betas": (0.9, 0.999),
    "eps": None,
    "maximize": False,
    "loss_reduction": "mean",
    "max_grad_norm": None,
}

# What an option is that was not given (None), by ``step_length``; and the damping, by ``damping_kind``.
# AdamW's eps of 1e-17 is there for 0/0 alone: it is the root of the smallest float32 over 1 - betas[1].
BY_STEP_LENGTH: dict[str, dict[str, Any]] = {
    "weight": {
        "lr": 0.2,
        "momentum": 0.6,
        "nesterov": True,
        "damping_kind": "relative",
        "stat_decay": 0.5,
        "curvature_interval": 1,
        "adamw_lr": 0.03,
        "eps": 1e-17,
    },
    "paper": {
        "lr": 0.05,
        "momentum": 0.5,
        "nesterov": False,
        "damping_kind": "absolute",
        "stat_decay": 0.9,
        "curvature_interval": 100,
        "adamw_lr": 1e-3,
        "eps": 1e-8,
    },
}
# Many averages of few rows are as good as few of many; None is for all rows.
ROWS_BY_STEP_LENGTH = {"weight": 2, "paper": 16}
BY_DAMPING_KIND = {"relative": "adaptive", "absolute": 1e-3}
_CHOICES = {
    "step_length": BY_STEP_LENGTH.keys(),
    "damping_kind": BY_DAMPING_KIND.keys(),
    "loss_reduction": ("mean", "sum"),
    "fisher": ("empirical", "model"),
}

# Options that may be functions of the step, and those that all groups share.
SCHEDULED = ("damping", "curvature_interval")
ONE_FOR_ALL = ("step_length", "damping_kind", "kl_clip", "loss_reduction", "max_grad_norm", "sub_batches")

# Options that schedules change in many groups at once, and those whose ranges depend on each other.
_RATES = ("lr", "weight_decay")
_COUPLED = (
    "step_length",
    "kl_clip",
    "momentum",
    "nesterov",
    "beta",
    "sub_batches",
    "damping",
    "damping_kind",
)
_UNKNOWN = object()

# What a parameter group holds beside them: the first rate, the last one, and the number of steps taken.
_OWN = ("base_lr", "last_lr", "step")

# Options under other names, and those of other optimizers.
_ELSEWHERE = {
    "learning_rate": "use lr",
    "wd": "use weight_decay",
    "epsilon": "use eps",
    "beta1": "use betas=(beta1, beta2)",
    "beta2": "use betas=(beta1, beta2)",
    "amsgrad": "leave it out; the AdamW path has no such variant",
    "foreach": "leave it out; the optimizer chooses its kernels",
    "fused": "leave it out; the optimizer chooses its kernels",
    "capturable": "capturable is an argument of the constructor",
    "differentiable": "leave it out; a step cannot be differentiated",
    "dampening": "leave it out; momentum is that of torch.optim.SGD without dampening",
    "decoupled_weight_decay": "leave it out; weight_decay is always decoupled",
    "layer_options": "layer_options is an argument of the constructor",
    "distributed": "distributed is an argument of the constructor",
}


def check_names(names: Iterable[Any], owner: str, *, group: bool = False) -> None:
    """Raise for a name that is no option: TypeError, and ValueError for a key of a parameter group.

    A group may have keys of the user's own, and of schedulers, unless they look like a misspelt option or are
    options of another optimizer.
    """
    for name in names:
        if group and (not isinstance(name, str) or name in (*DEFAULTS, *_OWN, "params")):
            continue
        plain = name.lower().replace("-", "_").strip("_")
        near = difflib.get_close_matches(plain, (*DEFAULTS, *_ELSEWHERE), n=1, cutoff=0.8)
        # As max_momentum, or weight_decay_mult.
        longer = near and near[0] != plain and f"_{near[0]}_" in f"_{plain}_"
        if near and not longer:
            remedy = _ELSEWHERE.get(near[0], f"did you mean {near[0]}?")
        elif group:
            continue
        else:
            remedy = f"the options are {', '.join(DEFAULTS)}"
        raise (ValueError if group else TypeError)(f"{owner} has no option {name!r}: {remedy}")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with plain numbers in place of NumPy's, which a checkpoint could not load safely.

    Raises ValueError or TypeError for the first option outside its range; unknown keys are left alone.
    """
    _check_options(options)
    return {key: _plain(value) if key in (*DEFAULTS, *_OWN) else value for key, value in options.items()}


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options with those that were not given (None) as ``step_length`` says."""
    for name in ("step_length", "damping_kind"):
        if name == "step_length" or options[name] is not None:
            _check_choice(name, options[name])
    implied = BY_STEP_LENGTH[options["step_length"]]
    chosen = {name: value for name, value in options.items() if name not in implied or value is not None}
    chosen = {**implied, **chosen}
    if chosen["statistics_rows"] == "auto":
        chosen["statistics_rows"] = ROWS_BY_STEP_LENGTH[chosen["step_length"]]
    if chosen["damping"] is None:
        chosen["damping"] = BY_DAMPING_KIND[chosen["damping_kind"]]
    return chosen


def split_schedules(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """Return the options with functions of the step replaced by their value at step 0, and the functions."""
    schedules = {name: options[name] for name in SCHEDULED if callable(options.get(name))}
    return {**options, **{name: schedule(0) for name, schedule in schedules.items()}}, schedules


def _plain(value: Any) -> Any:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


def _check_choice(name: str, value: Any) -> None:
    allowed = _CHOICES[name]
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, allowed))}")


def _check_options(options: Mapping[str, Any]) -> None:  # noqa: PLR0912 - one branch an option
    for name in _CHOICES:
        if name in options:
            _check_choice(name, options[name])
    for name in ("lr", "weight_decay", "adamw_lr", "eps", "base_lr", "last_lr"):
        if name in options:
            _check_number(name, options[name], low=0.0)
    if "damping" in options and options["damping"] != "adaptive":
        _check_number("damping", options["damping"], low=0.0, instead="or 'adaptive'")
    elif "damping" in options and options.get("damping_kind") == "absolute":
        raise ValueError("damping='adaptive' has no units, and damping_kind is 'absolute'; give a number")
    for name in ("momentum", "stat_decay"):
        if name in options:
            _check_number(name, options[name], low=0.0, below=1.0)
    for name in ("nesterov", "maximize"):
        if name in options and not isinstance(options[name], bool):
            raise TypeError(f"{name}={options[name]!r} must be True or False")
    if not isinstance(options.get("anneal", True), bool) and options["anneal"] != "auto":
        raise TypeError(f"anneal={options['anneal']!r} must be True, False or 'auto'")
    for name in ("beta", "eta"):
        if name in options and options[name] != "adaptive":
            _check_number(name, options[name], low=0.0, instead="or 'adaptive'")
    for name, instead in (("kl_clip", "or None for no clip"), ("max_grad_norm", "or None")):
        if options.get(name) is not None:
            _check_number(name, options[name], low=0.0, strict=True, instead=instead)
    for name, least, unit in (
        ("curvature_interval", 1, "steps"),
        ("inverse_delay", 0, "steps"),
        ("sub_batches", 1, "sub-batches"),
        ("step", 0, "steps"),
    ):
        if name in options:
            count = options[name]
            if isinstance(count, bool) or not isinstance(count, numbers.Integral):
                raise TypeError(f"{name}={count!r} must be a whole number of {unit}, {least} or more")
            if count < least:
                raise ValueError(f"{name}={count} must be {least} or more {unit}")
    if options.get("statistics_rows") is not None:
        rows = options["statistics_rows"]
        if isinstance(rows, bool) or not isinstance(rows, numbers.Integral):
            raise TypeError(
                f"statistics_rows={rows!r} must be a whole number, 1 or more, or None for all rows"
            )
        if rows < 1:
            raise ValueError(f"statistics_rows={rows} must be 1 or more, or None for all rows")
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise TypeError(f"betas={betas!r} must be two numbers in [0, 1), as for torch.optim.AdamW")
        for beta in betas:
            _check_number("betas", beta, low=0.0, below=1.0)
    if options.get("sub_batches", 2) > 2 and options.get("beta", "adaptive") not in ("adaptive", 0.0):
        raise ValueError(
            f"beta={options['beta']!r} fixes the mixing of two sub-batches, and sub_batches="
            f"{options['sub_batches']}; use beta='adaptive', or sub_batches=2"
        )
    if options.get("step_length") == "weight":
        if options.get("kl_clip") not in (None, DEFAULTS["kl_clip"]):
            raise ValueError(
                f"kl_clip={options['kl_clip']!r} bounds the steps of step_length='paper', and step_length is "
                "'weight', whose lr is a bound already; leave kl_clip out, or give step_length='paper'"
            )
    elif options.get("nesterov") and options.get("momentum") == 0:
        raise ValueError("nesterov=True needs momentum > 0; got momentum=0")


def _check_number(
    name: str, value: Any, *, low: float, below: float = math.inf, strict: bool = False, instead: str = ""
) -> None:
    allowed = f"{'(' if strict else '['}{low:g}, {below:g})"
    remedy = f"{name}={value!r} must be a number in {allowed} {instead}".rstrip()
    if isinstance(value, Tensor):
        raise TypeError(f"{remedy}; convert the tensor with float({name})")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(remedy)
    # A NaN fails every comparison, so the test is for what is right.
    if not ((low < value if strict else low <= value) and value < below):
        raise ValueError(remedy)


def normalise(params: ParamsLike) -> tuple[list[dict[str, Any]], nn.Module | None, dict[Tensor, str]]:
    """Return parameter groups, the root module if one was given, and the names known so far."""
    if isinstance(params, nn.Module):
        params = unwrapped(params)
        named = list(params.named_parameters())
        if not named:
            raise ValueError(f"the module {type(params).__name__} has no parameters to train")
        return [{"params": [p for _, p in named]}], params, {p: name for name, p in named}
    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor; give an iterable of parameters, [param], or the module")
    entries = _ordered(params)
    if not entries:
        raise ValueError("params is empty; an iterator such as model.parameters() can be used only once")
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    names: dict[Tensor, str] = {}
    return [normalise_group(group, names) for group in groups], None, names


def _ordered(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, Set):
        raise TypeError("params is a set, whose order changes from run to run; give a list")
    return list(params)


def normalise_group(group: Any, names: dict[Tensor, str]) -> dict[str, Any]:
    """Return one group with a list of plain parameters; names of named parameters go into ``names``.

    As torch does since 2.6, names are kept in the group, too, as ``param_names``.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group must be a dict with the key 'params'; got {type(group).__name__}")
    given = group["params"]
    if isinstance(given, nn.Module):
        names |= {param: name for name, param in given.named_parameters()}
        given = list(given.parameters())
    entries = [given] if isinstance(given, Tensor) else _ordered(given)
    if not entries and not isinstance(given, Sequence):
        raise ValueError("a parameter group is empty; an iterator of parameters can be used only once")
    named = [isinstance(entry, tuple) for entry in entries]
    if any(named) and not all(named):
        raise ValueError(
            "a parameter group has names for some of its parameters; give names to all or to none"
        )
    plain = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    for param in plain:
        if not isinstance(param, Tensor):
            raise TypeError(f"params must hold tensors; got {type(param).__name__}")
    if not any(named):
        return {**group, "params": plain}
    names |= {param: name for name, param in entries}
    return {**group, "params": plain, "param_names": [name for name, _ in entries]}


def checked_group(
    given: Any, names: dict[Tensor, str], defaults: Mapping[str, Any], first: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """Return a new parameter group with checked options, and its functions of the step.

    ``first`` is the optimizer's first group; names of named parameters go into ``names``.
    """
    group, schedules = split_schedules(normalise_group(given, names))
    check_names(group, "a parameter group", group=True)
    if first is not None:
        if first["step_length"] != defaults["step_length"]:
            # Loaded from a checkpoint of the other.
            alike = {name: first[name] for name in ("damping", "statistics_rows")}
            defaults = {**defaults, **BY_STEP_LENGTH[first["step_length"]], **alike}
            group = {**{name: defaults[name] for name in (*BY_STEP_LENGTH["paper"], *alike)}, **group}
        defaults = {**defaults, **{name: first[name] for name in ONE_FOR_ALL}}
    if group.get("statistics_rows") == "auto":
        group["statistics_rows"] = ROWS_BY_STEP_LENGTH[defaults["step_length"]]
    options = {key: value for key, value in group.items() if key != "params"}
    plain = checked({**defaults, **options})
    group |= {key: value for key, value in plain.items() if key in options}
    for name in ONE_FOR_ALL:
        if name in options and options[name] != defaults[name]:
            raise ValueError(
                f"{name}={options[name]!r} in a parameter group: it is one for the whole step; give it "
                "to the constructor"
            )
    if first is not None and ("param_names" in group) != ("param_names" in first):
        raise ValueError("some parameter groups have named parameters; give names to all groups or to none")
    group |= {name: defaults[name] for name in ONE_FOR_ALL}
    group.setdefault("base_lr", group.get("lr", defaults["lr"]))
    group.setdefault("last_lr", group.get("lr", defaults["lr"]))
    group.setdefault("step", 0 if first is None else first["step"])
    return group, schedules


def recheck(groups: Sequence[dict[str, Any]], known: Sequence[tuple[Any, ...]]) -> None:
    """Check the options that were set in parameter groups since they were ``known``, as by a scheduler.

    Raises ValueError or TypeError for the first that is out of range, or not the same in all groups though it
    is one for the whole step; nothing has been changed then.
    """
    new: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        before = dict(zip(DEFAULTS, known[index], strict=True)) if index < len(known) else {}
        changed = {name: group[name] for name in DEFAULTS if group[name] is not before.get(name, _UNKNOWN)}
        if all(name in _RATES and type(v) is float and 0 <= v < math.inf for name, v in changed.items()):
            continue
        if isinstance(lr := changed.get("lr"), float) and -1e-12 * group["base_lr"] < lr < 0:
            # Schedulers that end at 0, such as LinearLR, may miss it by rounding.
            changed["lr"] = 0.0
        try:
            new[index] = checked({**{name: group[name] for name in _COUPLED}, **changed})
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{index}]: {error}") from None
    if new:
        check_shared([{**group, **new.get(index, {})} for index, group in enumerate(groups)], "param_groups")
    for index, options in new.items():
        groups[index].update(options)


def check_shared(groups: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise ValueError unless all parameter groups agree on the options of the whole step."""
    for name in ONE_FOR_ALL:
        for index, group in enumerate(groups):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{where}[{index}] has {name}={group[name]!r} and {where}[0] {groups[0][name]!r}; it is "
                    "one for the whole step: set it in all groups alike"
                )


def check_parameters(params: Sequence[Tensor], names: Mapping[Tensor, str], taken: set[Tensor]) -> None:
    """Raise ValueError or TypeError for parameters that no step could update, and for those given twice.

    Integer and quantised ones of a module are frozen for good and pass: they never have a gradient.
    """
    for index, param in enumerate(params):
        label = names.get(param, f"parameter {index}")
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{label} is uninitialised; run the lazy module once before making the optimizer"
            )
        label = f"{label} {tuple(param.shape)}"
        number = param.is_floating_point() or param.is_complex()
        if not number and not isinstance(param, nn.Parameter):
            raise TypeError(
                f"{label} has dtype {param.dtype}; only floating point and complex numbers can be trained; "
                "leave it out (a buffer?)"
            )
        if number and param.requires_grad and torch.finfo(param.dtype).bits < 16:
            raise TypeError(
                f"{label} has dtype {param.dtype}, in which no step can be added; freeze it with "
                "requires_grad_(False), or keep it in bfloat16 or more"
            )
        if param.layout is not torch.strided:
            raise ValueError(f"{label} has layout {param.layout}; only dense parameters are supported")
        if not param.is_leaf:
            raise ValueError(f"{label} is not a leaf tensor; give the parameter it was computed from")
        if param in taken:
            raise ValueError(f"{label} is in more than one parameter group; give each parameter once")
    for param, count in Counter(params).items():
        if count > 1:
            label = f"{names.get(param, 'a parameter')} {tuple(param.shape)}"
            raise ValueError(f"{label} is given {count} times; give each parameter once")
