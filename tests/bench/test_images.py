"""Image data sets: what is read is what the files hold, and what cannot be read says what to do."""

from __future__ import annotations

import io
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

from fop_bench.images import Images, Source, load, long_tail, per_class

SIZE = 8
SOURCE = Source("owner/name", image="img", size=SIZE)
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


def fill(part: Path, images: int, classes: tuple[str, ...] = CLASSES, first_seed: int = 0) -> None:
    for number, name in enumerate(classes):
        (part / name).mkdir(parents=True)
        for index in reversed(range(images)):
            picture(first_seed + 10 * number + index).save(part / name / f"{index}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, three training images and two test images of each."""
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 2, first_seed=100)
    return tmp_path


def one(tmp_path: Path, image: Image.Image) -> np.ndarray:
    """Load a folder that holds one image."""
    (tmp_path / "train" / "only").mkdir(parents=True)
    image.save(tmp_path / "train" / "only" / "0.png")
    return load(SOURCE, str(tmp_path)).pixels[0].numpy()


@pytest.mark.parametrize(("part", "images"), [("train", 3), ("test", 2)])
def test_a_folder_gives_its_pixels_in_the_order_of_names(folder: Path, part: str, images: int) -> None:
    loaded = load(SOURCE, str(folder), test=part == "test")
    assert loaded.classes == ("ant", "mole", "zebra")
    assert len(loaded) == 3 * images
    assert loaded.labels.dtype == torch.int64
    assert loaded.labels.tolist() == [label for label in range(3) for _ in range(images)]
    by_hand = [
        np.asarray(Image.open(folder / part / name / f"{index}.png"))
        for name in ("ant", "mole", "zebra")
        for index in range(images)
    ]
    assert loaded.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(loaded.pixels.numpy(), np.stack(by_hand))


@pytest.mark.parametrize("name", ["validation", "val"])
def test_the_test_part_may_have_another_name(folder: Path, name: str) -> None:
    expected = load(SOURCE, str(folder), test=True)
    (folder / "test").rename(folder / name)
    assert torch.equal(load(SOURCE, str(folder), test=True).pixels, expected.pixels)


@pytest.mark.parametrize(
    ("width", "height", "scaled", "box"),
    [
        (16, 16, (8, 8), (0, 0, 8, 8)),
        (4, 4, (8, 8), (0, 0, 8, 8)),
        (20, 10, (16, 8), (4, 0, 12, 8)),
        (10, 30, (8, 24), (0, 8, 8, 16)),
        (13, 7, (15, 8), (3, 0, 11, 8)),
        (8, 9, (8, 9), (0, 0, 8, 8)),
    ],
)
def test_other_sizes_are_scaled_and_cut(
    tmp_path: Path, width: int, height: int, scaled: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = picture(1, width, height)
    expected = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC).crop(box))
    np.testing.assert_array_equal(one(tmp_path, image), expected)


def test_the_middle_is_kept_and_not_stretched(tmp_path: Path) -> None:
    pixels = np.zeros((SIZE, 3 * SIZE, 3), dtype=np.uint8)
    pixels[:, SIZE : 2 * SIZE] = np.asarray(picture(2))
    np.testing.assert_array_equal(one(tmp_path, Image.fromarray(pixels)), np.asarray(picture(2)))


def test_grey_images_have_three_equal_channels(tmp_path: Path) -> None:
    image = picture(3, mode="L")
    np.testing.assert_array_equal(one(tmp_path, image), np.stack([np.asarray(image)] * 3, axis=2))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    image = picture(4, mode="RGBA")
    np.testing.assert_array_equal(one(tmp_path, image), np.asarray(image)[:, :, :3])


def test_images_are_chosen_and_moved_together(folder: Path) -> None:
    loaded = load(SOURCE, str(folder))
    some = loaded[torch.tensor([7, 0])].to(torch.device("cpu"))
    assert isinstance(some, Images)
    assert some.labels.tolist() == [2, 0]
    assert torch.equal(some.pixels[0], loaded.pixels[7])
    assert some.classes == loaded.classes


# --- Folders that are not as they should be


def test_a_folder_without_a_training_part_says_what_it_needs(folder: Path) -> None:
    (folder / "train").rename(folder / "training")
    with pytest.raises(FileNotFoundError, match=rf"{folder} has no images in train/<class>/\*; unpack"):
        load(SOURCE, str(folder))


def test_a_training_part_without_classes_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture(0).save(tmp_path / "train" / "loose.png")
    with pytest.raises(FileNotFoundError, match=r"has no images in train/<class>/\*; unpack"):
        load(SOURCE, str(tmp_path))


@pytest.mark.parametrize("changed", ["another", "fewer", "no test part"])
def test_a_test_part_with_other_classes_is_refused(folder: Path, changed: str) -> None:
    part = folder / "test"
    if changed == "no test part":
        part.rename(folder / "other")
    elif changed == "another":
        (part / "ant").rename(part / "bee")
    else:
        for file in (part / "ant").iterdir():
            file.unlink()
        (part / "ant").rmdir()
    with pytest.raises(FileNotFoundError, match=rf"{part} does not hold the class folders of {folder}/train"):
        load(SOURCE, str(folder), test=True)


def empty(folder: Path, name: str) -> None:
    for file in (folder / "train" / name).iterdir():
        file.unlink()


def test_an_empty_class_keeps_its_number(folder: Path) -> None:
    empty(folder, "mole")
    loaded = load(SOURCE, str(folder))
    assert loaded.classes == ("ant", "mole", "zebra")
    assert loaded.labels.tolist() == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("name", CLASSES)
def test_an_empty_class_has_too_few_images_of_a_class(folder: Path, name: str) -> None:
    empty(folder, name)
    with pytest.raises(ValueError, match=f"class {name!r} has no images"):
        load(SOURCE, str(folder), choose=per_class(2))


@pytest.mark.parametrize("name", CLASSES)
def test_an_empty_class_has_too_few_images_of_a_long_tail(folder: Path, name: str) -> None:
    empty(folder, name)
    with pytest.raises(ValueError, match=f"class {name!r} has no images"):
        load(SOURCE, str(folder), choose=long_tail(3, 3))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kept", [0, 3, 40, 100], ids="{} bytes".format)
def test_a_corrupt_image_is_named(folder: Path, kept: int) -> None:
    path = folder / "train" / "mole" / "1.png"
    assert len(png(picture(0))) > 200
    path.write_bytes(png(picture(0))[:kept])
    with pytest.raises(ValueError, match=rf"{path} cannot be decoded \(.+\); download it again or remove it"):
        load(SOURCE, str(folder))


def test_a_file_that_is_no_image_is_named(folder: Path) -> None:
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"ant/notes\.txt cannot be decoded"):
        load(SOURCE, str(folder))


def test_every_cut_and_every_changed_byte_gives_an_image_or_the_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    path = tmp_path / "train" / "only" / "0.png"
    whole = png(picture(5))
    broken = [whole[:end] for end in range(0, len(whole), 7)]
    broken += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            load(SOURCE, str(tmp_path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(broken) / 2


def test_an_image_whose_header_claims_a_huge_size_is_named(folder: Path) -> None:
    path = folder / "train" / "mole" / "1.bmp"
    picture(0).save(path)
    header = bytearray(path.read_bytes())
    header[18:26] = (60000).to_bytes(4, "little") * 2
    path.write_bytes(header)
    with pytest.raises(ValueError, match=rf"{path} cannot be decoded"):
        load(SOURCE, str(folder))


def test_images_that_are_not_chosen_are_not_decoded(folder: Path) -> None:
    (folder / "train" / "mole" / "2.png").write_bytes(b"broken")
    loaded = load(SOURCE, str(folder), choose=per_class(2))
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2]


# --- The hub


def as_on_the_hub(folder: Path, part: str, image: str = "img") -> Dataset:
    files = [
        (file, number)
        for number, name in enumerate(("ant", "mole", "zebra"))
        for file in sorted((folder / part / name).iterdir())
    ]
    features = Features({"label": ClassLabel(names=["ant", "mole", "zebra"]), image: ImageColumn()})
    columns = {
        image: [{"bytes": file.read_bytes(), "path": None} for file, _ in files],
        "label": [number for _, number in files],
    }
    return Dataset.from_dict(columns, features)


@pytest.mark.parametrize("data", [None, "someone/else"])
def test_the_hub_gives_the_same_as_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, data: str | None
) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return as_on_the_hub(folder, "train" if split == "train" else "test")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("owner/name", image="img", size=SIZE, test="validation")
    for test in (False, True):
        for choose in (None, per_class(1, skip=1)):
            here, there = (load(source, each, test=test, choose=choose) for each in (str(folder), data))
            assert torch.equal(here.pixels, there.pixels)
            assert torch.equal(here.labels, there.labels)
            assert here.classes == there.classes
    name = data or "owner/name"
    assert asked == [(name, "train")] * 2 + [(name, "validation")] * 2


def test_a_corrupt_image_of_the_hub_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "train" / "mole" / "1.png").write_bytes(b"broken")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: as_on_the_hub(folder, "train"))
    with pytest.raises(ValueError, match="an image of the data set cannot be decoded"):
        load(SOURCE, None)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hugging Face Hub\nsecond line"),
        TimeoutError("Couldn't reach the Hugging Face Hub"),
        FileNotFoundError("Couldn't reach the Hugging Face Hub"),
        ValueError("Couldn't reach the Hugging Face Hub"),
        httpx.ProxyError("Couldn't reach the Hugging Face Hub"),
        DatasetGenerationError("Couldn't reach the Hugging Face Hub"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("data", [None, "no/such"])
def test_a_hub_that_cannot_be_reached_says_how_to_get_the_data(
    monkeypatch: pytest.MonkeyPatch, error: Exception, data: str | None
) -> None:
    def load_dataset(name: str, split: str) -> Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError) as caught:
        load(SOURCE, data)
    message = str(caught.value)
    assert f"cannot load {data or 'owner/name'!r} from the Hugging Face hub" in message
    assert f"({type(error).__name__}: Couldn't reach the Hugging Face Hub)" in message
    assert "Give --data FOLDER with the images as train/<class>/* and test/<class>/*" in message
    assert f"`hf download --repo-type dataset {data or 'owner/name'}`" in message


def test_a_hub_data_set_without_the_column_names_those_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: as_on_the_hub(folder, "train", "image"))
    with pytest.raises(ValueError, match=r"someone/else.*img.*image, label"):
        load(SOURCE, "someone/else")


def test_a_folder_that_is_not_there_is_no_name_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere; give one with train/<class>"):
        load(SOURCE, "nowhere")


def test_another_data_set_does_not_pass_for_this_one(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has 3 classes, and this data set 100; choose .* --task"):
        load(replace(SOURCE, classes=100), str(folder))
    assert len(load(replace(SOURCE, classes=3), str(folder)).classes) == 3


def test_too_few_images_name_the_part_and_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"test part of {folder}: class 0 has .* images; 50 are needed"):
        load(SOURCE, str(folder), test=True, choose=per_class(50))
