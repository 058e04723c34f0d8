"""What scripts expect of any `torch.optim` optimizer: parameter groups, frozen and unused layers.

Part of the conformance suite; see `test_contract.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from contract import LR, Make, every, train
from models import Mixed, assert_differs, assert_equal, loss_of, tokens, train_step, weights

# --- groups ------------------------------------------------------------------------------------------------


def by_layer(model: Mixed) -> tuple[list[Tensor], list[Tensor]]:
    layer = list(model.first.parameters())
    return layer, [p for p in model.parameters() if all(p is not own for own in layer)]


@every
def test_every_group_has_its_own_learning_rate(make: Make) -> None:
    model = Mixed()
    still, moving = by_layer(model)
    optimizer = make([{"params": still, "lr": 0.0}, {"params": moving}], weight_decay=0.1)
    before = weights(model)
    train(model, optimizer, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("first")
    for group in optimizer.param_groups:
        group["lr"] = LR - group["lr"]
    before = weights(model)
    train(model, optimizer, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("first")


@every
def test_every_group_has_its_own_weight_decay(make: Make) -> None:
    """Without a gradient to speak of, only the decay is left."""
    model = Mixed()
    still, shrinking = by_layer(model)
    optimizer = make([{"params": still}, {"params": shrinking, "weight_decay": 0.5}])
    (0 * loss_of(model, *tokens())).backward()
    before = weights(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("first"):
            assert torch.equal(p, before[name])
        elif before[name].any():
            assert p.norm() < before[name].norm()


@every
@pytest.mark.parametrize("named", [False, True])
def test_add_param_group_in_mid_training(make: Make, named: bool) -> None:
    model, extra = Mixed(), nn.Linear(3, 3).double()
    optimizer = make(model.named_parameters() if named else model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(3))
    given = extra.named_parameters() if named else extra.parameters()
    optimizer.add_param_group({"params": given, "lr": 0.01})
    group = optimizer.param_groups[1]
    assert group["params"] == [extra.weight, extra.bias]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    whole = nn.Sequential(model, extra)
    before = weights(whole)
    for seed in range(2):
        train_step(whole, optimizer, *tokens(6, seed))
    assert_differs(weights(whole), before)
    assert len(optimizer.state_dict()["state"]) == 9


@every
def test_two_optimizers_over_two_parts_of_a_model(make: Make) -> None:
    """Each steps its own part at its own time (GAN, actor and critic)."""
    model = Mixed()
    optimizers = [make(part) for part in by_layer(model)]
    for seed in range(4):
        before = weights(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, *tokens(6, seed)).backward()
        optimizers[seed % 2].step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name.startswith("first") == bool(seed % 2))


# --- freezing ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("start", ["frozen", "thawed"])
def test_frozen_layer_stays_and_moves_again_when_thawed(make: Make, start: str) -> None:
    model = Mixed()
    layer = model.first.requires_grad_(start == "thawed")
    optimizer = make(model.parameters(), weight_decay=0.1)
    if start == "thawed":
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        layer.requires_grad_(False)
    frozen, others = weights(layer), weights(model.second)
    state = copy.deepcopy(optimizer.state[layer.weight])
    train(model, optimizer, range(3, 6))
    assert_equal(weights(layer), frozen)
    assert_equal(optimizer.state[layer.weight], state)
    assert_differs(weights(model.second), others)
    layer.requires_grad_(True)
    train(model, optimizer, range(6, 8))
    assert_differs(weights(layer), frozen)


class Branches(nn.Module):
    """Two layers of which a forward pass uses one, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Mixed()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).double()
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[self.chosen](self.base(x))
        return out


@every
def test_layer_that_the_forward_pass_leaves_out_keeps_its_value(make: Make) -> None:
    model = Branches()
    optimizer = make(model.parameters(), weight_decay=0.1)
    for seed, model.chosen in enumerate([0, 0, 1, 1, 0]):
        before = weights(model)
        train_step(model, optimizer, *tokens(6, seed))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith(f"experts.{1 - model.chosen}")
