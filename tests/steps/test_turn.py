"""Steps turn weights: their norm follows the gradient, and neither noise nor momentum lengthens them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from fop.step_size import Sums, Update, turn
from reference import turned

Net = Callable[[], nn.Module]


def numbers(weight: Tensor, u: Tensor) -> Sums:
    zero = weight.new_zeros(())
    squares = u.square().sum(), weight.square().sum(), zero, (weight * u).sum(), u.square().sum()
    return Sums(*squares, zero, zero)


def update(along: float, noise: float | None) -> Update:
    zero = torch.zeros((), dtype=torch.float64)
    share = None if noise is None else torch.tensor(noise, dtype=torch.float64)
    return Update(*[zero] * 5, noise=share, along=torch.tensor(along, dtype=torch.float64))


@pytest.mark.parametrize("rate", [0.2, -0.2, 3.0])
@pytest.mark.parametrize("noise", [None, 0.0, 0.7])
@pytest.mark.parametrize("along", [0.0, 1e-3, -0.1, 0.6])
def test_a_weight_turns_by_an_angle(along: float, noise: float | None, rate: float) -> None:
    torch.manual_seed(0)
    weight, u = torch.randn(2, 3, 4, dtype=torch.float64)
    signal = 0.0 if noise is None else 1 - noise
    # Going up is going down on the negative loss, whose gradient is the negative one.
    expected = turned(weight, rate * u, math.copysign(along, along * rate), signal, 12)
    zero, scale = torch.zeros((), dtype=torch.float64), torch.tensor(rate, dtype=torch.float64)
    turn(weight, u, scale, numbers(weight, u), update(along, noise), zero, 12, by_row=False)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_without_gradient_along_the_weight_its_norm_stays() -> None:
    torch.manual_seed(0)
    weight, zero = torch.randn(5, 6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    norm, momentum = weight.norm(), torch.zeros_like(weight)
    for _ in range(100):
        momentum = 0.6 * momentum + torch.randn_like(weight)
        u = momentum * weight.norm() / momentum.norm()
        turn(weight, u, zero + 0.2, numbers(weight, u), update(0.0, 0.0), zero, 30, by_row=False)
    torch.testing.assert_close(weight.norm(), norm, rtol=1e-12, atol=0.0)


def normalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, 30, bias=False), nn.LayerNorm(30), nn.ReLU()),
        nn.Linear(30, 5),
    )


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)
    )


def noisy_training(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Batches of 16, under a schedule: most of a step is noise."""
    shares = [min((step + 1) / 20, (steps - step) / steps) for step in range(steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, steps - 1)])
    x, y = torch.randn(256, 1, 8, 8), torch.randint(5, (256,))
    x = x + torch.nn.functional.one_hot(y, 64).view(-1, 1, 8, 8)
    for _ in range(steps):
        chosen = torch.randint(256, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()


def norms(net: nn.Module) -> dict[str, float]:
    return {name: float(p.norm()) for name, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("optimizer_of", [FOP, KFAC])
def test_weights_before_a_normalisation_keep_their_norm_and_others_do_not(optimizer_of: type[FOP]) -> None:
    torch.manual_seed(0)
    net = normalised()
    before = norms(net)
    noisy_training(net, optimizer_of(net), 100)
    changes = {name: abs(math.log(after / before[name])) for name, after in norms(net).items()}
    head = changes.pop("10.weight")
    assert max(changes.values()) < 0.01 and len(changes) == 3
    assert head > 0.1


@pytest.mark.parametrize("build", [normalised, plain])
def test_noise_does_not_lengthen_weights(build: Net) -> None:
    """Steps that are added make one 65 times as long, and all before a normalisation more than 200 times."""
    torch.manual_seed(0)
    net = build()
    before = norms(net)
    noisy_training(net, FOP(net), 400)
    assert all(after < 15 * before[name] for name, after in norms(net).items())
