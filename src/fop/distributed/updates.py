"""Gradient shards on their way to the owner of a weight, and its update on the way to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fop.binding import Binding
from fop.capture import is_sharded, local
from fop.distributed.buckets import joined
from fop.distributed.distributor import Shared
from fop.distributed.messages import NOT_THE_MEAN, Reductions, matrix_size, wire_dtype
from fop.step_size import Update, clip_coefficient

# What travels of a weight: the numbers of `_numbers`, and the update as gradient matrix.
Packets: TypeAlias = Mapping[Binding, tuple[Tensor, Tensor]]
# What arrives: the numbers, and for each parameter this rank's part of the update.
_Arrived: TypeAlias = dict[Binding, tuple[Tensor, list[tuple[Tensor, Tensor]]]]
_COUNT = 13


def gather_gradients(reductions: Reductions, bindings: Sequence[Binding]) -> dict[Binding, Tensor]:
    """Return the gradient matrices of the bindings that this rank owns, from the shards of all ranks."""
    channel, by_owner = reductions.ranks, _by_owner(reductions, bindings)
    dtype, device = _widest(bindings), local(bindings[0].weight).device
    out = [
        joined((_gradient(param) for binding in members for param in _stepping(binding)), dtype, device)
        for members in by_owner
    ]
    mine = by_owner[channel.rank]
    shapes = [param.shape for binding in mine for param in _stepping(binding)]
    sizes = [[_shard_size(shape, rank, channel.size) for shape in shapes] for rank in range(channel.size)]
    taken = channel.exchange(out, [sum(each) for each in sizes], "gradient shards")
    shards = [flat.split(each) for flat, each in zip(taken, sizes, strict=True)]
    whole = (torch.cat(each).view(shape) for shape, *each in zip(shapes, *shards, strict=True))
    matrices: dict[Binding, Tensor] = {}
    for binding in mine:
        weight, *bias = [next(whole).to(wire_dtype(binding)) for _ in _stepping(binding)]
        matrices[binding] = binding.layer.to_matrix(weight, bias[0] if bias else None)
    return matrices


def share_updates(
    reductions: Reductions, bindings: Sequence[Binding], own: Mapping[Binding, tuple[Update, Tensor]]
) -> tuple[list[Shared], list[Tensor]]:
    """Give the updates of all bindings to all ranks; where parameters are sharded, to each its shard.

    Beside the updates of this rank's weights ``own`` has the squared norms of their gradients Ga. Both are
    returned, of all bindings.
    """
    packets = {binding: (_numbers(*each), each[0].matrix) for binding, each in own.items()}
    sharded = [binding for binding in bindings if is_sharded(binding.weight)]
    arrived = _share_whole(reductions, [each for each in bindings if each not in sharded], packets)
    if sharded:
        arrived |= _share_shards(reductions, sharded, packets)
    shared: list[Shared] = []
    squares: list[Tensor] = []
    for binding in bindings:
        numbers, parts = arrived[binding]
        length, square, beta, eta, rho, trusted, used, size, noise = numbers[:-4].unbind()
        flags = trusted > 0.5, NOT_THE_MEAN, used > 0.5
        measured, scalars = noise if binding.corrected else None, (length, length, beta, eta, rho, *flags)
        update = Update(*scalars, input_square=size, noise=measured, along=numbers[-4:])
        shared.append((update, parts))
        squares.append(square)
    return shared, squares


def _numbers(update: Update, square: Tensor) -> Tensor:
    """Return the scalars of an update, and the squared norm of Ga, (13,); flags as 0 or 1."""
    length, trusted, used = update.length, update.trusted, update.used
    assert used is not None
    flag = torch.zeros_like(length) if trusted is None else trusted.to(length.dtype)
    size = torch.ones_like(length) if update.input_square is None else update.input_square.to(length)
    noise = torch.zeros_like(length) if update.noise is None else update.noise.to(length)
    along = length.new_zeros(4) if update.along is None else update.along.to(length)
    scalars = length, square, update.beta, update.eta, update.rho
    return torch.cat([torch.stack([*scalars, flag, used.to(length.dtype), size, noise]), along])


def _share_whole(reductions: Reductions, bindings: Sequence[Binding], packets: Packets) -> _Arrived:
    channel = reductions.ranks
    alike: dict[tuple[int, torch.dtype], list[Binding]] = {}
    for binding in bindings:
        alike.setdefault((reductions.owner(binding), wire_dtype(binding)), []).append(binding)
    arrived: _Arrived = {}
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
    channel.broadcast_all(buffers, "updates")
    for buffer, members in layouts:
        pieces = buffer.split([n for binding in members for n in (_COUNT, matrix_size(binding))])
        for binding, numbers, update in zip(members, pieces[::2], pieces[1::2], strict=True):
            arrived[binding] = numbers, binding.parts(update.view(binding.layer.matrix_shape))
    return arrived


def _share_shards(reductions: Reductions, bindings: Sequence[Binding], packets: Packets) -> _Arrived:
    channel, by_owner = reductions.ranks, _by_owner(reductions, bindings)
    dtype, device = _widest(bindings), local(bindings[0].weight).device
    numbers = [
        joined((packets[binding][0] for binding in members), dtype, device)
        if owner == channel.rank
        else torch.empty(_COUNT * len(members), dtype=dtype, device=device)
        for owner, members in enumerate(by_owner)
    ]
    channel.broadcast_all({owner: [each] for owner, each in enumerate(numbers) if len(each)}, "updates")
    own = by_owner[channel.rank]
    whole = [part for binding in own for _, part in binding.parts(packets[binding][1])]
    out = [
        joined((_shard(part, rank, channel.size) for part in whole), dtype, device)
        for rank in range(channel.size)
    ]
    sizes = [
        [local(param).numel() for binding in members for param in _stepping(binding)] for members in by_owner
    ]
    taken = channel.exchange(out, [sum(each) for each in sizes], "updates")
    arrived: _Arrived = {}
    for members, of_owner, flat, each in zip(by_owner, numbers, taken, sizes, strict=True):
        shards = iter(flat.split(each))
        for binding, of_this in zip(members, of_owner.view(-1, _COUNT), strict=True):
            parts = [(param, next(shards).view(local(param).shape)) for param in _stepping(binding)]
            arrived[binding] = of_this, parts
    return arrived


def clip_shared(
    shared: Sequence[Shared], squares: Sequence[Tensor], rest: Sequence[Tensor], max_norm: float
) -> list[Shared]:
    """Scale the gradients of a step together, as `torch.nn.utils.clip_grad_norm_`, after updates were made.

    Updates grow as their gradients do, of which ``squares`` are the squared norms; ``rest`` are all other
    gradients, scaled in place.
    """
    squares = [*squares, *(gradient.square().sum().to(squares[0]) for gradient in rest)]
    coefficient = clip_coefficient(squares, max_norm)
    # Of `Update.along`, which is linear and quadratic in gradients.
    along = torch.stack([coefficient, coefficient**2, coefficient, coefficient**2])
    for gradient in rest:
        gradient.mul_(coefficient.to(gradient))
    return [
        (
            update._replace(
                length=update.length * coefficient**2,
                along=None if update.along is None else update.along * along.to(update.along),
            ),
            [(param, part * coefficient.to(part)) for param, part in parts],
        )
        for update, parts in shared
    ]


def _by_owner(reductions: Reductions, bindings: Sequence[Binding]) -> list[list[Binding]]:
    owners = range(reductions.ranks.size)
    return [[each for each in bindings if reductions.owner(each) == owner] for owner in owners]


def _stepping(binding: Binding) -> list[Tensor]:
    """Return the parameters that take part in a step, as `Binding.parts` does."""
    bias = binding.bias
    takes_part = bias is not None and bias.requires_grad and bias.grad is not None
    return [binding.weight, bias] if takes_part else [binding.weight]  # type: ignore[list-item]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return local(param.grad)


def _shard_size(shape: torch.Size, rank: int, ranks: int) -> int:
    """Return how many elements of a parameter ``rank`` holds: chunks of rows as of `torch.chunk`."""
    chunk = -(-shape[0] // ranks)
    rows = max(0, min(chunk, shape[0] - rank * chunk))
    return rows * (shape.numel() // shape[0])


def _shard(whole: Tensor, rank: int, ranks: int) -> Tensor:
    chunk = -(-whole.shape[0] // ranks)
    return whole[rank * chunk : (rank + 1) * chunk]


def _widest(bindings: Sequence[Binding]) -> torch.dtype:
    double = any(wire_dtype(binding) is torch.float64 for binding in bindings)
    return torch.float64 if double else torch.float32
