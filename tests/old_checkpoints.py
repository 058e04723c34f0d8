"""Checkpoints of the version before the rebuild, in `data/checkpoints`, and how to go on from them.

`tools/record_checkpoints.py` wrote them; `test_old_checkpoints.py` compares.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fop import KFAC
from internals import as_when_recorded
from ranks import run_ranks
from trajectories import (
    EVERYTHING,
    MLP,
    VOCABULARY,
    Run,
    Task,
    Training,
    plain,
    sentences,
)

FOLDER = Path(__file__).parent / "data" / "checkpoints"
# The curvature is one step old then, and not due.
STEPS = 14
MORE = 5


class Mixed(nn.Module):
    """Embedding, convolutions with norms between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm1d(8)
        self.grouped = nn.Conv1d(8, 4, 3, groups=2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.batch_norm(self.conv(self.embed(ids).mT)))
        out: Tensor = self.head(torch.tanh(self.group_norm(self.grouped(x))).mean(-1))
        return out


DIAGONAL = {"path": "fop"}
TRAININGS = {
    "mlp": Training(MLP, {"momentum": 0.9, "nesterov": True}),
    "mixed": Training(
        Task(Mixed, sentences),
        {"layer_options": {nn.BatchNorm1d: DIAGONAL, nn.GroupNorm: DIAGONAL, "conv": {"max_factor_dim": 4}}},
        kind=KFAC,
    ),
    "ranks": Training(
        EVERYTHING, {"layer_options": {nn.LayerNorm: DIAGONAL, nn.GroupNorm: DIAGONAL}}, wrap="ddp", ranks=2
    ),
}


def save(rank: int, name: str, path: str) -> None:
    """Train, and let rank 0 save as scripts do."""
    run = Run(TRAININGS[name], rank)
    for step in range(STEPS):
        plain(run, step)
    if rank == 0:
        torch.save({"model": run.inner.state_dict(), "optimizer": run.optimizer.state_dict()}, path)


# How to go on from each, and whether that takes seconds.
WAYS = {
    ("mlp", "module"): False,
    ("mlp", "parameters"): False,
    ("mixed", "module"): False,
    ("mixed", "parameters"): False,
    ("ranks", "alone"): False,
    ("ranks", "ranks"): True,
}


def result_of(name: str, how: str, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Go on from a checkpoint, on as many ranks as that needs, and return the parameters."""
    if how == "ranks":
        results: list[dict[str, Tensor]] = run_ranks(go_on, 2, name, checkpoint, how)
        return results[0]
    return go_on(0, name, checkpoint, how)


def go_on(rank: int, name: str, checkpoint: dict[str, Any], how: str) -> dict[str, Tensor]:
    """Load a checkpoint and train on.

    Args:
        rank: of this process.
        name: what was trained.
        checkpoint: state of the model and, if there is one, of the optimizer.
        how: "module" or "parameters", what the optimizer is made from; "alone" for one process that goes on
            from what two ranks did; "ranks" for two.
    """
    training = TRAININGS[name]
    if how == "parameters":
        training = replace(training, make=lambda model, o: training.kind(model.parameters(), **o))
    elif how == "alone":
        training = replace(training, wrap="")
    run = Run(training, rank)
    run.inner.load_state_dict(checkpoint["model"])
    if "optimizer" in checkpoint:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
    # As batches were split when the checkpoints were written.
    with as_when_recorded():
        for step in range(STEPS, STEPS + MORE):
            plain(run, step)
    return {key: param.detach().clone() for key, param in run.inner.named_parameters()}
