"""`damping` and `curvature_interval` as functions of the step, against the same values given by hand.

Groups with functions of their own are in `test_groups_and_freezing.py`.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fop import FOP, KFAC
from models import assert_equal, batch, mlp, snapshot, train_step, weights

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
STEPS = 30


def damping(step: int) -> float:
    return 0.1 * 0.8**step


def interval(step: int) -> int:
    return 1 + step % 4


Functions = dict[str, Callable[[int], Any]]
FUNCTIONS: dict[str, Functions] = {
    "damping": {"damping": damping},
    "interval": {"curvature_interval": interval},
    "both": {"damping": damping, "curvature_interval": interval},
}


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_are_values_set_by_hand(case: str, library: type[FOP]) -> None:
    functions = FUNCTIONS[case]
    model, plain = mlp(), mlp()
    optimizer = library(model, **OPTIONS, **functions)
    other = library(plain, **OPTIONS, **{name: value(0) for name, value in functions.items()})
    for step in range(STEPS):
        other.param_groups[0].update({name: value(step) for name, value in functions.items()})
        train_step(model, optimizer, *batch(6, step))
        train_step(plain, other, *batch(6, step))
        assert {name: optimizer.param_groups[0][name] for name in functions} == {
            name: value(step) for name, value in functions.items()
        }
        assert optimizer.diagnostics() == other.diagnostics()
    assert_equal(weights(model), weights(plain))
    assert_equal(snapshot(optimizer), snapshot(other))
    constant = library(still := mlp(), **OPTIONS, **{name: value(0) for name, value in functions.items()})
    for step in range(STEPS):
        train_step(still, constant, *batch(6, step))
    assert not torch.equal(still[0].weight, model[0].weight), "the functions had no effect"


def test_a_function_is_asked_once_a_step_with_its_number() -> None:
    asked: list[int] = []
    model = mlp()
    optimizer = FOP(model, damping=lambda step: asked.append(step) or 0.1)  # type: ignore[func-returns-value]
    asked.clear()  # of the constructor, which checks a first value
    for step in range(4):
        train_step(model, optimizer, *batch(6, step))
    assert asked == [0, 1, 2, 3]
    assert all(type(step) is int for step in asked)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"damping": lambda step: -1.0}, ValueError),
        ({"damping": lambda step: "0.1"}, TypeError),
        ({"curvature_interval": lambda step: 0}, ValueError),
        ({"curvature_interval": lambda step: 2.5}, TypeError),
        ({"curvature_interval": lambda: 3}, TypeError),
    ],
)
def test_wrong_from_the_start(option: dict[str, Any], error: type[Exception]) -> None:
    model = mlp()
    with pytest.raises(error):
        FOP(model, **option)
    FOP(model)


def test_numbers_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    model = mlp()
    functions = {"damping": lambda step: np.float64(0.1), "curvature_interval": lambda step: np.int64(2)}
    optimizer = FOP(model, **functions)
    train_step(model, optimizer, *batch())
    round_trip(optimizer)


def round_trip(optimizer: FOP) -> dict[str, Any]:
    """The state through a file that may hold nothing but tensors and plain numbers."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 13, 16])
def test_resumed_run_goes_on_with_the_functions(stop: int, bare: bool, library: type[FOP]) -> None:
    def fresh() -> tuple[Any, FOP]:
        model = mlp()
        given = model.parameters() if bare else model
        return model, library(given, **OPTIONS, **FUNCTIONS["both"])

    def train(model: Any, optimizer: FOP, steps: range) -> None:
        for step in steps:
            train_step(model, optimizer, *batch(6, step))

    unbroken, expected = fresh()
    train(unbroken, expected, range(STEPS))
    first, optimizer = fresh()
    train(first, optimizer, range(stop))
    second, other = fresh()
    second.load_state_dict(first.state_dict())
    other.load_state_dict(round_trip(optimizer))
    train(second, other, range(stop, STEPS))
    assert_equal(weights(second), weights(unbroken))
    assert_equal(snapshot(other), snapshot(expected))


@pytest.mark.parametrize("later", [{}, {"damping": 0.7}, {"damping": lambda step: 0.7}])
def test_a_function_belongs_to_the_optimizer_and_a_number_to_the_state(later: dict[str, Any]) -> None:
    """Loading brings the last value; a function of the optimizer that loads replaces it in the next step."""
    model = mlp()
    optimizer = FOP(model, **OPTIONS, damping=damping)
    for step in range(3):
        train_step(model, optimizer, *batch(6, step))
    saved = round_trip(optimizer)
    assert saved["param_groups"][0]["damping"] == damping(2)
    del optimizer
    other = FOP(model, **OPTIONS, **later)
    other.load_state_dict(saved)
    train_step(model, other, *batch(6, 3))
    expected = 0.7 if callable(later.get("damping")) else damping(2)
    assert other.param_groups[0]["damping"] == expected


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_functions(copied: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = FOP(model, **OPTIONS, **FUNCTIONS["both"])
    for step in range(3):
        train_step(model, optimizer, *batch(6, step))
    twin, other = copied((model, optimizer))
    for step in range(3, 12):
        train_step(model, optimizer, *batch(6, step))
        train_step(twin, other, *batch(6, step))
    assert other.param_groups[0]["damping"] == damping(11)
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))
