"""Steps turn weights: their norm follows the gradient, and neither noise nor momentum lengthens them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from fop.step_size import Lengths, row_products, turn
from reference import turned

Net = Callable[[], nn.Module]


def step(weight: Tensor, u: Tensor, rate: float, cosine: float, signal: float, *, rows: bool = False) -> None:
    """Turn a weight in place by ``rate`` times u; ``signal`` is 1 - ν."""
    zero = weight.new_zeros(())
    whole = [weight.square().sum(), (weight * u).sum(), u.square().sum()]
    share = signal * min(1.0, math.sqrt(weight.numel()) * abs(cosine))
    scale, along, of_signal = zero + rate, zero + cosine, zero + share
    far = Lengths(zero + 1, zero + 1, scale, torch.tensor(True), along, of_signal, zero)
    a, b = turn(*(row_products(weight, u) if rows else whole), far)
    weight.copy_(a * weight - b * u)


@pytest.mark.parametrize("rate", [0.2, -0.2, 3.0])
@pytest.mark.parametrize("signal", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("along", [0.0, 1e-3, -0.1, 0.6])
def test_a_weight_turns_by_an_angle(along: float, signal: float, rate: float) -> None:
    torch.manual_seed(0)
    weight, u = torch.randn(2, 3, 4, dtype=torch.float64)
    # Going up is going down on the negative loss, whose gradient is the negative one.
    expected = turned(weight, rate * u, math.copysign(along, along * rate), signal, 12)
    step(weight, u, rate, along, signal)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_without_gradient_along_the_weight_its_norm_stays() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 6, dtype=torch.float64)
    norm, momentum = weight.norm(), torch.zeros_like(weight)
    for _ in range(100):
        momentum = 0.6 * momentum + torch.randn_like(weight)
        step(weight, momentum * weight.norm() / momentum.norm(), 0.2, 0.0, 1.0)
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


@pytest.mark.slow
@pytest.mark.parametrize("build", [normalised, plain])
def test_noise_does_not_lengthen_weights(build: Net) -> None:
    """Steps that are added make one 65 times as long, and all before a normalisation more than 200 times."""
    torch.manual_seed(0)
    net = build()
    before = norms(net)
    noisy_training(net, FOP(net), 400)
    assert all(after < 15 * before[name] for name, after in norms(net).items())


@pytest.mark.parametrize(
    "build", [normalised, plain, lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5))]
)
@pytest.mark.parametrize("optimizer_of", [FOP, KFAC])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_all_weights(
    build: Net, optimizer_of: type[FOP], bad: float
) -> None:
    torch.manual_seed(0)
    net, y = build(), torch.arange(16) % 5
    x = torch.randint(9, (16,)) if isinstance(net[0], nn.Embedding) else torch.randn(16, 1, 8, 8)  # type: ignore[index]
    optimizer = optimizer_of(net, weight_decay=0.1)
    for step in range(5):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        (loss * bad if step == 3 else loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        same = all(torch.equal(before[name], p) for name, p in net.named_parameters())
        assert same == (step == 3), step


@pytest.mark.parametrize("build", [
    lambda: nn.Linear(5, 3), lambda: nn.Conv1d(2, 4, 3, groups=2), lambda: nn.Embedding(9, 4)
], ids=["linear", "convolution", "embedding"])  # fmt: skip
@pytest.mark.parametrize("optimizer_of", [FOP, KFAC])
def test_a_step_with_decay_is_one_without_from_what_decay_leaves(optimizer_of: type[FOP], build: Net) -> None:
    """The loss is linear in the weights, so that gradients and curvature are the same there."""
    torch.manual_seed(0)
    layer = build().double()
    decayed = copy.deepcopy(layer)
    shape = (8,) if isinstance(layer, nn.Embedding) else (8, 5) if isinstance(layer, nn.Linear) else (8, 2, 5)
    x = torch.randint(7, shape) if len(shape) == 1 else torch.randn(shape, dtype=torch.float64)
    c = torch.randn_like(layer(x))
    with torch.no_grad():
        for p in decayed.parameters():
            p.mul_(1 - 0.2 * 0.5)
    for module, decay in ((layer, 0.5), (decayed, 0.0)):
        optimizer = optimizer_of(module, lr=0.4, weight_decay=decay)
        optimizer.param_groups[0]["lr"] = 0.2
        (module(x) * c).sum(-1).mean().backward()
        optimizer.step()
    for p, q in zip(layer.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_weights_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False).to(dtype)
    optimizer, norm = FOP(layer, lr=0.02, anneal=False), float(layer.weight.float().norm())
    x, y = torch.randn(64, 16).to(dtype), torch.randn(64, 16)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x).float() / layer.weight.float().norm() - y).square().mean().backward()
        optimizer.step()
    assert float(layer.weight.float().norm()) == pytest.approx(norm, rel=0.01)


@pytest.mark.parametrize("optimizer_of", [FOP, KFAC])
def test_an_embedding_of_one_number_learns_its_sign(optimizer_of: type[FOP]) -> None:
    torch.manual_seed(0)
    embedding, target = nn.Embedding(50, 1), torch.randn(50).sign()
    optimizer = optimizer_of(embedding)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 100)
    for _ in range(100):
        ids = torch.randint(50, (64,))
        optimizer.zero_grad()
        (embedding(ids)[:, 0] - target[ids]).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert torch.equal(embedding.weight.detach()[:, 0].sign(), target)


def test_a_row_that_is_much_shorter_than_the_others_stays_finite() -> None:
    torch.manual_seed(0)
    weight, u = torch.randn(2, 8, 4, dtype=torch.float64)
    weight[3] *= 1e-4
    before = weight.clone()
    step(weight, u, 0.2, -0.02, 0.5, rows=True)
    assert weight[3].norm() < 2 * (0.2 * u[3]).norm()
    assert (weight - before)[0].norm() < 2 * (0.2 * u[0]).norm()
