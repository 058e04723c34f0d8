"""What scripts expect of any `torch.optim` optimizer: its state, saving and loading it, hooks on both.

Part of the conformance suite; see `test_contract.py`.
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from contract import LR, Make, State, copied, every, saved, train, trained
from models import Mixed, assert_equal, snapshot, weights

WAYS: dict[str, Callable[[State], State]] = {
    "as-it-is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "torch.save": saved,
}


# --- state dicts -------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 7])
def test_continuing_equals_never_having_stopped(make: Make, stop: int, way: str) -> None:
    model, optimizer = trained(make, stop, weight_decay=0.1)
    twin = copied(model)
    other = make(twin.parameters(), lr=9.0)
    state = WAYS[way](optimizer.state_dict())
    kept = copy.deepcopy(state)
    other.load_state_dict(state)
    assert_equal(state, kept)
    assert_equal(snapshot(other), snapshot(optimizer))
    train(twin, other, range(stop, stop + 7))
    # Only now: a state dict shares its tensors with the optimizer that gave it.
    model, optimizer = trained(make, stop + 7, weight_decay=0.1)
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))


@every
def test_loading_goes_back(make: Make) -> None:
    """Into the optimizer that gave the state, after it went on."""
    model, optimizer = trained(make, 4)
    state, values = snapshot(optimizer), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(4, 8))
    expected = weights(model), snapshot(optimizer)
    model.load_state_dict(values)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    assert_equal((weights(model), snapshot(optimizer)), expected)


@every
def test_layout_of_a_state_dict(make: Make) -> None:
    model = Mixed()
    first, *rest = model.parameters()
    optimizer = make([{"params": [first]}, {"params": rest, "tag": "mine"}])
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert not optimizer.state and optimizer.state_dict()["state"] == {}
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0], [1, 2, 3, 4, 5, 6]]
    assert set(state["state"]) == set(range(7))
    assert state["param_groups"][1]["tag"] == "mine"
    for index, p in enumerate(model.parameters()):
        for key, value in state["state"][index].items():
            assert value is optimizer.state[p][key]


@every
def test_options_come_with_the_state(make: Make) -> None:
    """Of the groups that are loaded, not of those the optimizer was made with; the user's own included."""
    _, optimizer = trained(make, lr=0.2, weight_decay=0.3)
    optimizer.param_groups[0]["tag"] = "mine"
    other = make(Mixed().parameters())
    params = other.param_groups[0]["params"]
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["tag"]) == (0.2, 0.3, "mine")
    assert group["params"] == params
    assert other.defaults["lr"] == LR
    group["lr"] = 0.7
    assert optimizer.param_groups[0]["lr"] == 0.2


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


@every
def test_state_goes_by_position(make: Make) -> None:
    """torch never looks at names: an optimizer over the layers in another order gets the state by order."""
    model = two_layers()
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.eye(3).double()).square().sum().backward()
        optimizer.step()
    reverse = two_layers()
    other = make([*reverse[2].parameters(), *reverse[0].parameters()])
    other.load_state_dict(snapshot(optimizer))
    for layer, source in ((reverse[2], model[0]), (reverse[0], model[2])):
        for p, q in zip(layer.parameters(), source.parameters(), strict=True):
            assert_equal(dict(other.state[p]), dict(optimizer.state[q]))
    other.zero_grad()
    reverse(torch.eye(3).double()).square().sum().backward()
    other.step()
    assert all(bool(p.isfinite().all()) for p in reverse.parameters())


@every
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_states_with_and_without_names_fit_each_other(make: Make, named: tuple[bool, bool]) -> None:
    model = Mixed()
    twin = Mixed()
    optimizer, other = (
        make(each.named_parameters() if with_names else each.parameters())
        for each, with_names in zip((model, twin), named, strict=True)
    )
    train(model, optimizer, range(3))
    other.load_state_dict(snapshot(optimizer))
    twin.load_state_dict(model.state_dict())
    assert other.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(3, 6))
    assert_equal(weights(twin), weights(model))


@every
def test_state_of_other_groups_is_refused_and_changes_nothing(make: Make) -> None:
    model, optimizer = trained(make)
    params = list(Mixed().parameters())
    before = snapshot(optimizer)
    for groups in ([{"params": params[:3]}, {"params": params[3:]}], params[:3]):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(make(groups).state_dict())
    assert_equal(snapshot(optimizer), before)
    train(model, optimizer, range(3, 5))


@every
def test_state_made_by_a_step_of_nothing_before_the_first_pass(make: Make) -> None:
    """torch.distributed.checkpoint makes a state to load into so: zero gradients, a rate of 0, one step."""
    model, optimizer = trained(make, 4)
    twin = copied(model)
    other = make(twin.parameters())
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    other.param_groups[0]["lr"] = 0.0
    other.step()
    other.zero_grad()
    assert_equal(weights(twin), weights(model))
    other.load_state_dict(snapshot(optimizer))
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(4, 8))
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))


@every
@pytest.mark.parametrize("assign", [False, True])
def test_state_may_be_thrown_away(make: Make, assign: bool) -> None:
    """Scripts reset an optimizer by emptying its state; it fills up again, and what is saved is complete."""
    model, optimizer = trained(make, 6)
    keys = [set(optimizer.state[p]) for p in model.parameters()]
    if assign:
        optimizer.state = defaultdict(dict)
    else:
        optimizer.state.clear()
    train(model, optimizer, range(6, 9))
    assert [set(optimizer.state[p]) for p in model.parameters()] == keys
    twin = copied(model)
    other = make(twin.parameters())
    other.load_state_dict(snapshot(optimizer))
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(9, 12))
    assert_equal(weights(twin), weights(model))


# --- hooks of the state ------------------------------------------------------------------------------------


@every
def test_state_dict_hooks(make: Make) -> None:
    _, optimizer = trained(make)
    calls: list[str] = []

    def post(given: Optimizer, state: State) -> State:
        calls.append("post")
        return {**state, "epoch": 3}

    handles = [
        optimizer.register_state_dict_pre_hook(lambda given: calls.append("pre")),
        optimizer.register_state_dict_post_hook(post),
    ]
    assert optimizer.state_dict()["epoch"] == 3
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    assert "epoch" not in optimizer.state_dict()


@every
def test_load_hooks_and_their_order(make: Make) -> None:
    _, optimizer = trained(make)

    def set_rate(given: Optimizer, state: State) -> None:
        state["param_groups"][0]["lr"] *= 2

    def replace(given: Optimizer, state: State) -> State:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        return state

    seen: list[float] = []
    optimizer.register_load_state_dict_pre_hook(set_rate)
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda given: seen.append(given.param_groups[0]["lr"]))
    optimizer.load_state_dict(snapshot(optimizer))
    assert seen == [0.006]
    assert optimizer.param_groups[0]["lr"] == 0.006


@every
def test_load_hook_may_change_the_state(make: Make) -> None:
    """What a hook returns is loaded, not what was given."""
    model, optimizer = trained(make)
    state = snapshot(optimizer)

    def forget(given: Optimizer, state: State) -> State:
        state = copy.deepcopy(state)
        for entry in state["state"].values():
            for key in entry.keys() & {"momentum_buffer", "exp_avg"}:
                entry[key].zero_()
        return state

    optimizer.register_load_state_dict_pre_hook(forget)
    optimizer.load_state_dict(state)
    for p in model.parameters():
        held = {**optimizer.state[p]}
        (average,) = {"momentum_buffer", "exp_avg"} & held.keys()
        assert not held[average].any()


@every
def test_load_hook_may_fit_a_state_of_other_groups(make: Make) -> None:
    """The documented use: the saved run had one group, this one has two."""
    model, optimizer = trained(make)
    twin = copied(model)
    params = list(twin.parameters())
    other = make([{"params": params[:3]}, {"params": params[3:]}])

    def split(given: Optimizer, state: State) -> State:
        (group,) = state["param_groups"]
        ids = group["params"]
        return {**state, "param_groups": [{**group, "params": ids[:3]}, {**group, "params": ids[3:]}]}

    other.register_load_state_dict_pre_hook(split)
    other.load_state_dict(snapshot(optimizer))
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(3, 6))
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-12, atol=1e-14)
