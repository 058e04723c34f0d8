"""Image data sets from folders or the Hugging Face hub, decoded once into memory.

Shapes: N images, H and W pixels, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

# Names that a folder's test part goes by.
TEST_FOLDERS = ("test", "validation", "val")

# Given the labels of all images, the numbers of those to keep.
Choice = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Pixels (N, H, W, channels) uint8, class numbers (N,) int64, and the names of the C classes."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """Copy pixels and labels to a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def __getitem__(self, numbers: Tensor | slice) -> Images:
        """Return the images of these numbers; those of a slice share its memory."""
        return Images(self.pixels[numbers], self.labels[numbers], self.classes)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: its name on the hub, its columns there, and the size that images get."""

    hub: str
    image: str = "image"
    label: str = "label"
    test: str = "test"  # the hub's name of the part to test on
    size: int = (
        32  # side of a square: shorter side scaled, centre cut out; images of this size are left alone
    )
    classes: int | None = None  # so that other data do not pass for these


def load(source: Source, data: str | None, *, test: bool = False, choose: Choice | None = None) -> Images:
    """Load the training or the test part of a data set, and of these the images that ``choose`` keeps.

    ``data`` is a folder with train/<class>/* and test/<class>/*, or another name on the hub.

    Raises:
        FileNotFoundError: the data set is not there; the message says how to get it.
        ValueError: other classes, too few images, or one that cannot be decoded, named.
    """
    from datasets import Image  # noqa: PLC0415 - takes a second

    name = data or source.hub
    if data is not None and Path(data).is_dir():
        rows, image, label = _folder(Path(data), test), "image", "label"
    elif name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {data}; give one with train/<class>/* and test/<class>/*, or a name on the "
            "Hugging Face hub, owner/name"
        )
    else:
        rows, image, label = _hub(name, source.test if test else "train"), source.image, source.label
    if not {image, label} <= rows.features.keys():
        raise ValueError(
            f"{name} has no columns {image!r} and {label!r}, but {', '.join(rows.features)}; "
            "give a data set that has them, or a folder"
        )
    classes = tuple(rows.features[label].names)
    if source.classes not in (None, len(classes)):
        raise ValueError(
            f"{name} has {len(classes)} classes, and this data set {source.classes}; choose "
            "the one that it is by --task, or give another --data"
        )
    labels = torch.tensor(rows.with_format(None)[label][:], dtype=torch.int64)
    if choose is not None:
        absent = [each for at, each in enumerate(classes) if not (labels == at).any()]
        if absent:
            raise ValueError(f"class {absent[0]!r} has no images, and this recipe needs some of every class")
        try:
            chosen = choose(labels)
        except ValueError as error:
            raise ValueError(f"{'test' if test else 'training'} part of {name}: {error}") from error
        rows, labels = rows.select(chosen.tolist()), labels[chosen]
    rows = rows.cast_column(image, Image(decode=False))
    pixels = torch.empty(len(rows), source.size, source.size, 3, dtype=torch.uint8)
    for index, row in enumerate(rows.select_columns([image])):
        pixels[index] = torch.from_numpy(_decoded(row[image], source.size))
    return Images(pixels, labels, classes)


def _folder(folder: Path, test: bool) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image  # noqa: PLC0415

    def classes_of(part: Path) -> list[str]:
        return sorted(path.name for path in part.iterdir() if path.is_dir()) if part.is_dir() else []

    names = TEST_FOLDERS if test else ("train",)
    part = next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])
    classes = classes_of(part)
    # The classes are those of the training part, whose numbers the test part must share.
    if test and (folder / "train").is_dir() and classes != classes_of(folder / "train"):
        raise FileNotFoundError(
            f"{part} does not hold the class folders of {folder / 'train'}; "
            "both must have one folder a class, of the same names"
        )
    files = [(str(path), at) for at, name in enumerate(classes) for path in sorted((part / name).iterdir())]
    files = [(path, at) for path, at in files if Path(path).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no images in {names[0]}/<class>/*; unpack the data set there, one folder a class, "
            "or leave --data out to take it from the Hugging Face hub"
        )
    # `load_dataset("imagefolder")` would take a minute to list CIFAR's 60,000 files, in every process.
    columns = {"image": [path for path, _ in files], "label": [number for _, number in files]}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=classes)})
    return Dataset.from_dict(columns, features)


def _hub(name: str, part: str) -> Dataset:
    import datasets  # noqa: PLC0415
    from datasets.exceptions import DatasetsError  # noqa: PLC0415
    from httpx import HTTPError  # noqa: PLC0415

    try:
        return datasets.load_dataset(name, split=part)
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
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        left, top = (width - size) // 2, (height - size) // 2
        rgb = rgb.resize((width, height), Pillow.Resampling.BICUBIC)
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.array(rgb)


def by_class(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield every class that there is with the numbers of its images, in their order."""
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

    The first of the C classes keeps ``largest`` images, ``imbalance`` times as many as the last.
    """

    def choose(labels: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        last = max(1, int(labels.max()))
        kept = []
        for label, of_class in by_class(labels):
            count = int(largest * imbalance ** (-label / last))
            if len(of_class) < count:
                raise ValueError(
                    f"class {label} has {len(of_class)} images; an imbalance factor of {imbalance:g} needs "
                    f"{count}: give the balanced data set, or one with a smaller factor"
                )
            kept.append(of_class[torch.randperm(len(of_class), generator=draw)[:count]])
        return torch.cat(kept)

    return choose
