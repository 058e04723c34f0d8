"""DCGAN: two models whose losses go through each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.task import SAMPLES

LATENT = 5


def generator(dim: int = 4) -> nn.Sequential:
    """Make (N, LATENT, 1, 1) into images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 2 * dim, 4, bias=False),
        nn.BatchNorm2d(2 * dim),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(2 * dim, 1, 4, stride=2, padding=1, bias=False),
        nn.Tanh(),
    )


def discriminator(dim: int = 4) -> nn.Sequential:
    """Make images (N, 1, 8, 8) into logits (N, 1)."""
    return nn.Sequential(
        nn.Conv2d(1, dim, 4, stride=2, padding=1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(dim, 2 * dim, 4, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(),
        nn.Linear(2 * dim, 1),
    )


def real(seed: int) -> Tensor:
    """Images whose left half is bright."""
    image = torch.full((8, 8), -0.8)
    image[:, :4] = 0.8
    return image + 0.1 * torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def noise(seed: int) -> Tensor:
    return torch.randn(SAMPLES, LATENT, 1, 1, generator=torch.Generator().manual_seed(seed))


def verdict(model: nn.Module, images: Tensor, *, is_real: bool) -> Tensor:
    """Loss of a discriminator that should find these images real, or not."""
    logits = model(images)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))
