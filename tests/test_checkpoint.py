"""Saving and loading: continuing equals never having stopped; a wrong state changes nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    Attentive,
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    conv_net,
    loss_of,
    mlp,
    sentences,
    snapshot,
    tokens,
    train_step,
    weights,
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "curvature_interval": 4}
STEPS = 34


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def params_of(model: nn.Module, way: str) -> Any:
    params = list(model.parameters())
    return {
        "module": model,
        "bare": params,
        "named": model.named_parameters(),
        "groups": [{"params": params[:2], "lr": 0.2, "damping": 0.01}, {"params": params[2:]}],
    }[way]


# --- continuing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize(("way", "later"), [("module", "bare"), ("bare", "module"), ("groups", "groups")])
@pytest.mark.parametrize("stop", [0, 1, 13, 31, 32])
def test_continuing_equals_never_having_stopped(stop: int, way: str, later: str, library: type[FOP]) -> None:
    """Stops at the start, after the first step, while the interval grows, and inside an interval."""

    def fresh(way: str) -> tuple[Mixed, FOP, torch.optim.lr_scheduler.LRScheduler]:
        model = Mixed()
        optimizer = library(params_of(model, way), **OPTIONS)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def train(state: tuple[Any, Any, Any], seeds: range) -> None:
        model, optimizer, scheduler = state
        for seed in seeds:
            train_step(model, optimizer, *tokens(6, seed))
            scheduler.step()

    unbroken = fresh(way)
    train(unbroken, range(STEPS))
    first = fresh(way)
    train(first, range(stop))
    if stop == 31:
        assert not first[1].curvature_due, "the middle of an interval is meant"
    saved = [round_trip(each.state_dict()) for each in first]
    second = fresh(later)
    torch.manual_seed(1)
    if stop == 13:  # loading into an optimizer that has already trained something else
        train(second, range(50, 53))
    for each, state in zip(second, saved, strict=True):
        each.load_state_dict(state)
    train(second, range(stop, STEPS))
    assert_equal(weights(second[0]), weights(unbroken[0]))
    assert_equal(snapshot(second[1]), snapshot(unbroken[1]))


CHOICE: dict[Any, dict[str, Any]] = {
    "*": {"max_factor_dim": 5},
    nn.LayerNorm: {"path": "fop"},
    nn.GroupNorm: {"path": "fop"},
}


@pytest.mark.parametrize(("way", "later"), [("module", "bare"), ("bare", "module")])
@pytest.mark.parametrize("stop", [1, 13])
def test_continuing_with_factors_of_every_form(stop: int, way: str, later: str) -> None:
    """Dense, diagonal and grouped factors, and the diagonal Fisher of norms."""

    def run(model: nn.Module, optimizer: FOP, seeds: range) -> None:
        for seed in seeds:
            train_step(model, optimizer, *sentences(6, seed))

    unbroken = Attentive()
    expected = FOP(params_of(unbroken, way), layer_options=CHOICE, **OPTIONS)
    run(unbroken, expected, range(20))
    model = Attentive()
    first = FOP(params_of(model, way), layer_options=CHOICE, **OPTIONS)
    run(model, first, range(stop))
    saved = round_trip(first.state_dict())
    del first
    second = FOP(params_of(model, later), layer_options=CHOICE, **OPTIONS)
    second.load_state_dict(saved)
    run(model, second, range(stop, 20))
    assert_equal(weights(model), weights(unbroken))
    assert_equal(snapshot(second), snapshot(expected))


def test_state_of_other_layer_options() -> None:
    """Refused where the layers are known; otherwise those that do not fit start afresh, and only those."""
    model = Attentive()
    optimizer = FOP(model, **OPTIONS)
    for seed in range(3):
        train_step(model, optimizer, *sentences(6, seed))
    saved = round_trip(optimizer.state_dict())
    del optimizer
    optimizer = FOP(model, layer_options=CHOICE, **OPTIONS)
    check_refused(optimizer, model, saved)
    del optimizer
    optimizer = FOP(model.parameters(), layer_options=CHOICE, **OPTIONS)
    optimizer.load_state_dict(saved)
    before = weights(model)
    model(sentences()[0])
    fits = {name: "A" in optimizer.state[p] for name, p in model.named_parameters() if "weight" in name}
    assert {name for name, kept in fits.items() if kept} == {
        "embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight",
    }  # fmt: skip
    for seed in range(3):
        train_step(model, optimizer, *sentences(6, seed))
    assert_differs(before, weights(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    fresh = FOP(fresh_model := Attentive(), layer_options=CHOICE, **OPTIONS)
    train_step(fresh_model, fresh, *sentences())
    for (name, p), q in zip(model.named_parameters(), fresh_model.parameters(), strict=True):
        for key in ("A", "G", "A_inv", "G_inv"):
            if key in fresh.state[q]:
                assert optimizer.state[p][key].shape == fresh.state[q][key].shape, name


def test_loading_forgets_what_was_gathered() -> None:
    """A backward pass before the load belongs to the old weights."""
    model = conv_net()
    optimizer = FOP(model, **OPTIONS)
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed, (2, 5, 6)))
    saved, state = copy.deepcopy(model.state_dict()), snapshot(optimizer)
    expected = None
    for disturbed in (False, True):
        model.load_state_dict(saved)
        if disturbed:
            loss_of(model, *batch(4, 77, (2, 5, 6))).backward()
        optimizer.load_state_dict(copy.deepcopy(state))
        model.zero_grad()
        loss_of(model, *batch(6, 5, (2, 5, 6))).backward()
        optimizer.step()
        if expected is None:
            expected = weights(model)
    assert_equal(weights(model), expected)


def reload(model: nn.Module, optimizer: FOP) -> tuple[nn.Module, FOP]:
    optimizer.load_state_dict(snapshot(optimizer))
    return model, optimizer


@pytest.mark.parametrize("before", [reload, lambda *both: copy.deepcopy(both)], ids=["load", "deepcopy"])
def test_loading_a_second_time(before: Callable[[nn.Module, FOP], tuple[nn.Module, FOP]]) -> None:
    """Going back to an earlier state, which was saved before the optimizer was loaded or copied itself."""
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    train_step(model, optimizer, *batch())
    saved = round_trip(optimizer.state_dict())
    model, optimizer = before(model, optimizer)
    train_step(model, optimizer, *batch())
    optimizer.load_state_dict(saved)
    assert_equal(snapshot(optimizer)["state"], saved["state"])


def test_loaded_state_is_a_copy() -> None:
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    train_step(model, optimizer, *batch())
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other_model = mlp()
    other = FOP(other_model, **OPTIONS)
    other.load_state_dict(saved)
    for seed in range(3):
        train_step(other_model, other, *batch(6, seed))
    assert_equal(saved, kept)


def test_bfloat16_state_keeps_its_precision() -> None:
    model = mlp().bfloat16()
    optimizer = FOP(model, **OPTIONS)
    for seed in range(3):
        optimizer.zero_grad()
        x, y = (t.bfloat16() for t in batch(6, seed))
        loss_of(model, x, y).backward()
        optimizer.step()
    other = FOP(mlp().bfloat16(), **OPTIONS)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    assert_equal(snapshot(other), snapshot(optimizer))


@pytest.mark.filterwarnings("ignore:the inversion:RuntimeWarning")
def test_layer_that_has_no_inverse_yet() -> None:
    """All its inputs are zero and there is no damping: factors, but nothing to precondition with."""
    states = []
    for _ in range(2):
        model = nn.Linear(6, 4, bias=False)
        optimizer = FOP(model, damping=0.0)
        for state in states:
            optimizer.load_state_dict(state)
        train_step(model, optimizer, torch.zeros(4, 6), torch.ones(4, 4))
        states.append(round_trip(optimizer.state_dict()))
    assert "A" in states[0]["state"][0] and "A_inv" not in states[0]["state"][0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("bare", [False, True])
def test_copies_of_model_and_optimizer_train_on_alone(copied: Callable[[Any], Any], bare: bool) -> None:
    model = Mixed()
    optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
    for seed in range(7):
        train_step(model, optimizer, *tokens(6, seed))
    twin, twin_optimizer = copied((model, optimizer))
    assert next(iter(twin_optimizer.param_groups[0]["params"])) is next(twin.parameters())
    start = weights(model)
    for seed in range(7, 25):
        train_step(twin, twin_optimizer, *tokens(6, seed))
    assert_equal(weights(model), start)
    for seed in range(7, 25):
        train_step(model, optimizer, *tokens(6, seed))
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(twin_optimizer), snapshot(optimizer))
    assert [(row.name, row.path) for row in twin_optimizer.summary().rows] == [
        (row.name, row.path) for row in optimizer.summary().rows
    ]


def test_copy_of_a_kfac_is_a_kfac() -> None:
    model = mlp()
    optimizer = KFAC(model, **OPTIONS)
    train_step(model, optimizer, *batch())
    _, twin = copy.deepcopy((model, optimizer))
    assert type(twin) is KFAC
    assert twin.param_groups[0]["beta"] == 0.0


# --- wrong states ------------------------------------------------------------------------------------------


def trained(model: nn.Module, groups: Any = None) -> FOP:
    optimizer = FOP(model if groups is None else groups, **OPTIONS)
    for seed in range(3):
        train_step(model, optimizer, *(tokens(6, seed) if isinstance(model, Mixed) else batch(6, seed)))
    return optimizer


def of_torch(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    train_step(model, optimizer, *batch())
    return optimizer.state_dict()


def of_shapes(*sizes: int) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(5, sizes[0]), nn.Tanh(), nn.Linear(sizes[0], 3)).double()
    return trained(model).state_dict()


def edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = snapshot(trained(mlp()))
    edit(state)
    return state


def other_shape(key: str, shape: tuple[int, ...], param: int = 0) -> Callable[[], dict[str, Any]]:
    return lambda: edited(lambda s: s["state"][param].update({key: torch.ones(shape, dtype=torch.float64)}))


def without(key: str) -> Callable[[], dict[str, Any]]:
    return lambda: edited(lambda s: s["state"][0].pop(key))


def group_without(key: str) -> Callable[[], dict[str, Any]]:
    return lambda: edited(lambda s: s["param_groups"][0].pop(key))


WRONG: dict[str, Callable[[], Any]] = {
    "sgd": lambda: of_torch(torch.optim.SGD),
    "adamw": lambda: of_torch(torch.optim.AdamW),
    "empty": dict,
    "no-state": lambda: edited(lambda s: s.pop("state")),
    "no-groups": lambda: edited(lambda s: s.pop("param_groups")),
    "group-without-params": group_without("params"),
    "group-without-step": group_without("step"),
    "group-without-damping": group_without("damping"),
    "other-shapes": lambda: of_shapes(7),
    "fewer-parameters": lambda: trained(nn.Sequential(nn.Linear(5, 3)).double()).state_dict(),
    "more-groups": lambda: snapshot(
        trained(m := mlp(), [{"params": m[0].parameters()}, {"params": m[2].parameters()}])
    ),
    "A-too-large": other_shape("A", (1, 9, 9)),
    "A-not-square": other_shape("A", (1, 5, 6)),
    "A-not-a-stack": other_shape("A", (6, 6)),
    "A-without-bias-column": lambda: edited(
        lambda s: s["state"][0].update(
            {key: torch.eye(5, dtype=torch.float64)[None] for key in ("A", "A_inv")}
        )
    ),
    "G-too-small": other_shape("G", (1, 2, 2)),
    "G-not-square": other_shape("G", (1, 6, 3)),
    "A_inv-too-large": other_shape("A_inv", (1, 9, 9)),
    "G_inv-too-small": other_shape("G_inv", (1, 2, 2)),
    "momentum-of-other-shape": other_shape("momentum_buffer", (2, 2)),
    "momentum-not-a-tensor": lambda: edited(lambda s: s["state"][0].update(momentum_buffer=0.5)),
    "A-not-a-tensor": lambda: edited(lambda s: s["state"][0].update(A=[[1.0]])),
    "complete-not-a-tensor": lambda: edited(lambda s: s["state"][0].update(complete=True)),
    "without-A": without("A"),
    "without-G": without("G"),
    "without-A_inv": without("A_inv"),
    "without-refresh_at": without("refresh_at"),
    "without-refreshed_at": without("refreshed_at"),
}


def check_refused(optimizer: FOP, model: nn.Module, wrong: Any) -> None:
    before, params = snapshot(optimizer), weights(model)
    tensors = [id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    groups, defaults = [id(group) for group in optimizer.param_groups], dict(optimizer.defaults)
    with pytest.raises(ValueError, match=r".{20,}"):
        optimizer.load_state_dict(wrong)
    assert_equal(snapshot(optimizer), before)
    assert_equal(weights(model), params)
    assert [id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)] == tensors
    assert [id(group) for group in optimizer.param_groups] == groups
    assert optimizer.defaults == defaults


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_state_raises_and_changes_nothing(wrong: str) -> None:
    model = mlp()
    optimizer = trained(model)
    check_refused(optimizer, model, WRONG[wrong]())
    expected_model = mlp()
    expected = trained(expected_model)
    for seed in range(3, 6):
        train_step(model, optimizer, *batch(6, seed))
        train_step(expected_model, expected, *batch(6, seed))
    assert_equal(weights(model), weights(expected_model))


@pytest.mark.parametrize("wrong", ["sgd", "other-shapes", "A-too-large", "A_inv-too-large", "G-not-square"])
def test_wrong_state_into_a_fresh_optimizer(wrong: str) -> None:
    """Bare parameters: before the first forward pass only their shapes are known."""
    model = mlp()
    optimizer = FOP(model.parameters(), **OPTIONS)
    check_refused(optimizer, model, WRONG[wrong]())
    train_step(model, optimizer, *batch())


def test_wrong_adamw_state_raises() -> None:
    model = Mixed()
    optimizer = trained(model)
    state = snapshot(optimizer)
    index = next(i for i, entry in state["state"].items() if "exp_avg" in entry)
    state["state"][index]["exp_avg"] = torch.zeros(2, 2)
    check_refused(optimizer, model, state)
    state = snapshot(optimizer)
    del state["state"][index]["exp_avg_sq"]
    check_refused(optimizer, model, state)


@pytest.mark.parametrize("wrong", [None, [], "state", 3])
def test_something_else_than_a_state_dict(wrong: Any) -> None:
    model = mlp()
    optimizer = trained(model)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        optimizer.load_state_dict(wrong)
    assert_equal(snapshot(optimizer), before)
