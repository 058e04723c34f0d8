"""Checkpoints of the version before the rebuild load, and training goes on as it did then, to 1e-6."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from old_checkpoints import FOLDER, TRAININGS, WAYS, result_of
from trajectories import differences

NAMED = pytest.mark.parametrize("name", TRAININGS)
EACH = [pytest.param(*way, marks=pytest.mark.slow if slow else ()) for way, slow in WAYS.items()]


@cache
def record(name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    return checkpoint


@pytest.mark.parametrize(("name", "how"), EACH)
def test_training_goes_on(name: str, how: str) -> None:
    checkpoint = record(name)
    expected = checkpoint["later"][how]
    actual = result_of(name, how, checkpoint)
    assert actual.keys() == expected.keys()
    found = differences(actual, expected)
    assert all(difference <= 1e-6 for difference in found.values()), found


@NAMED
def test_the_optimizers_state_matters(name: str) -> None:
    """Had the state been ignored in loading, training would go on as from the weights alone."""
    checkpoint = record(name)
    how = "alone" if TRAININGS[name].ranks else "module"
    afresh = result_of(name, how, {"model": checkpoint["model"]})
    assert max(differences(afresh, checkpoint["later"][how]).values()) > 1e-3


@NAMED
def test_files_are_small(name: str) -> None:
    assert (FOLDER / f"{name}.pt").stat().st_size < 100_000
