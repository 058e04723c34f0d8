"""Collectives between the ranks of one optimizer: asynchronous, in buckets of a fixed order, and counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Large enough for the bandwidth of a network, small enough to start early in a backward pass.
BUCKET_BYTES = 8 * 2**20


@contextmanager
def explained(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Say in plain words what it means if an exchange of ``what``, with its collective, fails."""
    try:
        yield
    # Ranks at different collectives also find bytes that are no pickle, or too many of them.
    except Exception as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}: the exchange of {what} with the "
            "other ranks failed; one of them has ended, did not reach its step within the process group's "
            "timeout, or has alone loaded a state, changed the model or made another optimizer. Look at its "
            "own output, then start all ranks again from the last checkpoint"
        ) from error


class Pending:
    """A collective under way; keeps its tensors alive. ``what`` names them in error messages."""

    def __init__(self, work: Any, what: str, channel: Channel) -> None:
        self._work = work
        self._what = what
        self._channel = channel

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        if self._work is not None and self._work.is_completed():
            self.wait()
        return self._work is None

    def wait(self) -> None:
        """Wait for the end (on a GPU: let its stream wait); RuntimeError if another rank takes no part."""
        if self._work is None:
            return
        with explained(self._what, self._channel.group):
            self._work.wait()
        self._work = None


class Channel:
    """A process group of the optimizer's own, not the one that reduces gradients.

    ``sent`` counts bytes by category, for all channels of an optimizer: those that a rank sends on average
    with a bandwidth-optimal algorithm (Thakur et al. 2005), of n bytes over W ranks 2n(W-1)/W for an
    all-reduce, n(W-1)/W for a reduce or a broadcast.
    """

    def __init__(self, group: dist.ProcessGroup, sent: dict[str, float]) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._sent = sent

    def reduce(self, tensor: Tensor, to: int, what: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place on rank ``to``; on others its content is lost."""
        root = dist.get_global_rank(self.group, to)
        return self._start(what, self._share(tensor), dist.reduce, tensor, root)

    def broadcast(self, tensor: Tensor, source: int, what: str) -> Pending:
        """Start to copy ``tensor`` from rank ``source`` into that of all others."""
        root = dist.get_global_rank(self.group, source)
        return self._start(what, self._share(tensor), dist.broadcast, tensor, root)

    def all_reduce(self, tensor: Tensor, what: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place."""
        return self._start(what, 2 * self._share(tensor), dist.all_reduce, tensor)

    def broadcast_all(self, buffers: Mapping[int, Sequence[Tensor]], what: str) -> None:
        """Copy ``buffers[r]`` from rank r to all others, in place; those of all ranks at once."""
        ordered = [(source, buffer) for source in sorted(buffers) for buffer in buffers[source]]
        for pending in [self.broadcast(buffer, source, what) for source, buffer in ordered]:
            pending.wait()

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], what: str) -> list[Tensor]:
        """Send ``parts[r]``, 1-d, to rank r; return the ``sizes[r]`` elements that each rank r sends here."""
        given = torch.cat(list(parts))
        taken = given.new_empty(sum(sizes))
        lengths = [part.numel() for part in parts]
        count = (given.numel() - lengths[self.rank]) * given.element_size()
        self._start(what, count, dist.all_to_all_single, taken, given, list(sizes), lengths).wait()
        return list(taken.split(list(sizes)))

    def swap(self, other: int, tensor: Tensor, size: int, what: str) -> Tensor:
        """Send ``tensor`` to rank ``other`` and return the ``size`` elements that it sends, 1-d."""
        self._count(what, tensor.numel() * tensor.element_size())
        taken = tensor.new_empty(size)
        peer = dist.get_global_rank(self.group, other)
        operations = [dist.P2POp(dist.isend, tensor, peer, self.group)] if tensor.numel() else []
        operations += [dist.P2POp(dist.irecv, taken, peer, self.group)] if size else []
        with explained(f"{what} (send and receive)", self.group):
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return taken

    def gather_objects(self, value: Any, what: str) -> list[Any]:
        """Return the picklable ``value`` of every rank; waits for all of them."""
        values: list[Any] = [None] * self.size
        with explained(f"{what} (all_gather_object)", self.group):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _start(self, what: str, count: float, collective: Callable[..., Any], *args: Any) -> Pending:
        self._count(what, count)
        said = f"{what} ({collective.__name__})"
        with explained(said, self.group):
            return Pending(collective(*args, group=self.group, async_op=True), said, self)

    def _count(self, what: str, count: float) -> None:
        self._sent[what] = self._sent.get(what, 0.0) + count

    def _share(self, tensor: Tensor) -> float:
        return tensor.numel() * tensor.element_size() * (self.size - 1) / self.size


class Entry(NamedTuple):
    """One tensor of ``size`` elements that all ranks of ``channel`` add up on its rank ``to``.

    ``key`` names it, the same on all ranks, and ``what`` the category of its bytes.
    """

    key: Hashable
    size: int
    to: int
    dtype: torch.dtype
    what: str
    channel: Channel


class _Bucket:
    """Entries that go the same way in one tensor."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.missing = {entry.key for entry in entries}
        self.here = entries[0].to == entries[0].channel.rank
        self.buffer: Tensor | None = None


class BucketedReduce:
    """Entries joined into buckets, which start in a fixed order as soon as they, and those before, are full.

    The order is that of the entries, best the one in which they will be ready: every rank starts the same
    collectives in the same order, whatever order its layers finish in, and whichever of them it does not use.
    """

    def __init__(self, entries: Iterable[Entry], device: torch.device) -> None:
        self._device = device
        self._buckets = [_Bucket(entries) for entries in _bucketed(entries)]
        # One for each bucket that has started; they start in order.
        self._pending: list[Pending] = []
        # Bucket, and offset in it, of every entry.
        self._places: dict[Hashable, tuple[_Bucket, int]] = {}
        for bucket in self._buckets:
            offset = 0
            for entry in bucket.entries:
                self._places[entry.key] = bucket, offset
                offset += entry.size

    def put(self, key: Hashable, pieces: Sequence[Tensor]) -> None:
        """Fill an entry with the elements of ``pieces``, one after the other, and start what is full."""
        bucket, offset = self._places[key]
        buffer = self._buffer(bucket)
        for piece in pieces:
            flat = piece.reshape(-1)
            buffer[offset : offset + flat.numel()].copy_(flat)
            offset += flat.numel()
        bucket.missing.discard(key)
        while len(self._pending) < len(self._buckets) and not self._buckets[len(self._pending)].missing:
            self._start()

    def lacks(self, key: Hashable) -> bool:
        """Return whether an entry is in here and has not been filled."""
        return key in self._places and key in self._places[key][0].missing

    def flush(self) -> None:
        """Start what has not been started, with zeros for the entries that were not filled."""
        while len(self._pending) < len(self._buckets):
            self._start()

    def collect(self) -> dict[Any, Tensor]:
        """Wait, and return the sums that are this rank's, 1-d."""
        self.flush()
        sums: dict[Hashable, Tensor] = {}
        for bucket, pending in zip(self._buckets, self._pending, strict=True):
            pending.wait()
            if bucket.here and bucket.buffer is not None:
                parts = bucket.buffer.split([entry.size for entry in bucket.entries])
                sums |= {entry.key: part for entry, part in zip(bucket.entries, parts, strict=True)}
        return sums

    def _start(self) -> None:
        bucket = self._buckets[len(self._pending)]
        first = bucket.entries[0]
        self._pending.append(first.channel.reduce(self._buffer(bucket), first.to, first.what))
        for earlier, pending in zip(self._buckets, self._pending, strict=False):
            if pending.done and not earlier.here:
                earlier.buffer = None

    def _buffer(self, bucket: _Bucket) -> Tensor:
        if bucket.buffer is None:
            size = sum(entry.size for entry in bucket.entries)
            bucket.buffer = torch.zeros(size, dtype=bucket.entries[0].dtype, device=self._device)
        return bucket.buffer


def _bucketed(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Join entries that go the same way into buckets of BUCKET_BYTES, in the order in which these fill up."""
    full: list[list[Entry]] = []
    filling: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        alike = (entry.channel, entry.what, entry.to, entry.dtype)
        bucket = filling.setdefault(alike, [])
        bucket.append(entry)
        if sum(each.size for each in bucket) * entry.dtype.itemsize >= BUCKET_BYTES:
            full.append(filling.pop(alike))
    return full + list(filling.values())


def joined(parts: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the elements of all parts as one 1-d tensor, empty where there are none."""
    empty = torch.empty(0, dtype=dtype, device=device)
    return torch.cat([empty, *(part.reshape(-1).to(dtype) for part in parts)])
