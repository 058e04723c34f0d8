"""Options under wrong names, and options that are set in the groups while training: found, not ignored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR
from torch.optim.swa_utils import SWALR

from contract import Make, every, ours, saved
from fop import FOP, KFAC
from models import assert_differs, assert_equal, batch, loss_of, mlp, snapshot, train_step, weights

NAN = math.nan

# --- names -------------------------------------------------------------------------------------------------

# What is wrong, and what to do.
NAMES: dict[str, str] = {
    "learning_rate": "use lr",
    "learning-rate": "use lr",
    "LR": "did you mean lr?",
    "weigth_decay": "did you mean weight_decay?",
    "weightdecay": "did you mean weight_decay?",
    "wd": "use weight_decay",
    "dampng": "did you mean damping?",
    "momentun": "did you mean momentum?",
    "nestrov": "did you mean nesterov?",
    "curvature_intervall": "did you mean curvature_interval?",
    "adam_lr": "did you mean adamw_lr?",
    "beta1": "use betas=",
    "epsilon": "use eps",
    "foreach": "leave it out",
    "fused": "leave it out",
    "differentiable": "cannot be differentiated",
    "amsgrad": "leave it out",
    "dampening": "torch.optim.SGD",
    "decoupled_weight_decay": "always decoupled",
}


@ours
@pytest.mark.parametrize("name", NAMES)
def test_wrong_name_given_to_the_constructor(name: str, library: type[FOP]) -> None:
    with pytest.raises(TypeError) as caught:
        library(mlp(), **{name: 0.1})
    assert f"{library.__name__} has no option {name!r}: " in str(caught.value)
    assert NAMES[name] in str(caught.value)


def test_name_that_resembles_none() -> None:
    with pytest.raises(TypeError, match=r"no option 'warmup': the options are lr, .*max_grad_norm"):
        FOP(mlp(), warmup=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "layer_options", "distributed"])
def test_wrong_name_in_a_group(name: str, later: bool) -> None:
    model = mlp()
    group = {"params": model[2].parameters(), name: 0.1}
    known = FOP(model[0])
    before = snapshot(known)
    with pytest.raises(ValueError) as caught:
        if later:
            known.add_param_group(group)
        else:
            FOP([{"params": model[0].parameters()}, group])
    assert f"a parameter group has no option {name!r}: " in str(caught.value)
    assert NAMES.get(name, "argument of the constructor") in str(caught.value)
    assert_equal(snapshot(known), before)
    known.add_param_group({"params": model[2].parameters()})
    train_step(model, known, *batch())


# Written by torch's schedulers, by timm, BERT, MAE, DINO, Megatron; or somebody's marks.
FREE = [
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "param_names", "name"),
    *("lr_scale", "lr_mult", "lr_multiplier", "wd_mult", "wd_multiplier", "weight_decay_mult"),
    *("is_last_layer", "layer_id", "group_name", "tag", "use_muon", "rank", "is_expert_parallel"),
    *("no_weight_decay", "steps"),
]  # fmt: skip


@every
def test_groups_keep_keys_of_others(make: Make) -> None:
    model, clean = mlp(), mlp()
    # The option ``anneal`` looks for initial_lr.
    mark: dict[str, Any] = dict.fromkeys(set(FREE) - {"param_names", "initial_lr"}, 0.5)
    optimizer = make([{"params": model.parameters(), **mark, 7: "seven"}])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **mark})
    other = make(clean.parameters())
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
        train_step(clean, other, *batch(6, seed))
    assert_equal(weights(model), weights(clean))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in mark} == mark


@every
def test_groups_that_schedulers_have_written_to_make_an_optimizer(make: Make) -> None:
    """`SGD(other.param_groups)`, as scripts make one optimizer from another of the same kind."""
    model = mlp()
    optimizer = make(model.named_parameters())
    OneCycleLR(optimizer, 0.1, total_steps=10)
    SWALR(optimizer, 0.05)
    groups = [dict(group) for group in optimizer.param_groups]
    assert {"initial_lr", "max_lr", "min_lr", "max_momentum", "swa_lr"} <= groups[0].keys()
    del optimizer
    again = make([{**group, "params": list(model.named_parameters())} for group in groups])
    before = weights(model)
    train_step(model, again, *batch())
    assert_differs(before, weights(model))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "damping", "adamw_lr", "eps", "base_lr", "last_lr"])
@pytest.mark.parametrize("value", [-3.0, NAN, math.inf])
def test_rate_of_a_group_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FOP([{"params": mlp().parameters(), name: value}])


# --- options that are set between steps --------------------------------------------------------------------

WRONG: list[tuple[str, Any, type[Exception], str]] = [
    *[(name, value, ValueError, r"must be a number in \[0, inf\)")
      for name in ("lr", "weight_decay", "damping", "adamw_lr", "eps") for value in (NAN, -0.1, math.inf)],
    *[("momentum", value, ValueError, r"\[0, 1\)") for value in (1.0, NAN, -0.5)],
    ("stat_decay", NAN, ValueError, r"\[0, 1\)"),
    ("kl_clip", 0.0, ValueError, r"\(0, inf\)"),
    ("max_grad_norm", NAN, ValueError, r"\(0, inf\)"),
    ("beta", NAN, ValueError, "adaptive"),
    ("eta", "auto", TypeError, "adaptive"),
    ("betas", (0.9, NAN), ValueError, r"\[0, 1\)"),
    ("betas", None, TypeError, r"\[0, 1\)"),
    ("lr", None, TypeError, "None must be"),
    ("lr", "0.1", TypeError, "'0.1' must be"),
    ("lr", torch.tensor(0.2), TypeError, r"float\(lr\)"),
    ("nesterov", "yes", TypeError, "True or False"),
    ("step_length", "kl", ValueError, "'weight' or 'paper'"),
    ("damping_kind", None, ValueError, "'relative' or 'absolute'"),
    ("kl_clip", 1e-2, ValueError, "step_length='paper'"),
    ("curvature_interval", 0, ValueError, "1 or more"),
    ("inverse_delay", 1.5, TypeError, "whole number"),
    ("sub_batches", 0, ValueError, "1 or more"),
    ("loss_reduction", "max", ValueError, "'mean' or 'sum'"),
]  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("name", "value", "error", "says"), WRONG)
def test_option_set_to_a_bad_value(
    name: str, value: Any, error: type[Exception], says: str, which: int
) -> None:
    """The next step says so and has changed nothing; set right again, training goes on."""
    model, clean = mlp(), mlp()
    optimizer, expected = (
        FOP([{"params": net[index].parameters()} for index in (0, 2)], lr=0.1) for net in (model, clean)
    )
    for net, its in ((model, optimizer), (clean, expected)):
        train_step(net, its, *batch())
    good = optimizer.param_groups[which][name]
    optimizer.zero_grad()
    loss_of(model, *batch(6, 2)).backward()
    before, state = weights(model), snapshot(optimizer)["state"]
    optimizer.param_groups[which][name] = value
    for _ in range(2):
        with pytest.raises(error, match=rf"param_groups\[{which}\]: {name}=.*{says}"):
            optimizer.step()
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state)
    optimizer.param_groups[which][name] = good
    optimizer.step()
    train_step(clean, expected, *batch(6, 2))
    assert_equal(weights(model), weights(clean))


def test_options_that_go_together() -> None:
    model = mlp()
    optimizer = FOP.paper(model, nesterov=True)
    train_step(model, optimizer, *batch())
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        optimizer.step()
    optimizer.param_groups[0].update(momentum=0.5, beta=0.5)
    train_step(model, optimizer, *batch())
    optimizer.param_groups[0]["sub_batches"] = 4
    with pytest.raises(ValueError, match="fixes the mixing of two"):
        optimizer.step()


def test_bad_rate_comes_before_the_closure() -> None:
    optimizer = FOP(mlp())
    optimizer.param_groups[0]["lr"] = NAN
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.step(lambda: pytest.fail("the closure was called"))


def test_schedule_that_gives_nan() -> None:
    model = mlp()
    optimizer = FOP(model)
    schedule = LambdaLR(optimizer, lambda step: NAN if step == 2 else 1.0)
    for seed in range(2):
        train_step(model, optimizer, *batch(6, seed))
        schedule.step()
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr=nan"):
        train_step(model, optimizer, *batch(6, 2))


@every
def test_schedule_that_misses_zero_by_rounding(make: Make) -> None:
    """LinearLR ends at -1e-18: that is no rate below zero."""
    model = mlp()
    optimizer = make(model.parameters(), lr=0.05)
    schedule = LinearLR(optimizer, start_factor=0.3, end_factor=0.0, total_iters=3)
    rates = []
    for seed in range(5):
        train_step(model, optimizer, *batch(6, seed))
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert -1e-15 < min(rates) < 0, "the case cannot fail"
    before = weights(model)
    train_step(model, optimizer, *batch())
    torch.testing.assert_close(weights(model), before, rtol=0, atol=1e-12)


def test_numbers_of_numpy_set_by_a_schedule() -> None:
    np = pytest.importorskip("numpy")
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    optimizer.param_groups[0].update(lr=np.float64(0.1), curvature_interval=np.int64(3))
    train_step(model, optimizer, *batch())
    saved(optimizer.state_dict())  # refuses whatever is not a plain number


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.update(lr=1e-4),
        lambda group: group.update(momentum=0.9, betas=[0.8, 0.99]),
        lambda group: group.update(weight_decay=0.1, damping=0.5),
        lambda group: group.update(curvature_interval=1, stat_decay=0.2),
        lambda group: group.update(kl_clip=None, max_grad_norm=0.1),
        lambda group: group.update(kl_clip=1e-5),
    ],
)
def test_option_that_is_set_is_the_one_that_is_used(change: Callable[[dict[str, Any]], None]) -> None:
    """As an optimizer made with it would step on from the same state."""
    model, clean, same = mlp(), mlp(), mlp()
    nets = (model, clean, same)
    optimizer, expected, plain = (FOP(net, lr=0.1, step_length="paper") for net in nets)
    for net, its in ((model, optimizer), (clean, expected), (same, plain)):
        train_step(net, its, *batch())
    change(optimizer.param_groups[0])
    state = snapshot(expected)
    change(state["param_groups"][0])
    options = {key: state["param_groups"][0][key] for key in expected.defaults}
    expected = FOP(clean, **options)
    expected.load_state_dict(state)
    for seed in range(1, 5):
        for net, its in ((model, optimizer), (clean, expected), (same, plain)):
            train_step(net, its, *batch(6, seed))
    assert_equal(weights(model), weights(clean))
    assert_differs(weights(model), weights(same))


# --- options of the whole step -----------------------------------------------------------------------------

WHOLE: dict[str, tuple[Any, Any]] = {
    "kl_clip": (1e-5, 1.0),
    "max_grad_norm": (0.01, None),
    "loss_reduction": ("sum", "mean"),
    "sub_batches": (3, 2),
    "damping_kind": ("relative", "absolute"),
}


@ours
@pytest.mark.parametrize("name", WHOLE)
def test_loaded_option_of_the_whole_step_is_used(name: str, library: type[FOP]) -> None:
    """As for any option of torch.optim: the state wins over the constructor, and a later group follows it."""
    of_state, of_constructor = WHOLE[name]
    model, clean, same = mlp(), mlp(), mlp()
    expected = library(clean, lr=0.1, step_length="paper", damping=1e-3, **{name: of_state})
    train_step(clean, expected, *batch())
    for net in (model, same):
        net.load_state_dict(clean.state_dict())
    options: dict[str, Any] = {"step_length": "paper", "damping": 1e-3, name: of_constructor}
    optimizer, plain = (library(net, lr=0.1, **options) for net in (model, same))
    optimizer.load_state_dict(snapshot(expected))
    plain.load_state_dict(snapshot(expected))
    plain.param_groups[0][name] = of_constructor
    assert optimizer.param_groups[0][name] == of_state
    for seed in range(1, 4):
        for net, its in ((model, optimizer), (clean, expected), (same, plain)):
            train_step(net, its, *batch(6, seed))
    assert_equal(weights(model), weights(clean))
    if not (library is KFAC and name == "sub_batches"):
        assert_differs(weights(model), weights(same))
    extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{name}=.*one for the whole step"):
        optimizer.add_param_group({"params": [extra], name: of_constructor})
    optimizer.add_param_group({"params": [extra]})
    assert optimizer.param_groups[1][name] == of_state
    train_step(model, optimizer, *batch())


@pytest.mark.parametrize("name", WHOLE)
def test_option_of_the_whole_step_in_one_group_alone(name: str) -> None:
    model = mlp()
    groups = [{"params": model[index].parameters()} for index in (0, 2)]
    optimizer = FOP(groups, step_length="paper")
    train_step(model, optimizer, *batch())
    before = weights(model)
    optimizer.param_groups[1][name] = WHOLE[name][0]
    with pytest.raises(ValueError, match=rf"param_groups\[1\] has {name}=.*set it in all groups alike"):
        train_step(model, optimizer, *batch())
    assert_equal(weights(model), before)
    for group in optimizer.param_groups:
        group[name] = WHOLE[name][0]
    train_step(model, optimizer, *batch())
    assert_differs(weights(model), before)
