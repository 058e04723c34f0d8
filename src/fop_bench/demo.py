"""The demo: four optimizers on real digits at small, large and full batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fop_bench.recipes import DIGITS
from fop_bench.run_records import read_runs
from fop_bench.runner import TUNING_SEED, Record, Selection, make
from fop_bench.summary import Summary, summarise
from fop_bench.training import Epoch, Run
from fop_bench.world import World

TRAIN_SIZE = 1024
TARGET = DIGITS.targets["accuracy"]
SELECTION = "highest mean validation accuracy over the epochs of one run with the tuning seed"


@dataclass(frozen=True)
class Entry:
    """One optimizer at one batch size: the search, the rate it chose, the final runs and their summary."""

    batch_size: int
    optimizer: str
    learning_rate: float
    tuning: list[Run]
    runs: list[Run]
    summary: Summary


def protocol(study: str) -> dict[str, Any]:
    """Describe a study of the digits, whose grids have one option, the learning rate."""
    plan = DIGITS.studies[study]
    return {
        "data": "sklearn.datasets.load_digits",
        "target_accuracy": TARGET,
        "tuning_seed": TUNING_SEED,
        "selection": SELECTION,
        "schedule": "half a cosine from the learning rate to 0 over all steps",
        "quick": study == "demo-quick",
        "epochs": dict(plan.epochs),
        "seeds": list(plan.seeds),
    }


def run_demo(study: str, device: torch.device, on_run: Callable[[int, int, str], None]) -> list[Entry]:
    """Make the runs of a study of the digits, and return one entry for each batch size and optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Selection(DIGITS.name, study)
        world = World(device)
        make(chosen, data=None, world=world, out=Path(folder), jobs=1, minutes=600.0, on_run=on_run)
        records = read_runs(Path(folder))
    plan = DIGITS.studies[study]
    return [_entry(records, batch_size, name) for batch_size in plan.epochs for name in plan.contenders]


def _entry(records: list[Record], batch_size: int, name: str) -> Entry:
    runs: dict[str, list[Run]] = {"tuning": [], "final": []}
    for each in records:
        if (each["batch_size"], each["contender"]) == (batch_size, name):
            curve = [Epoch(**epoch) for epoch in each["curve"]]
            lr = each["options"]["lr"]
            runs[each["phase"]].append(Run(lr, each["seed"], curve, each["diverged"], each["warnings"]))
    final = runs["final"]
    return Entry(batch_size, name, final[0].learning_rate, runs["tuning"], final, summarise(final, TARGET))
