"""What scripts expect of the step of any `torch.optim` optimizer: gradients, closure, hooks, lifetime.

SGD and AdamW run through every test that applies to them, so that the contract is torch's and not ours. It
was drawn from torch's documentation and its own tests (test/test_optim.py).
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from contract import Make, every, train, trained
from models import Mixed, assert_differs, assert_equal, loss_of, snapshot, tokens, weights

# --- gradients ---------------------------------------------------------------------------------------------


@every
def test_zero_grad(make: Make) -> None:
    model, optimizer = trained(make)
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.any() for grad in grads)
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and not grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None for p in model.parameters())


@every
def test_zeros_are_as_good_as_no_gradient_for_the_next_backward_pass(make: Make) -> None:
    results = []
    for set_to_none in (True, False):
        model = Mixed()
        optimizer = make(model.parameters())
        for seed in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, *tokens(6, seed)).backward()
            optimizer.step()
        results.append(weights(model))
    assert_equal(*results)


@every
@pytest.mark.parametrize("steps", [0, 3])
def test_step_without_any_gradient_does_nothing(make: Make, steps: int) -> None:
    model, optimizer = trained(make, steps, weight_decay=0.1)
    optimizer.zero_grad()
    before, state = weights(model), snapshot(optimizer)["state"]
    assert optimizer.step() is None
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state)


@every
def test_first_step_with_gradients_of_zero_moves_nothing(make: Make) -> None:
    model = Mixed()
    before = weights(model)
    optimizer = make(model.parameters())
    (0 * loss_of(model, *tokens())).backward()
    optimizer.step()
    assert_equal(weights(model), before)


@every
def test_step_takes_gradients_put_there_by_hand(make: Make) -> None:
    """Plain tensors, no module and no backward pass anywhere."""
    params = [torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = make(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(bool((p < 1).all()) for p in params)


@every
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(make: Make, contiguous: bool, maximize: bool) -> None:
    """As torch tests its own: no module, and parameters that are slices of larger memory."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(10, 5, 2), torch.randn(10, 2), torch.randn(5)
    params = [nn.Parameter(p[..., 0] if not contiguous else p[..., 0].contiguous()) for p in (weight, bias)]
    optimizer = make(params, lr=1e-3, maximize=maximize)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (losses[-1] > losses[0]) == maximize
    assert losses[-1] != losses[0]


@every
def test_maximizing_is_minimizing_the_negative(make: Make) -> None:
    results = []
    for maximize, sign in ((False, 1), (True, -1)):
        model = Mixed()
        optimizer = make(model.parameters(), maximize=maximize)
        for seed in range(4):
            optimizer.zero_grad()
            (sign * loss_of(model, *tokens(6, seed))).backward()
            optimizer.step()
        results.append(weights(model))
    assert_equal(*results)


@every
def test_step_changes_weights_in_place_and_no_gradient(make: Make) -> None:
    model, optimizer = trained(make)
    optimizer.zero_grad()
    loss_of(model, *tokens()).backward()
    before, params = weights(model), list(model.parameters())
    places = [p.data_ptr() for p in params]
    grads = [p.grad for p in params]
    values = copy.deepcopy(grads)
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places
    assert optimizer.param_groups[0]["params"] == params
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert_equal(grads, values)
    assert_differs(weights(model), before)
    assert all(p.requires_grad and p.is_leaf for p in params)


# --- the step ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_closure_runs_once_with_gradients_enabled(make: Make, outer: Callable[[], Any]) -> None:
    plain, other = trained(make, 4)
    model = Mixed()
    optimizer = make(model.parameters())
    losses: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(loss_of(model, *tokens(6, len(losses))))
        losses[-1].backward()
        return losses[-1]

    for step in range(1, 5):
        with outer():
            returned = optimizer.step(closure)  # type: ignore[arg-type]
        assert len(losses) == step and returned is losses[-1]
    assert_equal(weights(model), weights(plain))
    assert_equal(snapshot(optimizer), snapshot(other))


@every
def test_step_hooks(make: Make) -> None:
    """Global before local, before and after the weights move, once a step, and gone when removed."""
    model, optimizer = trained(make)
    before = weights(model)
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(given: Optimizer, args: Any, kwargs: Any) -> None:
            assert given is optimizer
            seen.append((name, torch.equal(model.shift, before["shift"])))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        train(model, optimizer, [5])
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    train(model, optimizer, [6])
    assert len(seen) == 4


@every
def test_step_pre_hook_may_change_the_arguments(make: Make) -> None:
    _, optimizer = trained(make)
    optimizer.register_step_pre_hook(lambda given, *_: ((given, lambda: 2.5), {}))
    assert optimizer.step() == 2.5


@every
def test_profiler_shows_step_and_zero_grad_under_the_class_name(make: Make) -> None:
    model, optimizer = trained(make)
    with torch.profiler.profile() as profile:
        train(model, optimizer, [5])
    names = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer")]
    kind = type(optimizer).__name__
    assert sorted(names) == [f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"]


@every
def test_evaluation_in_between_changes_nothing(make: Make) -> None:
    """Passes without gradients, in inference mode, and with a graph that nobody goes back through."""
    expected, _ = trained(make, 8)
    model = Mixed()
    optimizer = make(model.parameters())
    for seed in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, *tokens(6, seed))
        model.eval()
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                loss_of(model, *tokens(5, 30 + seed))
        model.train()
        loss.backward()
        with torch.inference_mode():
            loss_of(model, *tokens(4, 50 + seed))
        with torch.no_grad():
            optimizer.step()
    assert_equal(weights(model), weights(expected))


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
