"""A fixed subset of CIFAR-10's training images, from an image folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from fop_bench.training import Samples

TRAIN_PER_CLASS = 100
VALIDATION_PER_CLASS = 100


def cifar_subset(folder: Path) -> tuple[Samples, Samples]:
    """Load 1,000 training and 1,000 validation images, both from ``folder/train/<class>/*``.

    The files of a class are taken in the order of their names; images are averaged to 16×16, so that
    a run takes seconds on a CPU, and become (samples, 3, 16, 16) with zero mean and unit variance over the
    training part. Raises FileNotFoundError if images are missing.
    """
    classes = sorted(path for path in (folder / "train").glob("*") if path.is_dir())
    parts: list[list[npt.NDArray[np.uint8]]] = [[], []]
    labels: list[list[int]] = [[], []]
    needed = TRAIN_PER_CLASS + VALIDATION_PER_CLASS
    for label, class_folder in enumerate(classes):
        files = sorted(class_folder.iterdir())[:needed]
        if len(files) < needed:
            raise FileNotFoundError(f"{class_folder} holds {len(files)} images; {needed} are needed")
        for index, file in enumerate(files):
            part = int(index >= TRAIN_PER_CLASS)
            with Image.open(file) as image:
                parts[part].append(np.asarray(image.convert("RGB")))
            labels[part].append(label)
    if not classes:
        raise FileNotFoundError(
            f"{folder} has no folders train/<class>; unpack CIFAR-10 there as images, one folder a class"
        )
    train, validation = (
        avg_pool2d(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255), 2)
        for images in parts
    )
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (
        Samples((train - mean) / std, torch.tensor(labels[0])),
        Samples((validation - mean) / std, torch.tensor(labels[1])),
    )
