"""Ranks that train one model together equal one process that is given their batches as sub-batches."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, train_alone, train_together

from ranks import run_ranks
from versions import fsdp_on_cpu

QUICK = [(3, "lean"), (4, "ddp")]
SLOW = {
    2: ["max-norm-fsdp", "synced-lean", "accumulated-lean", "accumulated-fsdp"],
    3: ["plain", "fsdp", "kfac", "sum", "accumulated-fsdp", "synced-lean", "labels"],
    4: ["lean", "fsdp", "groups-lean"],
}
REST = {3: ["ddp", "accumulated"], 4: ["plain", "kfac-lean", "synced"]}
CORE = {"ddp", "lean", "plain", "fsdp", "fsdp-layers"}
WHOLE = {*CORE, "synced-lean", "accumulated"}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [
        *([pytest.mark.core] if name in CORE else []),
        *([pytest.mark.whole] if name in WHOLE else []),
        *([fsdp_on_cpu] if "fsdp" in name else []),
    ]


EACH = [
    *(pytest.param(2, name, marks=marks(name)) for name in CASES if name not in [*SLOW[2], "rounded"]),
    *QUICK,
    *(
        pytest.param(
            ranks, name, marks=[pytest.mark.slow, *more, *(m for m in marks(name) if m.name != "core")]
        )
        for cases, more in ((SLOW, []), (REST, [pytest.mark.rest]))
        for ranks, names in cases.items()
        for name in names
    ),
]


@pytest.mark.parametrize(("ranks", "name"), EACH)
def test_ranks_train_as_one_process(ranks: int, name: str) -> None:
    """All ranks hold the same weights bit for bit, those of one process; every layer had its pair."""
    first, *others = run_ranks(train_together, ranks, name)
    for other in others:
        for key, value in first[0].items():
            assert torch.equal(value, other[0][key]), key
    expected = train_alone(name, ranks, parity=ranks % 2 == 0 and not CASES[name].labels)
    start = dict(CASES[name].model().named_parameters())
    for key, value in expected.items():
        assert (value - start[key]).norm() > 1e-3 * value.norm(), f"{key} did not move: the case cannot fail"
        error = (first[0][key] - value).norm() / value.norm()
        assert error < 1e-10, f"{key} differs by {float(error):.1e}"
    if not name.startswith("kfac"):
        for _, why, _ in (first, *others):
            assert set(why) == {None}


def test_without_the_pair_the_steps_would_be_others() -> None:
    """The comparison above could not tell a lost pair from a found one if K-FAC took the same steps."""
    fop, kfac = (train_alone(name, 2, True) for name in ("ddp", "kfac"))
    assert (fop["head.weight"] - kfac["head.weight"]).norm() > 1e-3 * fop["head.weight"].norm()


@pytest.mark.slow
def test_statistics_in_bfloat16_change_little() -> None:
    first, other = (weights for weights, _, _ in run_ranks(train_together, 2, "rounded"))
    assert all(torch.equal(value, other[key]) for key, value in first.items())
    expected = train_alone("rounded", 2, parity=True)
    assert 1e-3 < max((first[key] - value).norm() / value.norm() for key, value in expected.items()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [(2, "sum-lean"), (4, "groups-lean")])
def test_lean_sends_no_more_than_plain_data_parallel(ranks: int, name: str) -> None:
    """2 n (W-1)/W bytes for n bytes of gradient, as an all-reduce, without the factors."""
    _, _, sent = run_ranks(train_together, ranks, name)[0]
    # Every step but the first, whose gradients DistributedDataParallel averaged.
    n = 8 * sum(p.numel() for p in CASES[name].model().parameters())
    all_reduced = 2 * n * (ranks - 1) / ranks
    scalars = 8 * 9 * 3 * 13
    ours = sent["gradients"] + sent["updates"] - scalars
    first = n * (ranks - 1) / ranks * 2
    assert ours <= 9 * all_reduced + first + 8 * 3 * 128
