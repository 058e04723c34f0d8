"""`fisher="model"` on several ranks: one estimate from labels that each rank draws for its own batch."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fop import FOP
from models import batch, mlp, weights
from ranks import run_ranks


def squares(rank: int, mode: str, wrap: bool, reduction: str) -> tuple[Tensor | None, Tensor]:
    """G of a linear layer under squared errors, on its owner, and the gradient of this rank's last labels."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4))
    model = DistributedDataParallel(inner) if wrap else inner
    how = {"mode": mode}
    optimizer = FOP(
        model, lr=1e-30, fisher="model", stat_decay=0.0, loss_reduction=reduction, distributed=how
    )
    drawn: list[Tensor] = []
    inner.register_full_backward_pre_hook(lambda _, b: drawn.append(b[0]))
    passes = 2 if mode == "compatible" else 1
    for _ in range(2):
        optimizer.zero_grad()
        for index in range(passes):
            synchronises = not wrap or index == passes - 1
            with contextlib.nullcontext() if synchronises else model.no_sync():  # type: ignore[operator]
                rows = 0.5 * optimizer.sample_labels(model(torch.randn(400, 3)), "gaussian").square().sum(1)
                (rows.sum() if reduction == "sum" else rows.mean() / passes).backward()
        optimizer.step()
    return optimizer.state[inner[0].weight].get("G"), drawn[-2]


@pytest.mark.parametrize(
    ("mode", "wrap"), [("compatible", True), ("compatible", False), ("lean", True)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_are_of_all_ranks_and_draws_differ(mode: str, wrap: bool, reduction: str) -> None:
    """G is the identity, for a sample's share of the loss is that of a sum, whatever the number of ranks."""
    results = run_ranks(partial(squares, mode=mode, wrap=wrap, reduction=reduction), 2)
    (owned,) = [G for G, _ in results if G is not None]
    assert (owned[0] - torch.eye(4)).abs().max() < 0.2
    one, other = (gradient for _, gradient in results)
    assert one.std() > 0.9 and not torch.allclose(one, other)


def classes(rank: int, mode: str) -> dict[str, Tensor]:
    inner = mlp()
    model = DistributedDataParallel(inner)
    optimizer = FOP(model, fisher="model", distributed={"mode": mode})
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(6, 10 * step + rank)
        cross_entropy(optimizer.sample_labels(model(x), "categorical"), y.argmax(1)).backward()
        optimizer.step()
    assert not any(layer.why_kfac for layer in optimizer.diagnostics().layers.values())
    return weights(inner)


@pytest.mark.parametrize("mode", ["compatible", "lean"])
def test_ranks_end_with_the_same_weights(mode: str) -> None:
    one, other = run_ranks(partial(classes, mode=mode), 2)
    start = weights(mlp())
    for name, value in one.items():
        assert torch.equal(value, other[name]) and not torch.equal(value, start[name])


def sharded(rank: int) -> None:
    model = mlp()
    fully_shard(model)
    optimizer = FOP(model, fisher="model")
    with pytest.raises(ValueError, match="does not go together with fully_shard"):
        optimizer.sample_labels(model(batch(6, rank)[0]), "categorical")


def test_shards_are_refused() -> None:
    run_ranks(sharded, 2)
