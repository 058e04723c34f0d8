"""Checkpoints of several ranks: resumed on another number of ranks, and plain ones of rank 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import OPTIONS, Weights, whole, wrapped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from fop import FOP
from models import batch, loss_of, mlp, weights
from ranks import run_ranks
from reference import joined, split

SEGMENT = 7
RANKS = (4, 2, 3, 1)
# After so many steps the curvature is one step old, and not due.
STEPS = 12


class Net(nn.Module):
    """Both paths, grouped convolution, and parameters with fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 4, (1, 3), groups=2, padding="same")
        self.hidden = nn.Linear(48, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.norm(self.conv(x))))
        out: Tensor = self.head(torch.tanh(self.hidden(x.flatten(1))))
        return out


def train(model: nn.Module, optimizer: FOP, steps: range, rank: int, ranks: int) -> None:
    """Each rank has a part of a batch of 24; the first sub-batches of all ranks are its first one."""
    for step in steps:
        x, y = batch(24, step, (2, 5, 6))
        own = joined(*(torch.tensor(part).view(ranks, -1)[rank] for part in split(24)))
        optimizer.zero_grad()
        loss_of(model, x[own], y[own]).backward()
        optimizer.step()


def save(folder: object, model: nn.Module, optimizer: FOP) -> None:
    model_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=str(folder))


def load(folder: object, model: nn.Module, optimizer: FOP) -> None:
    model_state, state = get_state_dict(model, optimizer)
    loaded = {"model": model_state, "optimizer": state}
    dcp.load(loaded, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def segment(rank: int, ranks: int, folder: str, first: int, wrap: str, options: dict[str, Any]) -> Weights:
    """Load what the ranks before have saved, train on, and save."""
    warnings.simplefilter("ignore")
    inner = Net()
    model = wrapped(inner, wrap if ranks > 1 else "")
    optimizer = FOP(model, **{**OPTIONS, **options}, distributed={"pair": "halves"})
    if first:
        load(folder, model, optimizer)
        assert optimizer.param_groups[0]["step"] == first
    train(model, optimizer, range(first, first + SEGMENT), rank, ranks)
    save(folder, model, optimizer)
    return whole(inner)


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        pytest.param("ddp", {}, id="ddp"),
        pytest.param("ddp", {"momentum": 0.0, "inverse_delay": 2}, id="ddp-later", marks=pytest.mark.slow),
        pytest.param("fsdp", {}, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_resumed_on_other_numbers_of_ranks(tmp_path: Path, wrap: str, options: dict[str, Any]) -> None:
    model = Net()
    train(model, FOP(model, **{**OPTIONS, **options}), range(SEGMENT * len(RANKS)), 0, 1)
    for index, ranks in enumerate(RANKS):
        folder = str(tmp_path / "checkpoint")
        results = run_ranks(segment, ranks, ranks, folder, index * SEGMENT, wrap, options)
    for name, expected in weights(model).items():
        error = (results[0][name] - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name} differs by {float(error):.1e}"


def save_plainly(rank: int, ranks: int, path: str) -> list[list[str]]:
    """Rank 0 alone saves, as scripts for SGD do."""
    model = Net()
    optimizer = FOP(model_of_ranks := DistributedDataParallel(model), **OPTIONS)
    train(model_of_ranks, optimizer, range(STEPS), rank, ranks)
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return [sorted(key for key in optimizer.state[p] if key in "AG") for p in model.parameters()]


def load_plainly(rank: int, ranks: int, path: str) -> tuple[list[int], list[bool], bool]:
    model = Net()
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    model_of_ranks = wrapped(model, "ddp" if ranks > 1 else "")
    optimizer = FOP(model_of_ranks.parameters(), **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    train(model_of_ranks, optimizer, range(STEPS, STEPS + 1), rank, ranks)
    state = [optimizer.state[p] for p in model.parameters() if p.dim() > 1]
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return [entries["refreshed_at"] for entries in state], ["A" in entries for entries in state], finite


def test_what_rank_0_saves_alone_can_be_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pt")
    held = run_ranks(save_plainly, 2, 2, path)
    missing = [not keys for keys, p in zip(held[0], Net().parameters(), strict=True) if p.dim() > 1]
    assert any(missing)
    assert not all(missing)
    for ranks in (1, 3):
        results = run_ranks(load_plainly, ranks, ranks, path)
        for refreshed_at, _, finite in results:
            assert finite
            # What rank 0 did not own had to be estimated anew; the rest is as it was saved.
            assert [at == STEPS for at in refreshed_at] == missing
        owned = [sum(result[1][layer] for result in results) for layer in range(len(missing))]
        assert owned == [1] * len(missing)


@pytest.mark.core
def test_a_checkpoint_of_torch_continues_bit_for_bit(tmp_path: Path) -> None:
    """torch.distributed.checkpoint keeps no strides, and reads only what is there to read into."""
    warnings.simplefilter("ignore")

    def train_float32(model: nn.Module, optimizer: FOP, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, *(t.float() for t in batch(6, step))).backward()
            optimizer.step()

    model, twin = mlp().float(), mlp(1).float()
    optimizer, other = FOP(model, **OPTIONS), FOP(twin, **OPTIONS)
    train_float32(model, optimizer, range(STEPS))
    save(tmp_path, model, optimizer)
    load(tmp_path, twin, other)
    for param, copied in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[param].keys() == other.state[copied].keys()
    for net, its in ((model, optimizer), (twin, other)):
        train_float32(net, its, range(STEPS, 20))
    for name, value in weights(model).items():
        assert torch.equal(weights(twin)[name], value), name
