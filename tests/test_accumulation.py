"""Several backward passes before a step, with and without `sub_batch`, and what is left of earlier ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fop import FOP, KFAC
from models import (
    PLAIN,
    assert_equal,
    batch,
    check_step,
    conv_net,
    gradients,
    halves,
    loss_of,
    mlp,
    train_step,
    weights,
)
from reference import half_squared_error
from test_capture import check_oracle, plain_oracle, started

IMAGE = (2, 5, 6)

Batch = tuple[Tensor, Tensor]


def of_passes(twin: nn.Module, batches: Sequence[Batch], labels: Sequence[int]) -> dict[str, Any]:
    """(Ga, Gd) by layer where every pass belongs to one half of the pair; the loss is the mean of all."""
    each = [gradients(twin, loss_of(twin, x, y)) for x, y in batches]

    def mean(name: str, chosen: Sequence[int]) -> Tensor:
        return torch.stack([g[name] for g, label in zip(each, labels, strict=True) if label in chosen]).mean(
            0
        )

    return {name: (mean(name, (0, 1)), mean(name, (0,)) - mean(name, (1,))) for name in each[0]}


def backward(model: nn.Module, batches: Sequence[Batch]) -> None:
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()


# --- passes of any size ------------------------------------------------------------------------------------


def test_two_passes_through_one_graph() -> None:
    model, twin, optimizer = started()
    x, y = batch()
    pairs = {name: (2 * a, 2 * d) for name, (a, d) in halves(twin, x, y).items()}
    loss = loss_of(model, x, y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 5), (6, 4), (2, 8, 6)])
def test_every_pass_is_split_where_all_split_alike(sizes: tuple[int, ...]) -> None:
    model, twin, optimizer = started()
    batches = [batch(n, seed) for seed, n in enumerate(sizes)]
    each = [halves(twin, x, y) for x, y in batches]
    pairs = {
        name: tuple(sum(pair[name][i] for pair in each) / len(sizes) for i in range(2)) for name in each[0]
    }
    backward(model, batches)
    optimizer.step()
    check_step(model, twin, optimizer, pairs)  # type: ignore[arg-type]


# The passes up to the first that cannot be split like those before it are one half; then they alternate.
WHOLE = [
    ((1, 1), (0, 1)),
    ((1, 1, 1, 1, 1), (0, 1, 0, 1, 0)),
    ((5, 4), (0, 1)),
    ((3, 6), (0, 1)),
    ((6, 6, 1), (0, 0, 1)),
    ((6, 4, 1, 6, 7, 6), (0, 0, 1, 0, 1, 0)),
    ((1, 6, 6), (0, 1, 0)),
]


@pytest.mark.parametrize(("sizes", "labels"), WHOLE)
@pytest.mark.parametrize("build", [mlp, conv_net])
def test_whole_passes_alternate_where_they_do_not_split_alike(
    build: Callable[[], nn.Sequential], sizes: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    model, twin, optimizer = started(build)
    shape = IMAGE if build is conv_net else (5,)
    batches = [batch(n, seed, shape) for seed, n in enumerate(sizes)]
    backward(model, batches)
    optimizer.step()
    check_step(model, twin, optimizer, of_passes(twin, batches, labels))


def test_whole_passes_in_a_step_without_statistics() -> None:
    model = mlp()
    optimizer = FOP(model, **{**PLAIN, "curvature_interval": 20, "lr": 0.01})
    step = 0
    while step < 30 or optimizer.curvature_due:
        train_step(model, optimizer, *batch(6, step))
        step += 1
    twin = copy.deepcopy(model)
    batches = [batch(n, step + n) for n in (6, 1, 3)]
    optimizer.zero_grad()
    backward(model, batches)
    optimizer.step()
    check_step(model, twin, optimizer, of_passes(twin, batches, (0, 1, 0)))


@pytest.mark.parametrize("zeros", [False, True])
def test_pair_of_whole_passes_starts_afresh_with_every_step(zeros: bool) -> None:
    model, twin, optimizer = started()
    for seed in range(3):
        twin.load_state_dict(model.state_dict())
        batches = [batch(n, 3 * seed + n) for n in (3, 4, 1)]
        optimizer.zero_grad(set_to_none=not zeros)
        if seed == 1:  # a window that the caller gives up half-way
            backward(model, batches[:2])
            model.zero_grad(set_to_none=not zeros)
        backward(model, batches)
        optimizer.step()
        check_step(model, twin, optimizer, of_passes(twin, batches, (0, 1, 0)))


@pytest.mark.parametrize("sizes", [(6, 6), (3, 4), (3, 4, 3)])
def test_pair_of_several_passes_follows_a_change_of_scale(sizes: tuple[int, ...]) -> None:
    model, twin, optimizer = started()
    batches = [batch(n, seed) for seed, n in enumerate(sizes)]
    if len(set(sizes)) == 1:
        each = [halves(twin, x, y) for x, y in batches]
        pairs: dict[str, Any] = {
            name: tuple(sum(pair[name][i] for pair in each) / len(sizes) for i in range(2))
            for name in each[0]
        }
    else:
        pairs = of_passes(twin, batches, (0, 1, 0)[: len(sizes)])
    backward(model, batches)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    scale = 0.01 / (norm + 1e-6)
    assert scale < 0.5
    check_step(model, twin, optimizer, {name: (scale * a, scale * d) for name, (a, d) in pairs.items()})


@pytest.mark.parametrize("sizes", [(3, 4), (3, 4, 3)])
@pytest.mark.parametrize("change", ["negate", "clamp", "shuffle"])
def test_changed_gradient_of_whole_passes_falls_back_to_kfac(change: str, sizes: tuple[int, ...]) -> None:
    model, twin, optimizer = started()
    batches = [batch(n, seed) for seed, n in enumerate(sizes)]
    backward(model, batches)
    for p in model.parameters():
        assert p.grad is not None
        with torch.no_grad():
            p.grad.copy_(
                {"negate": -p.grad, "clamp": p.grad.clamp(-0.02, 0.02), "shuffle": p.grad.roll(1, 0)}[change]
            )
    changed = {
        name: (reference.to_matrix(layer, layer.weight.grad, layer.bias.grad), None)
        for name, layer in reference.layers_of(model).items()
    }
    optimizer.step()
    check_step(model, twin, optimizer, changed)


def test_accumulated_statistics_are_those_of_one_batch() -> None:
    model, _, optimizer = started()
    (x1, y1), (x2, y2) = batch(4, 1), batch(6, 2)
    samples = reference.per_sample(model, torch.cat([x1, x2]), torch.cat([y1, y2]), half_squared_error)
    (0.4 * loss_of(model, x1, y1)).backward()
    (0.6 * loss_of(model, x2, y2)).backward()
    optimizer.step()
    for name, layer in reference.layers_of(model).items():
        A, G = reference.factors(samples[name])
        torch.testing.assert_close(optimizer.state[layer.weight]["A"], A)
        torch.testing.assert_close(optimizer.state[layer.weight]["G"], G)


# --- passes that the user labels (more in test_micro_batches.py) --------------------------------------------


def test_label_is_that_of_the_backward_pass() -> None:
    """Where the forward pass ran does not matter, and a K-FAC optimizer has no use for labels."""
    model, twin, optimizer = started()
    batches = [batch(6, 0), batch(4, 1)]
    losses = [loss_of(model, x, y) / 2 for x, y in batches]
    for label, loss in enumerate(losses):
        with optimizer.sub_batch(label):
            loss.backward()
    optimizer.step()
    check_step(model, twin, optimizer, of_passes(twin, batches, (0, 1)))
    results = []
    for labelled in (False, True):
        model = mlp()
        other = KFAC(model)
        for label, (x, y) in enumerate(batches):
            if not labelled:
                loss_of(model, x, y).backward()
                continue
            with other.sub_batch(label):
                loss_of(model, x, y).backward()
        other.step()
        results.append(weights(model))
    assert_equal(*results)


# --- what is left of earlier passes ------------------------------------------------------------------------


def test_step_without_zero_grad_is_kfac() -> None:
    model, twin, optimizer = started()
    train_step(model, optimizer, *batch())
    first = gradients(twin, loss_of(twin, *batch()))
    twin.load_state_dict(model.state_dict())
    second = gradients(twin, loss_of(twin, *batch(6, seed=2)))
    loss_of(model, *batch(6, seed=2)).backward()
    optimizer.step()
    check_step(model, twin, optimizer, {name: (first[name] + second[name], None) for name in first})


def zero_by_hand(model: nn.Module, _: FOP) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def drop_by_hand(model: nn.Module, _: FOP) -> None:
    for p in model.parameters():
        p.grad = None


RESETS: dict[str, Callable[[nn.Module, FOP], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer-zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model-zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "none": drop_by_hand,
    "zero_": zero_by_hand,
}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_every_way_to_reset_gradients(reset: str, skipped: bool) -> None:
    model, _, optimizer = started(conv_net)
    oracle = plain_oracle(model)
    for seed in range(3):
        x, y = batch(6, seed, IMAGE)
        oracle.step(x, y, half_squared_error)
        RESETS[reset](model, optimizer)
        if skipped:  # a step that the caller decides not to take
            loss_of(model, *batch(6, seed + 10, IMAGE)).backward()
            RESETS[reset](model, optimizer)
        loss_of(model, x, y).backward()
        optimizer.step()
        check_oracle(model, oracle)
