"""Frozen weights with trained biases, and the other way round, between ranks and in the middle of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import OPTIONS, Weights, whole, wrapped
from torch import nn

from fop import FOP
from models import batch, loss_of, mlp, weights
from ranks import run_ranks

FROZEN = {"weights": ["0.weight", "2.weight"], "one weight": ["0.weight"], "bias": ["0.bias"]}


def freeze(model: nn.Module, names: list[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def train(rank: int, frozen: str, when: int, wrap: str, mode: str, more: dict[str, Any]) -> list[Weights]:
    """The weights of one rank before the first step and after every step."""
    model = mlp()
    if not when:
        freeze(model, FROZEN[frozen])
    net = wrapped(model, wrap)
    optimizer = FOP(net, **OPTIONS, **more, distributed={"mode": mode, "pair": "halves"})
    seen = [whole(model)]
    for seed in range(4):
        if seed and seed == when:
            freeze(model, FROZEN[frozen])
            # DistributedDataParallel must be told.
            net = wrapped(model, wrap)
        optimizer.zero_grad(set_to_none=seed % 2 == 0)
        loss_of(net, *batch(4, 10 * seed + rank)).backward()
        optimizer.step()
        seen.append(whole(model))
    return seen


def alone(frozen: str, when: int, more: dict[str, Any]) -> list[Weights]:
    """The same in one process, with both batches at once."""
    model = mlp()
    if not when:
        freeze(model, FROZEN[frozen])
    optimizer = FOP(model, **OPTIONS, **more)
    seen = [weights(model)]
    for seed in range(4):
        if seed and seed == when:
            freeze(model, FROZEN[frozen])
        optimizer.zero_grad(set_to_none=seed % 2 == 0)
        x, y = (
            torch.cat(both) for both in zip(*(batch(4, 10 * seed + rank) for rank in range(2)), strict=True)
        )
        loss_of(model, x, y).backward()
        optimizer.step()
        seen.append(weights(model))
    return seen


@pytest.mark.parametrize(
    ("wrap", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("", "compatible"), ("fsdp", "compatible")]
)
@pytest.mark.parametrize("frozen", FROZEN)
def test_from_the_start(frozen: str, wrap: str, mode: str) -> None:
    check(frozen, 0, wrap, mode, {"beta": 0.0, "eta": 1.0})


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.1}, {"loss_reduction": "sum"}])
@pytest.mark.parametrize(("wrap", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("", "compatible")])
@pytest.mark.parametrize("frozen", FROZEN)
def test_in_mid_training(frozen: str, wrap: str, mode: str, more: dict[str, Any]) -> None:
    check(frozen, 2, wrap, mode, {"beta": 0.0, "eta": 1.0, **more})


def check(frozen: str, when: int, wrap: str, mode: str, more: dict[str, Any]) -> None:
    """Ranks take the steps of one process; what is frozen stays, everything else moves in every step."""
    expected = alone(frozen, when, more)
    for rank, seen in enumerate(run_ranks(train, 2, frozen, when, wrap, mode, more)):
        for step, (before, after) in enumerate(pairwise(seen)):
            for name, value in before.items():
                stays = name in FROZEN[frozen] and step >= when
                assert torch.equal(after[name], value) == stays, (rank, step, name)
        if more.get("loss_reduction") != "sum":
            for name, value in expected[-1].items():
                torch.testing.assert_close(seen[-1][name], value, rtol=1e-9, atol=1e-11, msg=f"{rank} {name}")
