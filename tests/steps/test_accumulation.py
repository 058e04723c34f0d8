"""Several backward passes before a step: in which half of the pair each sample counts, and what is left."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    PLAIN,
    Pairs,
    assert_equal,
    batch,
    check_kept_pair,
    check_lost_pair,
    check_step,
    gradients,
    halves,
    kfac,
    loss_of,
    mlp,
    started,
    train_step,
    weights,
)
from reference import (
    Block,
    ReferenceFOP,
    Tape,
    check_direction,
    estimate,
    half_squared_error,
    layers_of,
    observe,
    split,
)

L = 4
NAMES = {"embed", "attention.in_proj", "attention.out_proj", "conv", "head"}


class Net(nn.Module):
    """Embedding, packed attention, convolution and Linear on sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(4, 3, 2, padding=1, groups=1)
        self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(torch.tanh(self.conv(x.mT).mT))
        return out


def micro_batches(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(7, (n, L), generator=generator),
            torch.randn(n, L + 1, 2, dtype=torch.float64, generator=generator),
        )
        for n in sizes
    ]


def labels_of(sizes: Sequence[int]) -> list[list[int]]:
    """Which sub-batch of the pair each sample of each pass belongs to.

    Parts of every pass, where all split in the same ratio. Otherwise the passes before the first that does
    not are one sub-batch together, and passes alternate from there.
    """
    ratios = [Fraction(len(split(n)[1]), n) for n in sizes]
    other = next((i for i, ratio in enumerate(ratios) if ratio != ratios[0]), None)
    if ratios[0] == 0:
        other = 1
    if other is None:
        return [[int(position in split(n)[1]) for position in range(n)] for n in sizes]
    return [[max(0, i - other + 1) % 2] * n for i, n in enumerate(sizes)]


def pair(
    blocks: Block, sizes: Sequence[int], labels: Sequence[Sequence[int]], reduction: str
) -> tuple[Tensor, Tensor]:
    """Ga and Gd from the gradients of single samples, each counted as the loss counts it."""
    weights = [1 / (len(sizes) * n if reduction == "mean" else sum(sizes)) for n in sizes for _ in range(n)]
    sums, shares = [torch.zeros(()), torch.zeros(())], [0.0, 0.0]
    for n, (weight, label) in enumerate(zip(weights, [one for each in labels for one in each], strict=True)):
        sums[label] = sums[label] + weight * blocks.sample_gradient(n)
        shares[label] += weight
    return sums[0] + sums[1], sums[0] / shares[0] - sums[1] / shares[1]


def check_net(
    model: nn.Module,
    twin: nn.Module,
    optimizer: FOP,
    batches: Sequence[tuple[Tensor, Tensor]],
    labels: Sequence[Sequence[int]],
    scale: float = 1.0,
) -> None:
    """The step from ``twin``; and the factors, where they are those of one batch."""
    reduction = optimizer.param_groups[0]["loss_reduction"]
    sizes = [len(y) for _, y in batches]
    ids, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    old = copy.deepcopy(twin)
    blocks = observe(twin, Tape(twin), (ids,), y, half_squared_error)
    new = dict(model.named_parameters())
    moved = {name: (p - new[name]).detach() / PLAIN["lr"] for name, p in old.named_parameters()}
    assert len(blocks) == len(NAMES)
    for name, block in blocks.items():
        held = optimizer.state[new[name]]
        if reduction == "sum" or len(set(sizes)) == 1:
            for key, value in estimate(block).items():
                torch.testing.assert_close(held[key], value, rtol=1e-9, atol=1e-12)
        Ga, Gd = pair(block, sizes, labels, reduction)
        check_direction(name, block.matrix(moved), held, scale * Ga, scale * Gd, PLAIN, 1e-9)
    found = optimizer.diagnostics().layers
    assert {name: (found[name].kfac_steps, found[name].why_kfac) for name in NAMES} == dict.fromkeys(
        NAMES, (0, None)
    )


def backward(net: nn.Module, ids: Tensor, y: Tensor, k: int, reduction: str) -> None:
    loss = half_squared_error(net(ids), y)
    (loss / k if reduction == "mean" else loss * len(y)).backward()


# --- passes of any size, on every kind of layer ------------------------------------------------------------

SIZES = [
    (2,), (3,), (6,), (7,), (4, 4), (3, 3), (1, 1), (4, 4, 4), (3, 3, 3), (1, 1, 1), (2, 2, 2, 2),
    (4, 4, 4, 2), (4, 4, 4, 3), (4, 4, 4, 1), (3, 3, 3, 3, 2), (1, 1, 1, 1, 1), (2, 3, 2, 3, 1), (1, 6, 6),
    (6, 4, 1, 6, 7, 6),
]  # fmt: skip
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


@reductions
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_passes_of_any_size(sizes: tuple[int, ...], reduction: str) -> None:
    model, twin = Net(), Net()
    optimizer = FOP(model, **PLAIN, loss_reduction=reduction)  # type: ignore[arg-type]
    batches = micro_batches(sizes)
    for ids, y in batches:
        backward(model, ids, y, len(sizes), reduction)
    optimizer.step()
    check_net(model, twin, optimizer, batches, labels_of(sizes))


@reductions
@pytest.mark.parametrize(
    ("sizes", "labels"),
    [((3, 3), (0, 1)), ((3, 2), (1, 0)), ((1, 4, 2), (0, 1, 1)), ((2, 2, 2, 2), (0, 1, 1, 0))],
)
def test_labelled_passes(sizes: tuple[int, ...], labels: tuple[int, ...], reduction: str) -> None:
    """The label is that of the backward pass; where the forward pass ran does not matter."""
    model, twin = Net(), Net()
    optimizer = FOP(model, **PLAIN, loss_reduction=reduction)  # type: ignore[arg-type]
    batches = micro_batches(sizes)
    k = len(sizes)
    losses = [
        half_squared_error(model(ids), y) * (1 / k if reduction == "mean" else len(y)) for ids, y in batches
    ]
    for loss, label in zip(losses, labels, strict=True):
        with optimizer.sub_batch(label):
            loss.backward()
    optimizer.step()
    check_net(model, twin, optimizer, batches, [[label] * n for n, label in zip(sizes, labels, strict=True)])


@pytest.mark.parametrize(
    ("sizes", "labelled"),
    [((6,), False), *itertools.product([(4, 4), (4, 3), (1, 1, 1)], [False, True])],
)
def test_clipping_on_top(sizes: tuple[int, ...], labelled: bool) -> None:
    model, twin = Net(), Net()
    optimizer = FOP(model, **PLAIN)
    batches = micro_batches(sizes)
    labels = [[i % 2] * n for i, n in enumerate(sizes)] if labelled else labels_of(sizes)
    for i, (ids, y) in enumerate(batches):
        with optimizer.sub_batch(i % 2) if labelled else contextlib.nullcontext():
            backward(model, ids, y, len(sizes), "mean")
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    assert norm > 0.2
    optimizer.step()
    check_net(model, twin, optimizer, batches, labels, 0.1 / (norm + 1e-6))


@pytest.mark.parametrize("zeros", [False, True])
def test_every_step_starts_afresh(zeros: bool) -> None:
    """Sizes change from step to step, and a window is given up half-way."""
    model = Net()
    optimizer = FOP(model, **{**PLAIN, "stat_decay": 0.0})
    for step, sizes in enumerate([(4, 4), (3, 4), (6,), (1, 1, 1), (4, 4, 2)]):
        twin = copy.deepcopy(model)
        optimizer.zero_grad(set_to_none=not zeros)
        batches = micro_batches(sizes)
        if step == 1:
            backward(model, *micro_batches((5,))[0], 2, "mean")
            model.zero_grad(set_to_none=not zeros)
        for ids, y in batches:
            backward(model, ids, y, len(sizes), "mean")
        optimizer.step()
        check_net(model, twin, optimizer, batches, labels_of(sizes))


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (3, 3, 3)], ids=str)
def test_no_sync(sizes: tuple[int, ...]) -> None:
    """DistributedDataParallel on one process, all passes but the last in ``no_sync``, as loops do it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, twin = Net(), Net()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = FOP(model, **PLAIN)
        batches = micro_batches(sizes)
        for i, (ids, y) in enumerate(batches):
            with parallel.no_sync() if i < len(sizes) - 1 else contextlib.nullcontext():
                backward(parallel, ids, y, len(sizes), "mean")
        optimizer.step()
        check_net(model, twin, optimizer, batches, labels_of(sizes))
    finally:
        dist.destroy_process_group()


def test_single_pass_of_one_sample_says_why() -> None:
    model = Net()
    optimizer = FOP(model, **PLAIN)
    backward(model, *micro_batches((1,))[0], 1, "mean")
    optimizer.step()
    check_lost_pair(optimizer, why="a batch of 1 has no halves")


def test_weighted_passes_have_the_statistics_of_one_batch() -> None:
    model, twin, optimizer = started()
    (x1, y1), (x2, y2) = batch(4, 1), batch(6, 2)
    (0.4 * loss_of(model, x1, y1)).backward()
    (0.6 * loss_of(model, x2, y2)).backward()
    optimizer.step()
    x, y = torch.cat([x1, x2]), torch.cat([y1, y2])
    blocks = observe(twin, Tape(twin), (x,), y, half_squared_error)
    for name, layer in layers_of(model).items():
        for key, value in estimate(blocks[f"{name}.weight"]).items():
            torch.testing.assert_close(optimizer.state[layer.weight][key], value)


def test_passes_in_a_step_without_statistics() -> None:
    model, twin, optimizer = started(due=False)
    batches = [batch(n, 30 + n) for n in (6, 1, 3)]
    for x, y in batches:
        (loss_of(model, x, y) / 3).backward()
    optimizer.step()
    check_step(model, twin, optimizer, of_passes(twin, batches, (0, 1, 0)))


def of_passes(
    twin: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], labels: Sequence[int | None]
) -> Pairs:
    """Every pass belongs to one half of the pair; the loss is the mean of all. Without labels no pair."""
    each = [gradients(twin, loss_of(twin, x, y)) for x, y in batches]

    def mean(name: str, *chosen: int | None) -> Tensor:
        found = [g[name] for g, label in zip(each, labels, strict=True) if label in chosen]
        return torch.stack(found).mean(0)

    if None in labels:
        return {name: (mean(name, 0, 1, None), None) for name in each[0]}
    return {name: (mean(name, 0, 1), mean(name, 0) - mean(name, 1)) for name in each[0]}


# --- sub_batch: misuse and corners -------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, -1, True, None, "0", 0.5, 1.0])
def test_index_that_is_none_of_the_two(index: Any) -> None:
    optimizer = FOP(mlp())
    with pytest.raises((ValueError, TypeError), match="0 and 1"), optimizer.sub_batch(index):
        pass


def test_errors_leave_no_label_behind() -> None:
    model, twin, optimizer = started()
    with pytest.raises(RuntimeError, match="inside"), optimizer.sub_batch(0), optimizer.sub_batch(1):
        pass
    with pytest.raises(ZeroDivisionError), optimizer.sub_batch(1):
        raise ZeroDivisionError
    pairs = halves(twin, *batch())
    train_step(model, optimizer, *batch())
    check_step(model, twin, optimizer, pairs)


def test_step_inside_a_label() -> None:
    """The whole step in one sub-batch: no pair, and it says so; the label does not leak into the next."""
    model, twin, optimizer = started()
    with optimizer.sub_batch(0):
        train_step(model, optimizer, *batch())
    check_step(model, twin, optimizer, kfac(halves(twin, *batch())))
    check_lost_pair(optimizer, why="its backward passes were all of one sub-batch")
    twin.load_state_dict(model.state_dict())
    pairs = halves(twin, *batch(6, 2))
    train_step(model, optimizer, *batch(6, 2))
    check_step(model, twin, optimizer, pairs)


@pytest.mark.parametrize("labels", [(0, None), (None, 0), (0, 1, None), (None, None, 1)])
def test_labelled_and_other_passes_mixed(labels: tuple[int | None, ...]) -> None:
    model, twin, optimizer = started()
    batches = [batch(6, seed) for seed in range(len(labels))]
    for (x, y), label in zip(batches, labels, strict=True):
        with contextlib.nullcontext() if label is None else optimizer.sub_batch(label):
            (loss_of(model, x, y) / len(labels)).backward()
    optimizer.step()
    check_step(model, twin, optimizer, of_passes(twin, batches, labels))
    check_lost_pair(optimizer, why="sub_batch")


class TwoHeads(nn.Module):
    """A head of its own for each sub-batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def losses(self) -> list[Tensor]:
        batches = (batch(4, 1), batch(6, 2))
        return [
            half_squared_error(head(torch.tanh(self.trunk(x))), y)
            for head, (x, y) in zip((self.a, self.b), batches, strict=True)
        ]


def test_layer_used_in_one_sub_batch_only() -> None:
    """The trunk has the pair, the heads say why they have none."""
    model, twin = TwoHeads(), TwoHeads()
    optimizer = FOP(model, **PLAIN)
    for label, loss in enumerate(model.losses()):
        with optimizer.sub_batch(label):
            (loss / 2).backward()
    optimizer.step()
    trunk = nn.ModuleDict({"trunk": twin.trunk})
    g1, g2 = (gradients(trunk, loss)["trunk"] for loss in twin.losses())
    check_step(nn.ModuleDict({"trunk": model.trunk}), trunk, optimizer, {"trunk": ((g1 + g2) / 2, g1 - g2)})
    check_kept_pair(optimizer, ["trunk"])
    check_lost_pair(optimizer, "ab", why="its backward passes were all of one sub-batch")


def test_kfac_has_no_use_for_labels() -> None:
    results = []
    for labelled in (False, True):
        model = mlp()
        optimizer = KFAC(model)
        for label in (0, 1):
            with optimizer.sub_batch(label) if labelled else contextlib.nullcontext():
                loss_of(model, *batch(6, label)).backward()
        optimizer.step()
        results.append(weights(model))
    assert_equal(*results)


# --- what is left of earlier passes ------------------------------------------------------------------------


@pytest.mark.parametrize("due", [True, False])
def test_step_without_zero_grad_is_kfac(due: bool) -> None:
    """And costs the pair of the next step nothing."""
    model, twin, optimizer = started(due=due)
    train_step(model, optimizer, *batch())
    left = gradients(twin, loss_of(twin, *batch()))
    twin.load_state_dict(model.state_dict())
    added = gradients(twin, loss_of(twin, *batch(6, seed=2)))
    loss_of(model, *batch(6, seed=2)).backward()
    optimizer.step()
    check_step(model, twin, optimizer, {name: (left[name] + added[name], None) for name in left})
    twin.load_state_dict(model.state_dict())
    pairs = halves(twin, *batch(6, 3))
    train_step(model, optimizer, *batch(6, 3))
    check_step(model, twin, optimizer, pairs)


def test_due_step_without_zero_grad_does_not_cost_the_steps_after_it() -> None:
    """What was in p.grad then says nothing about the steps without statistics that follow."""
    model, twin, optimizer = started(due=False)
    train_step(model, optimizer, *batch(6, 20))
    optimizer.request_curvature()
    loss_of(model, *batch(6, 21)).backward()
    optimizer.step()
    assert not optimizer.curvature_due
    twin.load_state_dict(model.state_dict())
    pairs = halves(twin, *batch(6, 22))
    train_step(model, optimizer, *batch(6, 22))
    check_step(model, twin, optimizer, pairs)


def by_hand(model: nn.Module, value: float | None) -> None:
    for p in model.parameters():
        if value is None:
            p.grad = None
        elif p.grad is not None:
            p.grad.zero_()


RESETS: dict[str, Callable[[nn.Module, FOP], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer-zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model-zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "none": lambda model, optimizer: by_hand(model, None),
    "zero_": lambda model, optimizer: by_hand(model, 0.0),
}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_every_way_to_reset_gradients(reset: str, skipped: bool) -> None:
    """Also after a backward pass without a step."""
    model, _, optimizer = started()
    oracle = ReferenceFOP(model, **{k: v for k, v in PLAIN.items() if k != "curvature_interval"})
    for seed in range(3):
        x, y = batch(6, seed)
        oracle.step(x, y, half_squared_error)
        RESETS[reset](model, optimizer)
        if skipped:
            loss_of(model, *batch(6, seed + 10)).backward()
            RESETS[reset](model, optimizer)
        loss_of(model, x, y).backward()
        optimizer.step()
        torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-10, atol=1e-11)
