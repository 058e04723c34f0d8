"""What a model of the zoo comes with: batches and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]

CLASSES = 4
# Unlike every length and window count of the zoo, so that samples cannot be taken for tokens by luck.
SAMPLES = 6


class Task(NamedTuple):
    """A model, ``batch(seed)``, and ``loss(model, batch)``."""

    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def classification(*shape: int) -> Callable[[int], Batch]:
    """Make batches of noisy class prototypes of this shape, and the classes."""
    prototypes = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        return prototypes[y] + 0.5 * torch.randn(SAMPLES, *shape, generator=generator), y

    return batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of classes along the last dimension of the model's output; -100 is no class."""
    *inputs, target = batch
    return F.cross_entropy(model(*inputs).flatten(0, -2), target.flatten())
