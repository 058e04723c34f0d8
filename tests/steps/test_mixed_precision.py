"""Autocast, and `torch.amp.GradScaler` by torch's protocol for optimizers that unscale by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    PLAIN,
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    check_kept_pair,
    conv_net,
    loss_of,
    mlp,
    snapshot,
    tokens,
    train_step,
    weights,
)

SCALE = 2.0**16
KFAC_PLAIN = {key: value for key, value in PLAIN.items() if key not in ("beta", "eta")}
LIBRARIES = {"FOP": (FOP, PLAIN), "KFAC": (KFAC, KFAC_PLAIN)}
libraries = pytest.mark.parametrize("library", LIBRARIES)


def scaler_of(scale: float = SCALE, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def scaled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x: Tensor,
    y: Tensor,
    *,
    unscale: bool = False,
    max_norm: float | None = None,
    factor: float = 1.0,
) -> None:
    """One step as torch's documentation shows it; a ``factor`` of infinity makes the gradients overflow."""
    optimizer.zero_grad()
    (factor * scaler.scale(loss_of(model, x, y))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, max_norm: float | None
) -> None:
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def assert_near(left: Any, right: Any, tolerance: float) -> None:
    """All tensors of two equal structures, each relative to its own size."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_near(value, right[key], tolerance)
    elif isinstance(left, Tensor):
        error = float((left.double() - right.double()).norm())
        assert error <= tolerance * float(right.double().norm()), f"{error:.1e}"


# --- autocast ----------------------------------------------------------------------------------------------


def overwritten_run(kind: type[FOP], overwrite: int) -> dict[str, Tensor]:
    """Two steps; in step ``overwrite`` the input is tripled in place after the layer has used it."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = kind(layer, lr=0.1, stat_decay=0.0, curvature_interval=1)
    for step in range(2):
        hidden = torch.randn(6, 3) * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(hidden)
        if step == overwrite:
            hidden.mul_(3)
        optimizer.zero_grad()
        out.float().square().mean().backward()
        optimizer.step()
    return {"A": optimizer.state[layer.weight]["A"], "weight": layer.weight.detach()}


def test_overwritten_input_of_fop() -> None:
    """Its own node keeps the input in bfloat16, as autograd does, so the original may be overwritten."""
    untouched, overwritten = overwritten_run(FOP, -1), overwritten_run(FOP, 1)
    assert torch.equal(untouched["A"], overwritten["A"])
    assert torch.equal(untouched["weight"], overwritten["weight"])


def test_overwritten_input_of_kfac_enters_nothing() -> None:
    """Autograd keeps a copy of the input in bfloat16, so the original may be overwritten."""
    untouched, overwritten = overwritten_run(KFAC, -1), overwritten_run(KFAC, 1)
    torch.manual_seed(0)
    nn.Linear(3, 2, bias=False)
    first = torch.randn(6, 3)
    # The statistics of the second step are left out, not taken from the tripled input.
    torch.testing.assert_close(overwritten["A"][0], first.T @ first / 6)
    assert not torch.equal(untouched["A"], overwritten["A"])
    assert torch.isfinite(overwritten["weight"]).all()


# --- the scale ---------------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize(("unscale", "max_norm"), [(False, None), (True, None), (True, 0.3), (True, 1e6)])
def test_scaled_run_equals_the_plain_one(library: str, unscale: bool, max_norm: float | None) -> None:
    """Weights, momentum and factors. READY: `scaler.step` alone; UNSCALED: `scaler.unscale_` before it."""
    make, options = LIBRARIES[library]
    options = {**options, "momentum": 0.9, "lr": 0.05}
    model, twin = conv_net(), conv_net()
    optimizer, plain = make(model, **options), make(twin, **options)
    scaler = scaler_of()
    for seed in range(4):
        x, y = batch(7, seed, (2, 5, 6))
        scaled_step(model, optimizer, scaler, x, y, unscale=unscale, max_norm=max_norm)
        plain_step(twin, plain, x, y, max_norm)
        assert_near(weights(model), weights(twin), 1e-9)
        assert_near(snapshot(optimizer)["state"], snapshot(plain)["state"], 1e-9)
    assert scaler.get_scale() == SCALE
    if library == "FOP":
        check_kept_pair(optimizer)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 1000.0, 2.0**40])
def test_any_scale_even_one_that_no_float_inverts(scale: float, unscale: bool) -> None:
    """torch multiplies with a float32 reciprocal, so 1e-6 is all that can be had at 1000."""
    model, twin = mlp(), mlp()
    optimizer, plain = FOP(model, **PLAIN), FOP(twin, **PLAIN)
    for seed in range(3):
        scaled_step(model, optimizer, scaler_of(scale), *batch(6, seed), unscale=unscale)
        train_step(twin, plain, *batch(6, seed))
    assert_near(weights(model), weights(twin), 1e-6)
    assert_near(snapshot(optimizer)["state"], snapshot(plain)["state"], 1e-6)


@libraries
@pytest.mark.parametrize("unscale", [False, True])
def test_scale_that_grows_and_backs_off(library: str, unscale: bool) -> None:
    """The scale of the backward pass counts, not the one that `update` sets afterwards."""
    make, options = LIBRARIES[library]
    model, twin = mlp(), mlp()
    optimizer, plain = make(model, **options), make(twin, **options)
    scaler = scaler_of(2.0**10, growth_factor=4.0, backoff_factor=0.25, growth_interval=2)
    scales = []
    for seed in range(6):
        scales.append(scaler.get_scale())
        bad = seed == 3
        scaled_step(
            model, optimizer, scaler, *batch(6, seed), unscale=unscale, factor=torch.inf if bad else 1.0
        )
        if not bad:
            train_step(twin, plain, *batch(6, seed))
        assert_near(weights(model), weights(twin), 1e-9)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            for key in ("A", "G"):
                assert_near(optimizer.state[param].get(key), plain.state[other].get(key), 1e-9)
    assert scales == [2.0**10, 2.0**10, 2.0**12, 2.0**12, 2.0**10, 2.0**10]


def test_accumulation_under_a_scale() -> None:
    results = []
    for scaler in (scaler_of(), scaler_of(enabled=False)):
        model = mlp()
        optimizer = FOP(model, **PLAIN)
        for seed in (1, 2):
            scaler.scale(loss_of(model, *batch(6, seed)) / 2).backward()
        scaler.step(optimizer)
        results.append(weights(model))
    assert_near(*results, 1e-9)


def test_scaler_and_wrapped_step() -> None:
    """A learning rate scheduler and step hooks stand between the scaler and the step."""
    model, twin = mlp(), mlp()
    optimizer, plain = FOP(model, **PLAIN), FOP(twin, **PLAIN)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, plain)]
    for each in (optimizer, plain):
        each.register_step_pre_hook(lambda *_: None)
        each.register_step_post_hook(lambda *_: None)
    scaler = scaler_of()
    for seed in range(3):
        scaled_step(model, optimizer, scaler, *batch(6, seed), unscale=True, max_norm=0.3)
        plain_step(twin, plain, *batch(6, seed), 0.3)
        for schedule in schedules:
            schedule.step()
    assert_near(snapshot(optimizer)["state"], snapshot(plain)["state"], 1e-9)


# --- steps that the scaler skips ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "max_norm", "when"),
    [
        ("FOP", None, 1),
        ("FOP", 0.3, 4),
        ("FOP", None, 17),
        ("FOP", 0.3, 17),
        ("KFAC", 0.3, 4),
        ("KFAC", None, 17),
    ],
)
def test_skipped_step_leaves_everything(library: str, max_norm: float | None, when: int) -> None:
    """Bit for bit and without a warning; the steps after it are those of a run that never had it.

    Steps 1 and 4 renew the curvature, 17 does not. With a clip the gradients are NaN by the time of the step.
    """
    make, options = LIBRARIES[library]
    options = {**options, "momentum": 0.9, "lr": 0.05, "weight_decay": 0.1, "curvature_interval": 100}
    model, twin = Mixed(), Mixed()
    optimizer, plain = make(model, **options), make(twin, **options)
    scaler = scaler_of()
    unscale = max_norm is not None
    for seed in range(when):
        scaled_step(model, optimizer, scaler, *tokens(6, seed), unscale=unscale, max_norm=max_norm)
        plain_step(twin, plain, *tokens(6, seed), max_norm)
    assert optimizer.curvature_due is (when != 17)
    before, state = weights(model), snapshot(optimizer)["state"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_step(
            model, optimizer, scaler, *tokens(6, 50), unscale=unscale, max_norm=max_norm, factor=torch.inf
        )
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state)
    assert scaler.get_scale() == SCALE / 2
    scaled_step(model, optimizer, scaler, *tokens(6, 51), unscale=unscale, max_norm=max_norm)
    plain_step(twin, plain, *tokens(6, 51), max_norm)
    assert_near(weights(model), weights(twin), 1e-9)
    assert_near(snapshot(optimizer)["state"], snapshot(plain)["state"], 1e-9)


@libraries
@pytest.mark.parametrize("unscale", [False, True])
def test_very_first_step_is_skipped(library: str, unscale: bool) -> None:
    """The usual start: the scale begins too large."""
    make, options = LIBRARIES[library]
    model, twin = Mixed(), Mixed()
    optimizer, plain = make(model.parameters(), **options), make(twin.parameters(), **options)
    scaler = scaler_of()
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_step(model, optimizer, scaler, *tokens(6, 0), unscale=unscale, factor=torch.inf)
    assert_equal(weights(model), before)
    assert not {"A", "A_inv", "exp_avg"} & optimizer.state[model.first.weight].keys()
    rows = {row.name: row for row in optimizer.summary().rows}
    assert rows["first.weight"].path == ("FOP" if library == "FOP" else "K-FAC")
    scaled_step(model, optimizer, scaler, *tokens(6, 1), unscale=unscale)
    train_step(twin, plain, *tokens(6, 1))
    assert_near(weights(model), weights(twin), 1e-9)


def test_inf_in_one_gradient_skips_the_whole_step() -> None:
    model = Mixed()
    optimizer, scaler = FOP(model, lr=0.05), scaler_of()
    scaled_step(model, optimizer, scaler, *tokens(6, 0))
    before, state = weights(model), snapshot(optimizer)["state"]
    optimizer.zero_grad()
    scaler.scale(loss_of(model, *tokens(6, 1))).backward()
    assert model.norm.bias.grad is not None
    model.norm.bias.grad[0] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state)


def test_skipped_steps_are_not_counted_as_kfac_steps() -> None:
    model = mlp()
    optimizer, scaler = FOP(model, lr=0.05), scaler_of()
    for seed in range(4):
        scaled_step(model, optimizer, scaler, *batch(6, seed), factor=torch.inf if seed in (1, 3) else 1.0)
    check_kept_pair(optimizer, ["0", "2"])


# --- one scaler, several optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_several_optimizers_with_one_scaler(unscale: bool) -> None:
    """FOP, K-FAC and SGD; the loss of the second overflows once, and only it is skipped."""
    makers: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
        lambda model: FOP(model, **PLAIN),
        lambda model: KFAC(model, **KFAC_PLAIN),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    ]
    models, twins = [mlp(seed) for seed in range(3)], [mlp(seed) for seed in range(3)]
    optimizers = [make(model) for make, model in zip(makers, models, strict=True)]
    plain = [make(twin) for make, twin in zip(makers, twins, strict=True)]
    scaler = scaler_of()
    for seed in range(3):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            factor = torch.inf if (number, seed) == (1, 1) else 1.0
            (factor * scaler.scale(loss_of(model, *batch(6, seed)))).backward()
        for optimizer in optimizers:
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        for number, (twin, optimizer) in enumerate(zip(twins, plain, strict=True)):
            if (number, seed) != (1, 1):
                train_step(twin, optimizer, *batch(6, seed))
    for model, twin, optimizer, other in zip(models, twins, optimizers, plain, strict=True):
        assert_near(weights(model), weights(twin), 1e-9)
        assert_near(snapshot(optimizer)["state"], snapshot(other)["state"], 1e-9)
        assert_differs(weights(model), weights(mlp(models.index(model))))
    assert not any(hasattr(each, name) for each in optimizers for name in ("found_inf", "grad_scale"))
