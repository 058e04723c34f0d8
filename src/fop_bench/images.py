"""Image data sets from folders or the Hugging Face hub, decoded once into memory.

Shapes: N images, H and W pixels, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from datasets.exceptions import DatasetsError
from httpx import HTTPError
from PIL import Image as Pillow
from torch import Tensor

# Names that a folder's parts go by.
TEST_FOLDERS = ("test", "validation", "val")

# Given the labels of all images, the numbers of those to keep.
Choice = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Pixels (N, H, W, 3) uint8, class numbers (N,) int64, and the names of the C classes."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """Copy pixels and labels to a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def __getitem__(self, numbers: Tensor | slice) -> Images:
        """Give the images of these numbers; those of a slice share its memory."""
        return Images(self.pixels[numbers], self.labels[numbers], self.classes)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: its name on the hub, its columns, and the size that images get.

    Attributes:
        hub: name on the Hugging Face hub.
        image: column of the images; "image" in a folder.
        label: column of the classes; "label" in a folder.
        test: the hub's name of the part to test on.
        classes: number of classes, so that other data do not pass for these; None for any.
        size: side of the square that images are brought to: shorter side scaled, centre cut out. Images of
            this size are left alone.
    """

    hub: str
    image: str = "image"
    label: str = "label"
    test: str = "test"
    size: int = 32
    classes: int | None = None


def load(source: Source, data: str | None, *, test: bool = False, choose: Choice | None = None) -> Images:
    """Load the training part of a data set, or its test part.

    Args:
        source: the data set.
        data: a folder with train/<class>/* and test/<class>/*, or another name on the hub; None for
            ``source.hub``.
        test: whether to load the test part.
        choose: which images to keep, before any is decoded; None for all.

    Raises:
        FileNotFoundError: the data set is not there; the message says how to get it.
        ValueError: an image that cannot be decoded, named.
    """
    if data is not None and Path(data).is_dir():
        rows, image, label = _folder(Path(data), test), "image", "label"
    elif data is not None and data.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {data}; give one with train/<class>/* and test/<class>/*, or a name on the "
            "Hugging Face hub, owner/name"
        )
    else:
        rows, image, label = _hub(source, data or source.hub, test), source.image, source.label
    if not {image, label} <= rows.features.keys():
        raise ValueError(
            f"{data or source.hub} has no columns {image!r} and {label!r}, but {', '.join(rows.features)}; "
            "give a data set that has them, or a folder"
        )
    classes = tuple(rows.features[label].names)
    if source.classes not in (None, len(classes)):
        raise ValueError(
            f"{data or source.hub} has {len(classes)} classes, and this data set {source.classes}; choose "
            "the one that it is by --task, or give another --data"
        )
    labels = torch.tensor(rows.with_format(None)[label][:], dtype=torch.int64)
    if choose is not None:
        for name, count in zip(classes, labels.bincount(minlength=len(classes)).tolist(), strict=True):
            if not count:
                raise ValueError(f"class {name!r} has no images, and this recipe needs some of every class")
        try:
            chosen = choose(labels)
        except ValueError as error:
            raise ValueError(
                f"{'test' if test else 'training'} part of {data or source.hub}: {error}"
            ) from error
        rows, labels = rows.select(chosen.tolist()), labels[chosen]
    rows = rows.cast_column(image, Image(decode=False)) if rows.features[image].decode else rows
    pixels = torch.empty(len(rows), source.size, source.size, 3, dtype=torch.uint8)
    for index, row in enumerate(rows.select_columns([image])):
        pixels[index] = torch.from_numpy(_decoded(row[image], source.size))
    return Images(pixels, labels, classes)


def _folder(folder: Path, test: bool) -> Dataset:
    names = TEST_FOLDERS if test else ("train",)
    part = next((folder / name for name in names if (folder / name).is_dir()), None)
    classes = sorted(path.name for path in part.iterdir() if path.is_dir()) if part else []
    # The classes are those of the training part, whose numbers the test part must share.
    train = folder / "train"
    if test and train.is_dir() and classes != sorted(p.name for p in train.iterdir() if p.is_dir()):
        raise FileNotFoundError(
            f"{part or folder / 'test'} does not hold the class folders of {train}; "
            "both must have one folder a class, of the same names"
        )
    files = [(path, number) for number, name in enumerate(classes) for path in _files(part, name)]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no images in {names[0]}/<class>/*; unpack the data set there, one folder a class, "
            "or leave --data out to take it from the Hugging Face hub"
        )
    # `load_dataset("imagefolder")` would take a minute to list CIFAR's 60,000 files, in every process.
    columns = {"image": [str(path) for path, _ in files], "label": [number for _, number in files]}
    return Dataset.from_dict(
        columns, Features({"image": Image(decode=False), "label": ClassLabel(names=classes)})
    )


def _files(part: Path | None, name: str) -> list[Path]:
    return [] if part is None else sorted(path for path in (part / name).iterdir() if path.is_file())


def _hub(source: Source, name: str, test: bool) -> Dataset:
    try:
        return datasets.load_dataset(name, split=source.test if test else "train")
    # Whatever stands between us and the hub, the remedy is the same; the library raises its own, urllib's
    # and httpx's errors.
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        raise FileNotFoundError(
            f"cannot load {name!r} from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}). "
            "Is there a network? Give --data FOLDER with the images as train/<class>/* and test/<class>/*, "
            f"or download them where there is a network: `hf download --repo-type dataset {name}`"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _decoded(image: dict[str, Any], size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    try:
        with Pillow.open(source) as opened:
            rgb = opened.convert("RGB")
    except (Pillow.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{image['path'] or 'an image of the data set'} cannot be decoded ({_first_line(error)}); "
            "download it again or remove it"
        ) from error
    if rgb.size != (size, size):
        scale = size / min(rgb.size)
        rgb = rgb.resize(
            tuple(max(size, round(side * scale)) for side in rgb.size), Pillow.Resampling.BICUBIC
        )
        left, top = ((side - size) // 2 for side in rgb.size)
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.array(rgb)


def by_class(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Give every class that there is with the numbers of its images, in their order."""
    for label in labels.unique().tolist():
        yield label, (labels == label).nonzero().squeeze(1)


def per_class(count: int, *, skip: int = 0) -> Choice:
    """Keep ``count`` images of every class, after the first ``skip``, in the order of the data set."""

    def choose(labels: Tensor) -> Tensor:
        kept = []
        for label, of_class in by_class(labels):
            if len(of_class) < skip + count:
                raise ValueError(
                    f"class {label} has {len(of_class)} images; {skip + count} are needed by this recipe"
                )
            kept.append(of_class[skip : skip + count])
        return torch.cat(kept)

    return choose


def long_tail(imbalance: float, largest: int, *, seed: int = 0) -> Choice:
    """Keep int(largest·imbalance^(−i/(C−1))) images of class i, chosen at random (Cui et al. 2019).

    Args:
        imbalance: how many times as many images the first class has as the last.
        largest: number of images of class 0.
        seed: of the choice.
    """

    def choose(labels: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        classes = int(labels.max()) + 1
        kept = []
        for label in range(classes):
            count = int(largest * imbalance ** (-label / max(1, classes - 1)))
            of_class = (labels == label).nonzero().squeeze(1)
            if len(of_class) < count:
                raise ValueError(
                    f"class {label} has {len(of_class)} images; an imbalance factor of {imbalance:g} needs "
                    f"{count}: give the balanced data set, or one with a smaller factor"
                )
            kept.append(of_class[torch.randperm(len(of_class), generator=draw)[:count]])
        return torch.cat(kept)

    return choose
