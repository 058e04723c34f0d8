"""Updates on their way from the owner of a layer to all ranks, and gradient shards on their way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fop.capture import is_sharded, local
from fop.distributed import Channel, share
from fop.optim.block import Block
from fop.optim.rounds import wire_dtype


class Packet(NamedTuple):
    """What the owner of a layer tells the others.

    Attributes:
        scalars: (8,), see `Scalars`.
        update: gradient matrix.
    """

    scalars: Tensor
    update: Tensor


class Scalars(NamedTuple):
    """Numbers that go with an update, each 0-dim.

    Attributes:
        length: lr²·⟨update, gradient⟩.
        norm: squared norm of Ga.
        alignment: ⟨update, gradient⟩.
        beta: β.
        eta: η.
        rho: ρ.
        trusted: 1 where the step had a gradient pair.
        used: 1 where any rank used the layer.
    """

    length: Tensor
    norm: Tensor
    alignment: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor
    trusted: Tensor
    used: Tensor


class Shared(NamedTuple):
    """What every rank knows of a layer's update: the numbers, and its own part for each parameter."""

    scalars: Scalars
    parts: list[tuple[Tensor, Tensor]]


_COUNT = len(Scalars._fields)


def share_updates(
    channel: Channel,
    blocks: Sequence[Block],
    owners: Mapping[Tensor, int],
    packets: Mapping[Tensor, Packet],
) -> list[Shared]:
    """Give the updates of all blocks to all ranks; where parameters are sharded, to each its shard.

    Args:
        channel: the ranks.
        blocks: the same on all ranks.
        owners: owner of every block by weight.
        packets: those of the blocks that this rank owns.
    """
    sharded = [block for block in blocks if is_sharded(block.weight)]
    shared = _share_whole(channel, [b for b in blocks if b not in sharded], owners, packets)
    if sharded:
        shared |= _share_shards(channel, sharded, owners, packets)
    return [shared[block.weight] for block in blocks]


def _share_whole(
    channel: Channel,
    blocks: Sequence[Block],
    owners: Mapping[Tensor, int],
    packets: Mapping[Tensor, Packet],
) -> dict[Tensor, Shared]:
    alike: dict[tuple[int, torch.dtype], list[Block]] = {}
    for block in blocks:
        alike.setdefault((owners[block.weight], wire_dtype(block)), []).append(block)
    shared: dict[Tensor, Shared] = {}
    buffers: dict[int, list[Tensor]] = {}
    layouts: list[tuple[Tensor, list[Block]]] = []
    for (owner, dtype), members in alike.items():
        if owner == channel.rank:
            buffer = torch.cat([part.reshape(-1) for block in members for part in packets[block.weight]])
        else:
            size = sum(_COUNT + _size(block) for block in members)
            buffer = torch.empty(size, dtype=dtype, device=members[0].weight.device)
        buffers.setdefault(owner, []).append(buffer)
        layouts.append((buffer, members))
    share(channel, buffers, "updates")
    for buffer, members in layouts:
        pieces = buffer.split([n for block in members for n in (_COUNT, _size(block))])
        for block, scalars, update in zip(members, pieces[::2], pieces[1::2], strict=True):
            parts = block.parts(update.view(block.layer.matrix_shape))
            shared[block.weight] = Shared(Scalars(*scalars.unbind()), parts)
    return shared


def _share_shards(
    channel: Channel,
    blocks: Sequence[Block],
    owners: Mapping[Tensor, int],
    packets: Mapping[Tensor, Packet],
) -> dict[Tensor, Shared]:
    of = _by_owner(channel, blocks, owners)
    dtype, device = _widest(blocks), local(blocks[0].weight).device
    scalars = [
        torch.cat([packets[block.weight].scalars.to(dtype) for block in members])
        if members and owner == channel.rank
        else torch.empty(_COUNT * len(members), dtype=dtype, device=device)
        for owner, members in enumerate(of)
    ]
    share(channel, {owner: [each] for owner, each in enumerate(scalars) if len(each)}, "updates")
    whole = [part for block in of[channel.rank] for _, part in block.parts(packets[block.weight].update)]
    out = [
        _joined([_shard(part, rank, channel.size).to(dtype) for part in whole], dtype, device)
        for rank in range(channel.size)
    ]
    taken = channel.exchange(out, [sum(map(_local_size, members)) for members in of], "updates")
    shared: dict[Tensor, Shared] = {}
    for members, numbers, flat in zip(of, scalars, taken, strict=True):
        rest = flat
        for block, own in zip(members, numbers.view(-1, _COUNT), strict=True):
            parts = []
            for param in _stepping(block):
                size = local(param).numel()
                parts.append((param, rest[:size].view(local(param).shape)))
                rest = rest[size:]
            shared[block.weight] = Shared(Scalars(*own.unbind()), parts)
    return shared


def gather_gradients(
    channel: Channel, blocks: Sequence[Block], owners: Mapping[Tensor, int]
) -> dict[Tensor, Tensor]:
    """Return the gradient matrices of the blocks that this rank owns, from the shards of all ranks."""
    of = _by_owner(channel, blocks, owners)
    dtype, device = _widest(blocks), local(blocks[0].weight).device
    out = [
        _joined(
            [_gradient(param).to(dtype) for block in members for param in _stepping(block)], dtype, device
        )
        for members in of
    ]
    mine = of[channel.rank]
    shapes = [param.shape for block in mine for param in _stepping(block)]
    sizes = [sum(_shard_size(shape, rank, channel.size) for shape in shapes) for rank in range(channel.size)]
    taken = channel.exchange(out, sizes, "gradient shards")
    matrices: dict[Tensor, Tensor] = {}
    places = [0] * channel.size
    for block in mine:
        whole: list[Tensor] = []
        for param in _stepping(block):
            pieces = []
            for rank, flat in enumerate(taken):
                size = _shard_size(param.shape, rank, channel.size)
                pieces.append(flat[places[rank] : places[rank] + size])
                places[rank] += size
            whole.append(torch.cat(pieces).view(param.shape).to(wire_dtype(block)))
        matrices[block.weight] = block.layer.to_matrix(whole[0], whole[1] if len(whole) > 1 else None)
    return matrices


def _by_owner(channel: Channel, blocks: Sequence[Block], owners: Mapping[Tensor, int]) -> list[list[Block]]:
    return [[block for block in blocks if owners[block.weight] == owner] for owner in range(channel.size)]


def _stepping(block: Block) -> list[Tensor]:
    """Return the parameters that take part in a step, as `Block.parts` does."""
    return [block.weight, block.bias] if block.bias is not None and block.steps_bias() else [block.weight]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return local(param.grad).reshape(-1)


def _local_size(block: Block) -> int:
    return sum(local(param).numel() for param in _stepping(block))


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


def _widest(blocks: Sequence[Block]) -> torch.dtype:
    double = any(wire_dtype(block) is torch.float64 for block in blocks)
    return torch.float64 if double else torch.float32


def _size(block: Block) -> int:
    return torch.Size(block.layer.matrix_shape).numel()
