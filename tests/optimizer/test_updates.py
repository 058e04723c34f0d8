"""Momentum, decay, KL clip and the AdamW path against hand-written recurrences and torch's own optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import (
    PLAIN,
    assert_equal,
    batch,
    direction,
    halves,
    layers,
    mlp,
    train_step,
    weights,
)
from reference import from_matrix

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


@pytest.mark.parametrize("step_length", ["weight", "paper"])
def test_matrices_on_the_adamw_path_move_by_a_share_of_their_size(step_length: str) -> None:
    """By ``lr`` times the root mean square that they began with, at most; vectors, and zeros, by the rate."""
    lr, rate = 0.2, 0.03
    sizes = {"matrix": (4, 6), "positions": (1, 3, 5), "large": (2, 2), "zeros": (3, 4)}
    sizes |= {"vector": (7,), "scales": (5, 1, 1)}
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(size).double() * 0.05) for name, size in sizes.items()}
    params["large"].data.mul_(100)
    params["zeros"].data.zero_()
    rms = {name: p.detach().square().mean().sqrt().item() for name, p in params.items()}
    expected = dict.fromkeys(params, rate)
    if step_length == "weight":
        expected |= {name: lr * rms[name] for name in ("matrix", "positions")}
    assert all(0 < rms[name] * lr < rate for name in ("matrix", "positions")) and rms["large"] * lr > rate
    twins = copy.deepcopy(params)
    optimizer = FOP(list(params.values()), lr=lr, adamw_lr=rate, step_length=step_length)
    groups = [{"params": [twins[name]], "eps": optimizer.param_groups[0]["eps"]} for name in params]
    adamw = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(6):
        if step == 3:
            # Resumed: the size is that of the beginning, from the state.
            saved = optimizer.state_dict()
            optimizer = FOP(list(params.values()), lr=lr, adamw_lr=rate, step_length=step_length)
            optimizer.load_state_dict(saved)
        for n, each in zip(params, adamw.param_groups, strict=True):
            each["lr"] = expected[n] / (1 + step)
        optimizer.param_groups[0]["lr"] = lr / (1 + step)
        for p, q in zip(params.values(), twins.values(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for name, p in params.items():
        torch.testing.assert_close(p, twins[name], rtol=1e-12, atol=1e-15)
