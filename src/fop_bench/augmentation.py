"""Augmentation of whole batches, on the device that holds them.

Shapes: N batch, H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Augmentation:
    """What a training image goes through."""

    flip: bool = False  # mirror it, with probability 1/2
    shift: int = 0  # move it by up to so many pixels either way: zero padding, then a crop of the old size
    cutout: int = 0  # side of a square at a random place that is set to the mean (DeVries & Taylor 2017)


class Normaliser:
    """Turns pixels (N, H, W, C) uint8 into inputs (N, C, H, W) of zero mean and unit variance, channels last.

    The mean and standard deviation are those of the training images' ``pixels``; ``total`` sums over the
    processes that share these.
    """

    def __init__(self, pixels: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        channels = pixels.shape[-1]
        sums = torch.zeros(3, channels, dtype=torch.float64)
        for part in pixels.split(4096):
            values = part.reshape(-1, channels).double().cpu()
            sums += torch.stack([values.sum(0), (values * values).sum(0), torch.ones_like(values).sum(0)])
        first, second, count = total(sums)
        mean = first / count
        std = (second / count - mean * mean).clamp(min=1e-12).sqrt()
        self.mean, self.std = mean.float().to(pixels.device), std.float().to(pixels.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        inputs: Tensor = (pixels.float() - mean) / std
        return inputs.permute(0, 3, 1, 2)


def augment(pixels: Tensor, what: Augmentation, draw: torch.Generator) -> Tensor:
    """Flip and shift a batch (N, H, W, C) of pixels, by random numbers of a generator on its device."""
    if not (what.flip or what.shift):
        return pixels
    count, height, width, _ = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if what.flip:
        mirrored = torch.rand(count, 1, device=device, generator=draw) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if what.shift:
        reach = 2 * what.shift + 1
        rows = rows + torch.randint(reach, (count, 1), device=device, generator=draw)
        columns = columns + torch.randint(reach, (count, 1), device=device, generator=draw)
        pixels = pad(pixels, (0, 0, *(what.shift,) * 4))
    numbers = torch.arange(count, device=device)
    return pixels[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]


def cut_out(inputs: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """Set a square of a batch of normalised inputs (N, C, H, W) to zero, cut off at the edges."""
    if not side:
        return inputs
    inside = []
    for length in inputs.shape[2:]:
        centre = torch.randint(length, (len(inputs), 1), device=inputs.device, generator=draw)
        place = torch.arange(length, device=inputs.device) - centre + side // 2
        inside.append((place >= 0) & (place < side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return inputs.masked_fill(hole, 0.0)


def training_inputs(
    pixels: Tensor, what: Augmentation, normalise: Normaliser, draw: torch.Generator
) -> Tensor:
    """Return the inputs (N, C, H, W) of a training step, augmented and normalised."""
    return cut_out(normalise(augment(pixels, what, draw)), what.cutout, draw)
