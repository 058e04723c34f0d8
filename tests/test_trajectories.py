"""Trainings end with the parameters that were recorded before the rebuild of `fop`, to 1e-6 of their norm.

Rounding alone (measured with other CPU instructions) changes most by 5e-13, and none by more than 5e-10.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from trajectories import TRAININGS, differences, result_of

DATA = Path(__file__).parent / "data" / "trajectories.pt"
RECORD: dict[str, dict[str, Any]] = torch.load(DATA, weights_only=True)

# Trainings that are one in different words; their records are equal but for rounding.
SAME = [
    ["mlp", "mlp-parameters", "mlp-names", "sum", "closure", "compile", "resume", "resume-parameters"],
    ["mlp-kfac", "compile-kfac", "resume-kfac"],
    ["cnn", "compile-cnn", "evaluated"],
    ["cnn-norms-fop", "resume-cnn"],
    ["transformer", "transformer-recompute", "batch-second"],
    ["tied", "compile-tied", "resume-tied"],
    ["clip", "max-grad-norm"],
    ["frozen", "frozen-parameters"],
    ["groups", "resume-groups"],
    ["ranks2-ddp", "ranks2-lean", "ranks2-plain", "ranks2-fsdp"],
    ["ranks2-ddp-halves", "ranks2-lean-halves", "ranks2-plain-halves"],
    ["ranks2-ddp-delay", "ranks2-lean-delay"],
    ["ranks4-ddp-halves", "ranks4-lean-halves"],
]
GROUP = {name: number for number, same in enumerate(SAME) for name in same}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[*[pytest.mark.slow] * training.slow, *[pytest.mark.rest] * training.rest])
        for name, training in TRAININGS.items()
    ],
)
def test_trajectory(name: str) -> None:
    result = result_of(name)
    sizes = [value.numel() for value in result.values()]
    recorded = dict(zip(result, RECORD[name]["parameters"].split(sizes), strict=True))
    found = differences({key: value.flatten() for key, value in result.items()}, recorded)
    assert all(difference <= 1e-6 for difference in found.values()), found


def test_every_training_is_recorded() -> None:
    assert RECORD.keys() == TRAININGS.keys() >= GROUP.keys()


def test_records_are_equal_only_where_they_should_be() -> None:
    """An option without effect would make two records equal, and a broken resume would make two differ."""
    for names in combinations(RECORD, 2):
        one, other = (RECORD[name]["parameters"] for name in names)
        equal = one.shape == other.shape and (one - other).norm() < 1e-9 * other.norm()
        # AdamW's eps alone makes accumulate-cnn and sum-accumulate differ, by 8e-9.
        assert equal == (GROUP.get(names[0], names[0]) == GROUP.get(names[1], names[1])), names
