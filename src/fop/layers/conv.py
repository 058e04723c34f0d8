"""`torch.nn.Conv2d`: stride, any padding, dilation and groups; one Kronecker block per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fop.layers.base import FactorSums, Layer, statistics_dtype, with_ones

# Elements of the unfolded input that exist at a time (64 MiB in float32). Unfolding a large batch at
# once would take kernel-area times the memory of the activations.
CHUNK_ELEMENTS = 2**24
# A convolution has a row for every output position, at very large batch far more than its factors have
# entries. Statistics then take every k-th sample, with k as large as leaves this many samples and rows.
MIN_SAMPLES = 2048
MIN_ROWS_PER_DIM = 8


class Conv2dLayer(Layer):
    """Rows of A are unfolded patches in the order of ``weight.flatten(1)``, rows of G output positions."""

    def __init__(self, module: nn.Conv2d, *, bias: bool) -> None:
        self.groups = module.groups
        self.out_dim = module.out_channels // module.groups
        self.in_dim = module.weight[0].numel()
        self.bias = bias
        self.weight_shape = tuple(module.weight.shape)
        self.kernel = _pair(module.kernel_size)
        self.stride = _pair(module.stride)
        self.dilation = _pair(module.dilation)
        self.pads = _pads(module)
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def batched(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (x[None], b[None]) if x.dim() == 3 else (x, b)

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        left, right, top, bottom = self.pads
        if self.mode == "constant" and left == right and top == bottom:
            padding = (top, left)
        else:
            x, padding = self._padded(x), (0, 0)
        weight = conv2d_weight(
            x.to(b.dtype), self.weight_shape, b, self.stride, padding, self.dilation, self.groups
        )
        return self.to_matrix(weight, b.sum((0, 2, 3)) if self.bias else None)

    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        dtype = statistics_dtype(b)
        positions = b.shape[2] * b.shape[3]
        batch = x.shape[0]
        x, b = self._subsample(x, b, positions)
        samples, rows = x.shape[0], x.shape[0] * positions
        a = torch.zeros(self.groups, self.in_dim, self.in_dim, dtype=dtype, device=x.device)
        g = torch.zeros(self.groups, self.out_dim, self.out_dim, dtype=dtype, device=x.device)
        sums = torch.zeros(self.groups, self.in_dim, dtype=dtype, device=x.device)
        per_sample = self.groups * self.in_dim * positions
        chunk = max(1, CHUNK_ELEMENTS // max(1, per_sample))
        for x_part, b_part in zip(x.split(chunk), b.split(chunk), strict=True):
            patches_gir = self._rows(self._patches(x_part.to(dtype)), self.in_dim)
            gradients_gor = self._rows(b_part.to(dtype).flatten(2), self.out_dim)
            a.baddbmm_(patches_gir, patches_gir.mT)
            g.baddbmm_(gradients_gor, gradients_gor.mT)
            if self.bias:
                sums += patches_gir.sum(-1)
        a = with_ones(a, sums, rows) if self.bias else a
        # As if all samples had been summed: b is 1/batch of a sample's own gradient.
        share = batch / max(1, samples)
        return FactorSums(a * share, g * share, batch, batch * positions)

    def _subsample(self, x: Tensor, b: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        needed = -(-MIN_ROWS_PER_DIM * max(self.in_dim, self.out_dim) // max(1, positions))
        step = max(1, x.shape[0] // max(MIN_SAMPLES, needed))
        return x[::step], b[::step]

    def _patches(self, x: Tensor) -> Tensor:
        """Return the patches of x (N, channels, height, width) as (N, channels·kernel, positions)."""
        patches: Tensor = F.unfold(self._padded(x), self.kernel, dilation=self.dilation, stride=self.stride)
        return patches

    def _rows(self, columns: Tensor, size: int) -> Tensor:
        """Return columns (N, groups·size, positions) as (groups, size, N·positions)."""
        samples, _, positions = columns.shape
        split = columns.reshape(samples, self.groups, size, positions)
        return split.permute(1, 2, 0, 3).flatten(2)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode=self.mode) if any(self.pads) else x


def unsupported_conv2d(module: nn.Conv2d) -> str | None:
    """Return why a Conv2d cannot take the FOP step, or None if it can."""
    if (
        type(module).forward is not nn.Conv2d.forward
        or type(module)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"{type(module).__name__} overrides Conv2d.forward"
    return None


def _pair(value: tuple[int, ...] | int) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pads(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) as `F.pad` takes them; 'same' puts the odd one right and below."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return 0, 0, 0, 0
        dilation, kernel = _pair(module.dilation), _pair(module.kernel_size)
        total_y, total_x = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return total_x // 2, total_x - total_x // 2, total_y // 2, total_y - total_y // 2
    y, x = _pair(module.padding)
    return x, x, y, y
