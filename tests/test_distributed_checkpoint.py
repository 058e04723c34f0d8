"""Checkpoints of several ranks: resumed on another number of ranks, and plain ones of rank 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed_cases import OPTIONS
from fop import FOP
from models import batch, loss_of
from ranks import run_ranks

pytestmark = pytest.mark.timeout(180)
SEGMENT = 7
RANKS = (4, 2, 3, 1)
# After so many steps the curvature is one step old, and not due.
STEPS = 13


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


def shares(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a batch of 24; the first halves of all ranks together are the first 12 samples."""
    x, y = batch(24, step, (2, 5, 6))
    h = 12 // ranks
    own = torch.arange(rank * h, (rank + 1) * h)
    index = torch.cat([own, 12 + own])
    return x[index], y[index]


def segment(
    rank: int, ranks: int, folder: str, first: int, wrap: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Load what the ranks before have saved, train on, and save."""
    warnings.simplefilter("ignore")
    model = Net()
    if wrap == "fsdp" and ranks > 1:
        fully_shard(model)
    wrapped: nn.Module = DistributedDataParallel(model) if wrap == "ddp" and ranks > 1 else model
    optimizer = FOP(wrapped, **{**OPTIONS, **options}, distributed={"pair": "halves"})
    if first:
        model_state, state = get_state_dict(wrapped, optimizer)
        loaded = {"model": model_state, "optimizer": state}
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(
            wrapped, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        assert optimizer.param_groups[0]["step"] == first
    for step in range(first, first + SEGMENT):
        optimizer.zero_grad()
        loss_of(wrapped, *shares(step, rank, ranks)).backward()
        optimizer.step()
    model_state, state = get_state_dict(wrapped, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    return {name: whole(param) for name, param in model.named_parameters()}


def whole(param: Tensor) -> Tensor:
    tensor = param.full_tensor() if hasattr(param, "full_tensor") else param
    return tensor.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("wrap", "options"),
    [("ddp", {}), ("ddp", {"momentum": 0.0, "inverse_delay": 2}), ("fsdp", {})],
    ids=["ddp", "ddp-later", "fsdp"],
)
def test_resumed_on_other_numbers_of_ranks(tmp_path: Path, wrap: str, options: dict[str, Any]) -> None:
    model = Net()
    optimizer = FOP(model, **{**OPTIONS, **options})
    for step in range(SEGMENT * len(RANKS)):
        optimizer.zero_grad()
        loss_of(model, *shares(step, 0, 1)).backward()
        optimizer.step()
    results: list[dict[str, Tensor]] = []
    for index, ranks in enumerate(RANKS):
        folder = str(tmp_path / "checkpoint")
        results = run_ranks(segment, ranks, ranks, folder, index * SEGMENT, wrap, options)
    for name, param in model.named_parameters():
        expected = param.detach()
        error = (results[0][name] - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name} differs by {float(error):.1e}"


def save_plainly(rank: int, ranks: int, path: str) -> list[list[str]]:
    """Rank 0 alone saves, as scripts for SGD do."""
    model = Net()
    wrapped = DistributedDataParallel(model)
    optimizer = FOP(wrapped, **OPTIONS)
    train(wrapped, optimizer, range(STEPS), rank, ranks)
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return [sorted(key for key in optimizer.state[p] if key in "AG") for p in model.parameters()]


def load_plainly(rank: int, ranks: int, path: str) -> tuple[list[int], list[bool], bool]:
    model = Net()
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    wrapped: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = FOP(wrapped.parameters(), **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    train(wrapped, optimizer, range(STEPS, STEPS + 1), rank, ranks)
    state = [optimizer.state[p] for p in model.parameters() if p.dim() > 1]
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return [entries["refreshed_at"] for entries in state], ["A" in entries for entries in state], finite


def train(model: nn.Module, optimizer: FOP, steps: range, rank: int, ranks: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *shares(step, rank, ranks)).backward()
        optimizer.step()


def test_what_rank_0_saves_alone_can_be_loaded_by_any_number_of_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pt")
    held = run_ranks(save_plainly, 2, 2, path)
    missing = [not keys for keys, p in zip(held[0], Net().parameters(), strict=True) if p.dim() > 1]
    assert any(missing)
    assert not all(missing)
    for ranks in (1, 3):
        for result in (results := run_ranks(load_plainly, ranks, ranks, path)):
            refreshed_at, _, finite = result
            assert finite
            # What rank 0 did not own had to be estimated anew; the rest is as it was saved.
            assert [at == STEPS for at in refreshed_at] == missing
        owned = [sum(result[1][layer] for result in results) for layer in range(len(missing))]
        assert owned == [1] * len(missing)
