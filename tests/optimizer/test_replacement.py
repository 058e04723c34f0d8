"""An optimizer made again on a live model replaces the one before; what it may not touch stays as it is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.lr_scheduler import StepLR

from fop import FOP, KFAC
from models import (
    Attentive,
    assert_differs,
    assert_equal,
    batch,
    check_kept_pair,
    loss_of,
    mlp,
    sentences,
    snapshot,
    train_step,
    weights,
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "curvature_interval": 4}


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks there are on each module and parameter, and for all modules of the process."""
    found: dict[str, int] = {}
    things = [*model.named_modules(), *model.named_parameters(), ("all", torch_module)]
    for name, thing in things:
        for key in dir(thing) if thing is torch_module else [*vars(thing), "_post_accumulate_grad_hooks"]:
            if "hook" in key and isinstance(value := getattr(thing, key, None), dict):
                found[f"{name}.{key}"] = len(value)
    return {key: count for key, count in found.items() if count}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(5)) -> None:
    for seed in seeds:
        train_step(model, optimizer, *batch(6, seed))


def given(model: nn.Sequential, how: str) -> Any:
    return {
        "module": model,
        "bare": list(model.parameters()),
        "groups": [{"params": layer.parameters()} for layer in (model[0], model[2])],
        "part": list(model[2].parameters()),
    }[how]


def check_replaced(optimizer: FOP) -> None:
    """It says so wherever it would do something, and harms nothing where it would not."""
    for call in (optimizer.step, lambda: optimizer.step(lambda: pytest.fail("the closure was called"))):
        with pytest.raises(RuntimeError, match=r"was replaced: a newer FOP or KFAC.*Step with the newer one"):
            call()
    groups = len(optimizer.param_groups)
    with pytest.raises(RuntimeError, match="was replaced"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert len(optimizer.param_groups) == groups
    assert {(row.path, row.reason) for row in optimizer.summary().rows} == {
        ("unknown", "a newer optimizer has replaced this one")
    }
    assert optimizer.diagnostics().layers == {}


# --- made again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [FOP, KFAC])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("before", ["module", "bare"])
@pytest.mark.parametrize("after", ["module", "bare", "groups"])
def test_made_again_trains_as_the_only_one(after: str, before: str, steps: int, first: type[FOP]) -> None:
    """A notebook cell run twice: bit for bit, and with no hook of the first left."""
    model, clean = mlp(), mlp()
    old = first(given(model, before), lr=0.3)
    train(model, old, range(steps))
    model.load_state_dict(clean.state_dict())
    model.zero_grad()
    new, only = FOP(given(model, after), **OPTIONS), FOP(given(clean, after), **OPTIONS)
    train(model, new)
    train(clean, only)
    assert_equal(weights(model), weights(clean))
    assert_equal(snapshot(new), snapshot(only))
    check_replaced(old)
    assert hooks(model) == hooks(clean)
    check_kept_pair(new)


def test_made_again_many_times() -> None:
    """A sweep over learning rates in which every optimizer is kept."""
    model, clean = mlp(), mlp()
    only = FOP(clean, lr=0.1)
    start, kept = model.state_dict(), []
    start = copy.deepcopy(start)
    for lr in (0.9, 0.5, 0.3, 0.1):
        model.load_state_dict(start)
        kept.append(FOP(model, lr=lr))
        train(model, kept[-1])
    train(clean, only)
    assert_equal(weights(model), weights(clean))
    assert hooks(model) == hooks(clean)
    for old in kept[:-1]:
        check_replaced(old)


def test_attention_made_again() -> None:
    """Its hooks come in pairs that push and pop a function mode."""
    model, clean = Attentive(), Attentive()
    old = FOP(model, lr=0.3)
    train_step(model, old, *sentences())
    model.load_state_dict(clean.state_dict())
    model.zero_grad()
    new, only = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    for seed in range(4):
        train_step(model, new, *sentences(6, seed))
        train_step(clean, only, *sentences(6, seed))
    assert_equal(weights(model), weights(clean))
    assert hooks(model) == hooks(clean)
    check_replaced(old)


@pytest.mark.parametrize("first_steps", [0, 2])
def test_part_of_the_parameters_replaces_the_whole(first_steps: int) -> None:
    """Fine-tuning of the head: nothing else moves, and no hook is left on what nobody trains."""
    model, clean = mlp(), mlp()
    old = FOP(model.parameters(), lr=0.3)
    train(model, old, range(first_steps))
    clean.load_state_dict(model.state_dict())
    new, only = FOP(given(model, "part"), **OPTIONS), FOP(given(clean, "part"), **OPTIONS)
    train(model, new)
    train(clean, only)
    assert_equal(weights(model), weights(clean))
    check_replaced(old)
    assert hooks(model) == hooks(clean)
    whole = FOP(model, **OPTIONS)
    check_replaced(new)
    before = weights(model)
    train(model, whole)
    assert_differs(before, weights(model))


def test_group_added_replaces_the_other_as_a_whole() -> None:
    model, extra = mlp(), nn.Linear(5, 3).double()
    old, new = FOP(model), FOP(extra)
    new.add_param_group({"params": model[2].parameters()})
    check_replaced(old)
    before = weights(model)
    for seed in range(3):
        train_step(model, new, *batch(6, seed))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_only_the_one_that_shares_is_replaced() -> None:
    """Of two optimizers on two layers, which both go on working."""
    model, clean = mlp(), mlp()
    head, body = FOP(model[2].parameters(), **OPTIONS), FOP(model[0].parameters(), lr=0.3)
    twin = FOP(clean[2].parameters(), **OPTIONS)
    newer = FOP(model[0], **OPTIONS), FOP(clean[0], **OPTIONS)
    check_replaced(body)
    for net, pair in ((model, (head, newer[0])), (clean, (twin, newer[1]))):
        for seed in range(4):
            for optimizer in pair:
                optimizer.zero_grad()
            loss_of(net, *batch(6, seed)).backward()
            for optimizer in pair:
                optimizer.step()
    assert_equal(weights(model), weights(clean))


def test_parameters_that_were_replaced_in_the_model_first() -> None:
    """The first optimizer would follow them at its next step."""
    model, clean = mlp(), mlp()
    old = FOP(model, lr=0.3)
    train(model, old)
    model.load_state_dict(copy.deepcopy(clean.state_dict()), assign=True)
    model.zero_grad()
    new, only = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    check_replaced(old)
    train(model, new)
    train(clean, only)
    assert_equal(weights(model), weights(clean))
    assert hooks(model) == hooks(clean)


def test_state_of_the_replaced_one_goes_on_in_the_new() -> None:
    model, clean = mlp(), mlp()
    old, only = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    train(model, old)
    train(clean, only)
    new = FOP(model, lr=9.0)
    new.load_state_dict(old.state_dict())
    train(model, new, range(5, 9))
    train(clean, only, range(5, 9))
    assert_equal(weights(model), weights(clean))
    assert_equal(snapshot(new), snapshot(only))


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("steps", [0, 3])
def test_replaced_one_disturbs_no_step_of_the_new(steps: int) -> None:
    """A trainer that still zeroes gradients with the old one, loads its state, or asks for curvature."""
    model, clean = mlp(), mlp()
    old = FOP(model.parameters(), lr=0.3)
    train(model, old, range(steps))
    scheduler = StepLR(old, 1)
    model.load_state_dict(clean.state_dict())
    model.zero_grad()
    new, only = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    state = snapshot(old)
    for seed in range(5):
        old.zero_grad()
        old.load_state_dict(state)
        old.request_curvature()
        loss_of(model, *batch(6, seed)).backward()
        new.step()
        scheduler.step()
        train_step(clean, only, *batch(6, seed))
    assert_equal(weights(model), weights(clean))
    assert hooks(model) == hooks(clean)
    assert new.param_groups[0]["lr"] == OPTIONS["lr"]


def test_scaler_of_the_replaced_one_says_so() -> None:
    model = mlp().float()
    old = FOP(model)
    FOP(model[2])
    scaler = torch.amp.GradScaler("cpu")
    x, y = (each.float() for each in batch())
    scaler.scale(loss_of(model, x, y)).backward()
    with pytest.raises(RuntimeError, match="was replaced"):
        scaler.step(old)


def test_made_again_between_forward_and_backward() -> None:
    """The graph of the first one gives its gradients, and feeds nobody."""
    model, clean = mlp(), mlp()
    old = FOP(model)
    loss = loss_of(model, *batch())
    new = FOP(model, **OPTIONS)
    loss.backward()
    loss_of(clean, *batch()).backward()
    for param, twin in zip(model.parameters(), clean.parameters(), strict=True):
        torch.testing.assert_close(param.grad, twin.grad)
    check_replaced(old)
    only = FOP(clean, **OPTIONS)
    new.zero_grad()
    only.zero_grad()
    train(model, new)
    train(clean, only)
    assert_equal(weights(model), weights(clean))


def test_with_inverses_that_are_still_computed() -> None:
    model, clean = mlp(), mlp()
    old = FOP(model, inverse_delay=3, curvature_interval=1)
    train(model, old, range(2))
    model.load_state_dict(clean.state_dict())
    model.zero_grad()
    new, only = (FOP(net, inverse_delay=3, **OPTIONS) for net in (model, clean))
    train(model, new)
    train(clean, only)
    assert_equal(weights(model), weights(clean))


# --- what fails replaces nobody ----------------------------------------------------------------------------

FAILS: dict[str, Callable[[nn.Sequential], Any]] = {
    "option": lambda model: FOP(model, lr=-1.0),
    "name": lambda model: FOP(model, learning_rate=0.1),
    "given-twice": lambda model: FOP([*model.parameters(), model[0].weight]),
    "group-option": lambda model: FOP([{"params": model[0].parameters()}, {"params": model[2].parameters(),
                                                                          "damping": -1}]),
    "sparse": lambda model: FOP(nn.Sequential(model, nn.Embedding(3, 2, sparse=True))),
    # The first layer is fine.
    "curvature": lambda model: FOP(nn.Sequential(model, nn.LayerNorm(3)),
                                   layer_options={nn.LayerNorm: {"path": "fop", "curvature": "kronecker"}}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("failing", "compiled"),
    [
        *((failing, False) for failing in FAILS),
        *(
            pytest.param(name, True, marks=[] if name in ("option", "sparse") else pytest.mark.rest)
            for name in FAILS
        ),
    ],
)
def test_failed_constructor_replaces_nobody(failing: str, compiled: bool) -> None:
    model, clean = mlp(), mlp()
    optimizer, expected = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    twin = torch.compile(clean, backend="aot_eager") if compiled else clean
    train_step(forward, optimizer, *batch())
    installed = hooks(model)
    with pytest.raises((TypeError, ValueError)) as caught:
        FAILS[failing](model)
    assert str(caught.value)  # the failed one hangs in the traceback
    train(forward, optimizer)
    train_step(twin, expected, *batch())
    train(twin, expected)
    assert_equal(weights(model), weights(clean))
    check_kept_pair(optimizer)
    del caught
    gc.collect()
    assert hooks(model) == installed


def test_failed_group_replaces_nobody_and_adds_nothing() -> None:
    """Its module is in a model that the optimizer knows."""
    model, other = nn.Sequential(mlp(), nn.Embedding(3, 2, sparse=True)), mlp()
    first, second = FOP([{"params": model[0].parameters()}]), FOP(other)
    train(model[0], first)
    first._adopt(model)  # as a forward pass of the whole would
    before, theirs = snapshot(first), snapshot(second)
    group = {"params": [*model[1].parameters(), *other.parameters()]}
    with pytest.raises(ValueError, match="sparse"):
        first.add_param_group(group)
    assert_equal(snapshot(first), before)
    assert_equal(snapshot(second), theirs)
    train(model[0], first)
    train(other, second)


# --- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("what", ["optimizer", "both", "model-that-holds-it"])
def test_copy_replaces_nobody(what: str, way: str) -> None:
    """It has parameters of its own, and drives those."""
    model, clean = mlp(), mlp()
    optimizer, expected = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    if what == "model-that-holds-it":
        model.optimizer = optimizer  # type: ignore[assignment]
    train(model, optimizer)
    train(clean, expected)
    thing = {"optimizer": optimizer, "both": (model, optimizer), "model-that-holds-it": model}[what]
    copied = copy.deepcopy(thing) if way == "deepcopy" else pickle.loads(pickle.dumps(thing))
    twin = {"both": lambda: copied[1], "optimizer": lambda: copied}.get(what, lambda: copied.optimizer)()
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    train(model, optimizer, range(5, 8))
    train(clean, expected, range(5, 8))
    assert_equal(weights(model), weights(clean))
    twin.step()


def test_shallow_copy_has_the_same_parameters_and_replaces() -> None:
    model, clean = mlp(), mlp()
    optimizer, expected = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
    train(model, optimizer)
    twin = copy.copy(optimizer)
    check_replaced(optimizer)
    train(model, twin, range(5, 8))
    train(clean, expected, range(8))
    assert_equal(weights(model), weights(clean))


def test_copy_of_a_replaced_one_lives() -> None:
    model = mlp()
    old = FOP(model, **OPTIONS)
    train(model, old)
    new = FOP(model, **OPTIONS)
    twin_model, twin = copy.deepcopy((model, old))
    train(twin_model, twin)
    train(model, new)
    check_replaced(old)


# --- nothing is left ---------------------------------------------------------------------------------------


def test_replaced_one_holds_no_hook_and_no_model() -> None:
    model = mlp()
    old = FOP(model, lr=0.3)
    train(model, old)
    parts = [weakref.ref(each) for each in (*old._bindings, old._bindings)]
    parts += [weakref.ref(each.recorder) for each in old._bindings]
    modules = [weakref.ref(module) for module in model.modules()]
    new = FOP(model, lr=0.3)
    gc.collect()
    assert [ref() is None for ref in parts] == [True, True, False, True, True]
    train(model, new)
    gone = weakref.ref(old)
    del old
    assert gone() is None
    del model
    gc.collect()
    assert [ref() for ref in modules if ref() is not None] == []


def test_unreachable_one_that_the_collector_has_not_seen() -> None:
    """A trainer and its optimizer that hold each other."""
    model, clean = mlp(), mlp()
    gc.collect()
    gc.disable()
    try:
        old = FOP(model, lr=0.3)
        old.trainer = [old]  # type: ignore[attr-defined]
        del old
        new, only = FOP(model, **OPTIONS), FOP(clean, **OPTIONS)
        assert hooks(model) == hooks(clean)
        train(model, new)
        train(clean, only)
    finally:
        gc.enable()
    assert_equal(weights(model), weights(clean))


# --- compiled ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using .torch.compile")
@pytest.mark.parametrize("bare", [False, True])
def test_compiled_model_feeds_the_newest_alone(bare: bool) -> None:
    """Graphs that were traced with the first one serve the second, whose part is a layer."""
    model, clean = mlp(), mlp()
    forward, twin = (torch.compile(net, backend="aot_eager") for net in (model, clean))
    old = FOP(model.parameters() if bare else model, lr=0.3)
    train(forward, old)
    model.load_state_dict(clean.state_dict())
    model.zero_grad()
    new, only = FOP(model.parameters() if bare else model, **OPTIONS), FOP(clean, **OPTIONS)
    train(forward, new)
    train(twin, only)
    torch.testing.assert_close(weights(model), weights(clean), rtol=1e-9, atol=1e-11)
    check_kept_pair(new, steps=0)
    check_replaced(old)
    head = FOP(model[2].parameters(), **OPTIONS)
    before = weights(model)
    train(forward, head)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    check_kept_pair(head, ["2"])
