"""A parameter takes part in a step if it requires a gradient, whatever an old `p.grad` says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import Attentive, assert_equal, loss_of, sentences, snapshot, train_step, weights

# Momentum and decay would move a parameter whose gradient is zero.
BUSY: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
NAMES = [name for name, _ in Attentive().named_parameters()]
NORMS: dict[Any, Any] = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}}


def to_zeros(model: nn.Module, optimizer: FOP) -> None:
    optimizer.zero_grad(set_to_none=False)


def to_zeros_by_the_model(model: nn.Module, optimizer: FOP) -> None:
    model.zero_grad(set_to_none=False)


def keep(model: nn.Module, optimizer: FOP) -> None:
    """The frozen parameter's old gradient stays; that of the others is set anew."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = None


def spoil(model: nn.Module, optimizer: FOP) -> None:
    keep(model, optimizer)
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = torch.full_like(p, float("nan"))


RESETS = [to_zeros, to_zeros_by_the_model, keep, spoil]


@pytest.mark.parametrize(
    ("reset", "norms"),
    [
        *((reset, None) for reset in RESETS),
        (spoil, NORMS),
        *(pytest.param(reset, NORMS, marks=pytest.mark.rest) for reset in RESETS if reset is not spoil),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_in_mid_training_stays(
    name: str, reset: Callable[[nn.Module, FOP], None], norms: dict[Any, Any] | None
) -> None:
    """It stays; the others step as if it had no gradient; later it is thawed, and moves again."""
    library = KFAC if norms else FOP
    results = []
    for forget in (False, True):
        model = Attentive()
        optimizer = library(model, layer_options=norms, max_grad_norm=0.5, **BUSY)
        for seed in range(3):
            train_step(model, optimizer, *sentences(6, seed))
        frozen = model.get_parameter(name).requires_grad_(False)
        before = frozen.detach().clone()
        for seed in range(3):
            reset(model, optimizer)
            if forget:
                frozen.grad = None
            loss_of(model, *sentences(6, 10 + seed)).backward()
            optimizer.step()
            assert torch.equal(frozen, before)
        results.append((weights(model), snapshot(optimizer)["state"]))
        frozen.requires_grad_(True)
        train_step(model, optimizer, *sentences(6, 20))
        assert not torch.equal(frozen, before)
    assert_equal(*results)


class Bitfit(nn.Module):
    """Layers of several kinds, all weights frozen; an embedding has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 3, 2)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.conv(self.embed(ids).mT))).mean(-1))
        return out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("library", [FOP, KFAC])
def test_biases_alone_are_trained_by_adamw(library: type[FOP], late: bool) -> None:
    model, twin = Bitfit(), Bitfit()
    optimizer = library(model, adamw_lr=0.02, **BUSY)
    if late:
        train_step(model, optimizer, *sentences(6, 30))
        twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        for name, p in net.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1, eps=1e-17)
    if late:
        # The norm has taken an AdamW step already.
        state = optimizer.state[model.norm.bias]
        adamw.state[twin.norm.bias] = copy.deepcopy(state)
    for seed in range(4):
        for net, each in ((model, optimizer), (twin, adamw)):
            train_step(net, each, *sentences(6, seed))
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-10, atol=1e-12)
    paths = {row.name: (row.path, row.reason) for row in optimizer.summary().rows}
    assert paths["conv.bias"] == ("AdamW", "the weight of its Conv1d is frozen")
    assert paths["conv.weight"][1] == "Conv1d, frozen"


def test_a_model_whose_parameters_are_all_frozen_stays() -> None:
    model = Attentive()
    optimizer = FOP(model, **BUSY)
    train_step(model, optimizer, *sentences())
    before = weights(model)
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer.step()
    assert_equal(weights(model), before)
