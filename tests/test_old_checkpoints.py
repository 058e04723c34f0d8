"""Checkpoints of the version before the rebuild load, and training goes on as it did then.

Bit for bit on a machine like that which recorded them, elsewhere within 1e-6 (see test_trajectories.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from old_checkpoints import FOLDER, TRAININGS, WAYS, result_of
from trajectories import fingerprint

pytestmark = pytest.mark.timeout(3600)
ELSEWHERE = 1e-6

# Relative tolerance where the order of a sum had to change.
ALLOWED: dict[str, float] = {}

NAMED = pytest.mark.parametrize("name", TRAININGS)
EACH = [pytest.param(*way, marks=pytest.mark.slow if slow else ()) for way, slow in WAYS.items()]


@cache
def record(name: str) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    return checkpoint


def difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "how"), EACH)
def test_training_goes_on(name: str, how: str) -> None:
    torch.set_num_threads(1)
    checkpoint = record(name)
    expected = checkpoint["later"][how]
    actual = result_of(name, how, checkpoint)
    assert actual.keys() == expected.keys()
    here = checkpoint["fingerprint"] == fingerprint()
    tolerance = ALLOWED.get(name, 0.0) if here else ELSEWHERE
    worst = max((difference(actual[key], value), key) for key, value in expected.items())
    assert worst[0] <= tolerance, worst
    if not tolerance:
        assert all(torch.equal(actual[key], value) for key, value in expected.items())


@NAMED
def test_the_optimizers_state_matters(name: str) -> None:
    """Had the state been ignored in loading, training would go on as from the weights alone."""
    checkpoint = record(name)
    how = "alone" if TRAININGS[name].ranks else "module"
    afresh = result_of(name, how, {"model": checkpoint["model"]})
    assert max(difference(afresh[key], value) for key, value in checkpoint["later"][how].items()) > 1e-3


@NAMED
def test_files_are_small(name: str) -> None:
    assert (FOLDER / f"{name}.pt").stat().st_size < 100_000
