"""Collectives between the ranks of one optimizer: asynchronous, in buckets of a fixed order, and counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Large enough for the bandwidth of a network, small enough to start early in a backward pass.
BUCKET_BYTES = 8 * 2**20


class Pending:
    """A collective under way; keeps its tensors alive.

    Args:
        work: what torch.distributed returned.
        what: what is exchanged, for the error message.
        channel: where.
    """

    def __init__(self, work: Any, what: str, channel: Channel) -> None:
        self._work = work
        self._what = what
        self._channel = channel

    @property
    def done(self) -> bool:
        """Whether it has ended, and its tensors are no longer needed."""
        if self._work is not None and self._work.is_completed():
            self.wait()
        return self._work is None

    def wait(self) -> None:
        """Wait for the end (on a GPU: let its stream wait).

        Raises:
            RuntimeError: another rank has died, or did not come in time.
        """
        if self._work is None:
            return
        with self._channel.explained(self._what):
            self._work.wait()
        self._work = None


class Channel:
    """A process group of the optimizer's own, not the one that reduces gradients.

    Args:
        group: the process group.
        sent: bytes by category, shared by all channels of an optimizer.

    Bytes are those that a rank sends on average with a bandwidth-optimal algorithm (Thakur et al. 2005): of
    n bytes over W ranks 2n(W-1)/W for an all-reduce, n(W-1)/W for a reduce or a broadcast.
    """

    def __init__(self, group: dist.ProcessGroup, sent: dict[str, float]) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._sent = sent

    def reduce(self, tensor: Tensor, to: int, what: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place on rank ``to``; elsewhere its content is lost."""
        self._count(what, tensor, 1)
        root = dist.get_global_rank(self.group, to)
        return self._started(lambda: dist.reduce(tensor, root, group=self.group, async_op=True), what)

    def broadcast(self, tensor: Tensor, source: int, what: str) -> Pending:
        """Start to copy ``tensor`` from rank ``source`` into that of all others."""
        self._count(what, tensor, 1)
        root = dist.get_global_rank(self.group, source)
        return self._started(lambda: dist.broadcast(tensor, root, group=self.group, async_op=True), what)

    def all_reduce(self, tensor: Tensor, what: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place."""
        self._count(what, tensor, 2)
        return self._started(lambda: dist.all_reduce(tensor, group=self.group, async_op=True), what)

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], what: str) -> list[Tensor]:
        """Send ``parts[r]`` to rank r and return what every rank sent here, each 1-d.

        Args:
            parts: one 1-d tensor for each rank, of one dtype.
            sizes: how many elements come from each rank.
            what: category of the bytes.
        """
        given = torch.cat(list(parts))
        self._add(what, (given.numel() - parts[self.rank].numel()) * given.element_size())
        taken = given.new_empty(sum(sizes))
        lengths = [part.numel() for part in parts]
        self._started(
            lambda: dist.all_to_all_single(
                taken, given, list(sizes), lengths, group=self.group, async_op=True
            ),
            what,
        ).wait()
        return list(taken.split(list(sizes)))

    def swap(self, other: int, tensor: Tensor, size: int, what: str) -> Tensor:
        """Send ``tensor`` to rank ``other`` and return the ``size`` elements that it sends, 1-d."""
        self._add(what, tensor.numel() * tensor.element_size())
        taken = tensor.new_empty(size)
        peer = dist.get_global_rank(self.group, other)
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group)] if tensor.numel() else []
        operations += [dist.P2POp(dist.irecv, taken, peer, self.group)] if size else []
        if operations:
            works = dist.batch_isend_irecv(operations)
            for work in works:
                Pending(work, what, self).wait()
        return taken

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """Return the picklable ``value`` of every rank; waits for all of them."""
        values: list[Any] = [None] * self.size
        with self.explained(what):
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Say in plain words what it means if an exchange of ``what`` fails.

        Raises:
            RuntimeError: another rank has died, or did not come in time.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: the exchange of {what} with the other ranks failed; one "
                "of them has ended, did not reach its step within the process group's timeout, or has alone "
                "loaded a state or changed the model. Look at its own output, then start all ranks again "
                "from the last checkpoint"
            ) from error

    def _started(self, start: Callable[[], Any], what: str) -> Pending:
        with self.explained(what):
            return Pending(start(), what, self)

    def _count(self, what: str, tensor: Tensor, times: int) -> None:
        self._add(what, times * tensor.numel() * tensor.element_size() * (self.size - 1) / self.size)

    def _add(self, what: str, count: float) -> None:
        self._sent[what] = self._sent.get(what, 0.0) + count


@dataclass(frozen=True)
class Entry:
    """One tensor that all ranks add up on one of them.

    Attributes:
        key: names it, the same on all ranks.
        size: elements.
        to: rank that gets the sum.
        dtype: of the sum, and on the wire.
        what: category of the bytes.
        channel: between the ranks that add up.
    """

    key: Hashable
    size: int
    to: int
    dtype: torch.dtype
    what: str
    channel: Channel


class BucketedReduce:
    """Entries joined into buckets, which start in a fixed order as soon as they, and those before, are full.

    The order is that of the entries: every rank starts the same collectives in the same order, whatever order
    its layers finish in, and whichever of them it does not use.

    Args:
        entries: all entries, those that are ready first first.
        device: device of the tensors.
    """

    def __init__(self, entries: Iterable[Entry], device: torch.device) -> None:
        self._buckets = _bucketed(entries)
        # Bucket, and offset in it, of every entry.
        self._places: dict[Hashable, tuple[int, int]] = {}
        for index, bucket in enumerate(self._buckets):
            offset = 0
            for entry in bucket:
                self._places[entry.key] = index, offset
                offset += entry.size
        self._missing = [{p.key for p in bucket} for bucket in self._buckets]
        self._buffers: list[Tensor | None] = [None] * len(self._buckets)
        self._pending: list[Pending] = []
        self._device = device

    def put(self, key: Hashable, pieces: Sequence[Tensor]) -> None:
        """Fill an entry with the elements of ``pieces``, one after the other, and start what is full."""
        index, offset = self._places[key]
        buffer = self._buffer(index)
        for piece in pieces:
            flat = piece.reshape(-1)
            buffer[offset : offset + flat.numel()].copy_(flat)
            offset += flat.numel()
        self._missing[index].discard(key)
        while len(self._pending) < len(self._buckets) and not self._missing[len(self._pending)]:
            self._start()

    def lacks(self, key: Hashable) -> bool:
        """Return whether an entry is in here and has not been filled."""
        return key in self._places and key in self._missing[self._places[key][0]]

    def flush(self) -> None:
        """Start what has not been started, with zeros for the entries that were not filled."""
        while len(self._pending) < len(self._buckets):
            self._start()

    def collect(self) -> dict[Hashable, Tensor]:
        """Wait, and return the sums that are this rank's, 1-d."""
        self.flush()
        sums: dict[Hashable, Tensor] = {}
        for bucket, buffer, pending in zip(self._buckets, self._buffers, self._pending, strict=True):
            pending.wait()
            if buffer is not None and _is_here(bucket):
                parts = buffer.split([entry.size for entry in bucket])
                sums |= {entry.key: part for entry, part in zip(bucket, parts, strict=True)}
        return sums

    def _start(self) -> None:
        index = len(self._pending)
        first = self._buckets[index][0]
        self._pending.append(first.channel.reduce(self._buffer(index), first.to, first.what))
        for earlier, pending in enumerate(self._pending):
            if pending.done and not _is_here(self._buckets[earlier]):
                self._buffers[earlier] = None

    def _buffer(self, index: int) -> Tensor:
        buffer = self._buffers[index]
        if buffer is None:
            bucket = self._buckets[index]
            size = sum(entry.size for entry in bucket)
            buffer = torch.zeros(size, dtype=bucket[0].dtype, device=self._device)
            self._buffers[index] = buffer
        return buffer


def _bucketed(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Join entries that go the same way into buckets of BUCKET_BYTES, in the order in which these fill up."""
    full: list[list[Entry]] = []
    filling: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        alike = (entry.channel, entry.what, entry.to, entry.dtype)
        bucket = filling.setdefault(alike, [])
        bucket.append(entry)
        if sum(p.size for p in bucket) * entry.dtype.itemsize >= BUCKET_BYTES:
            full.append(filling.pop(alike))
    return full + list(filling.values())


def _is_here(bucket: Sequence[Entry]) -> bool:
    return bucket[0].to == bucket[0].channel.rank


def broadcast_all(channel: Channel, buffers: Mapping[int, Sequence[Tensor]], what: str) -> None:
    """Copy ``buffers[r]`` from rank r to all others, in place; those of all ranks at once."""
    pending = [
        channel.broadcast(buffer, source, what) for source in sorted(buffers) for buffer in buffers[source]
    ]
    for each in pending:
        each.wait()
