"""Inverses that are computed in the background count `inverse_delay` steps later, on one process too."""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fop import FOP, KFAC
from fop.curvature import NEVER
from models import batch, conv_net, mlp, weights

OPTIONS: dict[str, Any] = {"step_length": "paper", "lr": 0.05, "damping": 1e-2, "curvature_interval": 4}


def step(model: nn.Module, optimizer: FOP, seed: int) -> None:
    x, y = batch(6, seed, (2, 5, 6) if isinstance(model[0], nn.Conv2d) else (5,))  # type: ignore[index]
    dtype = next(model.parameters()).dtype
    x, y = x.to(dtype), y.to(dtype)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("build", [mlp, conv_net])
def test_new_inverses_count_later(build: Any, delay: int) -> None:
    """At step t + delay the inverse of step t's factors is used, and until then the one before."""
    model = build()
    optimizer = KFAC(model, inverse_delay=delay, **OPTIONS)
    used: list[int] = []
    for seed in range(36):
        step(model, optimizer, seed)
        ages = {layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()}
        assert len(ages) == 1
        used.append(seed - int(ages.pop() or 0))
    # The first inverse cannot wait; later ones count from `delay` steps after their factors. Early on
    # the next refresh comes sooner than that, and takes the pending inverse with it.
    assert used[0] == 0
    late = [step - of for step, (before, of) in enumerate(pairwise(used), 1) if of != before and of > 20]
    assert len(late) >= 3
    assert set(late) == {delay}


def test_delay_changes_the_training_and_no_delay_does_not_wait() -> None:
    finals = []
    for delay in (0, 2):
        model = mlp()
        optimizer = KFAC(model, inverse_delay=delay, **OPTIONS)
        for seed in range(20):
            step(model, optimizer, seed)
        finals.append(torch.cat([value.reshape(-1) for value in weights(model).values()]))
    assert not torch.equal(*finals)


def until_pending(model: nn.Module, optimizer: FOP) -> None:
    """Train until inverses are pending that do not count yet."""
    for seed in range(40):
        step(model, optimizer, seed)
        if seed > 20 and all(pending(optimizer)):
            return
    raise AssertionError("no inverse was ever pending")


def pending(optimizer: FOP) -> list[bool]:
    return [state.get("inverse_at", NEVER) != NEVER for state in optimizer.state.values() if "A" in state]


def check_resumes(model: nn.Module, optimizer: FOP) -> None:
    """A copy that takes over the state trains as the first goes on, bit for bit."""
    other = copy.deepcopy(model)
    resumed = KFAC(other, inverse_delay=3, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(6):
        step(model, optimizer, 100 + seed)
        step(other, resumed, 100 + seed)
    for one, two in zip(weights(model).values(), weights(other).values(), strict=True):
        assert torch.equal(one, two)


def test_a_resume_in_between_starts_the_same_inversion_again() -> None:
    model = mlp()
    optimizer = KFAC(model, inverse_delay=3, **OPTIONS)
    until_pending(model, optimizer)
    check_resumes(model, optimizer)


def test_a_state_put_in_place_of_another_is_inverted_itself() -> None:
    model = mlp()
    optimizer = KFAC(model, inverse_delay=3, **OPTIONS)
    until_pending(model, optimizer)
    replaced = {param: copy.deepcopy(entries) for param, entries in optimizer.state.items()}
    for entries in replaced.values():
        if "A" in entries:
            entries["A"] *= 3.0
    optimizer.state = defaultdict(dict, replaced)
    check_resumes(model, optimizer)


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_that_moves_in_between_takes_the_inverse_with_it(
    dtypes: tuple[torch.dtype, torch.dtype], library: type[FOP]
) -> None:
    before, after = dtypes
    model = mlp().to(before)
    optimizer = library(model, inverse_delay=3, **OPTIONS)
    until_pending(model, optimizer)
    model.to(after)
    for seed in range(8):
        step(model, optimizer, seed)
        if not any(pending(optimizer)):
            break
    assert not any(pending(optimizer))
    kept = [
        state[key] for state in optimizer.state.values() if "A" in state for key in ("A", "A_inv", "G_inv")
    ]
    assert kept
    assert {tensor.dtype for tensor in kept} == {after}


def test_pending_inverse_of_a_state_that_does_not_fit() -> None:
    """Parameters without modules take a state of other factors, which is dropped with what was pending."""
    model = mlp()
    optimizer = FOP(model, inverse_delay=3, **OPTIONS)
    until_pending(model, optimizer)
    other = copy.deepcopy(model)
    resumed = FOP(other.parameters(), inverse_delay=3, layer_options={"*": {"max_factor_dim": 2}}, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(6):
        step(other, resumed, seed)
    assert all(layer.steps_since_curvature is not None for layer in resumed.diagnostics().layers.values())
