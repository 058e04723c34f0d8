"""Augmentation of whole batches, on the device that holds them.

Shapes: N batch, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Augmentation:
    """What a training image goes through.

    Attributes:
        flip: mirror every other image, at random.
        shift: move by up to so many pixels either way (zero padding, then a crop of the old size).
        cutout: side in pixels of a square at a random place that is set to the mean (DeVries & Taylor 2017).
    """

    flip: bool = False
    shift: int = 0
    cutout: int = 0


class Normaliser:
    """Turns pixels (N, H, W, 3) uint8 into inputs (N, 3, H, W) of zero mean and unit variance, channels last.

    Args:
        pixels: the training images, whose mean and standard deviation count.
        total: sums over the processes that share the images.
    """

    def __init__(self, pixels: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        sums, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for part in pixels.split(4096):
            values = part.reshape(-1, 3).double().cpu()
            sums += values.sum(0)
            squares += (values * values).sum(0)
        ones = torch.full((3,), pixels.numel() / 3, dtype=torch.float64)
        sums, squares, count = total(torch.stack([sums, squares, ones]))
        mean = sums / count
        std = (squares / count - mean * mean).clamp(min=1e-12).sqrt()
        self.mean = mean.float().to(pixels.device)
        self.std = std.float().to(pixels.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise a batch."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        inputs: Tensor = (pixels.float() - mean) / std
        return inputs.permute(0, 3, 1, 2)


def augment(pixels: Tensor, what: Augmentation, draw: torch.Generator) -> Tensor:
    """Flip and shift a batch (N, H, W, 3) of pixels.

    Args:
        pixels: the batch.
        what: which changes.
        draw: source of randomness, on the device of the batch.
    """
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
    """Set a square of a batch of normalised inputs (N, 3, H, W) to zero, cut off at the edges."""
    if not side:
        return inputs
    count, _, height, width = inputs.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (count, 1), device=inputs.device, generator=draw)
        place = torch.arange(length, device=inputs.device) - centre + side // 2
        inside.append((place >= 0) & (place < side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return inputs.masked_fill(hole, 0.0)


def training_inputs(
    pixels: Tensor, what: Augmentation, normalise: Normaliser, draw: torch.Generator
) -> Tensor:
    """Give the inputs (N, 3, H, W) of a training step from pixels (N, H, W, 3): augmented and normalised."""
    return cut_out(normalise(augment(pixels, what, draw)), what.cutout, draw)
