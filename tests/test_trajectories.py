"""Trainings give the numbers that they gave when `data/trajectories.json` was recorded, bit for bit.

Bits are compared where the recorded fingerprint (torch, CPU capability, bits of a few operations) is this
machine's. On other machines the final float64 parameters are compared with a relative tolerance of 1e-6, by
parameter; float32 and autocast trainings, and those with random masks, are skipped there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trajectories import EVERY, TRAININGS, Result, fingerprint, result_of

# Ranks train all that they have to in the first of their tests.
pytestmark = pytest.mark.timeout(3600)
DATA = Path(__file__).parent / "data"
RECORD: dict[str, Any] = json.loads((DATA / "trajectories.json").read_text())
PARAMETERS: dict[str, Tensor] = torch.load(DATA / "trajectories.pt")
HERE = fingerprint() == RECORD["fingerprint"]

# Trainings in which the order of a sum had to change, with the relative tolerance for float64 and the reason.
# For float32 it is larger by the ratio of the roundings.
ALLOWED: dict[str, float] = {}
ELSEWHERE = 1e-6

# Trainings that must equal the first one of their line.
SAME = [
    ["mlp", "mlp-parameters", "mlp-names", "closure", "compile", "resume", "resume-parameters"],
]


def cases() -> list[Any]:
    return [
        pytest.param(name, dtype, marks=pytest.mark.slow if training.slow else ())
        for name, training in TRAININGS.items()
        for dtype in training.dtypes
    ]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_trajectory(name: str, dtype: str) -> None:
    key = f"{name}/{dtype}"
    if not HERE and (dtype != "float64" or not TRAININGS[name].portable):
        pytest.skip("recorded on another machine, which rounds in another way")
    result = result_of(name, dtype)
    recorded = RECORD["results"][key]
    assert result.final.keys() == recorded["final"].keys()
    if HERE and name not in ALLOWED:
        same = [one == other for one, other in zip(result.every, recorded["every"], strict=True)]
        assert all(same) and result.final == recorded["final"], (
            f"{key}: the same bits after {EVERY * sum(same)} steps, then others; at the end the parameters "
            f"differ by {difference(result, PARAMETERS[key]):.1e} of their norm"
        )
    else:
        tolerance = ALLOWED[name] if HERE else ELSEWHERE
        tolerance *= torch.finfo(result.parameters.dtype).eps / torch.finfo(torch.float64).eps
        assert difference(result, PARAMETERS[key]) <= tolerance


def difference(result: Result, recorded: Tensor) -> float:
    """The largest distance of a parameter from its recorded value, relative to its norm."""
    sizes = list(result.sizes.values())
    assert result.parameters.shape == recorded.shape
    pairs = zip(result.parameters.split(sizes), recorded.split(sizes), strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def test_every_training_is_recorded() -> None:
    keys = {f"{name}/{dtype}" for name, training in TRAININGS.items() for dtype in training.dtypes}
    assert set(RECORD["results"]) == keys == set(PARAMETERS)
    assert set(TRAININGS) >= set(ALLOWED)


def test_trainings_are_the_same_only_where_they_should_be() -> None:
    """An option without effect would make two records equal, and a broken resume would make two differ."""
    groups = defaultdict(list)
    for key, recorded in RECORD["results"].items():
        groups[tuple(recorded["every"])].append(key)
    equal = sorted(keys for keys in groups.values() if len(keys) > 1)
    assert equal == sorted(
        [f"{name}/{dtype}" for name in names] for names in SAME for dtype in ("float64", "float32")
    )
