"""Compiled models whose optimizer, copies, gradients and frozen layers come and go."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import assert_equal, batch, loss_of, mlp, snapshot, train_step
from test_compile import (
    OPTIONS,
    VECTORS,
    assert_all_paired,
    assert_same,
    breaks,
    compiled,
    eager,
    fresh_compiler,
    graphs,
    train,
)

__all__ = ["fresh_compiler"]

SHORT = VECTORS[:4]


def used(model: nn.Module) -> nn.Module:
    """The model compiled, and run forwards and backwards once before any optimizer was made."""
    forward = compiled(model)
    loss_of(forward, *batch()).backward()
    model.zero_grad()
    return forward


@pytest.mark.parametrize("bare", [False, True])
def test_a_model_that_ran_before(bare: bool) -> None:
    """Guards of a graph do not see new hooks, so the optimizer has everything traced anew."""
    model = mlp()
    forward = used(model)
    optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
    train(forward, optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))
    assert_all_paired(optimizer)


@pytest.mark.parametrize("bare", [False, True])
def test_another_model_of_the_class_ran_before(bare: bool) -> None:
    """Compiled code belongs to the class: a baseline with another optimizer, then FOP, in one process."""
    other = mlp()
    train(compiled(other), torch.optim.SGD(other.parameters(), lr=0.1), SHORT)
    model = mlp()
    optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
    train(compiled(model), optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))
    assert_all_paired(optimizer)


def test_a_reset_disturbs_no_running_optimizer() -> None:
    model = mlp()
    forward = used(model)
    optimizer = FOP(model, **OPTIONS)
    train(forward, optimizer, SHORT)
    torch.compiler.reset()
    train(forward, optimizer, SHORT)
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}
    assert_all_paired(optimizer)


def test_a_model_that_ran_before_in_eager_mode_only() -> None:
    model = mlp()
    loss_of(model, *batch()).backward()
    model.zero_grad()
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model), optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))


@pytest.mark.parametrize("given", ["model", "forward", "parameters"])
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
def test_the_next_optimizer_of_a_compiled_model(given: str) -> None:
    """A graph that was traced with one optimizer serves the next."""
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    train(forward, optimizer, SHORT)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    model.load_state_dict(mlp().state_dict())
    model.zero_grad()
    optimizer = FOP({"model": model, "forward": forward, "parameters": model.parameters()}[given], **OPTIONS)
    train(forward, optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))
    assert_all_paired(optimizer)


def test_a_compiled_model_without_its_optimizer_is_as_before() -> None:
    model, twin = mlp(), mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    loss_of(forward, *batch()).backward()
    del optimizer
    gc.collect()
    model.zero_grad()
    loss_of(forward, *batch()).backward()
    loss_of(twin, *batch()).backward()
    for param, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, plain.grad, rtol=1e-12, atol=1e-12)
        assert not param._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def copy_of_model(model: nn.Module, forward: nn.Module) -> nn.Module:
    return compiled(copy.deepcopy(model))


def copy_of_compiled(model: nn.Module, forward: nn.Module) -> nn.Module:
    return copy.deepcopy(forward)


def copy_in_eager_mode(model: nn.Module, forward: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    ("make_copy", "when"),
    [
        (copy_of_model, "before"),
        (copy_of_model, "after"),
        (copy_of_compiled, "before"),
        (copy_of_compiled, "after"),
        (copy_in_eager_mode, "after"),
    ],
)
def test_copies_never_feed_the_optimizer(
    make_copy: Callable[[nn.Module, nn.Module], nn.Module], when: str
) -> None:
    """The copy runs forwards and backwards between the model's own passes, before or after it is traced."""
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    other = make_copy(model, forward)
    if when == "before":
        loss_of(other, *batch(6, seed=99)).backward()
    train(forward, optimizer, SHORT[:1])
    for x, y in SHORT[1:]:
        optimizer.zero_grad()
        loss = loss_of(forward, x, y)
        loss_of(other, *batch(6, seed=99)).backward()
        loss.backward()
        state = snapshot(optimizer)
        loss_of(other, *batch(6, seed=98)).backward()
        assert_equal(snapshot(optimizer), state)
        optimizer.step()
    assert_same(model, eager(mlp, SHORT))
    assert_all_paired(optimizer)


def test_a_copy_of_a_compiled_model_trains_with_an_optimizer_of_its_own() -> None:
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    train(forward, optimizer, SHORT)
    other = copy.deepcopy(mlp())
    own = FOP(other, **OPTIONS)
    both = compiled(other)
    for x, y in SHORT:
        train_step(both, own, x, y)
        train_step(forward, optimizer, x, y)
    assert_same(other, eager(mlp, SHORT))
    assert_same(model, eager(mlp, [*SHORT, *SHORT]))
    assert_all_paired(own)


# --- the loop around a compiled model ----------------------------------------------------------------------


def accumulate(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for part in range(3):
        x, y = batch(4, 10 * step + part)
        (loss_of(forward, x, y) / 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def uneven(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for part, n in enumerate((4, 3)):
        (loss_of(forward, *batch(n, 10 * step + part)) / 2).backward()
    optimizer.step()
    model.zero_grad(set_to_none=False)


def sub_batches(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for half in (0, 1):
        with optimizer.sub_batch(half):
            (loss_of(forward, *batch(4, 10 * step + half)) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate_between(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    x, y = batch(6, step)
    loss = loss_of(forward, x, y)
    model.eval()
    with torch.no_grad():
        forward(batch(5, 100 + step)[0])
    with torch.inference_mode():
        forward(batch(3, 100 + step)[0])
    model.train()
    forward(batch(6, 100 + step)[0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def freeze_and_thaw(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for param in model[0].parameters():  # type: ignore[index]
        param.requires_grad_(step not in (1, 2))
    train_step(forward, optimizer, *batch(6, step))


def closure(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(forward, *batch(6, step))
        loss.backward()
        return loss

    optimizer.step(evaluate)  # type: ignore[arg-type]


def clip(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss_of(forward, *batch(6, step)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def compiled_and_eager_in_turn(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    train_step(forward if step % 2 else model, optimizer, *batch(6, step))


def input_gradients(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    x, y = batch(6, step)
    x.requires_grad_()
    torch.autograd.grad(forward(x).sum(), x)
    train_step(forward, optimizer, x, y)


LOOPS: list[Callable[[nn.Module, nn.Module, FOP, int], None]] = [
    accumulate,
    uneven,
    sub_batches,
    evaluate_between,
    freeze_and_thaw,
    closure,
    clip,
    compiled_and_eager_in_turn,
    input_gradients,
]


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_around_a_compiled_model(loop: Callable[[nn.Module, nn.Module, FOP, int], None]) -> None:
    runs: list[tuple[nn.Module, FOP]] = []
    for wrap in (lambda model: model, compiled):
        model = mlp()
        optimizer = FOP(model, **OPTIONS)
        forward: Any = wrap(model)
        for step in range(4):
            loop(forward, model, optimizer, step)
        runs.append((model, optimizer))
    (plain, expected), (model, optimizer) = runs
    assert_same(model, plain)
    for name, layer in optimizer.diagnostics().layers.items():
        assert layer.kfac_steps == expected.diagnostics().layers[name].kfac_steps == 0
    assert breaks() == 0 and graphs() > 0
