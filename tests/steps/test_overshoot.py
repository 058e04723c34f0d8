"""Where a step went too far momentum is dropped and the next ones are shorter, as much as is signal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import fop.optimizer
from fop import FOP
from fop.step_size import REACH, after_overshoot


def looked_back(slope: float, radius: float, past: float, noise: float, *, good: bool = True) -> list[float]:
    """Return by what momentum is multiplied, and slope and radius; momentum 0.6, ⟨update, Ga⟩ = 5."""
    state = {REACH: torch.tensor([slope, radius], dtype=torch.float64)}
    along = torch.tensor([[0.0, 0.0, past, 5.0]], dtype=torch.float64)
    kept, now = after_overshoot([state], along, along.new_full((1,), noise), 0.6, torch.tensor([good]))
    assert now.tolist() == state[REACH][1:].tolist()
    return [float(kept), *state[REACH].tolist()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.0, 1.0, 0.0, 0.3), [1.0, 5.0, 1.0]),  # the first step
        ((4.0, 1.0, 3.0, 0.3), [1.0, 6.8, 1.0]),
        ((4.0, 0.5, -8.0, 0.0), [1.0, 0.2, 0.51]),  # turned round, and no more than twice
        ((4.0, 0.5, -8.1, 0.0), [0.0, 5.0, 0.25]),
        ((4.0, 0.5, -8.1, 0.25), [0.25, 5.0 - 0.6 * 0.25 * 8.1, 0.5 * 2**-0.75]),
        ((4.0, 0.5, -8.1, 1.0), [1.0, 5.0 - 0.6 * 8.1, 0.5]),  # all is noise
        ((-4.0, 0.5, -1.0, 0.0), [0.0, 5.0, 0.25]),  # momentum still goes up
        ((-4.0, 0.5, 1.0, 0.0), [1.0, 5.6, 0.51]),
        ((4.0, 0.07, -8.1, 0.0), [0.0, 5.0, 0.05]),
        ((4.0, 0.5, -math.inf, 0.5), [0.5, 4.0, 0.5]),  # too large for the dtype
    ],
)
def test_one_step_back(given: Sequence[float], expected: Sequence[float]) -> None:
    assert looked_back(*given) == pytest.approx(expected, rel=1e-12)


def test_weights_that_stay_remember_what_they_did() -> None:
    assert looked_back(4.0, 0.5, -100.0, 0.0, good=False)[1:] == [4.0, 0.5]


def losses(look_back: bool, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the losses of 60 steps of a network of 13 layers, each of which moves by a fifth a step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)), nn.Linear(16, 3))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    y = torch.sin(x[:, :3] + x[:, 3:6])
    if not look_back:
        untouched = lambda states, *rest: (torch.ones(len(states)),) * 2  # noqa: E731
        monkeypatch.setattr(fop.optimizer, "after_overshoot", untouched)
    optimizer, found = FOP(model), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        found.append(float(loss.detach()))
        optimizer.step()
    return found


@pytest.mark.slow
def test_a_deep_network_without_normalisation_does_not_run_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = losses(True, monkeypatch)
    assert max(now) < 100 * now[0]
    assert min(now[-10:]) < now[0]
    assert max(losses(False, monkeypatch)) > 1e6 * now[0]
