"""What travels between ranks: in which order, how many bytes, and in which form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distributed_internals import (
    Bucketed,
    Channel,
    Message,
    buckets,
    difference_weight,
    pack_symmetric,
    packed_shape,
    representative,
    scale_between,
    side_of,
    sketch,
    unpack_symmetric,
)
from ranks import run_ranks

# --- buckets -----------------------------------------------------------------------------------------


class Noted:
    """In the place of a `Channel`: rank 0 of three, which notes what is started."""

    rank, size = 0, 3

    def __init__(self) -> None:
        self.started: list[tuple[int, list[float], str]] = []

    def reduce(self, tensor: Tensor, to: int, what: str) -> Any:
        self.started.append((to, tensor.tolist(), what))
        return Done()


class Done:
    done = True

    def wait(self) -> None: ...


def bucketed(channel: Any, *messages: tuple[str, int, int]) -> Bucketed:
    made = [Message(key, size, to, torch.float32, "sums", channel) for key, size, to in messages]
    return Bucketed(made, torch.device("cpu"))


def filled(value: float, size: int) -> list[Tensor]:
    return [torch.full((size,), value)]


@pytest.fixture(autouse=True)
def two_elements_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 8)


def test_a_bucket_starts_when_it_is_full_and_not_before() -> None:
    channel = Noted()
    box = bucketed(channel, ("a", 1, 0), ("b", 1, 0), ("c", 2, 1))
    box.put("a", filled(1, 1))
    assert channel.started == []
    box.put("b", filled(2, 1))
    assert channel.started == [(0, [1.0, 2.0], "sums")]
    box.put("c", filled(3, 2))
    assert channel.started[1:] == [(1, [3.0, 3.0], "sums")]
    # Only this rank's sums are collected.
    assert set(box.collect()) == {"a", "b"}


@pytest.mark.parametrize("order", ["abc", "cba", "bc", ""])
def test_the_order_is_that_of_the_messages_whatever_comes_first(order: str) -> None:
    channel = Noted()
    box = bucketed(channel, ("a", 2, 0), ("b", 2, 1), ("c", 2, 2))
    for key in order:
        box.put(key, filled(1, 2))
    box.flush()
    given = [float(key in order) for key in "abc"]
    assert channel.started == [(to, [value] * 2, "sums") for to, value in enumerate(given)]


def test_messages_that_never_came_are_zeros() -> None:
    channel = Noted()
    box = bucketed(channel, ("a", 1, 0), ("b", 1, 0))
    box.put("b", filled(5, 1))
    assert [box.lacks(key) for key in ("a", "b", "unknown")] == [True, False, False]
    assert box.collect()["a"].tolist() == [0.0]
    assert channel.started == [(0, [0.0, 5.0], "sums")]


class Ordered(Channel):
    """One rank's channel that notes from whom it takes broadcasts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sources: list[int] = []

    def broadcast(self, tensor: Tensor, source: int, what: str) -> Any:
        self.sources.append(source)
        return Done()


def test_all_ranks_broadcast_in_one_order() -> None:
    """Otherwise they would wait for each other."""
    for rank in range(3):
        channel = Ordered(rank)
        channel.broadcast_all({source: filled(1, 2) for source in (rank, *range(3))}, "updates")
        assert channel.sources == [0, 1, 2]


# --- the pair ----------------------------------------------------------------------------------------


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


# --- bytes -------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_bytes_are_counted_and_sums_are_right() -> None:
    for rank, (sent, total) in enumerate(run_ranks(collectives, 3)):
        assert total == [6.0] * 6
        assert sent["reduce"] == sent["broadcast"] == 24 * 2 / 3
        assert sent["all"] == 2 * 24 * 2 / 3
        assert sent["exchange"] == 4 * sum(rank + other for other in range(3) if other != rank)


# --- packed factors ----------------------------------------------------------------------------------


def symmetric(groups: int, d: int, seed: int = 0) -> torch.Tensor:
    M = torch.randn(groups, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return M + M.mT


@given(st.integers(1, 3), st.integers(1, 12))
def test_what_was_packed_comes_back_bit_for_bit(groups: int, d: int) -> None:
    M, N = symmetric(groups, d, 1), symmetric(groups, d, 2)
    packed = pack_symmetric(M)
    assert tuple(packed.shape) == packed_shape((groups, d, d))
    assert torch.equal(unpack_symmetric(packed, d), M)
    # Sums of packed matrices are packed sums.
    assert torch.equal(unpack_symmetric(packed + pack_symmetric(N), d), M + N)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 513])
def test_packed_is_a_triangle(d: int) -> None:
    # An odd side repeats half a row.
    size = torch.Size(packed_shape((2, d, d))).numel()
    assert size - 2 * d * (d + 1) // 2 == (d % 2) * 2 * (d + 1) // 2


def test_diagonals_stay_as_they_are() -> None:
    diagonal = torch.randn(3, 5)
    assert pack_symmetric(diagonal) is diagonal
    assert unpack_symmetric(diagonal, 5) is diagonal
    assert packed_shape((3, 5)) == (3, 5)


# --- sketches that tell a scaling from other changes -------------------------------------------------

TOLERANCE = 1e-2


@pytest.mark.parametrize("shape", [(1, 3, 2), (1, 40, 33), (2, 10, 127), (1, 1, 1)])
def test_sketch_adds_up_every_127th_element(shape: tuple[int, ...]) -> None:
    V = torch.randn(shape, dtype=torch.float64)
    flat = V.flatten().tolist()
    expected = [sum(flat[start::127]) for start in range(127)]
    torch.testing.assert_close(sketch(V), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1.0, 0.03, 1 / 65536])
def test_a_scaling_is_recognised(factor: float) -> None:
    V = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(3))
    scale, same = scale_between(sketch(V), sketch(V * factor), TOLERANCE)
    assert bool(same)
    assert float(scale) == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda V: V.clamp(-1, 1),
        lambda V: V + 0.1 * torch.randn(V.shape, generator=torch.Generator().manual_seed(4)),
        lambda V: torch.cat([V[:, :1] * 3, V[:, 1:]], dim=1),
        lambda V: V.flip(2),
        lambda V: V.abs(),
        lambda V: V / torch.zeros(()),
    ],
    ids=["clipped elements", "noise", "one row", "another order", "other signs", "not finite"],
)
def test_other_changes_are_no_scaling(change: Any) -> None:
    V = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(3))
    assert not bool(scale_between(sketch(V), sketch(change(V)), TOLERANCE)[1])


def test_zero_gradients_have_no_scale() -> None:
    zero = torch.zeros(127)
    scale, same = scale_between(zero, zero, TOLERANCE)
    assert float(scale) == 0.0
    assert bool(same)
    assert not bool(scale_between(zero, torch.ones(127), TOLERANCE)[1])
