"""Updates on their way from the owner of a layer to all ranks, and gradient shards on their way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fop.binding import Binding
from fop.capture import is_sharded, local
from fop.distributed.buckets import broadcast_all
from fop.distributed.messages import Reductions, matrix_size, wire_dtype
from fop.step_size import clip_coefficient


class Packet(NamedTuple):
    """What the owner of a layer tells the others.

    Attributes:
        scalars: (7,), see `Scalars`.
        update: gradient matrix.
    """

    scalars: Tensor
    update: Tensor


class Scalars(NamedTuple):
    """Numbers that go with an update, each 0-dim.

    Attributes:
        length: lr²·⟨update, gradient⟩.
        square: squared norm of Ga.
        beta: β.
        eta: η.
        rho: ρ.
        trusted: 1 where the step had a gradient pair.
        used: 1 where any rank used the layer.
    """

    length: Tensor
    square: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor
    trusted: Tensor
    used: Tensor


class Received(NamedTuple):
    """What every rank knows of a layer's update: the numbers, and its own part for each parameter."""

    scalars: Scalars
    parts: list[tuple[Tensor, Tensor]]


_COUNT = len(Scalars._fields)


def share_updates(
    reductions: Reductions, bindings: Sequence[Binding], packets: Mapping[Binding, Packet]
) -> list[Received]:
    """Give the updates of all bindings to all ranks; where parameters are sharded, to each its shard.

    Args:
        reductions: knows the ranks and the owners.
        bindings: the same on all ranks.
        packets: those of the bindings that this rank owns.
    """
    sharded = [binding for binding in bindings if is_sharded(binding.weight)]
    shared = _share_whole(reductions, [each for each in bindings if each not in sharded], packets)
    if sharded:
        shared |= _share_shards(reductions, sharded, packets)
    return [shared[binding] for binding in bindings]


def _share_whole(
    reductions: Reductions, bindings: Sequence[Binding], packets: Mapping[Binding, Packet]
) -> dict[Binding, Received]:
    channel = reductions.ranks
    alike: dict[tuple[int, torch.dtype], list[Binding]] = {}
    for binding in bindings:
        alike.setdefault((reductions.owner(binding), wire_dtype(binding)), []).append(binding)
    shared: dict[Binding, Received] = {}
    buffers: dict[int, list[Tensor]] = {}
    layouts: list[tuple[Tensor, list[Binding]]] = []
    for (owner, dtype), members in alike.items():
        if owner == channel.rank:
            buffer = torch.cat([piece.reshape(-1) for binding in members for piece in packets[binding]])
        else:
            size = sum(_COUNT + matrix_size(binding) for binding in members)
            buffer = torch.empty(size, dtype=dtype, device=members[0].weight.device)
        buffers.setdefault(owner, []).append(buffer)
        layouts.append((buffer, members))
    broadcast_all(channel, buffers, "updates")
    for buffer, members in layouts:
        pieces = buffer.split([n for binding in members for n in (_COUNT, matrix_size(binding))])
        for binding, scalars, update in zip(members, pieces[::2], pieces[1::2], strict=True):
            parts = binding.parts(update.view(binding.layer.matrix_shape))
            shared[binding] = Received(Scalars(*scalars.unbind()), parts)
    return shared


def _share_shards(
    reductions: Reductions, bindings: Sequence[Binding], packets: Mapping[Binding, Packet]
) -> dict[Binding, Received]:
    channel = reductions.ranks
    by_owner = _by_owner(reductions, bindings)
    dtype, device = _widest(bindings), local(bindings[0].weight).device
    scalars = [
        torch.cat([packets[binding].scalars.to(dtype) for binding in members])
        if members and owner == channel.rank
        else torch.empty(_COUNT * len(members), dtype=dtype, device=device)
        for owner, members in enumerate(by_owner)
    ]
    broadcast_all(channel, {owner: [each] for owner, each in enumerate(scalars) if len(each)}, "updates")
    own = by_owner[channel.rank]
    whole = [part for binding in own for _, part in binding.parts(packets[binding].update)]
    out = [
        _joined([_shard(part, rank, channel.size).to(dtype) for part in whole], dtype, device)
        for rank in range(channel.size)
    ]
    taken = channel.exchange(out, [sum(map(_local_size, members)) for members in by_owner], "updates")
    shared: dict[Binding, Received] = {}
    for members, numbers, flat in zip(by_owner, scalars, taken, strict=True):
        rest = flat
        for binding, of_this in zip(members, numbers.view(-1, _COUNT), strict=True):
            parts = []
            for param in _stepping(binding):
                size = local(param).numel()
                parts.append((param, rest[:size].view(local(param).shape)))
                rest = rest[size:]
            shared[binding] = Received(Scalars(*of_this.unbind()), parts)
    return shared


def gather_gradients(reductions: Reductions, bindings: Sequence[Binding]) -> dict[Binding, Tensor]:
    """Return the gradient matrices of the bindings that this rank owns, from the shards of all ranks."""
    channel = reductions.ranks
    by_owner = _by_owner(reductions, bindings)
    dtype, device = _widest(bindings), local(bindings[0].weight).device
    out = [
        _joined([_gradient(p).to(dtype) for binding in members for p in _stepping(binding)], dtype, device)
        for members in by_owner
    ]
    mine = by_owner[channel.rank]
    shapes = [param.shape for binding in mine for param in _stepping(binding)]
    sizes = [sum(_shard_size(shape, rank, channel.size) for shape in shapes) for rank in range(channel.size)]
    taken = channel.exchange(out, sizes, "gradient shards")
    matrices: dict[Binding, Tensor] = {}
    places = [0] * channel.size
    for binding in mine:
        whole: list[Tensor] = []
        for param in _stepping(binding):
            pieces = []
            for rank, flat in enumerate(taken):
                size = _shard_size(param.shape, rank, channel.size)
                pieces.append(flat[places[rank] : places[rank] + size])
                places[rank] += size
            whole.append(torch.cat(pieces).view(param.shape).to(wire_dtype(binding)))
        matrices[binding] = binding.layer.to_matrix(whole[0], whole[1] if len(whole) > 1 else None)
    return matrices


def clip_shared(shared: Sequence[Received], rest: Sequence[Tensor], max_norm: float) -> list[Received]:
    """Scale the gradients of a step together, as `torch.nn.utils.clip_grad_norm_`, after updates were made.

    Args:
        shared: the updates, which grow as their gradients do, with the squared norms of these.
        rest: all other gradients, scaled in place.
        max_norm: the norm that all together may have.

    Returns:
        The updates from the scaled gradients.
    """
    squares = [scalars.square for scalars, _ in shared]
    squares += [gradient.square().sum().to(squares[0]) for gradient in rest]
    coefficient = clip_coefficient(squares, max_norm)
    for gradient in rest:
        gradient.mul_(coefficient.to(gradient))
    return [
        Received(
            scalars._replace(length=scalars.length * coefficient**2),
            [(param, part * coefficient.to(part)) for param, part in parts],
        )
        for scalars, parts in shared
    ]


def _by_owner(reductions: Reductions, bindings: Sequence[Binding]) -> list[list[Binding]]:
    owners = range(reductions.ranks.size)
    return [[each for each in bindings if reductions.owner(each) == owner] for owner in owners]


def _stepping(binding: Binding) -> list[Tensor]:
    """Return the parameters that take part in a step, as `Binding.parts` does."""
    bias = binding.bias
    return [binding.weight] if bias is None or bias.grad is None else [binding.weight, bias]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return local(param.grad).reshape(-1)


def _local_size(binding: Binding) -> int:
    return sum(local(param).numel() for param in _stepping(binding))


def _shard_size(shape: torch.Size, rank: int, ranks: int) -> int:
    """Return how many elements of a parameter ``rank`` holds: chunks of rows as of `torch.chunk`."""
    chunk = -(-shape[0] // ranks)
    rows = max(0, min(chunk, shape[0] - rank * chunk))
    return rows * (shape.numel() // shape[0])


def _shard(whole: Tensor, rank: int, ranks: int) -> Tensor:
    chunk = -(-whole.shape[0] // ranks)
    return whole[rank * chunk : (rank + 1) * chunk].reshape(-1)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype, device=device)


def _widest(bindings: Sequence[Binding]) -> torch.dtype:
    double = any(wire_dtype(binding) is torch.float64 for binding in bindings)
    return torch.float64 if double else torch.float32
