"""What scripts expect of any `torch.optim` optimizer: copies, models that move, and what is kept alive.

Part of the conformance suite; see `test_contract.py`.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contract import Make, copied, every, only, saved, train, trained
from models import Mixed, assert_equal, loss_of, snapshot, tokens, weights

# --- copies ------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


@every
@pytest.mark.parametrize("way", COPIES)
def test_copy_of_model_and_optimizer_trains_on_alone(make: Make, way: str) -> None:
    model, optimizer = trained(make, 7)
    twin, other = COPIES[way]((model, optimizer))
    assert type(other) is type(optimizer)
    assert {key: other.defaults[key] for key in optimizer.defaults} == optimizer.defaults
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    assert_equal(snapshot(other), snapshot(optimizer))
    before = weights(model), snapshot(optimizer)
    train(twin, other, range(7, 14))
    assert_equal((weights(model), snapshot(optimizer)), before)
    train(model, optimizer, range(7, 14))
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))


@every
def test_copy_of_the_optimizer_alone(make: Make) -> None:
    """It copies the parameters with it: of no use, but scripts do it, and the original must not care."""
    expected, _ = trained(make, 8)
    model, optimizer = trained(make, 4)
    other = copy.deepcopy(optimizer)
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    train(model, optimizer, range(4, 8))
    assert_equal(weights(model), weights(expected))


# --- moves -------------------------------------------------------------------------------------------------


def train_float32(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = tokens(6, seed)
        optimizer.zero_grad()
        loss_of(model, x, y.to(model.shift.dtype)).backward()  # type: ignore[arg-type]
        optimizer.step()


def check_float64(model: Mixed, optimizer: Optimizer, make: Make) -> None:
    """Whatever was float32 before, the further steps are close to those of an all-float64 run."""
    train_float32(model, optimizer, range(5, 10))
    assert all(p.dtype is torch.float64 and p.isfinite().all() for p in model.parameters())
    expected, _ = trained(make, 10)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-3, atol=1e-4)


@only("SGD", "FOP", "KFAC")
def test_model_moves_to_float64_in_mid_training(make: Make) -> None:
    """Without a word to the optimizer. AdamW needs the load below: its moments stay in float32."""
    model = Mixed().float()
    optimizer = make(model.parameters())
    train_float32(model, optimizer, range(5))
    model.double()
    check_float64(model, optimizer, make)


@every
@pytest.mark.parametrize("fresh", [False, True])
def test_state_of_float32_loads_into_float64(make: Make, fresh: bool) -> None:
    model = Mixed().float()
    optimizer = make(model.parameters())
    train_float32(model, optimizer, range(5))
    state = saved(optimizer.state_dict())
    model.double()
    if fresh:
        model = copied(model)
        optimizer = make(model.parameters())
    optimizer.load_state_dict(state)
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        held = [value[key] for value in optimizer.state.values() if key in value]
        assert all(value.dtype is torch.float64 for value in held)
    check_float64(model, optimizer, make)


# --- lifetime ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone must do."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@every
@pytest.mark.usefixtures("no_collector")
def test_dropping_the_optimizer_frees_its_state(make: Make) -> None:
    model, optimizer = trained(make)
    held = [value for entry in optimizer.state.values() for value in entry.values()]
    watched = [weakref.ref(value) for value in held if isinstance(value, Tensor)]
    watched.append(weakref.ref(optimizer))  # type: ignore[arg-type]
    assert len(watched) > 7
    del held, optimizer
    assert [ref() for ref in watched] == [None] * len(watched)
    model(tokens()[0]).sum().backward()


@every
@pytest.mark.usefixtures("no_collector")
def test_dropping_the_model_and_the_optimizer_frees_both(make: Make) -> None:
    model, optimizer = trained(make)
    watched = [weakref.ref(each) for each in (model, optimizer, *model.modules(), *model.parameters())]
    del model, optimizer
    assert [ref() for ref in watched] == [None] * len(watched)
