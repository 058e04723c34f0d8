"""Gradients that are read, cleared and put back: K-FAC's step of them, with the curvature of the passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    PLAIN,
    assert_equal,
    batch,
    check_lost_pair,
    check_step,
    conv_net,
    gradients,
    layers,
    loss_of,
    mlp,
    snapshot,
    train_step,
    weights,
)

Gradients = dict[str, Tensor]


def read(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def replace(model: nn.Module, values: Gradients) -> None:
    for name, p in model.named_parameters():
        p.grad = values[name].clone()


def write(model: nn.Module, values: Gradients) -> None:
    """Into the zeros that are there."""
    for name, p in model.named_parameters():
        assert p.grad is not None
        p.grad.copy_(values[name])


def add(model: nn.Module, values: Gradients) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None
        p.grad += values[name]


WAYS: dict[str, tuple[bool, Callable[[nn.Module, Gradients], None]]] = {
    "replaced": (True, replace),
    "replaced zeros": (False, replace),
    "written into zeros": (False, write),
    "added to zeros": (False, add),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("build", [mlp, conv_net])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_put_back(way: str, build: Callable[[], nn.Module], reduction: str) -> None:
    """From the first step on, and with new curvature whenever it is due."""
    to_none, put = WAYS[way]
    model = build()
    shape = (5,) if build is mlp else (2, 5, 6)
    optimizer = FOP(model, **PLAIN, loss_reduction=reduction)
    curvature = []
    for seed in range(3):
        twin = copy.deepcopy(model)
        loss = loss_of(model, *batch(6, seed, shape))
        (6 * loss if reduction == "sum" else loss).backward()
        values = read(model)
        optimizer.zero_grad(set_to_none=to_none)
        put(model, values)
        optimizer.step()
        optimizer.zero_grad()
        wanted = gradients(twin, loss_of(twin, *batch(6, seed, shape)))
        check_step(model, twin, optimizer, {name: (matrix, None) for name, matrix in wanted.items()})
        curvature.append(optimizer.state[next(iter(layers(model).values())).weight]["A"].clone())
    check_lost_pair(optimizer, steps=3, why="p.grad was not made by a backward pass")
    assert "AdamW" not in {row.path for row in optimizer.summary().rows}
    assert not torch.equal(curvature[0], curvature[1]) and not torch.equal(curvature[1], curvature[2])


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_gradient_surgery_on_two_losses(library: type[FOP]) -> None:
    """PCGrad: conflicting gradients are projected; the curvature is that of the last loss."""
    model = mlp()
    optimizer = library(
        model, **{k: v for k, v in PLAIN.items() if library is FOP or k not in ("beta", "eta")}
    )
    for seed in range(2):
        twin, each = copy.deepcopy(model), []
        for task in range(2):
            optimizer.zero_grad()
            loss_of(model, *batch(6, 10 * seed + task)).backward()
            each.append(read(model))
        one, other = (torch.cat([g.flatten() for g in values.values()]) for values in each)
        if (product := one @ other) < 0:
            one, other = one - product / (other @ other) * other, other - product / (one @ one) * one
        parts = (one + other).split([p.numel() for p in model.parameters()])
        values = {
            name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)
        }
        optimizer.zero_grad()
        replace(model, values)
        optimizer.step()
        for name, layer in layers(model).items():
            matrix = torch.cat([values[f"{name}.weight"], values[f"{name}.bias"][:, None]], 1)[None]
            assert layer.weight in optimizer.state
            check_step(model, twin, optimizer, {name: (matrix, None)})


def test_meta_gradient_of_inner_loops() -> None:
    """MAML: the passes of the inner loop never reach `p.grad`, and come before the gradient is put back."""
    model = mlp()
    optimizer = FOP(model, **PLAIN)
    for seed in range(2):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        loss_of(model, *batch(6, seed)).backward()
        values = read(model)
        optimizer.zero_grad()
        torch.autograd.grad(loss_of(model, *batch(6, 50 + seed)), list(model.parameters()))
        replace(model, values)
        optimizer.step()
        wanted = gradients(twin, loss_of(twin, *batch(6, seed)))
        check_step(model, twin, optimizer, {name: (matrix, None) for name, matrix in wanted.items()})


def train(skips: Callable[[nn.Module, FOP], None], **options: Any) -> tuple[Any, Any]:
    """A training in which ``skips`` comes before each step but the first."""
    model = mlp()
    optimizer = FOP(model, momentum=0.5, weight_decay=0.1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            if seed:
                skips(model, optimizer)
            train_step(model, optimizer, *batch(6, seed))
    return weights(model), snapshot(optimizer)["state"]


def bad_pass(model: nn.Module) -> None:
    (loss_of(model, *batch(6, 99)) * float("nan")).backward()


def skip(model: nn.Module, optimizer: FOP) -> None:
    bad_pass(model)
    optimizer.zero_grad()


def skip_twice(model: nn.Module, optimizer: FOP) -> None:
    skip(model, optimizer)
    optimizer.zero_grad(set_to_none=False)


def skip_and_look(model: nn.Module, optimizer: FOP) -> None:
    """A pass that never reaches `p.grad` follows."""
    skip(model, optimizer)
    torch.autograd.grad(loss_of(model, *batch(6, 98)), list(model.parameters()))


@pytest.mark.parametrize("skips", [skip, skip_twice, skip_and_look])
def test_what_was_cleared_never_enters_the_averages(skips: Callable[[nn.Module, FOP], None]) -> None:
    assert_equal(train(skips), train(lambda model, optimizer: None))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_without_a_gradient_takes_nothing_of_what_was_cleared(to_none: bool) -> None:
    """Not even the averages change; zeros that nobody has touched are no gradient by hand."""
    model = mlp()
    optimizer = FOP(model, momentum=0.0, curvature_interval=1)
    train_step(model, optimizer, *batch())
    before = [copy.deepcopy(optimizer.state[layer.weight]) for layer in layers(model).values()]
    bad_pass(model)
    optimizer.zero_grad(set_to_none=to_none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    for layer, old in zip(layers(model).values(), before, strict=True):
        assert torch.equal(optimizer.state[layer.weight]["A"], old["A"])
