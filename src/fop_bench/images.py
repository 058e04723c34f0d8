"""Image data sets from folders or the hub, decoded once into memory, and augmentation of whole batches.

Shapes: N images or batch, H and W pixels, C classes or channels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

SIDE = 32  # pixels of every image, either way

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
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)

    def __getitem__(self, numbers: Tensor) -> Images:
        """Return the images of these numbers, or where a mask is true."""
        return Images(self.pixels[numbers], self.labels[numbers], self.classes)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: its name on the hub, and its columns there."""

    hub: str
    image: str = "image"
    label: str = "label"
    classes: int | None = None  # so that other data do not pass for these


def load(source: Source, data: str | None, *, test: bool = False, choose: Choice | None = None) -> Images:
    """Load a part of a data set from a folder or the hub, and of its images those that ``choose`` keeps.

    Raises FileNotFoundError if the data set is not there, and ValueError for other classes, too few images,
    or one that cannot be decoded.
    """
    from datasets import Image

    name, part = data or source.hub, "test" if test else "train"
    if data is not None and Path(data).is_dir():
        rows, image, label = _folder(Path(data), part), "image", "label"
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"there is no folder {data}; give one with train/<class>/* and test/<class>/*, or owner/name "
            "on the Hugging Face hub"
        )
    else:
        rows, image, label = _hub(name, part), source.image, source.label
    classes = tuple(rows.features[label].names)
    if source.classes not in (None, len(classes)):
        raise ValueError(
            f"{name} has {len(classes)} classes, and this data set {source.classes}; choose the one that it "
            "is by --task, or give another --data"
        )
    labels = torch.tensor(rows.with_format(None)[label][:], dtype=torch.int64)
    if choose is not None:
        chosen = choose(labels)
        rows, labels = rows.select(chosen.tolist()), labels[chosen]
    rows = rows.cast_column(image, Image(decode=False)).select_columns([image])
    pixels = torch.empty(len(rows), SIDE, SIDE, 3, dtype=torch.uint8)
    for index, row in enumerate(rows):
        pixels[index] = torch.from_numpy(_decoded(row[image]))
    return Images(pixels, labels, classes)


def _folder(folder: Path, name: str) -> Dataset:
    """List the images of a folder; files of other kinds, hidden ones and links to nothing do not count."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow

    def classes_of(part: Path) -> list[str]:
        return sorted(path.name for path in part.glob("[!.]*") if path.is_dir())

    part = folder / name
    classes, endings = classes_of(part), Pillow.registered_extensions()
    # Else the test part's class numbers would mean others.
    if name == "test" and (folder / "train").is_dir() and classes != classes_of(folder / "train"):
        raise FileNotFoundError(f"{part} does not hold the class folders of {folder / 'train'}")
    images, labels = list[str](), list[int]()
    for label, of_class in enumerate(classes):
        for path in sorted((part / of_class).glob("[!.]*")):
            if path.suffix.lower() in endings and path.is_file():
                images.append(str(path))
                labels.append(label)
    if not images:
        raise FileNotFoundError(
            f"{folder} has no images in {name}/<class>/*; unpack the data set there, one folder a class"
        )
    # `load_dataset("imagefolder")` would take a minute to list CIFAR's 60,000 files, in every process.
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({"image": images, "label": labels}, features)


def _hub(name: str, part: str) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, split=part)
    except Exception as error:  # the library's own, urllib's or httpx's: the remedy is the same
        raise FileNotFoundError(
            f"cannot load {name!r} from the Hugging Face hub ({type(error).__name__}: {error}), and there is "
            "no such folder. Give --data FOLDER with the images as train/<class>/* and test/<class>/*, or "
            f"download them where there is a network: `hf download --repo-type dataset {name}`"
        ) from error


def _decoded(image: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import numpy as np
    from PIL import Image as Pillow

    where = image["path"] or "an image of the data set"
    try:
        with Pillow.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            rgb = opened.convert("RGB")
    except (Pillow.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} cannot be decoded ({error}); download it again or remove it") from error
    if rgb.size != (SIDE, SIDE):
        size = "×".join(map(str, rgb.size))
        raise ValueError(f"{where} has {size} pixels, and these data sets {SIDE}×{SIDE}")
    return np.array(rgb)


def of_each_class(labels: Tensor, keep: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return what is kept of every class, given its label and the numbers of its images in their order."""
    return torch.cat([keep(label, (labels == label).nonzero()[:, 0]) for label in labels.unique().tolist()])


def _first(count: int, label: int, of_class: Tensor, needs: str) -> Tensor:
    if len(of_class) < count:
        raise ValueError(f"class {label} has {len(of_class)} images; {needs}")
    return of_class[:count]


def per_class(count: int, *, skip: int = 0) -> Choice:
    """Keep ``count`` images of every class, after the first ``skip``, in the order of the data set."""

    def keep(label: int, of_class: Tensor) -> Tensor:
        return _first(skip + count, label, of_class, f"{skip + count} are needed by this recipe")[skip:]

    return lambda labels: of_each_class(labels, keep)


def long_tail(imbalance: float, largest: int, *, seed: int = 0) -> Choice:
    """Keep int(largest·imbalance^(−i/(C−1))) random images of class i of C (Cui et al. 2019)."""

    def choose(labels: Tensor) -> Tensor:
        draw, last = Generator().manual_seed(seed), int(labels.max())

        def keep(label: int, of_class: Tensor) -> Tensor:
            count = int(largest * imbalance ** (-label / max(1, last)))
            needs = f"an imbalance factor of {imbalance:g} needs {count}: "
            needs += "give the balanced data set, or one with a smaller factor"
            shuffled = of_class[torch.randperm(len(of_class), generator=draw)]
            return _first(count, label, shuffled, needs)

        return of_each_class(labels, keep)

    return choose


# --- Augmentation, on the device that holds the batch


@dataclass(frozen=True)
class Augmentation:
    """What a training image goes through."""

    flip: bool = False  # mirror it, with probability 1/2
    shift: int = 0  # move it by up to so many pixels either way: zero padding, then a crop of the old size


NOTHING = Augmentation()


class Normaliser:
    """Turns pixels (N, H, W, C) uint8 into inputs (N, C, H, W), channels last.

    Mean and variance of every channel of the given ``pixels`` become 0 and 1.
    """

    def __init__(self, pixels: Tensor) -> None:
        channels = pixels.shape[-1]
        sums = torch.zeros(2, channels, dtype=torch.float64)
        for part in pixels.split(4096):
            values = part.reshape(-1, channels).double().cpu()
            sums += torch.stack([values.sum(0), (values * values).sum(0)])
        mean, second = sums / pixels[..., 0].numel()
        std = (second - mean * mean).clamp(min=1e-12).sqrt()
        self.mean, self.std = mean.float().to(pixels.device), std.float().to(pixels.device)

    def __call__(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)

    def batch(
        self, images: Images, numbers: Tensor, what: Augmentation = NOTHING, draw: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the images of these numbers, augmented first, and their labels."""
        return self(augment(images.pixels[numbers], what, draw)), images.labels[numbers]


def augment(pixels: Tensor, what: Augmentation, draw: Generator | None) -> Tensor:
    """Flip and shift a batch (N, H, W, C) of pixels, by random numbers of a generator on its device."""
    if not (what.flip or what.shift):
        return pixels
    (count, height, width, _), device = pixels.shape, pixels.device
    rows, columns = (torch.arange(side, device=device).expand(count, side) for side in (height, width))
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
