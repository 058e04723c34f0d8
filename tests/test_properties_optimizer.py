"""What follows from the paper's equations, through the optimizer: halves swapped, shuffled, equal, scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from fop import FOP, KFAC

# Derandomized: a run today and a run tomorrow see the same examples. Few, as they build and train models.
brief = settings(derandomize=True, deadline=None, max_examples=15, database=None)

SCALES = [1e-8, 1e-3, 0.5, 3.0, 1e8]

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 2, bias=False)
    )


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "conv": (convolutional, (2, 3, 3)),
}
# No KL clip: it is no part of the equations, and not homogeneous in the loss.
OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 1e-2, "kl_clip": None, "momentum": 0.9}


def batches(model: str, samples: int, count: int, seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    build, shape = MODELS[model]
    out = build().double()(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    return [
        (
            torch.randn(samples, *shape, dtype=torch.float64),
            torch.randn(samples, out, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def trained(
    model: str, data: list[Batch], make: Callable[..., FOP] = FOP, loss_scale: float = 1.0, **options: Any
) -> tuple[list[Tensor], FOP]:
    """Weights after a step on each batch, from always the same start."""
    torch.manual_seed(7)
    net = MODELS[model][0]().double()
    optimizer = make(net, **{**OPTIONS, **options})
    for x, y in data:
        optimizer.zero_grad()
        (loss_scale * reference.half_squared_error(net(x), y)).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], optimizer


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of any entry."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def swap_halves(batch: Batch) -> Batch:
    x, y = batch
    half = len(x) // 2
    return torch.cat([x[half:], x[:half]]), torch.cat([y[half:], y[:half]])


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 6), st.integers(0, 1000))
def test_optimizer_swapping_the_halves_of_a_batch(model: str, half: int, seed: int) -> None:
    data = batches(model, 2 * half, 3, seed)
    one, _ = trained(model, data)
    other, _ = trained(model, [swap_halves(batch) for batch in data])
    assert distance(one, other) <= 1e-12


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 6), st.integers(0, 1000))
def test_optimizer_shuffling_within_the_halves(model: str, half: int, seed: int) -> None:
    data = batches(model, 2 * half, 2, seed)
    order = torch.cat([torch.randperm(half), half + torch.randperm(half)])
    one, _ = trained(model, data)
    other, _ = trained(model, [(x[order], y[order]) for x, y in data])
    assert distance(one, other) <= 1e-12
    # What the two tests above cannot see: that the halves matter at all.
    crossed = torch.arange(2 * half).reshape(2, half).T.flatten()
    crossed_weights, _ = trained(model, [(x[crossed], y[crossed]) for x, y in data])
    assert distance(one, crossed_weights) > 1e-6


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 6), st.integers(0, 1000))
def test_optimizer_equal_halves_are_kfac(model: str, half: int, seed: int) -> None:
    data = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in batches(model, half, 3, seed)]
    one, optimizer = trained(model, data)
    other, _ = trained(model, data, KFAC)
    assert distance(one, other) <= 1e-12
    assert {layer.rho for layer in optimizer.diagnostics().layers.values()} == {0.0}


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 1000))
def test_optimizer_one_sample_is_kfac_bit_for_bit(model: str, seed: int) -> None:
    data = batches(model, 1, 3, seed)
    one, _ = trained(model, data)
    other, _ = trained(model, data, KFAC)
    assert distance(one, other) == 0


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 9), st.integers(0, 1000))
def test_optimizer_diagnostics_obey_the_bounds(model: str, samples: int, seed: int) -> None:
    _, optimizer = trained(model, batches(model, samples, 3, seed))
    layers = optimizer.diagnostics().layers
    assert len(layers) == 2
    for layer in layers.values():
        assert 0 < layer.rho <= 1 + 1e-12
        assert layer.eta == pytest.approx((1 + layer.rho) / (1 + 3 * layer.rho), rel=1e-9)
        assert 0.5 - 1e-12 <= layer.eta < 1


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 9), st.sampled_from(SCALES), st.integers(0, 1000))
def test_optimizer_scaling_the_loss(model: str, samples: int, c: float, seed: int) -> None:
    """Loss times c: gradients grow by c and G by c², so damping times c² must divide the step by c."""
    data = batches(model, samples, 1, seed)
    start, _ = trained(model, [])
    one, _ = trained(model, data)
    scaled, _ = trained(model, data, loss_scale=c, damping=OPTIONS["damping"] * c * c, lr=OPTIONS["lr"] * c)
    for w0, w1, w2 in zip(start, one, scaled, strict=True):
        # A weight after the step has digits relative to itself, not to the update.
        assert (w2 - w1).norm() <= 1e-10 * ((w1 - w0).norm() + w0.norm())
        assert (w1 - w0).norm() > 1e-4 * w0.norm()
