"""What stands around an optimizer: schedules, GradScaler, gradient clipping, averaged weights."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from contract import FUNCTIONS, LR, Make, every, ours, saved, train, trained
from fop import FOP
from models import (
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    conv_net,
    loss_of,
    mlp,
    snapshot,
    tokens,
    train_step,
    weights,
)
from reference import half_squared_error

STEPS = 12

# --- schedulers --------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer, float], LRScheduler]] = {
    "LambdaLR": lambda o, top: lr_scheduler.LambdaLR(o, lambda step: step / 10),
    "MultiplicativeLR": lambda o, top: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o, top: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o, top: lr_scheduler.MultiStepLR(o, [2, 5, 9], 0.5),
    "ConstantLR": lambda o, top: lr_scheduler.ConstantLR(o, 0.25, total_iters=4),
    "LinearLR": lambda o, top: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o, top: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o, top: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o, top: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o, top: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    "CyclicLR": lambda o, top: lr_scheduler.CyclicLR(o, top / 10, top, step_size_up=3),
    "OneCycleLR": lambda o, top: lr_scheduler.OneCycleLR(o, top, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o, top: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o, top: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "ChainedScheduler": lambda o, top: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o, top: SWALR(o, swa_lr=top / 5, anneal_epochs=6),
}

every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)


def test_no_scheduler_of_torch_is_left_out() -> None:
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and not name.endswith("LRScheduler")
    }
    assert kinds | {"SWALR"} == SCHEDULERS.keys()


def advance(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def scheduled(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, seeds: range
) -> list[dict[str, Any]]:
    """Train on a schedule; return what it had set in each step."""
    used = []
    for seed in seeds:
        used.append({k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "momentum", "betas")})
        train(model, optimizer, [seed])
        advance(scheduler)
    return used


@every
@every_scheduler
def test_scheduler_drives_the_step(make: Make, kind: str) -> None:
    """Weights go where they go when the same numbers are written into the group by hand."""
    model = Mixed()
    optimizer = make(model.parameters(), weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = scheduled(model, optimizer, SCHEDULERS[kind](optimizer, LR), range(STEPS))
    assert len({options["lr"] for options in used}) > 1
    by_hand = Mixed()
    other = make(by_hand.parameters(), weight_decay=0.1)
    # Tells FOP's option ``anneal`` of a schedule.
    known = {key: value for key, value in optimizer.param_groups[0].items() if key == "initial_lr"}
    for seed, options in enumerate(used):
        other.param_groups[0].update(options, **known)
        train(by_hand, other, [seed])
    assert_equal(weights(by_hand), weights(model))
    assert_differs(without_a_schedule(make), weights(model))


@functools.cache
def without_a_schedule(make: Make) -> dict[str, Any]:
    model, _ = trained(make, STEPS, weight_decay=0.1)
    return weights(model)


@ours
@every_scheduler
def test_scheduler_and_optimizer_continue_from_their_states(library: Make, kind: str) -> None:
    def fresh() -> tuple[Mixed, Optimizer, LRScheduler]:
        model = Mixed()
        optimizer = library(model.parameters())
        return model, optimizer, SCHEDULERS[kind](optimizer, LR)

    first, unbroken = fresh(), fresh()
    scheduled(*first, range(5))
    scheduled(*unbroken, range(STEPS))
    second = fresh()
    for each, state in zip(second, [saved(each.state_dict()) for each in first], strict=True):
        each.load_state_dict(state)
    scheduled(*second, range(5, STEPS))
    assert second[2].get_last_lr() == unbroken[2].get_last_lr()
    assert_equal(weights(second[0]), weights(unbroken[0]))
    assert_equal(snapshot(second[1]), snapshot(unbroken[1]))


@every
def test_groups_keep_their_rates_on_a_schedule(make: Make) -> None:
    model = Mixed()
    first, *rest = model.parameters()
    optimizer = make([{"params": [first], "lr": LR / 10}, {"params": rest}])
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, [0])
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 20, LR / 2]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [LR / 10, LR]


@every
def test_rate_of_zero_moves_nothing(make: Make) -> None:
    model, optimizer = trained(make, weight_decay=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: float(step != 1))
    train(model, optimizer, [3])
    scheduler.step()
    before = weights(model)
    train(model, optimizer, [4])
    assert_equal(weights(model), before)
    scheduler.step()
    train(model, optimizer, [5])
    assert_differs(weights(model), before)


@every_scheduler
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_path_is_torch_adamw(kind: str, maximize: bool) -> None:
    """Same gradients in, same weights out, with its own lr on the schedule of the group's lr."""
    model = Mixed()
    others = {
        name: p for name, p in model.named_parameters() if name.split(".")[0] not in ("first", "second")
    }
    assert len(others) == 4
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in others.items()}
    shared = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": maximize}
    # A table of tokens is the usual thing to be left to AdamW.
    choice = {"embed": {"path": "adamw"}}
    optimizer = FOP(model.parameters(), lr=0.2, adamw_lr=0.01, layer_options=choice, **shared)
    adamw = torch.optim.AdamW(twins.values(), lr=0.01, **shared)
    schedulers = [SCHEDULERS[kind](optimizer, 0.2), SCHEDULERS[kind](adamw, 0.01)]
    rates = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *tokens(6, step)).backward()
        for name, p in others.items():
            twins[name].grad = p.grad.clone()  # type: ignore[union-attr]
        rates.add(optimizer.param_groups[0]["lr"])
        optimizer.step()
        adamw.step()
        for scheduler in schedulers:
            advance(scheduler)
        for name, p in others.items():
            torch.testing.assert_close(p.detach(), twins[name].detach(), rtol=1e-10, atol=1e-12)
    assert len(rates) > 1


# --- functions of the step ---------------------------------------------------------------------------------


@ours
@pytest.mark.parametrize("names", [["damping"], ["curvature_interval"], ["damping", "curvature_interval"]])
def test_functions_are_values_set_by_hand(names: list[str], library: type[FOP]) -> None:
    functions = {name: FUNCTIONS[name] for name in names}
    first = {name: function(0) for name, function in functions.items()}
    models = [mlp(), mlp(), mlp()]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    optimizer, by_hand, constant = (
        library(model, **options, **chosen)
        for model, chosen in zip(models, (functions, first, first), strict=True)
    )
    for step in range(30):
        by_hand.param_groups[0].update({name: function(step) for name, function in functions.items()})
        for model, each in zip(models, (optimizer, by_hand, constant), strict=True):
            train_step(model, each, *batch(6, step))
        assert {name: optimizer.param_groups[0][name] for name in functions} == {
            name: function(step) for name, function in functions.items()
        }
        assert optimizer.diagnostics() == by_hand.diagnostics()
    assert_equal(weights(models[0]), weights(models[1]))
    assert_equal(snapshot(optimizer), snapshot(by_hand))
    assert not torch.equal(models[2][0].weight, models[0][0].weight), "the functions had no effect"


def test_a_function_is_asked_once_a_step_with_its_number() -> None:
    asked: list[int] = []
    model = mlp()
    optimizer = FOP(model, damping=lambda step: asked.append(step) or 0.1)  # type: ignore[func-returns-value]
    asked.clear()  # of the constructor, which checks a first value
    for step in range(4):
        train_step(model, optimizer, *batch(6, step))
    assert asked == [0, 1, 2, 3]
    assert all(type(step) is int for step in asked)


# --- the curvature interval --------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_interval_grows_to_its_value(interval: int) -> None:
    model = mlp()
    optimizer = FOP(model, curvature_interval=interval)
    refreshed, age = [], -1
    for step in range(120):
        due = optimizer.curvature_due
        train_step(model, optimizer, *batch(6, step))
        age = 0 if due else age + 1
        assert {layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()} == {age}
        if age == 0:
            refreshed.append(step)
    gaps = [later - earlier for earlier, later in itertools.pairwise(refreshed)]
    assert refreshed[:2] == [0, 1], "a step-0 inverse is wrong by step 20"
    assert gaps == [min(interval, max(1, step)) for step in refreshed[:-1]]
    assert gaps[-3:] == [interval] * 3


def test_layer_unused_at_its_due_step_refreshes_when_next_used() -> None:
    model = mlp()
    optimizer = FOP(model, curvature_interval=10)
    step = 0
    while step < 60 or not optimizer.curvature_due:
        train_step(model, optimizer, *batch(6, step))
        step += 1
    for seed in range(3):  # the first layer sits out its due step and two more
        optimizer.zero_grad()
        half_squared_error(model[2](batch(6, seed, shape=(6,))[0]), batch(6, seed)[1]).backward()
        optimizer.step()
        assert optimizer.curvature_due
    ages = {name: layer.steps_since_curvature for name, layer in optimizer.diagnostics().layers.items()}
    assert ages == {"0": 12, "2": 2}
    train_step(model, optimizer, *batch())
    ages = {name: layer.steps_since_curvature for name, layer in optimizer.diagnostics().layers.items()}
    assert ages == {"0": 0, "2": 3}
    assert not optimizer.curvature_due


def test_request_curvature() -> None:
    model = conv_net()
    optimizer = FOP(model, curvature_interval=50)
    step = 0
    while step < 30 or optimizer.curvature_due:
        train_step(model, optimizer, *batch(6, step, (2, 5, 6)))
        step += 1
    optimizer.request_curvature()
    assert optimizer.curvature_due
    train_step(model, optimizer, *batch(6, step, (2, 5, 6)))
    ages = [layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()]
    assert ages == [0, 0, 0]
    assert not optimizer.curvature_due


@pytest.mark.parametrize("when", ["before the state", "loaded", "loaded twice", "parts called one by one"])
def test_request_curvature_before_the_first_pass(when: str) -> None:
    """From bare parameters, whose layers are not known then; not only of those that are called first."""
    model = mlp()
    optimizer = FOP(model, curvature_interval=50)
    step = 0
    while step < 30 or optimizer.curvature_due:
        train_step(model, optimizer, *batch(6, step))
        step += 1
    state = snapshot(optimizer)
    optimizer = FOP(model.parameters())
    if when == "before the state":
        # The state says when, as it does of a run that was never stopped.
        optimizer.request_curvature()
    optimizer.load_state_dict(state)
    if when != "before the state":
        optimizer.request_curvature()
    if when == "loaded twice":
        optimizer.load_state_dict(snapshot(optimizer))
    x, y = batch(6, step)
    if when == "parts called one by one":
        optimizer.zero_grad()
        half_squared_error(model[2](model[1](model[0](x))), y).backward()
        optimizer.step()
    else:
        train_step(model, optimizer, x, y)
    due = when != "before the state"
    ages = [layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()]
    assert [age == 0 for age in ages] == [due, due]
    assert state["state"][0]["refresh_at"] > step


# --- GradScaler --------------------------------------------------------------------------------------------


def amp_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    seed: int,
    *,
    unscale: bool = False,
    factor: float = 1.0,
) -> None:
    """One step the way torch's documentation shows it; a ``factor`` of 1e38 makes the gradients overflow."""
    x, y = tokens(6, seed)
    optimizer.zero_grad()
    (factor * scaler.scale(loss_of(model, x, y.float()))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def amp_run(make: Make, scale: float | None, unscale: bool = False) -> dict[str, Tensor]:
    model = Mixed().float()
    optimizer = make(model.parameters(), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for seed in range(9):
        amp_step(model, optimizer, scaler, seed, unscale=unscale)
    return weights(model)


@every
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [2.0**4, 2.0**16])
def test_grad_scaler_changes_no_step(make: Make, scale: float, unscale: bool) -> None:
    torch.testing.assert_close(amp_run(make, scale, unscale), amp_run(make, None), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_skips_a_step_that_overflows(make: Make, unscale: bool) -> None:
    """Weights and state stay as they are, without a warning, and the run goes on as if nothing had been."""
    model = Mixed().float()
    optimizer = make(model.parameters(), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for seed in range(9):
        if seed in (0, 4):
            before, state = weights(model), snapshot(optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                amp_step(model, optimizer, scaler, seed, unscale=unscale, factor=1e38)
            assert_equal(weights(model), before)
            # The very first step may lay out its state, as torch's fused AdamW does.
            if seed > 0:
                assert_equal(snapshot(optimizer), state)
        amp_step(model, optimizer, scaler, seed, unscale=unscale)
    assert scaler.get_scale() == 2.0**14
    torch.testing.assert_close(weights(model), amp_run(make, None), rtol=1e-4, atol=1e-5)


@every
def test_grad_scaler_keeps_two_optimizers_apart(make: Make) -> None:
    """Only the one whose gradients overflow is skipped, and nothing of the scaler stays on them."""
    models = [Mixed().float(), Mixed().float()]
    optimizers = [make(model.parameters()) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [weights(model) for model in models]
    for model, factor in zip(models, (1e38, 1.0), strict=True):
        x, y = tokens()
        (factor * scaler.scale(loss_of(model, x, y.float()))).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert_equal(weights(models[0]), before[0])
    assert_differs(weights(models[1]), before[1])
    assert not any(hasattr(each, name) for each in optimizers for name in ("found_inf", "grad_scale"))


# --- clipping ----------------------------------------------------------------------------------------------


def by_norm(model: nn.Module, limit: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), limit)


def by_value(model: nn.Module, limit: float) -> None:
    nn.utils.clip_grad_value_(model.parameters(), limit)


def clipped_run(make: Make, clip: Callable[[nn.Module, float], None], limit: float) -> dict[str, Tensor]:
    model = Mixed()
    optimizer = make(model.parameters())
    for seed in range(6):
        optimizer.zero_grad()
        loss_of(model, *tokens(6, seed)).backward()
        clip(model, limit)
        optimizer.step()
    return weights(model)


@every
@pytest.mark.parametrize("clip", [by_norm, by_value])
def test_clipping(make: Make, clip: Callable[[nn.Module, float], None]) -> None:
    expected, _ = trained(make, 6)
    assert_equal(clipped_run(make, clip, 1e6), weights(expected))
    limited = clipped_run(make, clip, 0.02)
    assert_differs(limited, weights(expected))
    assert all(bool(p.isfinite().all()) for p in limited.values())
    # To nothing at all: no direction of its own is left.
    start, nothing = weights(Mixed()), clipped_run(make, clip, 0.0)
    assert_equal(nothing, start)


# --- averaged weights --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_is_the_mean_and_disturbs_nothing(make: Make, use_buffers: bool) -> None:
    expected, _ = trained(make, 8)
    model = Mixed()
    optimizer = make(model.parameters())
    averaged = AveragedModel(model, use_buffers=use_buffers)
    visited = []
    for seed in range(8):
        train(model, optimizer, [seed])
        averaged.update_parameters(model)
        visited.append(weights(model))
        loss_of(averaged, *tokens(5, 40 + seed)).backward()
    assert_equal(weights(model), weights(expected))
    for name, p in averaged.module.named_parameters():
        mean = torch.stack([each[name] for each in visited]).mean(0)
        torch.testing.assert_close(p.detach(), mean)


@every
def test_stochastic_weight_averaging(make: Make) -> None:
    """The recipe of torch's documentation: SWALR, an average from the middle on, batch norm at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(24, 5, dtype=torch.float64)
    y = x[:, :3].sin()
    optimizer = make(model.parameters())
    averaged, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=LR / 2, anneal_epochs=3)
    before = loss_of(model, x, y)
    for epoch in range(12):
        for part in range(0, 24, 8):
            optimizer.zero_grad()
            loss_of(model, x[part : part + 8], y[part : part + 8]).backward()
            optimizer.step()
        if epoch >= 6:
            averaged.update_parameters(model)
            scheduler.step()
    update_bn(torch.utils.data.DataLoader(x, batch_size=8), averaged)
    assert optimizer.param_groups[0]["lr"] == LR / 2
    assert loss_of(averaged, x, y) < before / 2
