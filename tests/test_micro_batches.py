"""Micro-batches on every kind of layer, with both reductions of the loss; misuse of `sub_batch`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fop import FOP
from models import PLAIN, batch, check_step, gradients, halves, loss_of, mlp, train_step
from reference import Block, Tape, estimate, half_squared_error, observe
from reference.steps import check_direction

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
    """Which half of the pair each sample of each pass belongs to.

    Halves of every pass, where all split in the same ratio. Otherwise the passes before the first that does
    not are one half together, and passes alternate from there.
    """
    ratios = [Fraction(n // 2, n) for n in sizes]
    other = next((i for i, ratio in enumerate(ratios) if ratio != ratios[0]), None)
    if ratios[0] == 0:
        other = 1
    if other is None:
        return [[int(position >= n // 2) for position in range(n)] for n in sizes]
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


SIZES = [
    (6,),
    (7,),
    (4, 4),
    (3, 3),
    (1, 1),
    (4, 4, 4),
    (3, 3, 3),
    (1, 1, 1),
    (2, 2, 2, 2),
    (4, 4, 4, 2),
    (4, 4, 4, 3),
    (4, 4, 4, 1),
    (3, 3, 3, 3, 2),
    (1, 1, 1, 1, 1),
    (2, 3, 2, 3, 1),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_kind_of_layer(sizes: tuple[int, ...], reduction: str) -> None:
    model, twin = Net(), Net()
    optimizer = FOP(model, **PLAIN, loss_reduction=reduction)  # type: ignore[arg-type]
    batches = micro_batches(sizes)
    for ids, y in batches:
        backward(model, ids, y, len(sizes), reduction)
    optimizer.step()
    check_net(model, twin, optimizer, batches, labels_of(sizes))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("sizes", "labels"),
    [((3, 3), (0, 1)), ((3, 2), (1, 0)), ((1, 4, 2), (0, 1, 1)), ((2, 2, 2, 2), (0, 1, 1, 0))],
)
def test_labelled_passes(sizes: tuple[int, ...], labels: tuple[int, ...], reduction: str) -> None:
    model, twin = Net(), Net()
    optimizer = FOP(model, **PLAIN, loss_reduction=reduction)  # type: ignore[arg-type]
    batches = micro_batches(sizes)
    for (ids, y), label in zip(batches, labels, strict=True):
        with optimizer.sub_batch(label):
            backward(model, ids, y, len(sizes), reduction)
    optimizer.step()
    check_net(model, twin, optimizer, batches, [[label] * n for n, label in zip(sizes, labels, strict=True)])


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (1, 1, 1)], ids=str)
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


def test_single_pass_of_one_sample_says_why() -> None:
    model = Net()
    optimizer = FOP(model, **PLAIN)
    ((ids, y),) = micro_batches((1,))
    backward(model, ids, y, 1, "mean")
    optimizer.step()
    layers = optimizer.diagnostics().layers
    assert {layer.kfac_steps for layer in layers.values()} == {1}
    assert {layer.why_kfac for layer in layers.values()} == {"a batch of 1 has no halves"}


def test_sizes_change_from_step_to_step() -> None:
    model = Net()
    optimizer = FOP(model, **{**PLAIN, "stat_decay": 0.0})
    for sizes in [(4, 4), (3, 4), (6,), (1, 1, 1), (4, 4, 2)]:
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        batches = micro_batches(sizes)
        for ids, y in batches:
            backward(model, ids, y, len(sizes), "mean")
        optimizer.step()
        check_net(model, twin, optimizer, batches, labels_of(sizes))


# --- explicit control: misuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, -1, True, None, "0", 0.5, 1.0])
def test_index_that_is_none_of_the_two(index: Any) -> None:
    optimizer = FOP(mlp())
    with pytest.raises((ValueError, TypeError), match="0 and 1"), optimizer.sub_batch(index):
        pass


def test_nested_sub_batches() -> None:
    """The error leaves nothing behind: the passes after it are labelled as they say."""
    model, twin = mlp(), mlp()
    optimizer = FOP(model, **PLAIN)
    with pytest.raises(RuntimeError, match="inside"), optimizer.sub_batch(0), optimizer.sub_batch(1):
        pass
    batches = [batch(6, 1), batch(5, 2)]
    for label, (x, y) in enumerate(batches):
        with optimizer.sub_batch(label):
            (loss_of(model, x, y) / 2).backward()
    optimizer.step()
    g1, g2 = (gradients(twin, loss_of(twin, x, y)) for x, y in batches)
    check_step(
        model, twin, optimizer, {name: ((g1[name] + g2[name]) / 2, g1[name] - g2[name]) for name in g1}
    )


def test_error_inside_ends_the_label() -> None:
    model, twin = mlp(), mlp()
    optimizer = FOP(model, **PLAIN)
    with pytest.raises(ZeroDivisionError), optimizer.sub_batch(1):
        raise ZeroDivisionError
    pairs = halves(twin, *batch())
    train_step(model, optimizer, *batch())
    check_step(model, twin, optimizer, pairs)


def test_step_inside_a_label() -> None:
    """The whole step in one sub-batch: no pair, and it says so; the label does not leak into the next."""
    model, twin = mlp(), mlp()
    optimizer = FOP(model, **PLAIN)
    with optimizer.sub_batch(0):
        train_step(model, optimizer, *batch())
    check_step(model, twin, optimizer, {name: (Ga, None) for name, (Ga, _) in halves(twin, *batch()).items()})
    assert {d.why_kfac for d in optimizer.diagnostics().layers.values()} == {
        "its backward passes were all of one sub-batch"
    }
    twin.load_state_dict(model.state_dict())
    pairs = halves(twin, *batch(6, 2))
    train_step(model, optimizer, *batch(6, 2))
    check_step(model, twin, optimizer, pairs)


@pytest.mark.parametrize("labels", [(0, None), (None, 0), (0, 1, None), (None, None, 1)])
def test_labelled_and_other_passes_mixed(labels: tuple[int | None, ...]) -> None:
    model, twin = mlp(), mlp()
    optimizer = FOP(model, **PLAIN)
    batches = [batch(6, seed) for seed in range(len(labels))]
    for (x, y), label in zip(batches, labels, strict=True):
        with contextlib.nullcontext() if label is None else optimizer.sub_batch(label):
            (loss_of(model, x, y) / len(labels)).backward()
    optimizer.step()
    each = [gradients(twin, loss_of(twin, x, y)) for x, y in batches]
    average = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    check_step(model, twin, optimizer, {name: (Ga, None) for name, Ga in average.items()})
    for layer in optimizer.diagnostics().layers.values():
        assert layer.kfac_steps == 1
        assert "sub_batch" in str(layer.why_kfac)


def test_layer_used_in_one_sub_batch_only() -> None:
    """A head of its own for each half: the trunk has the pair, the heads say why they have none."""
    torch.manual_seed(0)
    nets = [
        nn.ModuleDict({key: nn.Linear(5, 5 if key == "trunk" else 3) for key in ("trunk", "a", "b")})
        for _ in (0, 1)
    ]
    model, twin = (net.double() for net in nets)
    twin.load_state_dict(model.state_dict())
    optimizer = FOP(model, **PLAIN)

    def losses(net: Any) -> list[Tensor]:
        return [
            half_squared_error(net[key](torch.tanh(net["trunk"](x))), y)
            for key, (x, y) in zip("ab", (batch(4, 1), batch(6, 2)), strict=True)
        ]

    for label, loss in enumerate(losses(model)):
        with optimizer.sub_batch(label):
            (loss / 2).backward()
    optimizer.step()
    trunk = list(twin["trunk"].parameters())
    g1, g2 = (
        torch.cat([w, b[:, None]], dim=1)[None]
        for w, b in (torch.autograd.grad(loss, trunk) for loss in losses(twin))
    )
    old, new = twin["trunk"], model["trunk"]
    step = [
        (was - now).detach() / PLAIN["lr"]
        for was, now in zip(old.parameters(), new.parameters(), strict=True)
    ]
    moved = torch.cat([step[0], step[1][:, None]], dim=1)[None]
    check_direction("trunk", moved, optimizer.state[new.weight], (g1 + g2) / 2, g1 - g2, PLAIN, 1e-9)
    found = optimizer.diagnostics().layers
    assert (found["trunk"].kfac_steps, found["trunk"].why_kfac) == (0, None)
    assert {found[key].why_kfac for key in "ab"} == {"its backward passes were all of one sub-batch"}


# --- DistributedDataParallel, one process ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (3, 3, 3)], ids=str)
def test_no_sync(sizes: tuple[int, ...]) -> None:
    """All passes but the last in ``no_sync``, as every loop with accumulation does it."""
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
