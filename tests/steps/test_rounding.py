"""float32 steps against float64 ones: what of a difference is rounding, and gradients of any size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fop import FOP, KFAC
from models import weights

EXACT: dict[str, Any] = {"step_length": "paper", "lr": 1.0, "momentum": 0.5, "kl_clip": None}
Loss = Callable[[nn.Module, Tensor], Tensor]


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(0).sum()


def one_step(
    model: nn.Module, x: Tensor, loss: Loss = square, library: type[FOP] = FOP, **options: Any
) -> Any:
    """The updates of one step, before they are added to weights of another size; and the optimizer."""
    optimizer = library(model, **{**EXACT, **options})
    loss(model, x).backward()
    optimizer.step()
    return {
        name: optimizer.state[p]["momentum_buffer"].double() for name, p in model.named_parameters()
    }, optimizer


def error(model: nn.Module, x: Tensor, loss: Loss = square, **options: Any) -> float:
    """How far a float32 step is from the float64 one of the same model and batch, over all parameters."""
    exact, _ = one_step(copy.deepcopy(model).double(), x.double(), loss, **options)
    taken, _ = one_step(model, x, loss, **options)
    off, whole = (
        torch.cat([part(name).flatten() for name in exact])
        for part in (lambda name: taken[name] - exact[name], lambda name: exact[name])
    )
    return float(off.norm() / whole.norm())


# --- a difference that is small, and means something --------------------------------------------------


def transposed(seed: int, outputs: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.ConvTranspose1d(1, outputs, 3), torch.randn(8, 1, 3)


def linear(seed: int, outputs: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(3, outputs), torch.randn(8, 3)


def convolution(seed: int, outputs: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Conv2d(2, outputs, 2), torch.randn(8, 2, 3, 3)


@pytest.mark.parametrize("build", [transposed, linear, convolution])
@pytest.mark.parametrize("noise", [1e-2, 1e-4, 3e-5])
def test_halves_that_are_nearly_alike(build: Callable[..., tuple[nn.Module, Tensor]], noise: float) -> None:
    """β* makes up for the length of G⊥: with a short one taken for rounding the step is off by a third."""
    worst = 0.0
    for seed in (2, 7, 10, 53, 62, 99):
        model, x = build(seed, 2 + seed % 2)
        x = reference.joined(x, x + noise * torch.randn_like(x))
        worst = max(worst, error(model, x, damping=1e-2))
    assert worst < 0.07


# --- a difference that is rounding --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_that_are_alike_are_kfac(rows: int, dtype: torch.dtype) -> None:
    """The same samples in another order: sums of many rows round more."""
    for seed in range(10):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype), torch.randn(rows, 5)
        x = reference.joined(x, x[torch.randperm(rows)]).to(dtype)
        _, optimizer = one_step(model, x)
        assert [(row.beta, row.rho) for row in optimizer.diagnostics().layers.values()] == [(0, 0)] * 2


# --- gradients of any size ----------------------------------------------------------------------------


def of_size(scale: float) -> Loss:
    """A loss whose gradients are this large; by the targets, so that they are of float32 numbers."""
    return lambda model, x: scale * square(model, x)


def build(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "linear": (lambda: nn.Linear(20, 3), (20,)),
        "convolution": (
            lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
            (2, 3, 3),
        ),
        "no bias": (lambda: nn.Linear(20, 3, bias=False), (20,)),
        "norm": (lambda: nn.LayerNorm(20), (20,)),
    }
    make, shape = models[kind]
    return make(), torch.randn(64, *shape)


@pytest.mark.parametrize("kind", ["linear", "convolution", "no bias", "norm"])
@pytest.mark.parametrize("scale", [1e10, 1e15])
def test_large_gradients(kind: str, scale: float) -> None:
    """Finite, so no warning; and the step of float64. A power of two changes nothing but the size."""
    model, x = build(kind)
    more: dict[str, Any] = {"layer_options": {nn.LayerNorm: {"path": "fop"}}} if kind == "norm" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(model, x, of_size(scale), **more) < 1e-2


@pytest.mark.parametrize("scale", [1e-5, 1e-10, 1e-15])
def test_small_gradients(scale: float) -> None:
    """⟨Ga, F·Ga⟩ underflows from 1e-10 on."""
    model, x = build("linear")
    assert error(model, x, of_size(scale)) < 1e-2


@pytest.mark.parametrize("scale", [1e-25, 1e-35])
def test_vanishing_gradients_are_harmless(scale: float) -> None:
    """F underflows, too: the step, far too short for any weight, is that of the damping."""
    model, x = build("linear")
    taken, optimizer = one_step(model, x, of_size(scale))
    assert all(torch.isfinite(each).all() for each in taken.values())
    assert float(taken["weight"].norm()) > 0
    assert optimizer.diagnostics().layers["Linear"].eta == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("power", [-20, 7, 40])
def test_a_power_of_two_changes_no_digit(power: int) -> None:
    """Loss, and with it damping relative to the curvature, in other units: exactly the same β, η and ρ."""
    results = []
    for scale in (1.0, 2.0**power):
        model, x = build("convolution")
        taken, optimizer = one_step(model, x, of_size(scale), damping=0.0)
        layers = optimizer.diagnostics().layers.values()
        results.append(
            ([(row.beta, row.rho, row.eta) for row in layers], {k: v * scale for k, v in taken.items()})
        )
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name])


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_one_layer_of_huge_gradients_beside_ordinary_ones(library: type[FOP], max_norm: float | None) -> None:
    """It neither stops the others nor itself; with a KL clip and a norm of all gradients, too."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"huge": nn.Linear(5, 3), "plain": nn.Linear(5, 3)})
    optimizer = library(model, max_grad_norm=max_norm)
    x = torch.randn(16, 5)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            (1e13 * model["huge"](x).square().mean() + model["plain"](x).square().mean()).backward()
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if max_norm is None:
        assert not torch.equal(model["plain"].weight, before["plain.weight"])
    assert all(
        float(optimizer.state[p]["momentum_buffer"].abs().max()) > 0 for p in model["huge"].parameters()
    )
    assert 0 < optimizer.diagnostics().kl_scale <= 1
