"""Convolutions and transposed convolutions in one to three dimensions; one Kronecker block per group."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fop.layers.base import CHUNK_ELEMENTS, LayerOptions, RowLayer

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvLayer(RowLayer):
    """Rows of A are unfolded patches in the order of ``weight.flatten(1)``, rows of G output positions."""

    def __init__(
        self, module: Convolution | TransposedConvolution, *, bias: bool, options: LayerOptions
    ) -> None:
        self.spatial, self.taps = len(module.kernel_size), prod(module.kernel_size)
        out_dim = module.out_channels // module.groups
        in_dim = module.in_channels // module.groups * self.taps
        super().__init__(module.groups, out_dim, in_dim, bias=bias, options=options)
        self.leading = slice(None, -1 - self.spatial)
        self.weight_shape, self.pads = tuple(module.weight.shape), _pads(module)
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        # What `_taps` returned last, and for which input.
        self._table: tuple[Any, tuple[Tensor, Tensor | None]] | None = None
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # Whether taps may look where x has no entry.
        self.gaps = self.mode == "constant" and any(map(any, self.pads))
        # Otherwise the module pads its input itself.
        self.owns_backward = self.mode == "constant" and all(before == after for before, after in self.pads)

    def gradients(self, x: Tensor, b: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        x = x.to(b.dtype) if self.owns_backward else self._padded(x.to(b.dtype))
        weight = self._backward(x, b, b.new_empty(1).expand(self.weight_shape), of_input=False)
        return weight, b.sum([0, *range(2, b.dim())]) if bias else None

    def input_gradient(self, x: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return self._backward(x, b, weight, of_input=True)

    def _backward(self, x: Tensor, b: Tensor, weight: Tensor, *, of_input: bool) -> Tensor:
        padding = tuple(before for before, _ in self.pads) if self.owns_backward else (0,) * self.spatial
        transposed, longer = self._output_padding(x, b)
        geometry: tuple[Any, ...] = (self.stride, padding, self.dilation, transposed, longer, self.groups)
        mask = (of_input, not of_input, False)
        gradients = torch.ops.aten.convolution_backward(b, x, weight, None, *geometry, mask)
        gradient: Tensor = gradients[0 if of_input else 1]
        return gradient

    def _output_padding(self, x: Tensor, b: Tensor) -> tuple[bool, tuple[int, ...]]:
        """Return whether the convolution is transposed, and by how much its output is longer then."""
        return False, (0,) * self.spatial

    def chunks(self, x: Tensor, b: Tensor, *, all_rows: bool) -> Iterator[tuple[Tensor, Tensor]]:
        per_sample = self.groups * self.in_dim * b[0, 0].numel() if all_rows else x[0].numel()
        chunk = max(1, CHUNK_ELEMENTS // max(1, per_sample))
        yield from zip(x.split(chunk), b.split(chunk), strict=True)

    def rows_per_sample(self, b: Tensor) -> int:
        return prod(b.shape[2:])

    def input_rows(self, x: Tensor, output: torch.Size, entries: Tensor | None) -> Tensor:
        return self._all_patches(x, output) if entries is None else self._patches(x, output, entries)

    def _patches(self, x: Tensor, output: torch.Size, entries: Tensor) -> Tensor:
        if self.mode != "constant":
            x = self._padded(x)
        positions = prod(output[2:])
        # What rows and taps see is gathered from x as it lies in memory: (rows, channels, taps), the order of
        # weight.flatten(1). Copies of all of x, padded or with channels last, would cost far more.
        last = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
        # Of so many numbers half of the bytes are half of the time.
        short = torch.int32 if last < 2**31 else torch.int64
        taps, outside = self._taps(x, output[2:])
        place = entries % positions
        spots = taps.index_select(0, place) + (entries // positions * x.stride(0)).to(short)[:, None]
        channels = torch.arange(x.shape[1], device=x.device, dtype=short)[:, None] * x.stride(1)
        index = spots[:, None] + channels
        patches = x.as_strided((last + 1,), (1,)).index_select(0, index.flatten()).view(index.shape)
        if outside is not None:
            patches.masked_fill_(outside.index_select(0, place)[:, None], 0)
        return patches.view(len(index), self.groups, self.in_dim)

    def _all_patches(self, x: Tensor, output: torch.Size) -> Tensor:
        x = self._padded(x)
        geometry = zip(self.kernel, self.stride, self.dilation, strict=True)
        for dim, (size, step, dilation) in enumerate(geometry, start=2):
            x = x.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
        # (N, channels, *output, *kernel)
        return x.movedim(1, 1 + self.spatial).reshape(-1, self.groups, self.in_dim)

    def output_rows(self, b: Tensor, entries: Tensor | None) -> Tensor:
        if entries is None:
            return b.movedim(1, -1).reshape(-1, self.groups, self.out_dim)
        positions = self.rows_per_sample(b)
        # Without a copy of all of b.
        chosen = b.flatten(2)[entries // positions, :, entries % positions]
        return chosen.reshape(-1, self.groups, self.out_dim)

    def _taps(self, x: Tensor, output: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Return where in the memory of a sample of x taps look from output positions, (positions, taps).

        And whether there is no entry; None where there always is one. ``output`` is the size of the output.
        """
        geometry = x.shape[2:], x.stride(), output, x.device
        # Read once: backward passes of other devices are in other threads.
        table = self._table
        if table is None or table[0] != geometry:
            table = self._table = geometry, self._make_taps(x, output)
        return table[1]

    def _make_taps(self, x: Tensor, output: torch.Size) -> tuple[Tensor, Tensor | None]:
        rows = torch.arange(prod(output), device=x.device)
        places = []
        for length in reversed(output):
            places.append(rows % length)
            rows = rows // length
        spots = torch.zeros_like(rows)[:, None]
        outside = torch.zeros_like(spots, dtype=torch.bool) if self.gaps else None
        for dim, place in enumerate(reversed(places)):
            length = x.shape[2 + dim]
            # One more dimension of taps, and all of them in one.
            source = self._source(dim, place[:, None])
            if outside is not None:
                unseen = (source < 0) | (source >= length)
                outside = (outside[..., None] | unseen[:, None]).flatten(1)
                source = source.clamp(0, length - 1)
            spots = (spots[..., None] + source[:, None] * x.stride(2 + dim)).flatten(1)
        return spots.to(torch.int32 if x[:1].numel() < 2**31 else torch.int64), outside

    def _source(self, dim: int, place: Tensor) -> Tensor:
        """Return where in x taps look from places in the output, in one dimension; outside for nowhere."""
        taps = torch.arange(self.kernel[dim], device=place.device)
        before, _ = self.pads[dim] if self.mode == "constant" else (0, 0)
        return place * self.stride[dim] + taps * self.dilation[dim] - before

    def _padded(self, x: Tensor) -> Tensor:
        pads = [size for pair in reversed(self.pads) for size in pair]
        return F.pad(x, pads, mode=self.mode) if any(pads) else x


class TransposedConvLayer(ConvLayer):
    """A transposed convolution as a convolution of its input with zeros between the pixels.

    Rows of A are the pixels that reach an output position, in the order (input channel, kernel position);
    the weight is stored as (in, out/groups, *kernel).
    """

    def __init__(self, module: TransposedConvolution, *, bias: bool, options: LayerOptions) -> None:
        super().__init__(module, bias=bias, options=options)
        self.gaps = True

    def _output_padding(self, x: Tensor, b: Tensor) -> tuple[bool, tuple[int, ...]]:
        geometry = zip(self.kernel, self.stride, self.dilation, self.pads, strict=True)
        # Not the module's: the caller may have asked for an output size.
        return True, tuple(
            out - (size - 1) * s + 2 * before - d * (k - 1) - 1
            for size, out, (k, s, d, (before, _)) in zip(x.shape[2:], b.shape[2:], geometry, strict=True)
        )

    def _all_patches(self, x: Tensor, output: torch.Size) -> Tensor:
        return self._patches(x, output, torch.arange(len(x) * prod(output[2:]), device=x.device))

    def _source(self, dim: int, place: Tensor) -> Tensor:
        taps = torch.arange(self.kernel[dim], device=place.device)
        spread = place + self.pads[dim][0] - taps * self.dilation[dim]
        pixel = spread.div(self.stride[dim], rounding_mode="floor")
        return torch.where(spread % self.stride[dim] == 0, pixel, -1)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        split = weight.reshape(self.groups, self.in_dim // self.taps, self.out_dim, self.taps)
        return split.transpose(1, 2).reshape(self.groups, self.out_dim, self.in_dim)

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        split = matrix.reshape(self.groups, self.out_dim, self.in_dim // self.taps, self.taps)
        return split.transpose(1, 2).reshape(shape)


def _pads(module: Convolution | TransposedConvolution) -> list[tuple[int, int]]:
    """Return (before, after) of each spatial dimension; 'same' puts the odd one after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]
