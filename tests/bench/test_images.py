"""Image data sets: what is read is what the files hold, and what cannot be read says what to do."""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from fop_bench.images import Choice, Source, load, long_tail, per_class

SIZE = 32
SOURCE = Source("owner/name", image="img")
# The file system gives no order, and the order of creation must not count.
CLASSES = ("zebra", "ant", "mole")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Dataset:
        raise AssertionError("a test asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def picture(seed: int, width: int = SIZE, height: int = SIZE, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, *channels), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, three training images and two test images of each."""
    for part, images, first in (("train", 3, 0), ("test", 2, 100)):
        for number, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for index in reversed(range(images)):
                picture(first + 10 * number + index).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def one(tmp_path: Path, image: Image.Image) -> np.ndarray:
    """Load a folder that holds one image."""
    (tmp_path / "train" / "only").mkdir(parents=True)
    image.save(tmp_path / "train" / "only" / "0.png")
    return load(SOURCE, str(tmp_path)).pixels[0].numpy()


# --- What is read


@pytest.mark.parametrize(("part", "images"), [("train", 3), ("test", 2)])
def test_a_folder_gives_its_pixels_in_the_order_of_names(folder: Path, part: str, images: int) -> None:
    loaded = load(SOURCE, str(folder), test=part == "test")
    assert loaded.classes == ("ant", "mole", "zebra")
    assert (loaded.labels.dtype, loaded.pixels.dtype) == (torch.int64, torch.uint8)
    assert loaded.labels.tolist() == [label for label in range(3) for _ in range(images)]
    by_hand = [
        np.asarray(Image.open(folder / part / name / f"{index}.png"))
        for name in ("ant", "mole", "zebra")
        for index in range(images)
    ]
    np.testing.assert_array_equal(loaded.pixels.numpy(), np.stack(by_hand))
    some = loaded[torch.tensor([2 * images, 0])].to(torch.device("cpu"))
    assert some.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(some.pixels[0].numpy(), by_hand[2 * images])
    assert some.classes == loaded.classes


@pytest.mark.parametrize(("width", "height"), [(64, 64), (32, 31), (8, 8)])
def test_images_of_another_size_are_another_data_set(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(ValueError, match=rf"0\.png has {width}×{height} pixels, and these data sets 32×32"):
        one(tmp_path, picture(1, width, height))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", lambda grey: np.stack([grey] * 3, axis=2)), ("RGBA", lambda pixels: pixels[:, :, :3])],
)
def test_images_get_three_channels(
    tmp_path: Path, mode: str, expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    image = picture(3, mode=mode)
    np.testing.assert_array_equal(one(tmp_path, image), expected(np.asarray(image)))


# --- Folders that are not as they should be


@pytest.mark.parametrize("loose", [False, True])
def test_a_training_part_without_classes_says_what_it_needs(folder: Path, loose: bool) -> None:
    (folder / "train").rename(folder / "training")
    if loose:
        (folder / "train").mkdir()
        picture(0).save(folder / "train" / "loose.png")
    with pytest.raises(FileNotFoundError, match=rf"{folder} has no images in train/<class>/\*; unpack"):
        load(SOURCE, str(folder))


@pytest.mark.parametrize("changed", ["another", "fewer", "no test part"])
def test_a_test_part_with_other_classes_is_refused(folder: Path, changed: str) -> None:
    part = folder / "test"
    if changed == "no test part":
        part.rename(folder / "other")
    elif changed == "another":
        (part / "ant").rename(part / "bee")
    else:
        shutil.rmtree(part / "ant")
    with pytest.raises(FileNotFoundError, match=rf"{part} does not hold the class folders of {folder}/train"):
        load(SOURCE, str(folder), test=True)


@pytest.mark.parametrize("name", CLASSES)
def test_an_empty_class_keeps_its_number(folder: Path, name: str) -> None:
    for file in (folder / "train" / name).iterdir():
        file.unlink()
    loaded = load(SOURCE, str(folder))
    assert loaded.classes == ("ant", "mole", "zebra")
    absent = loaded.classes.index(name)
    assert loaded.labels.tolist() == [label for label in range(3) for _ in range(3) if label != absent]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def huge() -> bytes:
    """Give an image whose header claims a size of 60000×60000."""
    file = io.BytesIO()
    picture(0).save(file, "BMP")
    content = bytearray(file.getvalue())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    return bytes(content)


@pytest.mark.parametrize(
    "content", [*(png(picture(0))[:kept] for kept in (0, 3, 40, 100)), b"no image", huge()]
)
def test_what_cannot_be_decoded_is_named(folder: Path, content: bytes) -> None:
    path = folder / "train" / "mole" / "2.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} cannot be decoded \(.+\); download it again or remove it"):
        load(SOURCE, str(folder))
    loaded = load(SOURCE, str(folder), choose=per_class(2))
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2], "what is not chosen is not decoded"


@pytest.mark.slow
def test_every_cut_and_every_changed_byte_gives_an_image_or_the_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    path = tmp_path / "train" / "only" / "0.png"
    whole = png(picture(5))
    broken = [whole[:end] for end in range(0, len(whole), 17)]
    broken += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(0, len(whole), 17)]
    refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            load(SOURCE, str(tmp_path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(broken) / 2


def test_another_data_set_does_not_pass_for_this_one(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 classes, and this data set 100; choose .* --task"):
        load(replace(SOURCE, classes=100), str(folder))
    assert len(load(replace(SOURCE, classes=3), str(folder)).classes) == 3


def test_too_few_images_are_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"class 0 has .* images; 50 are needed"):
        load(SOURCE, str(folder), test=True, choose=per_class(50))


# --- The hub


def as_on_the_hub(folder: Path, part: str) -> Dataset:
    names = ("ant", "mole", "zebra")
    files = [(file, at) for at, name in enumerate(names) for file in sorted((folder / part / name).iterdir())]
    columns = {
        "img": [{"bytes": file.read_bytes(), "path": None} for file, _ in files],
        "label": [number for _, number in files],
    }
    return Dataset.from_dict(columns, Features({"label": ClassLabel(names=[*names]), "img": ImageColumn()}))


@pytest.mark.parametrize("data", [None, "someone/else"])
def test_the_hub_gives_the_same_as_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, data: str | None
) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return as_on_the_hub(folder, "train" if split == "train" else "test")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for test in (False, True):
        for choose in (None, per_class(1, skip=1)):
            here, there = (load(SOURCE, each, test=test, choose=choose) for each in (str(folder), data))
            assert torch.equal(here.pixels, there.pixels)
            assert torch.equal(here.labels, there.labels)
            assert here.classes == there.classes
    name = data or "owner/name"
    assert asked == [(name, "train")] * 2 + [(name, "test")] * 2


def test_what_is_wrong_with_the_hubs_data_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train" / "mole" / "1.png").write_bytes(b"broken")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: as_on_the_hub(folder, "train"))
    with pytest.raises(ValueError, match="an image of the data set cannot be decoded"):
        load(SOURCE, None)


@pytest.mark.parametrize(
    "kind",
    [ConnectionError, TimeoutError, FileNotFoundError, ValueError, httpx.ProxyError, DatasetGenerationError],
)
@pytest.mark.parametrize("data", [None, "no/such"])
def test_a_hub_that_cannot_be_reached_says_how_to_get_the_data(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], data: str | None
) -> None:
    def load_dataset(name: str, split: str) -> Dataset:
        raise kind("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError) as caught:
        load(SOURCE, data)
    message = str(caught.value)
    assert f"cannot load {data or 'owner/name'!r} from the Hugging Face hub" in message
    assert f"({kind.__name__}: Couldn't reach the Hugging Face Hub)" in message
    assert "Give --data FOLDER with the images as train/<class>/* and test/<class>/*" in message
    assert f"`hf download --repo-type dataset {data or 'owner/name'}`" in message


# --- Which images are used


def shuffled(classes: int, of_each: int) -> torch.Tensor:
    labels = torch.arange(classes).repeat_interleave(of_each)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def test_per_class_keeps_the_first_after_those_skipped() -> None:
    labels = [1, 0, 0, 1, 2, 1, 2, 0, 2, 0, 1, 2]
    chosen = per_class(2, skip=1)(torch.tensor(labels)).tolist()
    expected = [[at for at, each in enumerate(labels) if each == label][1:3] for label in range(3)]
    assert chosen == [at for of_class in expected for at in of_class]
    assert not set(chosen) & set(per_class(1)(torch.tensor(labels)).tolist())


def profile(classes: int, imbalance: int, largest: int) -> list[int]:
    """Give the largest n of each class with n ≤ largest·imbalance^(-i/(C-1)), in whole numbers."""
    return [
        max(n for n in range(largest + 1) if n ** (classes - 1) * imbalance**i <= largest ** (classes - 1))
        for i in range(classes)
    ]


@pytest.mark.parametrize(
    ("classes", "largest", "imbalance", "total"),
    [
        # Totals of the published data sets (Cui et al. 2019; Cao et al. 2019).
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
    ],
)
def test_long_tail_has_the_published_counts(classes: int, largest: int, imbalance: int, total: int) -> None:
    labels = shuffled(classes, largest)
    chosen = long_tail(imbalance, largest)(labels)
    assert len(set(chosen.tolist())) == len(chosen) == total
    counts = Counter(labels[chosen].tolist())
    assert [counts[label] for label in range(classes)] == profile(classes, imbalance, largest)
    assert (counts[0], counts[classes - 1]) == (largest, largest // imbalance)


def test_the_choice_of_a_long_tail_is_fixed_by_its_seed_and_can_be_cut_again() -> None:
    labels = shuffled(10, 50)
    first = long_tail(10, 50, seed=3)(labels)
    torch.manual_seed(99)
    assert torch.equal(first, long_tail(10, 50, seed=3)(labels))
    assert set(first.tolist()) != set(long_tail(10, 50, seed=4)(labels).tolist())
    # Not the first images of a class: any can be chosen.
    last_class = (labels == 9).nonzero().squeeze(1)
    seen = {at for seed in range(60) for at in long_tail(10, 50, seed=seed)(labels)[-5:].tolist()}
    assert seen == set(last_class.tolist())
    again = Counter(labels[first][long_tail(50, 50)(labels[first])].tolist())
    assert [again[label] for label in range(10)] == profile(10, 50, 50)


@pytest.mark.parametrize(
    ("choose", "counts", "message"),
    [
        (per_class(2, skip=1), (3, 2), "class 1 has 2 images; 3 are needed"),
        (
            long_tail(4, 8),
            (8, 1),
            "class 1 has 1 images; an imbalance factor of 4 needs 2: give the balanced data set",
        ),
    ],
)
def test_a_choice_names_a_class_with_too_few(choose: Choice, counts: tuple[int, int], message: str) -> None:
    labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(labels)
    assert len(choose(torch.cat([labels, torch.tensor([1])]))) in (4, 10)


# --- What lies about in a folder


def test_what_is_no_image_does_not_count(folder: Path) -> None:
    before = load(SOURCE, str(folder))
    for place in (folder, folder / "train", folder / "train" / "mole"):
        (place / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (place / "notes.txt").write_text("no image")
        (place / "link.png").symlink_to(folder / "nowhere.png")
        (place / ".cache").mkdir()
        picture(9).save(place / ".cache" / "0.png")
    (folder / "train" / "mole" / "._0.png").write_bytes(b"\0\5\26\7")
    after = load(SOURCE, str(folder))
    assert after.classes == before.classes
    assert torch.equal(after.pixels, before.pixels)
    assert torch.equal(after.labels, before.labels)
    load(SOURCE, str(folder), test=True)


@pytest.mark.parametrize("data", ["/missing", "./missing", "../a/b", "a/b/c", "~/images", "missing"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(data: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no folder {data}; ")) as caught:
        load(SOURCE, data)
    assert "download" not in str(caught.value)
