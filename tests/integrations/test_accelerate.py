"""FOP under accelerate: the same weights as a loop written by hand, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fop import FOP
from tiny import (
    EPOCHS,
    OPTIONS,
    STEPS_BETWEEN_UPDATES,
    assert_same_weights,
    assert_trained,
    by_hand,
    cosine,
    distance,
    loader,
    loss_of,
    net,
    run_block,
    weights,
)

accelerate = pytest.importorskip("accelerate")


def accelerator(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


def train(accelerator: Any, model: Any, optimizer: Any, batches: Any, schedule: Any, epochs: int) -> None:
    """The loop of accelerate's documentation."""
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


WAYS: dict[str, Callable[[nn.Module], FOP]] = {
    "module": lambda model: FOP(model, **OPTIONS),
    "parameters": lambda model: FOP(model.parameters(), **OPTIONS),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_same_weights_as_by_hand(way: str, precision: str, accumulate: int) -> None:
    """11 batches an epoch: windows of 2 leave one batch over, windows of 3 leave two."""
    model, expected = net(), net()
    initial = weights(model)
    run = accelerator(gradient_accumulation_steps=accumulate, mixed_precision=precision)
    optimizer = WAYS[way](model)
    train(run, *run.prepare(model, optimizer, loader(), cosine(optimizer)), epochs=EPOCHS)
    assert_trained(weights(model), initial)
    by_hand(expected, FOP(expected, **OPTIONS), accumulate, bf16=precision == "bf16")
    assert_same_weights(weights(model), weights(expected))


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_model_of_one_layer_in_bf16(made: str) -> None:
    """prepare() replaces the forward method of the model, which here is the layer itself."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    initial = weights(layer)
    run = accelerator(mixed_precision="bf16")
    if made == "after":
        layer = run.prepare(layer)
    optimizer = FOP(layer, **OPTIONS)
    train(run, *run.prepare(layer, optimizer, loader(), cosine(optimizer)), epochs=EPOCHS)
    rows = optimizer.summary().rows
    if made == "after":
        # The layer is recognised by the function that the new method calls in the end.
        assert {(row.path, row.reason) for row in rows} == {("FOP", "F.linear in Linear")}
        return
    assert [row.path for row in rows] == ["FOP", "FOP"]
    expected = nn.Linear(6, 3)
    expected.load_state_dict(initial)
    by_hand(expected, FOP(expected, **OPTIONS), bf16=True)
    # Not bit for bit: accelerate's forward returns float32, so FOP sees gradients in full precision.
    moved = distance(weights(expected), initial)
    assert distance(weights(layer), weights(expected)) < 0.02 * moved


def test_prepare_keeps_the_state_of_an_optimizer_that_has_stepped() -> None:
    """prepare() takes the state out of the optimizer and loads it again."""
    model, expected = net(), net()
    for each in (model, expected):
        each.optimizer = FOP(each, **OPTIONS)
        by_hand(each, each.optimizer)
    run = accelerator()
    batches, schedule = loader(), cosine(model.optimizer)
    train(run, *run.prepare(model, model.optimizer, batches, schedule), epochs=EPOCHS)
    by_hand(expected, expected.optimizer)
    assert_same_weights(weights(model), weights(expected))


@pytest.mark.parametrize("way", WAYS)
def test_loaded_state_goes_on_as_if_never_stopped(way: str) -> None:
    """Saved between two curvature updates; with dropout and shuffled data."""

    def prepared() -> tuple[Any, ...]:
        run = accelerator(project_dir="state")
        model = net(dropout=0.2)
        optimizer = WAYS[way](model)
        batches = loader(shuffle=True)
        assert len(batches) == STEPS_BETWEEN_UPDATES
        return run, *run.prepare(model, optimizer, batches, cosine(optimizer))

    run, *objects = prepared()
    train(run, *objects, epochs=1)
    run.save_state("state/saved")
    train(run, *objects, epochs=1)
    expected = weights(objects[0])
    run.free_memory(*objects)

    torch.manual_seed(99)
    run, *objects = prepared()
    run.load_state("state/saved")
    train(run, *objects, epochs=1)
    assert_same_weights(weights(objects[0]), expected)


def test_script_of_the_docs() -> None:
    model = net()
    initial = weights(model)
    run_block("accelerate", model=model, loader=loader(), loss_fn=nn.functional.cross_entropy)
    assert_trained(weights(model), initial)
