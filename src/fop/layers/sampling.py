"""Rows drawn at random, from which the statistics of a layer with very many rows are estimated."""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor

# A factor of few dimensions costs little, and its diagonal needs many rows.
MIN_ROWS = 1024


def keyed_generator(key: str, device: torch.device) -> torch.Generator:
    """Return a new generator whose draws depend on ``key`` alone, for tensors on a device."""
    # A device other than CUDA may have no float64, or no generator of its own.
    home = device if device.type == "cuda" else torch.device("cpu")
    return torch.Generator(home).manual_seed(random.Random(key).getrandbits(63))


class RowSampler:
    """Draws rows for the statistics of one weight: ``per_dim`` for each dimension of a factor.

    Each row is equally likely, and the draws are spread evenly over the samples. They depend on ``key`` and
    how many came before, not on torch's global generators.
    """

    def __init__(self, per_dim: int, key: str, device: torch.device) -> None:
        self.per_dim = per_dim
        self._device, self._generator = device, keyed_generator(key, device)

    def draw(self, rows: int, dim: int, share: float = 1.0) -> Tensor | None:
        """Return which of so many rows serve a factor of ``dim`` dimensions; None for all of them.

        ``share`` is that of these rows in all that the factor is made of.
        """
        wanted = max(1, round(share * max(MIN_ROWS, self.per_dim * dim)))
        if wanted >= rows:
            return None
        home = self._generator.device
        # One row from each of so many stretches of equal length, whole or not: every row is equally likely.
        place = torch.rand(wanted, dtype=torch.float64, device=home, generator=self._generator)
        place += _numbers(wanted, home)
        return place.mul_(rows / wanted).long().clamp_(max=rows - 1).to(self._device)


@lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=device)
