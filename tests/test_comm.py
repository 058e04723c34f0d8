"""The order of collectives on a channel without partners that notes what is asked of it; what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fop.distributed import Channel, Outbox, Parcel, comm, difference_weight, representative, side_of
from ranks import run_ranks


class Noted:
    """In the place of a `Channel`: rank 0 of three."""

    rank, size = 0, 3

    def __init__(self) -> None:
        self.started: list[tuple[int, list[float], str]] = []

    def reduce(self, tensor: Tensor, to: int, what: str) -> Any:
        self.started.append((to, tensor.tolist(), what))
        return Done()


class Done:
    done = True

    def wait(self) -> None: ...


def outbox(channel: Any, *parcels: tuple[str, int, int]) -> Outbox:
    made = [Parcel(key, size, to, torch.float32, "sums", channel) for key, size, to in parcels]
    return Outbox(made, torch.device("cpu"))


def filled(value: float, size: int) -> list[Tensor]:
    return [torch.full((size,), value)]


@pytest.fixture(autouse=True)
def two_elements_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "BUCKET_BYTES", 8)


def test_a_bucket_starts_when_it_is_full_and_not_before() -> None:
    channel = Noted()
    box = outbox(channel, ("a", 1, 0), ("b", 1, 0), ("c", 2, 1))
    box.put("a", filled(1, 1))
    assert channel.started == []
    box.put("b", filled(2, 1))
    assert channel.started == [(0, [1.0, 2.0], "sums")]
    box.put("c", filled(3, 2))
    assert channel.started[1:] == [(1, [3.0, 3.0], "sums")]


def test_the_order_is_that_of_the_parcels_whatever_comes_first() -> None:
    parcels = [("a", 2, 0), ("b", 2, 1), ("c", 2, 2)]
    orders = [["a", "b", "c"], ["c", "b", "a"], ["b", "c"], []]
    started = []
    for order in orders:
        channel = Noted()
        box = outbox(channel, *parcels)
        for key in order:
            box.put(key, filled(1, 2))
        box.flush()
        started.append([to for to, _, _ in channel.started])
    assert started == [[0, 1, 2]] * 4


def test_parcels_that_never_came_are_zeros() -> None:
    channel = Noted()
    box = outbox(channel, ("a", 1, 0), ("b", 1, 0))
    box.put("b", filled(5, 1))
    assert box.lacks("a")
    assert not box.lacks("b")
    assert not box.lacks("unknown")
    assert box.collect()["a"].tolist() == [0.0]
    assert channel.started == [(0, [0.0, 5.0], "sums")]


def test_only_this_ranks_sums_are_collected() -> None:
    box = outbox(Noted(), ("a", 2, 0), ("b", 2, 1))
    for key in "ab":
        box.put(key, filled(1, 2))
    assert set(box.collect()) == {"a"}


def test_even_ranks_against_odd_ones() -> None:
    assert [side_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    for ranks in (2, 3, 4, 5):
        weights = [difference_weight(rank, ranks) for rank in range(ranks)]
        assert sum(weights[0::2]) == pytest.approx(1)
        assert sum(weights[1::2]) == pytest.approx(-1)
    for owner in range(4):
        assert {representative(owner, 0), representative(owner, 1)} == {owner, owner ^ 1}
        assert representative(owner, side_of(owner)) == owner
        assert [side_of(representative(owner, side)) for side in (0, 1)] == [0, 1]


def collectives(rank: int) -> tuple[dict[str, float], list[float]]:
    sent: dict[str, float] = {}
    channel = Channel(dist.group.WORLD, sent)  # type: ignore[arg-type]
    tensor = torch.full((6,), float(rank + 1))
    channel.reduce(tensor.clone(), 1, "reduce").wait()
    channel.broadcast(tensor.clone(), 2, "broadcast").wait()
    channel.all_reduce(total := tensor.clone(), "all").wait()
    # Rank r sends r + q elements to rank q.
    parts = [torch.full((rank + other,), float(rank)) for other in range(3)]
    taken = channel.exchange(parts, [other + rank for other in range(3)], "exchange")
    assert [part.tolist() for part in taken] == [[float(q)] * (q + rank) for q in range(3)]
    return sent, total.tolist()


def test_bytes_are_counted_and_sums_are_right() -> None:
    for rank, (sent, total) in enumerate(run_ranks(collectives, 3)):
        assert total == [6.0] * 6
        assert sent["reduce"] == sent["broadcast"] == 24 * 2 / 3
        assert sent["all"] == 2 * 24 * 2 / 3
        assert sent["exchange"] == 4 * sum(rank + other for other in range(3) if other != rank)
