"""Ranks that train one model together equal one process that is given their batches as sub-batches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from distributed_cases import CASES, train_alone, train_together
from ranks import run_ranks

# 24 trainings in each process.
pytestmark = pytest.mark.timeout(240)

ODD = [
    "ddp",
    "lean",
    "plain",
    "fsdp",
    "kfac",
    "sum",
    "accumulated",
    "accumulated-fsdp",
    "synced-lean",
    "labels",
]
WANTED = {2: list(CASES), 3: ODD, 4: ["ddp", "lean", "plain", "fsdp", "kfac-lean", "groups-lean", "synced"]}
EACH = [(ranks, name) for ranks, names in WANTED.items() for name in names]


@cache
def together(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(train_together, ranks, WANTED[ranks], ranks, seconds=220)


@pytest.mark.parametrize(("ranks", "name"), EACH)
def test_all_ranks_hold_the_same_weights_bit_for_bit(ranks: int, name: str) -> None:
    first, *others = (result[name][0] for result in together(ranks))
    assert len(others) == ranks - 1
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(("ranks", "name"), EACH)
def test_ranks_equal_one_process_with_their_batches(ranks: int, name: str) -> None:
    parity = ranks % 2 == 0 and not CASES[name].labels
    expected, start = train_alone(name, ranks, parity), dict(CASES[name].model().named_parameters())
    actual = together(ranks)[0][name][0]
    for key, value in expected.items():
        assert (value - start[key]).norm() > 1e-3 * value.norm(), f"{key} did not move: the case cannot fail"
        error = (actual[key] - value).norm() / value.norm()
        assert error < 1e-10, f"{key} differs by {float(error):.1e}"


@pytest.mark.parametrize(("ranks", "name"), [(r, n) for r, n in EACH if not n.startswith("kfac")])
def test_every_layer_had_its_pair_on_every_rank(ranks: int, name: str) -> None:
    for result in together(ranks):
        why = result[name][2]
        assert why
        assert set(why) == {None}


def test_without_the_pair_the_steps_would_be_others() -> None:
    """The comparison above could not tell a lost pair from a found one if K-FAC took the same steps."""
    fop, kfac = (train_alone(name, 2, True) for name in ("ddp", "kfac"))
    assert (fop["head.weight"] - kfac["head.weight"]).norm() > 1e-3 * fop["head.weight"].norm()


def test_lean_sends_no_more_than_plain_data_parallel() -> None:
    """2 n (W-1)/W bytes for n bytes of gradient, as an all-reduce, without the factors."""
    for ranks in (2, 4):
        sent = together(ranks)[0]["groups-lean" if ranks == 4 else "sum-lean"][1]
        # Every step but the first, whose gradients DistributedDataParallel averaged.
        n = 8 * sum(p.numel() for p in CASES["sum"].model().parameters())
        all_reduced = 2 * n * (ranks - 1) / ranks
        scalars = 8 * 7 * 3 * 10
        ours = sent["gradients"] + sent["updates"] - scalars
        first = n * (ranks - 1) / ranks * 2
        assert ours <= 9 * all_reduced + first + 8 * 3 * 128
