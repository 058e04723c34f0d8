"""What an optimizer may be made of; for bad input an error with value, range and remedy."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from contract import LR, Make, every, ours, saved, train, trained
from fop import FOP, KFAC
from models import Mixed, assert_equal, batch, loss_of, mlp, snapshot, train_step, weights

NAN, INF = math.nan, math.inf


def hooks(model: nn.Module) -> int:
    """Hooks anywhere: on modules, on parameters, or for all modules of the process."""
    here = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    here += sum(
        len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters()
    )
    everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    return here + sum(len(registered) for registered in everywhere)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    before = hooks(nn.Sequential())
    yield
    nn.Identity()(0)  # the hook that waits for a first forward pass leaves with one
    if hooks(nn.Sequential()) > before:  # or its owner still hangs in a traceback
        gc.collect()
        nn.Identity()(0)
    assert hooks(nn.Sequential()) <= before


def says(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


# --- every form of parameters ------------------------------------------------------------------------------

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "generator": lambda model: (p for p in model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "dict-values": lambda model: dict(model.named_parameters()).values(),
    "named": lambda model: model.named_parameters(),
    "one-group": lambda model: [{"params": model.parameters(), "lr": LR}],
    "groups": lambda model: [{"params": list(model.parameters())[:3]}, {"params": [*model.parameters()][3:]}],
    "named-groups": lambda model: [{"params": model.named_parameters()}],
    "a-group-each": lambda model: [{"params": p} for p in model.parameters()],
    "children": lambda model: [
        {"params": [model.shift]},
        *({"params": child.parameters()} for child in model.children()),
    ],
    "with-an-empty-group": lambda model: [{"params": []}, {"params": model.parameters()}],
}


@every
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameters_gives_the_same_run(make: Make, form: str) -> None:
    expected, _ = trained(make)
    model = Mixed()
    optimizer = make(FORMS[form](model), lr=9.0 if form == "one-group" else LR)
    assert isinstance(optimizer, Optimizer)
    train(model, optimizer, range(3))
    assert_equal(weights(model), weights(expected))


@ours
def test_module_gives_the_same_run(library: type[FOP]) -> None:
    expected, _ = trained(library)
    model = Mixed()
    train(model, library(model), range(3))
    assert_equal(weights(model), weights(expected))


def test_kfac_is_fop_with_beta_0_and_eta_1() -> None:
    options: dict[str, Any] = {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.01,
        "curvature_interval": 3,
    }
    expected, _ = trained(KFAC, 8, **options)
    # Without a second gradient an adaptive η is 1.
    for mixing in ({"beta": 0.0, "eta": 1.0}, {"beta": 0.0}):
        assert_equal(weights(trained(FOP, 8, **mixing, **options)[0]), weights(expected))
    other, _ = trained(FOP, 8, **options)
    assert not torch.equal(other.first.weight, expected.first.weight)


@every
def test_options_of_a_group_go_before_the_defaults(make: Make) -> None:
    model = Mixed()
    first, *rest = model.parameters()
    optimizer = make([{"params": [first], "lr": 0.5, "weight_decay": 0.1, "tag": "mine"}, {"params": rest}])
    one, two = optimizer.param_groups
    assert (one["lr"], one["weight_decay"], one["tag"]) == (0.5, 0.1, "mine")
    assert (two["lr"], two["weight_decay"]) == (LR, 0.0)
    assert one["params"] == [first] and two["params"] == rest
    assert optimizer.defaults["lr"] == LR


@every
def test_names_are_kept_in_the_groups(make: Make) -> None:
    """Since torch 2.6: `named_parameters()` leaves its names in the groups and in the state."""
    model = Mixed()
    optimizer = make(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert "param_names" not in make(Mixed().parameters()).param_groups[0]


@every
def test_repr_names_the_class_and_every_option(make: Make) -> None:
    _, optimizer = trained(make, lr=0.125)
    text = repr(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (")
    assert "Parameter Group 0" in text and "lr: 0.125" in text
    for option in optimizer.defaults:
        assert f" {option}: " in text
    assert str(optimizer) == text


def test_numbers_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    model = mlp()
    options: dict[str, Any] = {
        "lr": np.float64(0.1),
        "eps": np.float32(0.1),
        "curvature_interval": np.int64(3),
    }
    functions: dict[str, Any] = {
        "damping": lambda step: np.float64(0.1),
        "curvature_interval": lambda step: np.int64(2),
    }
    groups = [
        {"params": model[0].parameters(), "lr": np.float32(0.2)},
        {"params": model[2].parameters(), **functions},
    ]
    optimizer = FOP(groups, damping=np.float32(0.1), **options)
    train_step(model, optimizer, *batch())
    saved(optimizer.state_dict())  # refuses whatever is not a plain number


# --- options -----------------------------------------------------------------------------------------------

ZERO_OR_MORE, SHARE = "[0, inf)", "[0, 1)"
MIXING, CLIP, WHOLE = "[0, inf) or 'adaptive'", "(0, inf) or None", "1 or more"
OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    *[(name, value, ValueError, ZERO_OR_MORE) for name in ("lr", "damping", "weight_decay", "adamw_lr", "eps")
      for value in (-0.1, NAN, INF, -INF)],
    *[(name, value, ValueError, SHARE) for name in ("stat_decay", "momentum")
      for value in (1.0, -0.1, NAN, 2)],
    *[("curvature_interval", value, ValueError, WHOLE) for value in (0, -5)],
    *[("curvature_interval", value, TypeError, WHOLE) for value in (2.5, True, "10")],
    *[("inverse_delay", value, error, "must be") for value, error in ((-1, ValueError), (1.5, TypeError),
                                                                     (True, TypeError))],
    *[("kl_clip", value, ValueError, CLIP) for value in (0.0, -1e-3, NAN)],
    *[("beta", value, ValueError, MIXING) for value in (-0.1, NAN)],
    ("beta", "auto", TypeError, MIXING),
    ("eta", NAN, ValueError, MIXING),
    ("eta", None, TypeError, MIXING),
    *[("betas", value, ValueError, SHARE) for value in ((0.9, 1.0), (NAN, 0.9))],
    *[("betas", value, TypeError, SHARE) for value in (0.9, (0.9,))],
    ("nesterov", 1, TypeError, "True or False"),
    ("maximize", "yes", TypeError, "True or False"),
    # Only some options may be functions.
    *[("lr", value, TypeError, ZERO_OR_MORE) for value in ("0.1", True, len)],
    ("damping", 1j, TypeError, ZERO_OR_MORE),
    *[("loss_reduction", value, ValueError, "'mean' or 'sum'") for value in ("max", None)],
    *[("step_length", value, ValueError, "'weight' or 'paper'") for value in ("kl", None, [])],
    *[("damping_kind", value, ValueError, "'relative' or 'absolute'") for value in ("pi", True)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "allowed"), OPTIONS)
def test_option_out_of_range(name: str, value: Any, error: type[Exception], allowed: str) -> None:
    model = mlp()
    for given in (model, list(model.parameters())):
        with pytest.raises(error) as caught:
            FOP(given, **{name: value})
        pair = isinstance(value, tuple) and len(value) > 1
        bad = next(v for v in value if not 0 <= v < 1) if pair else value
        says(caught, f"{name}=", repr(value) if error is TypeError else str(bad), allowed)
    if name != "inverse_delay":
        with pytest.raises(error) as caught:
            FOP([{"params": model[0].parameters()}, {"params": model[2].parameters(), name: value}])
        says(caught, f"{name}=")
    assert hooks(model) == 0
    FOP(model)


VALUES: list[tuple[str, Any, Any, type[Exception]]] = [
    ("damping", 0.1, -1.0, ValueError),
    ("damping", 0.1, "0.1", TypeError),
    ("damping", 0.1, None, TypeError),
    ("curvature_interval", 1, 0, ValueError),
    ("curvature_interval", 1, 2.5, TypeError),
]


@pytest.mark.parametrize(("name", "good", "bad", "error"), VALUES)
def test_function_with_a_value_out_of_range(name: str, good: Any, bad: Any, error: type[Exception]) -> None:
    """The constructor raises; later the step that asks for it, which names the option and changes nothing."""
    model = mlp()
    with pytest.raises(error, match=name):
        FOP(model, **{name: lambda step: bad})
    with pytest.raises(TypeError):
        FOP(model, **{name: lambda: good})
    optimizer = FOP(model, **{name: lambda step: bad if step == 2 else good})
    for seed in range(2):
        train_step(model, optimizer, *batch(6, seed))
    before, state = weights(model), snapshot(optimizer)
    with pytest.raises(error, match=name):
        train_step(model, optimizer, *batch(6, 2))
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer), state)


@every
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_negative_options_are_refused(make: Make, option: str) -> None:
    with pytest.raises(ValueError, match=r"-1\.0"):
        make([nn.Parameter(torch.ones(2, 3))], **{option: -1.0})


@pytest.mark.parametrize("lr", [torch.tensor(0.1), nn.Parameter(torch.tensor(0.1))])
def test_tensor_lr(lr: Tensor) -> None:
    with pytest.raises(TypeError) as caught:
        FOP(mlp(), lr=lr)  # type: ignore[arg-type]
    says(caught, "lr=", "[0, inf)", "float(lr)")


def test_options_that_follow_from_the_length_of_a_step() -> None:
    """None is as if the option was not given."""
    (group,) = FOP(mlp()).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["stat_decay"]) == (0.2, 0.6, True, 0.5)
    assert (group["damping"], group["damping_kind"], group["eps"]) == ("adaptive", "relative", 1e-17)
    assert (group["statistics_rows"], group["anneal"]) == (2, "auto")
    (paper,) = FOP(mlp(), step_length="paper").param_groups
    assert (paper["lr"], paper["momentum"], paper["nesterov"], paper["stat_decay"]) == (0.05, 0.5, False, 0.9)
    assert (paper["damping"], paper["damping_kind"], paper["eps"]) == (1e-3, "absolute", 1e-8)
    assert paper["statistics_rows"] == 16
    (given,) = FOP(mlp(), None, step_length="paper", momentum=0.0, damping=None).param_groups
    assert given == {**paper, "params": given["params"], "momentum": 0.0}
    (absolute,) = FOP(mlp(), damping_kind="absolute").param_groups
    assert absolute["damping"] == 1e-3


@ours
def test_the_papers_own_values(library: type[FOP]) -> None:
    (group,) = library.paper(mlp()).param_groups
    options: dict[str, Any] = {"damping": 1e-4, "curvature_interval": 150, "statistics_rows": None}
    expected = library(mlp(), 0.05, step_length="paper", **options)
    assert {**group, "params": 0} == {**expected.param_groups[0], "params": 0}
    assert type(library.paper(mlp())) is library
    (group,) = library.paper(mlp(), 0.1, damping=1e-2).param_groups
    assert (group["lr"], group["damping"], group["curvature_interval"]) == (0.1, 1e-2, 150)


def test_kl_clip_of_another_length() -> None:
    with pytest.raises(ValueError) as caught:
        FOP(mlp(), kl_clip=1e-2)
    says(caught, "kl_clip=0.01", "step_length='paper'", "leave kl_clip out")
    FOP(mlp(), kl_clip=None)


def test_nesterov_without_momentum() -> None:
    with pytest.raises(ValueError) as caught:
        FOP.paper(mlp(), momentum=0.0, nesterov=True)
    says(caught, "nesterov=True", "momentum > 0", "momentum=0")


@ours
def test_unknown_keyword(library: type[FOP]) -> None:
    with pytest.raises(TypeError, match="dampening"):
        library(mlp(), 0.1, dampening=0.5)
    with pytest.raises(TypeError):
        library(mlp(), 0.1, 0.9)  # type: ignore[misc]  # options by name only


@pytest.mark.parametrize("name", ["beta", "eta"])
def test_kfac_takes_no_mixing(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        KFAC(mlp(), **{name: 0.5})
    says(caught, name, "Use FOP")


@pytest.mark.parametrize("option", [{"kl_clip": 0.5}, {"kl_clip": None}, {"loss_reduction": "sum"}])
def test_options_of_the_whole_step_in_a_group_are_refused(option: dict[str, Any]) -> None:
    model = mlp()
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}.*constructor"):
        FOP([{"params": model.parameters(), **option}], step_length="paper")
    FOP([{"params": model.parameters(), **option}], step_length="paper", **option)


# --- parameters that are refused ---------------------------------------------------------------------------


def exhausted() -> Any:
    params = mlp().parameters()
    list(params)
    return params


def shared_between_groups() -> Any:
    model = mlp()
    return [{"params": model.parameters()}, {"params": model[2].parameters()}]


def twice() -> Any:
    model = mlp()
    return [*model.parameters(), model[0].weight]


def half_named() -> Any:
    return [*mlp().named_parameters(), nn.Parameter(torch.zeros(2))]


class Holder(nn.Module):
    """A module with a parameter of any dtype."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.fine = nn.Linear(2, 2)
        self.odd = nn.Parameter(parameter)


REAL = "floating point and complex"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "empty": (list, ValueError, ("empty", "model.parameters()")),
    "no-parameters": (nn.ReLU, ValueError, ("ReLU", "no parameters")),
    "exhausted": (exhausted, ValueError, ("empty", "only once")),
    "exhausted-group": (lambda: [{"params": exhausted()}], ValueError, ("empty", "only once")),
    "half-named": (half_named, ValueError, ("names for some", "to all or to none")),
    "group-without-names": (
        lambda: [{"params": mlp().named_parameters()}, {"params": mlp().parameters()}], ValueError, ()
    ),
    "twice": (twice, ValueError, ("(6, 5)", "2 times", "give each parameter once")),
    "two-groups": (shared_between_groups, ValueError, ("(3, 6)", "more than one parameter group", "once")),
    "integer": (lambda: [torch.zeros(2, dtype=torch.int64)], TypeError, ("int64", REAL)),
    "float8": (lambda: Holder(torch.zeros(2).to(torch.float8_e5m2)), TypeError, ("odd", "float8", "freeze")),
    "boolean": (lambda: [torch.zeros(2, dtype=torch.bool)], TypeError, ("bool", REAL)),
    "not-a-leaf": (lambda: [mlp()[0].weight * 2], ValueError, ("(6, 5)", "leaf", "computed from")),
    "sparse": (lambda: [torch.eye(3).to_sparse().requires_grad_()], ValueError, ("sparse", "dense")),
    "tensor": (lambda: mlp()[0].weight, TypeError, ("single tensor", "[param]")),
    "strings": (lambda: ["weight"], TypeError, ("tensors", "str")),
    "set": (lambda: set(mlp().parameters()), TypeError, ("set",)),
    "set-in-a-group": (lambda: [{"params": set(mlp().parameters())}], TypeError, ("set",)),
    "group-without-params": (lambda: [{"lr": 0.1}], TypeError, ("'params'",)),
    "mixed": (lambda: [{"params": mlp().parameters()}, mlp()[0].weight], TypeError, ("'params'",)),
    "lazy": (lambda: nn.LazyLinear(3), ValueError, ("weight", "uninitialised", "run the lazy module once")),
    "sparse-embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)),
        ValueError,
        ("sparse=True", "sparse=False", "SparseAdam"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_parameters_that_cannot_be_trained(case: str) -> None:
    make, error, parts = REFUSED[case]
    given = make()
    installed = hooks(given) if isinstance(given, nn.Module) else 0  # a lazy module has its own
    other_model = mlp()
    other = FOP(other_model)
    with pytest.raises(error) as caught:
        FOP(given)
    says(caught, *parts)
    if REAL in parts:
        assert "leave it out (a buffer?)" in str(caught.value)
    if isinstance(given, nn.Module):
        assert hooks(given) == installed
    train_step(other_model, other, *batch())


# What torch.optim itself refuses (of "twice" it only warns).
TORCH = ["tensor", "empty", "exhausted", "strings", "set-in-a-group", "not-a-leaf", "two-groups",
         "half-named", "group-without-names"]  # fmt: skip


@every
@pytest.mark.parametrize("case", TORCH)
def test_parameters_that_every_optimizer_refuses(make: Make, case: str) -> None:
    given, error, _ = REFUSED[case]
    with pytest.raises(error):
        make(given())


@every
def test_a_parameter_given_twice_is_pointed_out(make: Make) -> None:
    """torch warns that this will be an error; ours is one."""
    with warnings.catch_warnings(), pytest.raises((UserWarning, ValueError), match=r"duplicate|2 times"):
        warnings.simplefilter("error")
        make(twice())


# --- groups added later ------------------------------------------------------------------------------------

# Lists of groups are no group, owners of an added group are looked for at the next forward pass, and a group
# may be empty, as with torch.optim.
NO_BAD_GROUPS = {"exhausted-group", "two-groups", "mixed", "group-without-params", "sparse-embedding",
                 "empty", "no-parameters", "group-without-names", "set-in-a-group"}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in NO_BAD_GROUPS])
def test_bad_group_added_later_changes_nothing(case: str) -> None:
    make, error, _ = REFUSED[case]
    given = make()
    model = mlp()
    optimizer = FOP(model)
    if case == "tensor":
        given = model[0].weight  # one tensor is a fine group, but this one is in a group already
        error = ValueError
    before, installed = snapshot(optimizer), hooks(model)
    rows = optimizer.summary().rows
    with pytest.raises(error):
        optimizer.add_param_group({"params": given})
    with pytest.raises(ValueError, match="damping=-1"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "damping": -1})
    assert_equal(snapshot(optimizer), before)
    assert hooks(model) == installed
    assert optimizer.summary().rows == rows
    train_step(model, optimizer, *batch())


@every
def test_bad_groups_added_in_mid_training_change_nothing(make: Make) -> None:
    model, optimizer = trained(make)
    before = snapshot(optimizer)
    leaf = nn.Parameter(torch.ones(2, 3))
    for group, error in (
        ([leaf], TypeError),
        ({"params": {leaf}}, TypeError),
        ({"params": [leaf * 2]}, ValueError),
        ({"params": [model.shift]}, ValueError),
        ({"params": ["weight"]}, TypeError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
    assert_equal(snapshot(optimizer), before)


@pytest.mark.parametrize("case", ["empty", "no-parameters"])
def test_empty_group_changes_no_step(case: str) -> None:
    """A list of parameters that were filtered out; no step and no report minds it."""
    model, plain = mlp(), mlp()
    optimizer, other = FOP([{"params": []}, {"params": model.parameters()}]), FOP(plain)
    optimizer.add_param_group({"params": REFUSED[case][0]()})
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
        train_step(plain, other, *batch(6, seed))
    assert_equal(weights(model), weights(plain))
    assert len(optimizer.summary().rows) == 4


# --- sparse gradients --------------------------------------------------------------------------------------


def test_sparse_gradients_at_run_time() -> None:
    """From bare parameters the module is not known; nothing may have moved when the error comes."""
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = FOP(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="sparse=False"):
        for _ in range(2):  # the first forward pass may say it, or else the step
            model(torch.tensor([1, 2, 3])).square().sum().backward()
            optimizer.step()
    assert_equal(weights(model), before)


def test_sparse_gradient_given_by_hand() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    before, state = weights(model), snapshot(optimizer)
    loss_of(model, *batch()).backward()
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(ValueError, match=r"2\.weight.*sparse"):
        optimizer.step()
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state["state"])


# --- what failed ------------------------------------------------------------------------------------------


def test_failed_constructor_leaves_its_parameters_free() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    with pytest.raises(ValueError, match="sparse") as caught:
        FOP(model)
    optimizer = FOP(model[0])  # while the failed one may still hang in the traceback
    assert str(caught.value)
    assert optimizer.summary().rows[0].path == "FOP"
