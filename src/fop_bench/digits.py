"""Scikit-learn's bundled handwritten digits: 1797 real 8×8 images, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fop_bench.training import Samples

# 1024 = 16 × 64 = 2 × 512: no batch size of the demo leaves samples over.
TRAIN_SIZE = 1024
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """The three parts of the data, as tensors of shape (samples, 1, 8, 8) with values from 0 to 1."""

    train: Samples
    validation: Samples
    test: Samples


def split_indices() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Give the sample numbers of the fixed, stratified train, validation and test parts (1024, 386, 387)."""
    labels = load_digits().target
    train, rest = train_test_split(
        np.arange(len(labels)), train_size=TRAIN_SIZE, stratify=labels, random_state=SPLIT_SEED
    )
    validation, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=SPLIT_SEED)
    return train, validation, test


def digits(device: torch.device) -> Digits:
    """Load the digits onto a device."""
    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, validation, test = (
        Samples(images[index], labels[index]).to(device)
        for index in (torch.from_numpy(part) for part in split_indices())
    )
    return Digits(train, validation, test)
