"""The step against hand-written recurrences and torch's own optimizers; options, groups and schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fop import FOP, KFAC
from models import (
    PLAIN,
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    conv_net,
    direction,
    gradients,
    halves,
    layers,
    loss_of,
    mlp,
    moved,
    snapshot,
    tokens,
    train_step,
    weights,
)
from reference import from_matrix, to_matrix

IMAGE = (2, 5, 6)
BUSY: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "curvature_interval": 3}


# --- the same run by every way in --------------------------------------------------------------------------


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:3]}, {"params": params[3:]}]


def named_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:2]}, {"params": iter(named[2:])}]


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "named": lambda model: model.named_parameters(),
    "groups": two_groups,
    "named-groups": named_groups,
    "children": lambda model: [{"params": child.parameters()} for child in (model.embed, model.norm)]
    + [{"params": [model.shift, *model.first.parameters(), *model.second.parameters()]}],
}


def run_mixed(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 8) -> dict[str, Tensor]:
    model = Mixed()
    optimizer = make(model)
    for seed in range(steps):
        train_step(model, optimizer, *tokens(6, seed))
    return weights(model)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gives_the_same_run(way: str) -> None:
    expected = run_mixed(lambda model: FOP(model, lr=0.1, **BUSY))
    assert_differs(weights(Mixed()), expected)
    assert_equal(run_mixed(lambda model: FOP(WAYS[way](model), lr=0.1, **BUSY)), expected)


def test_kfac_is_fop_with_beta_0_and_eta_1() -> None:
    expected = run_mixed(lambda model: KFAC(model.parameters(), 0.1, **BUSY))
    assert_equal(run_mixed(lambda model: FOP(model, 0.1, beta=0.0, eta=1.0, **BUSY)), expected)
    # Without a second gradient an adaptive η is 1.
    assert_equal(run_mixed(lambda model: FOP(model, 0.1, beta=0.0, **BUSY)), expected)
    other = run_mixed(lambda model: FOP(model, 0.1, **BUSY))
    assert not torch.equal(other["first.weight"], expected["first.weight"])


# --- recurrences -------------------------------------------------------------------------------------------


def constant(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """A loss linear in the output of a linear model: gradient and curvature are those of step 0 for ever."""
    out: Tensor = (model(x) * c).sum(1).mean()
    return out


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_momentum_and_decay_are_those_of_torch(
    momentum: float, nesterov: bool, weight_decay: float, maximize: bool
) -> None:
    model = nn.Linear(5, 3).double()
    x, c = batch()
    once = copy.deepcopy(model)
    optimizer = FOP(once, **{**PLAIN, "maximize": maximize})
    constant(once, x, c).backward()
    optimizer.step()
    directions = [
        (p.detach() - q.detach()) / 0.5 for p, q in zip(model.parameters(), once.parameters(), strict=True)
    ]

    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=momentum, nesterov=nesterov)
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "maximize": maximize}
    optimizer = FOP(model, **{**PLAIN, **options})
    for step in range(6):
        rate = 0.5 / (1 + step)
        for group in (*optimizer.param_groups, *sgd.param_groups):
            group["lr"] = rate
        optimizer.zero_grad()
        constant(model, x, c).backward()
        optimizer.step()
        with torch.no_grad():
            for p, d in zip(twin.parameters(), directions, strict=True):
                p.mul_(1 - rate * weight_decay)
                p.grad = d.clone()
        sgd.step()
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kappa", [1e-4, 1e-2, 1e6])
def test_kl_clip_formula(kappa: float) -> None:
    """ν = min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩)), each parameter with its own group's lr."""
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = batch()
    rates = {"0.weight": 0.5, "0.bias": 0.1, "2.weight": 0.3, "2.bias": 0.3}
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    optimizer = FOP(groups, **{**PLAIN, "kl_clip": kappa})
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    updates, total = {}, 0.0
    for name, (average, difference) in pairs.items():
        layer = layers(model)[name]
        full = direction(optimizer, layer.weight, average, difference)
        for key, d, g in zip(
            ("weight", "bias"), from_matrix(layer, full), from_matrix(layer, average), strict=True
        ):
            updates[f"{name}.{key}"] = d
            total += rates[f"{name}.{key}"] ** 2 * float((d * g).sum())
    scale = min(1.0, math.sqrt(kappa / total))
    assert (scale == 1.0) == (kappa == 1e6)
    assert optimizer.diagnostics().kl_scale == pytest.approx(scale, rel=1e-9)
    for name, p in model.named_parameters():
        expected = dict(twin.named_parameters())[name].detach() - rates[name] * scale * updates[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-10)


# --- the AdamW path ----------------------------------------------------------------------------------------

Schedule = Callable[[torch.optim.Optimizer, float], lr_scheduler.LRScheduler]
SCHEDULES: dict[str, Schedule | None] = {
    "none": None,
    "lambda-warmup": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    "lambda-from-zero": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: step / 10),
    "cosine": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 10),
    "step": lambda o, _: lr_scheduler.StepLR(o, 3, 0.5),
    "sequential": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "one-cycle": lambda o, top: lr_scheduler.OneCycleLR(o, top, total_steps=12),
    "one-cycle-lr-only": lambda o, top: lr_scheduler.OneCycleLR(o, top, total_steps=12, cycle_momentum=False),
    "plateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_path_is_torch_adamw(schedule: str, maximize: bool) -> None:
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
    make = SCHEDULES[schedule]
    schedulers = [make(optimizer, 0.2), make(adamw, 0.01)] if make else []
    rates = set()
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, *tokens(6, step)).backward()
        for name, p in others.items():
            twins[name].grad = p.grad.clone()  # type: ignore[union-attr]
        rates.add(optimizer.param_groups[0]["lr"])
        optimizer.step()
        adamw.step()
        for scheduler in schedulers:
            scheduler.step(1.0) if schedule == "plateau" else scheduler.step()  # type: ignore[call-arg]
        for name, p in others.items():
            torch.testing.assert_close(p.detach(), twins[name].detach(), rtol=1e-10, atol=1e-12)
    assert (len(rates) > 1) == (schedule != "none")


@pytest.mark.parametrize("layout", ["sliced", "transposed", "gradient"])
def test_adamw_path_takes_any_memory_layout(layout: str) -> None:
    """A parameter that is a slice of a larger tensor moves by itself, and its neighbours stay."""
    memory, dense = torch.arange(24.0).view(4, 6), torch.arange(12.0).view(3, 4).T
    values = {"sliced": memory[:, ::2], "transposed": dense, "gradient": dense.contiguous()}[layout]
    param, twin = nn.Parameter(values), nn.Parameter(values.clone())
    neighbours = memory.clone()
    optimizer = FOP([param], adamw_lr=0.1, weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1, fused=False)
    torch.manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(3, 4).T
        # autograd lays a gradient out like its parameter; one put there by hand can be as it likes.
        param.grad = gradient if layout == "gradient" else torch.empty_like(param).copy_(gradient)
        twin.grad = gradient.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(param.detach(), twin.detach())
    if layout == "sliced":
        assert_equal(memory[:, 1::2], neighbours[:, 1::2])


# --- parameter groups --------------------------------------------------------------------------------------


def test_groups_have_their_own_options() -> None:
    """lr, weight_decay, damping and beta per group, a bias in another group than its weight included."""
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = batch()
    groups: list[dict[str, Any]] = [
        {"params": [model[0].weight], "lr": 0.5, "weight_decay": 0.1, "damping": 0.3},
        {"params": [model[0].bias], "lr": 0.2, "weight_decay": 0.0, "damping": 9.0},
        {"params": model[2].parameters(), "lr": 0.7, "weight_decay": 0.2, "damping": 0.05, "beta": 0.1},
    ]
    optimizer = FOP(groups, **PLAIN)
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    reports = optimizer.diagnostics().layers
    by_name = {"0": optimizer.param_groups[0], "2": optimizer.param_groups[2]}
    for name, (average, difference) in pairs.items():
        layer, old = layers(model)[name], layers(twin)[name]
        view = _OneGroup(optimizer, by_name[name])
        full = direction(view, layer.weight, average, difference)
        for p, q, d, group in zip(
            layer.parameters(),
            old.parameters(),
            from_matrix(layer, full),
            (by_name[name], optimizer.param_groups[1] if name == "0" else by_name[name]),
            strict=True,
        ):
            expected = q * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * d
            torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
        assert reports[name].beta == by_name[name]["beta"]


class _OneGroup:
    """What `direction` reads of an optimizer, with one of its groups in front."""

    def __init__(self, optimizer: FOP, group: dict[str, Any]) -> None:
        self.state, self.param_groups = optimizer.state, [group]


def test_weight_without_its_bias() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = batch()
    optimizer = FOP([model[0].weight, model[2].weight], **PLAIN)
    (average, difference) = halves(twin, x, y)["0"]
    train_step(model, optimizer, x, y)
    state = optimizer.state[model[0].weight]
    torch.testing.assert_close(state["A"][0], x.T @ x / 6)
    full = direction(optimizer, model[0].weight, average[..., :-1], difference[..., :-1])
    taken = (twin[0].weight - model[0].weight).detach() / 0.5
    torch.testing.assert_close(taken, full[0], rtol=1e-9, atol=1e-10)
    assert torch.equal(model[0].bias, twin[0].bias)


def test_bias_without_its_weight_takes_adamw() -> None:
    model = mlp()
    before = weights(model)
    optimizer = FOP([model[0].bias])
    train_step(model, optimizer, *batch())
    rows = optimizer.summary().rows
    assert [(row.name, row.path) for row in rows] == [("0.bias", "AdamW")]
    assert "weight" in rows[0].reason
    # The first step of Adam is lr times the sign of the gradient.
    torch.testing.assert_close((model[0].bias - before["0.bias"]).abs(), torch.full((6,), 1e-3).double())


@pytest.mark.parametrize("option", [{"kl_clip": 0.5}, {"kl_clip": None}, {"loss_reduction": "sum"}])
def test_options_of_the_whole_step_in_a_group_are_refused(option: dict[str, Any]) -> None:
    model = mlp()
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}.*constructor"):
        FOP([{"params": model.parameters(), **option}])
    FOP([{"params": model.parameters(), **option}], **option)


def test_maximize_is_minimizing_the_negative() -> None:
    results = []
    for maximize in (False, True):
        model = Mixed()
        optimizer = FOP(model, lr=0.1, maximize=maximize, **BUSY)
        for seed in range(6):
            optimizer.zero_grad()
            sign = -1 if maximize else 1
            (sign * loss_of(model, *tokens(6, seed))).backward()
            optimizer.step()
        results.append(weights(model))
    assert_equal(*results)


def test_closure() -> None:
    results, losses = [], []
    for use_closure in (False, True):
        model = Mixed()
        optimizer = FOP(model, lr=0.1, **BUSY)
        for seed in range(4):
            if not use_closure:
                train_step(model, optimizer, *tokens(6, seed))
                continue

            def closure(model: nn.Module = model, optimizer: Any = optimizer, seed: int = seed) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, *tokens(6, seed))
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        results.append((weights(model), snapshot(optimizer)))
    assert_equal(*results)
    assert all(isinstance(loss, Tensor) for loss in losses)


def test_add_param_group_in_mid_training() -> None:
    model = mlp()
    extra = nn.Linear(3, 3).double()
    optimizer = FOP(model, **PLAIN)
    for seed in range(2):
        train_step(model, optimizer, *batch(6, seed))
    whole = nn.Sequential(*model, extra)
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.1, "damping": 0.5})
    twin = copy.deepcopy(whole)
    x, y = batch(6, seed=3)
    pairs = halves(twin, x, y)
    train_step(whole, optimizer, x, y)
    average, difference = pairs["3"]
    expected = direction(_OneGroup(optimizer, optimizer.param_groups[1]), extra.weight, average, difference)
    torch.testing.assert_close(moved(whole, twin, "3", 0.1), expected, rtol=1e-9, atol=1e-9)
    expected = direction(optimizer, model[0].weight, *pairs["0"])
    torch.testing.assert_close(moved(whole, twin, "0", 0.5), expected, rtol=1e-9, atol=1e-9)
    assert [row.path for row in optimizer.summary().rows] == ["FOP"] * 6


def test_bare_layers_and_conv_groups_reach_the_same_end() -> None:
    """Two optimizers on disjoint parts of one model do what one with two groups does, without a KL clip."""
    results = []
    for split in (False, True):
        model = conv_net()
        parts = [list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]]
        options = {**PLAIN, "momentum": 0.9}
        if split:
            optimizers = [FOP(part, **options) for part in parts]
        else:
            optimizers = [FOP([{"params": part} for part in parts], **options)]
        for seed in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, *batch(6, seed, IMAGE)).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append(weights(model))
    assert_equal(*results)


def test_gradient_helpers_agree_with_backward() -> None:
    """The helpers of these tests themselves."""
    model = mlp()
    x, y = batch()
    expected = gradients(model, loss_of(model, x, y))
    loss_of(model, x, y).backward()
    assert_equal(to_matrix(model[0], model[0].weight.grad, model[0].bias.grad), expected["0"])
