"""The tasks of `fop-bench race`: little and much noise; images, text, squared errors."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fop_bench.images import Augmentation, Images, Normaliser, load, training_inputs
from fop_bench.models import DigitsLSTM, airbench, digits_autoencoder, digits_cnn, small_gpt
from fop_bench.optimizers import Loss
from fop_bench.recipes import CIFAR10, DigitsTask

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Data and network of a task."""

    build: Callable[[], nn.Module]
    batches: Callable[[int, Generator], Batches]  # of a size, without end
    loss: Loss
    value: Callable[[nn.Module], float]  # of a trained network in evaluation mode


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and by what it is judged."""

    load: Callable[[str | None], Problem]  # given a folder or a name on the hub for CIFAR-10
    batch_size: int
    steps: int
    measure: str = "accuracy, %"
    highest: bool = True  # whether the highest value is the best
    rest: float = 0.01  # AdamW's rate for biases, norms, positions and embeddings
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by optimizer


def _numbers(count: int, size: int, draw: Generator) -> Iterator[Tensor]:
    """Yield the numbers of whole batches, epoch by epoch."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count, generator=draw).split(size)[: count // size]


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Callable[[Tensor], Tensor], labels: Tensor) -> float:
    """Return percent, given the inputs of samples by their numbers."""
    parts = torch.arange(len(labels)).split(1000)
    right = sum(int((model(inputs(part)).argmax(1) == labels[part]).sum()) for part in parts)
    return 100 * right / len(labels)


def _smoothed(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return cross_entropy(outputs, targets, reduction=reduction, label_smoothing=0.1)


@cache
def cifar(data: str | None) -> Problem:
    """Load CIFAR-10 for the network of airbench."""
    return of_images(*(load(CIFAR10, data, test=test) for test in (False, True)))


def of_images(train: Images, test: Images) -> Problem:
    """Return the problem of telling apart 32×32 images, with flips and shifts by two pixels."""
    normalise, augmentation = Normaliser(train.pixels), Augmentation(flip=True, shift=2)
    patches = normalise(train.pixels[:5000]).unfold(2, 2, 1).unfold(3, 2, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def batches(size: int, draw: Generator) -> Batches:
        for numbers in _numbers(len(train), size, draw):
            pixels = train.pixels[numbers]
            yield training_inputs(pixels, augmentation, normalise, draw), train.labels[numbers]

    def value(model: nn.Module) -> float:
        return _accuracy(model, lambda numbers: normalise(test.pixels[numbers]), test.labels)

    return Problem(lambda: airbench(patches), batches, _smoothed, value)


def _of_bytes(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


@cache
def gpt(data: str | None, length: int = 64) -> Problem:
    """Load the sources of Python's standard library, of which every tenth file is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)

    def joined(held_out: bool) -> Tensor:
        texts = (path.read_bytes() for n, path in enumerate(files) if (n % 10 == 0) == held_out)
        return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

    train, held_out, window = joined(False), joined(True), torch.arange(length + 1)

    def samples(of: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = of[starts[:, None] + window].long()
        return rows[:, :-1], rows[:, 1:]

    def batches(size: int, draw: Generator) -> Batches:
        while True:
            yield samples(train, torch.randint(len(train) - length, (size,), generator=draw))

    @torch.no_grad()
    def value(model: nn.Module) -> float:
        inputs, targets = samples(held_out, torch.arange(0, len(held_out) - length, length)[:1024])
        return float(_of_bytes(model(inputs), targets))

    return Problem(lambda: small_gpt(tokens=length), batches, _of_bytes, value)


def digits(build: Callable[[], nn.Module], itself: bool = False) -> Callable[[str | None], Problem]:
    """Return what loads the digits, to be told apart, or each to be its own target."""

    def load_digits(data: str | None) -> Problem:
        parts = DigitsTask().load(None)
        train, *held_out = parts["final"][0], parts["tuning"][1], parts["final"][1]
        # Pixels are 0 to 240.
        x = train.pixels.permute(0, 3, 1, 2).float() / 240
        x_held_out = torch.cat([part.pixels for part in held_out]).permute(0, 3, 1, 2).float() / 240
        y, y_held_out = (
            x.flatten(1) if itself else train.labels,
            torch.cat([part.labels for part in held_out]),
        )
        loss: Loss = mse_loss if itself else cross_entropy

        def batches(size: int, draw: Generator) -> Batches:
            yield from ((x[numbers], y[numbers]) for numbers in _numbers(len(x), size, draw))

        @torch.no_grad()
        def value(model: nn.Module) -> float:
            if itself:
                return float(loss(model(x), y))
            return _accuracy(model, lambda numbers: x_held_out[numbers], y_held_out)

        return Problem(build, batches, loss, value)

    return load_digits


FULL = 1024  # all training digits
_IMAGES: dict[str, Any] = {"rest": 0.03, "options": {"muon": {"momentum": 0.6}}}
_TEXT: dict[str, Any] = {"measure": "nats a byte", "highest": False, "rest": 0.005}
_TEXT["options"] = {"muon": {"momentum": 0.8}}
TASKS = {
    "cifar-500": Task(cifar, 500, 120, **_IMAGES),
    "cifar-5000": Task(cifar, 5000, 30, **_IMAGES),
    "cifar-25000": Task(cifar, 25000, 20, **_IMAGES),
    "gpt-128": Task(gpt, 128, 100, **_TEXT),
    "gpt-1024": Task(gpt, 1024, 60, **_TEXT),
    "digits-autoencoder": Task(
        digits(digits_autoencoder, itself=True), FULL, 200, "training MSE", highest=False
    ),
    "digits-cnn": Task(digits(digits_cnn), FULL, 40),
    "digits-lstm": Task(digits(DigitsLSTM), 128, 200),
}
