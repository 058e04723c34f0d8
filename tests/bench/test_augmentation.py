"""Augmentation of batches, each image compared with what plain code may make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fop_bench.images import Augmentation, Normaliser, augment

# Not square, so that rows are told from columns.
HEIGHT, WIDTH = 5, 7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int, seed: int = 1) -> Tensor:
    """Random pixels, none of them black as what is moved in."""
    shape = (count, HEIGHT, WIDTH, 3)
    return torch.randint(1, 256, shape, generator=generator(seed)).to(torch.uint8)


def crop(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Cut out a part of the old size that begins there, black outside of the image."""
    out = np.zeros_like(image)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            if 0 <= row + down < HEIGHT and 0 <= column + right < WIDTH:
                out[row, column] = image[row + down, column + right]
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_pixels_are_those_of_float64(channels: int) -> None:
    draw = np.random.default_rng(0)
    scale, offset = np.array([200, 90, 10])[:channels], np.array([3, 60, 240])[:channels]
    # More than are summed at once.
    pixels = (draw.random((5000, 2, 3, channels)) * scale + offset).astype(np.uint8)
    normalise = Normaliser(torch.from_numpy(pixels))
    values = pixels.astype(np.float64)
    mean, std = values.mean((0, 1, 2)), values.std((0, 1, 2))
    np.testing.assert_allclose(normalise.mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(normalise.std.numpy(), std, rtol=1e-6)
    some = pixels[[4999, 0, 17]]
    expected = ((some.astype(np.float64) - mean) / std).transpose(0, 3, 1, 2)
    inputs = normalise(torch.from_numpy(some))
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_a_channel_of_one_value_stays_finite() -> None:
    pixels = photographs(4)
    pixels[..., 1] = 137
    inputs = Normaliser(pixels)(pixels)
    assert inputs.isfinite().all()
    assert (inputs[:, 1] == 0).all()


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1), (True, 1), (True, 2)])
def test_augmented_images_are_mirrored_or_crops_of_the_padded_ones(flip: bool, shift: int) -> None:
    count = 300
    pixels = photographs(count)
    shifted = augment(pixels, Augmentation(flip=flip, shift=shift), generator()).numpy()
    assert shifted.shape == pixels.shape
    assert shifted.dtype == np.uint8
    reach = range(-shift, shift + 1)
    seen: Counter[tuple[bool, int, int]] = Counter()
    for before, after in zip(pixels.numpy(), shifted, strict=True):
        matching = [
            (mirrored, down, right)
            for mirrored in ((False, True) if flip else (False,))
            for down in reach
            for right in reach
            if np.array_equal(after, crop(before[:, ::-1] if mirrored else before, down, right))
        ]
        assert len(matching) == 1
        seen.update(matching)
    # Every move is as likely as the others.
    moves = (1 + flip) * len(reach) ** 2
    assert len(seen) == moves
    assert max(seen.values()) < 3 * count / moves
    if flip:
        mirrored = sum(times for (each, *_), times in seen.items() if each)
        assert 0.4 < mirrored / count < 0.6  # 3.5 standard deviations


def test_nothing_asked_for_is_nothing_done() -> None:
    pixels, draw = photographs(4), generator()
    before, state = pixels.clone(), draw.get_state()
    assert augment(pixels, Augmentation(), draw) is pixels
    assert torch.equal(pixels, before)
    assert torch.equal(draw.get_state(), state)


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "flip": lambda pixels, draw: augment(pixels, Augmentation(flip=True), draw),
    "shift": lambda pixels, draw: augment(pixels, Augmentation(shift=2), draw),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_generator_alone_decides(kind: str) -> None:
    change, pixels = CHANGES[kind], photographs(30)
    before = pixels.clone()
    torch.manual_seed(1)
    first = change(pixels, generator(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, change(pixels, generator(5)))
    assert not torch.equal(first, change(pixels, generator(6)))
    draw = generator(5)
    assert torch.equal(first, change(pixels, draw))
    assert not torch.equal(first, change(pixels, draw)), "the second batch is another"
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels, before), "the data set itself is left alone"
