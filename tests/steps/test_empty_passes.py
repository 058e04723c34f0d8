"""Micro-batches without samples: they add nothing, and no sub-batch is made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import Own, assert_equal, check_lost_pair, weights


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.ConvTranspose1d(2, 1, 2), nn.Flatten())


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2))


def numbers(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (linear, numbers),
    "convolution": (convolution, lambda n: numbers(n)[:, None]),
    "embedding": (embedding, lambda n: torch.randint(0, 7, (n, 4))),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda out: out.square().sum(),
    "mean": lambda out: out.square().sum() / max(1, len(out)),
}


def train(kind: str, reduction: str, *sizes: int, count: int = 2) -> tuple[nn.Module, FOP]:
    build, inputs = KINDS[kind]
    torch.manual_seed(0)
    model = build().double()
    optimizer = FOP(
        model, loss_reduction=reduction, sub_batches=count, step_length="paper", kl_clip=None, damping=0.1
    )
    for seed in range(2):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        for n in sizes:
            LOSSES[reduction](model(inputs(n))).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4), (0, 0, 4, 0), (3, 0, 4), (0, 3, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_empty_passes_change_nothing(kind: str, reduction: str, sizes: tuple[int, ...], count: int) -> None:
    """Split passes, passes that alternate since they cannot be split alike, and two of one sample."""
    model, optimizer = train(kind, reduction, *sizes, count=count)
    twin, other = train(kind, reduction, *filter(None, sizes), count=count)
    assert_equal(weights(model), weights(twin))
    for name, row in optimizer.diagnostics().layers.items():
        assert (row.beta, row.kfac_steps) == (other.diagnostics().layers[name].beta, row.kfac_steps)


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_empty_passes(kind: str, reduction: str) -> None:
    """The gradient is zero, and so is the step; then training goes on."""
    build, inputs = KINDS[kind]
    model = build().double()
    optimizer = FOP(model, loss_reduction=reduction, momentum=0.0)
    before = weights(model)
    for n in (0, 0):
        LOSSES[reduction](model(inputs(n))).backward()
    optimizer.step()
    assert_equal(weights(model), before)
    optimizer.zero_grad()
    LOSSES[reduction](model(inputs(6))).backward()
    optimizer.step()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, before[name]) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("reduction", LOSSES)
def test_a_labelled_pass_that_is_empty(reduction: str) -> None:
    model = linear().double()
    optimizer = FOP(model, loss_reduction=reduction)
    for label, n in ((0, 4), (1, 0)):
        with optimizer.sub_batch(label):
            LOSSES[reduction](model(numbers(n))).backward()
    optimizer.step()
    check_lost_pair(optimizer, why="its batch is empty")


@pytest.mark.parametrize("reduction", LOSSES)
def test_a_pass_of_an_unknown_number_of_samples(reduction: str) -> None:
    """Its input was changed in place: how much of a sum it made up, nobody knows."""
    model = Own(4, 2)
    optimizer = FOP(model, loss_reduction=reduction)
    for changed in (False, True):
        x = numbers(4).float()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        if changed:
            # Legal: autograd has a copy of its own.
            x.mul_(2)
        LOSSES[reduction](out.float()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if reduction == "sum":
        check_lost_pair(optimizer, why="changed in place")
