"""The inputs that an output position of a convolution sees, by explicit index loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches(conv: Convolution, image: Tensor) -> Tensor:
    """(groups, T, in/groups·taps) of one image (in, *size), taps in the order of the kernel."""
    size, dims = image.shape[1:], range(image.dim() - 1)
    padding = _padding(conv)
    count = [
        (size[i] + sum(padding[i]) - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i in dims
    ]

    def source(position: Sequence[int], tap: Sequence[int]) -> list[int | None]:
        return [
            _source(
                position[i] * conv.stride[i] + tap[i] * conv.dilation[i] - padding[i][0],
                size[i],
                conv.padding_mode,
            )
            for i in dims
        ]

    return _gather(image, conv.groups, count, conv.kernel_size, source)


def transposed_patches(conv: Transposed, image: Tensor, count: Sequence[int]) -> Tensor:
    """(groups, T, in/groups·taps) of one image (in, *size) for an output of ``count`` positions.

    Output t sees input s by tap k where t = s·stride − padding + k·dilation.
    """
    size = image.shape[1:]

    def source(position: Sequence[int], tap: Sequence[int]) -> list[int | None]:
        found: list[int | None] = []
        for i in range(len(size)):
            s, rest = divmod(position[i] + conv.padding[i] - tap[i] * conv.dilation[i], conv.stride[i])
            found.append(s if rest == 0 and 0 <= s < size[i] else None)
        return found

    return _gather(image, conv.groups, count, conv.kernel_size, source)


def _gather(
    image: Tensor,
    groups: int,
    count: Sequence[int],
    kernel: Sequence[int],
    source: Callable[[Sequence[int], Sequence[int]], list[int | None]],
) -> Tensor:
    """(groups, positions, channels of a group · taps); ``source`` tells which pixel, None for zero."""
    pixels = image.detach().tolist()
    per_group, taps = len(pixels) // groups, list(_grid(kernel))

    def pixel(channel: int, at: list[int | None]) -> float:
        value = pixels[channel]
        for coordinate in at:
            if coordinate is None:
                return 0.0
            value = value[coordinate]
        return float(value)

    rows = [
        [
            [pixel(g * per_group + c, source(position, tap)) for c in range(per_group) for tap in taps]
            for position in _grid(count)
        ]
        for g in range(groups)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _grid(size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in size))


def _padding(conv: Convolution) -> list[tuple[int, int]]:
    """(before, after) of every spatial dimension."""
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]  # an odd total pads one more after than before
    return [(int(p), int(p)) for p in conv.padding]


def _source(index: int, size: int, mode: str) -> int | None:
    """The pixel a padded coordinate stands for; None means zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    raise NotImplementedError(mode)
