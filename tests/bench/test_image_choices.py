"""Which images of a data set are used: the first of each class, or a long tail."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from fop_bench.images import long_tail, per_class


def shuffled(classes: int, of_each: int) -> torch.Tensor:
    labels = torch.arange(classes).repeat_interleave(of_each)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def test_per_class_keeps_the_first_after_those_skipped() -> None:
    labels = [1, 0, 0, 1, 2, 1, 2, 0, 2, 0, 1, 2]
    chosen = per_class(2, skip=1)(torch.tensor(labels)).tolist()
    expected = [[at for at, each in enumerate(labels) if each == label][1:3] for label in range(3)]
    assert chosen == [at for of_class in expected for at in of_class]
    assert not set(chosen) & set(per_class(1)(torch.tensor(labels)).tolist())


def test_per_class_names_a_class_with_too_few() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert len(per_class(2)(labels)) == 4
    with pytest.raises(ValueError, match="class 1 has 2 images; 3 are needed"):
        per_class(2, skip=1)(labels)


def profile(classes: int, imbalance: int, largest: int) -> list[int]:
    """Give the largest n of each class with n ≤ largest·imbalance^(-i/(C-1)), in whole numbers."""
    return [
        max(n for n in range(largest + 1) if n ** (classes - 1) * imbalance**i <= largest ** (classes - 1))
        for i in range(classes)
    ]


@pytest.mark.parametrize(
    ("classes", "largest", "imbalance", "total"),
    [
        # Totals of the published data sets (Cui et al. 2019; Cao et al. 2019).
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
    ],
)
def test_long_tail_has_the_published_counts(classes: int, largest: int, imbalance: int, total: int) -> None:
    labels = shuffled(classes, largest)
    chosen = long_tail(imbalance, largest)(labels)
    assert len(set(chosen.tolist())) == len(chosen) == total
    counts = Counter(labels[chosen].tolist())
    assert [counts[label] for label in range(classes)] == profile(classes, imbalance, largest)
    assert counts[0] == largest
    assert counts[classes - 1] == largest // imbalance


def test_a_long_tail_can_be_cut_from_a_longer_one() -> None:
    labels = shuffled(10, 500)
    ten = labels[long_tail(10, 500)(labels)]
    again = Counter(ten[long_tail(100, 500)(ten)].tolist())
    assert [again[label] for label in range(10)] == profile(10, 100, 500)


def test_the_choice_of_a_long_tail_is_fixed_by_its_seed() -> None:
    labels = shuffled(10, 50)
    first = long_tail(10, 50, seed=3)(labels)
    torch.manual_seed(99)
    assert torch.equal(first, long_tail(10, 50, seed=3)(labels))
    other = long_tail(10, 50, seed=4)(labels)
    assert set(first.tolist()) != set(other.tolist())
    # Not the first images of a class: any can be chosen.
    last_class = (labels == 9).nonzero().squeeze(1)
    seen = {at for seed in range(60) for at in long_tail(10, 50, seed=seed)(labels)[-5:].tolist()}
    assert seen == set(last_class.tolist())


def test_a_long_tail_names_a_class_with_too_few() -> None:
    labels = torch.cat([torch.zeros(8, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    assert len(long_tail(8, 8)(labels)) == 9
    message = "class 1 has 1 images; an imbalance factor of 4 needs 2: give the balanced data set"
    with pytest.raises(ValueError, match=re.escape(message)):
        long_tail(4, 8)(labels)
