"""Momentum that the KL clip bounded at a small learning rate does not break out when the rate rises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fop import FOP
from models import batch, mlp, train_step

OPTIONS = {"step_length": "paper", "kl_clip": 1e-6, "curvature_interval": 1, "damping": 1e-2}


@pytest.mark.parametrize(("first", "second"), [(0.01, 0.1), (0.0, 0.1), (0.1, 0.01), (0.1, 0.1)])
def test_rising_rate_carries_momentum_no_further(first: float, second: float) -> None:
    model = mlp()
    optimizer = FOP(model, lr=first, momentum=0.9, **OPTIONS)
    train_step(model, optimizer, *batch(seed=1))
    weight = model[0].weight
    before = optimizer.state[weight]["momentum_buffer"].clone()
    # The same second step without momentum gives the clipped update itself.
    bare, plain = copy.deepcopy((model, optimizer))
    for each in (optimizer, plain):
        each.param_groups[0]["lr"] = second
    plain.param_groups[0]["momentum"] = 0.0
    start = bare[0].weight.detach().clone()
    train_step(bare, plain, *batch(seed=2))
    train_step(model, optimizer, *batch(seed=2))
    update = (start - bare[0].weight.detach()) / second
    expected = 0.9 * min(1.0, first / second) * before + update
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected, rtol=1e-9, atol=1e-12)


def test_one_cycle_ends_below_where_it_began() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = FOP(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=31, cycle_momentum=False)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5
    assert max(losses) <= 1.05 * losses[0]
