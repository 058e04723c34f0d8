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

    subsampled = True

    def __init__(
        self, module: Convolution | TransposedConvolution, *, bias: bool, options: LayerOptions
    ) -> None:
        self.spatial, self.taps = len(module.kernel_size), prod(module.kernel_size)
        out_dim = module.out_channels // module.groups
        in_dim = module.in_channels // module.groups * self.taps
        super().__init__(module.groups, out_dim, in_dim, bias=bias, options=options)
        self.weight_shape, self.pads = tuple(module.weight.shape), _pads(module)
        self.kernel, self.stride, self.dilation = module.kernel_size, module.stride, module.dilation
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def leading_dims(self, x: Tensor) -> int:
        return x.dim() - 1 - self.spatial

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        befores, afters = zip(*self.pads, strict=True)
        if self.mode == "constant" and befores == afters:
            return self._gradient(x, b, befores)
        return self._gradient(self._padded(x), b, (0,) * self.spatial)

    def _gradient(
        self, x: Tensor, b: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...] | None = None
    ) -> Tensor:
        # torch.nn.grad.conv2d_weight and its kin, for any dimension and for transposed ones.
        weight = b.new_empty(1).expand(self.weight_shape)
        transposed, longer = output_padding is not None, output_padding or (0,) * self.spatial
        geometry: tuple[Any, ...] = (self.stride, padding, self.dilation, transposed, longer, self.groups)
        mask = (False, True, False)
        gradients = torch.ops.aten.convolution_backward(b, x.to(b.dtype), weight, None, *geometry, mask)
        return self.to_matrix(gradients[1], b.transpose(0, 1).flatten(1).sum(1) if self.bias else None)

    def chunks(self, x: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        per_sample = self.groups * self.in_dim * b[0, 0].numel()
        chunk = max(1, CHUNK_ELEMENTS // max(1, per_sample))
        yield from zip(x.split(chunk), b.split(chunk), strict=True)

    def input_columns(self, x: Tensor) -> Tensor:
        return self._patches(self._padded(x), self.stride)

    def output_columns(self, b: Tensor) -> Tensor:
        return b.reshape(b.shape[0], self.groups, self.out_dim, -1)

    def _patches(self, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        """Return the patches of x (N, channels, *size) as (N, groups, channels/groups·kernel, positions)."""
        for dim, (k, s, d) in enumerate(zip(self.kernel, stride, self.dilation, strict=True), start=2):
            # Each unfold appends a dimension: (N, channels, *positions, *kernel) in the end.
            x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        n, channels = x.shape[:2]
        positions, taps = range(2, 2 + self.spatial), range(2 + self.spatial, 2 + 2 * self.spatial)
        columns = channels // self.groups * self.taps
        return x.permute(0, 1, *taps, *positions).reshape(n, self.groups, columns, -1)

    def _padded(self, x: Tensor) -> Tensor:
        pads = [size for pair in reversed(self.pads) for size in pair]
        return F.pad(x, pads, mode=self.mode) if any(pads) else x


class TransposedConvLayer(ConvLayer):
    """A transposed convolution as the convolution of its input with zeros between the pixels.

    Rows of A are the pixels that reach an output position, in the order (input channel, kernel position);
    the weight is stored as (in, out/groups, *kernel).
    """

    def __init__(self, module: TransposedConvolution, *, bias: bool, options: LayerOptions) -> None:
        super().__init__(module, bias=bias, options=options)
        self.padding = tuple(int(p) for p in module.padding)

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        geometry = zip(self.kernel, self.stride, self.dilation, self.padding, strict=True)
        # Not the module's: the caller may have asked for an output size.
        output_padding = tuple(
            out - (size - 1) * s + 2 * p - d * (k - 1) - 1
            for size, out, (k, s, d, p) in zip(x.shape[2:], b.shape[2:], geometry, strict=True)
        )
        return self._gradient(x, b, self.padding, output_padding)

    def chunks(self, x: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for x_chunk, b_chunk in super().chunks(x, b):
            yield self._spread(x_chunk, b_chunk.shape[2:]), b_chunk

    def input_columns(self, x: Tensor) -> Tensor:
        patches = self._patches(x, (1,) * self.spatial)
        # Output t sees input s through tap k where t = s·stride - padding + k·dilation: later k, earlier s
        taps: Tensor = patches.unflatten(2, (-1, self.taps))
        return taps.flip(3).flatten(2, 3)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        split = weight.reshape(self.groups, self.in_dim // self.taps, self.out_dim, self.taps)
        return split.transpose(1, 2).reshape(self.groups, self.out_dim, self.in_dim)

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        split = matrix.reshape(self.groups, self.out_dim, self.in_dim // self.taps, self.taps)
        return split.transpose(1, 2).reshape(shape)

    def _spread(self, x: Tensor, out_size: torch.Size) -> Tensor:
        """Return x with zeros between its pixels, padded so that every output position has a patch."""
        sizes, pads = [], []
        geometry = zip(self.kernel, self.stride, self.dilation, self.padding, strict=True)
        for size, out, (k, s, d, p) in zip(x.shape[2:], out_size, geometry, strict=True):
            sizes.append((size - 1) * s + 1)
            before = d * (k - 1) - p
            # The output may be longer than the input asks for (output_padding).
            pads.append((before, out + d * (k - 1) - sizes[-1] - before))
        spread = x.new_zeros(*x.shape[:2], *sizes)
        every = [slice(None, None, s) for s in self.stride]
        spread[(slice(None), slice(None), *every)] = x
        return F.pad(spread, [size for pair in reversed(pads) for size in pair])


def _pads(module: Convolution | TransposedConvolution) -> list[tuple[int, int]]:
    """Return (before, after) of each spatial dimension; 'same' puts the odd one after."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]
