"""The tasks of `fop-bench race`: little and much noise; images, text, squared errors."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from fop_bench.images import Augmentation, Images, Normaliser, load
from fop_bench.models import DigitsLSTM, airbench, digits_autoencoder, digits_cnn, mlp, small_gpt
from fop_bench.optimizers import Loss, class_loss
from fop_bench.recipes import CIFAR10, DigitsTask
from fop_bench.training import Batch, Order, count_right, with_replacement, without_replacement


@dataclass(frozen=True)
class Problem:
    """Data and network of a task."""

    build: Callable[[], nn.Module]
    samples: int
    # Of the samples with these numbers the inputs, augmented by random numbers, and the targets.
    batch: Callable[[Tensor, Generator], tuple[Tensor, Tensor]]
    loss: Loss
    judged: int  # number of samples to judge by
    judged_batch: Batch
    by_loss: bool = False  # what judges; else the accuracy
    order: Order = without_replacement
    # The same with some of the training samples held out, to be judged by; None if nothing can be.
    held_out: Problem | None = None

    def value(self, model: nn.Module, most: int | None = None) -> float:
        """Return the percentage of right answers, or the loss, on all samples or about ``most``."""
        # Evenly spread: images may lie in the order of their classes.
        device = next(model.parameters(), torch.empty(0)).device
        chosen = torch.arange(0, self.judged, max(1, self.judged // (most or self.judged)), device=device)
        if not self.by_loss:
            right = count_right(model, len(chosen), lambda numbers: self.judged_batch(chosen[numbers]))
            return 100 * right / len(chosen)
        inputs, targets = self.judged_batch(chosen)
        with torch.no_grad():
            return float(self.loss(model.eval()(inputs), targets))


class WithMirrorImage(nn.Module):
    """Adds up what a model says of images, (N, C, H, W), and of their mirror images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.model(x) + self.model(x.flip(-1))
        return both


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and by what it is judged."""

    # Given a folder or a name on the hub for CIFAR-10, and the device that is to hold the data.
    load: Callable[[str | None, torch.device], Problem]
    batch_size: int
    steps: int
    target: float  # the value to which steps and seconds are counted
    measure: str = "accuracy, %"
    highest: bool = True  # whether the highest value is the best
    rest: float = 0.01  # AdamW's rate for biases, norms, positions and embeddings
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by optimizer
    held_out: bool = False  # whether training samples can be held out
    mirrored: bool = False  # whether the mirror image of an input is as good


@cache
def cifar10(data: str | None, device: torch.device) -> tuple[Images, Images]:
    """Load the training and the test images of CIFAR-10."""
    train, test = (load(CIFAR10, data, test=test).to(device) for test in (False, True))
    return train, test


@cache
def cifar(data: str | None, device: torch.device, **how: Any) -> Problem:
    """Load CIFAR-10 for the network of airbench; to search by, every tenth training image is held out."""
    train, test = cifar10(data, device)
    tenth = torch.arange(len(train), device=device) % 10 == 0
    searched = of_images(train[~tenth], train[tenth], **how)
    return replace(of_images(train, test, **how), held_out=searched)


def of_images(train: Images, test: Images, **how: Any) -> Problem:
    """Return the problem of telling apart 32×32 images, with flips and shifts by two pixels."""
    normalise, augmentation = Normaliser(train.pixels), Augmentation(flip=True, shift=2)
    patches = normalise(train.pixels[:5000]).unfold(2, 2, 1).unfold(3, 2, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).cpu()

    def batch(numbers: Tensor, draw: Generator) -> tuple[Tensor, Tensor]:
        return normalise.batch(train, numbers, augmentation, draw)

    loss, judged = partial(class_loss, label_smoothing=0.1), partial(normalise.batch, test)
    return Problem(lambda: airbench(patches, **how), len(train), batch, loss, len(test), judged)


@cache
def gpt(data: str | None, device: torch.device, length: int = 64, **how: Any) -> Problem:
    """Load the sources of Python's standard library, of which every tenth file is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)

    def joined(held_out: bool) -> Tensor:
        texts = (path.read_bytes() for n, path in enumerate(files) if (n % 10 == 0) == held_out)
        return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).to(device)

    train, held_out, window = joined(False), joined(True), torch.arange(length + 1, device=device)

    def windows(of: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = of[starts[:, None] + window].long()
        return rows[:, :-1], rows[:, 1:]

    judged = torch.arange(0, len(held_out) - length, length, device=device)[:1024]
    return Problem(
        lambda: small_gpt(tokens=length, **how),
        len(train) - length,
        lambda starts, draw: windows(train, starts),
        class_loss,
        len(judged),
        lambda numbers: windows(held_out, judged[numbers]),
        by_loss=True,
        order=with_replacement,
    )


def _in_memory(inputs: Tensor, targets: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda numbers, draw=None: (inputs[numbers], targets[numbers])


def digits(
    build: Callable[[], nn.Module], itself: bool = False
) -> Callable[[str | None, torch.device], Problem]:
    """Return what loads the digits, to be told apart, or each to be its own target."""

    def load_digits(data: str | None, device: torch.device) -> Problem:
        parts = {name: [each.to(device) for each in part] for name, part in DigitsTask().load(None).items()}
        train, held_out = parts["final"][0], (parts["tuning"][1], parts["final"][1])
        x, of_held_out = (
            pixels.permute(0, 3, 1, 2).float() / 240  # which are 0 to 240
            for pixels in (train.pixels, torch.cat([part.pixels for part in held_out]))
        )
        if itself:
            batch = _in_memory(x, x.flatten(1))
            return Problem(build, len(x), batch, mse_loss, len(x), batch, by_loss=True)
        judged = _in_memory(of_held_out, torch.cat([part.labels for part in held_out]))
        return Problem(build, len(x), _in_memory(x, train.labels), class_loss, len(of_held_out), judged)

    return load_digits


FULL = 1024  # all training digits
_IMAGES: dict[str, Any] = {"target": 60.0, "rest": 0.03, "options": {"muon": {"momentum": 0.6}}}
_IMAGES |= {"held_out": True, "mirrored": True}
_TEXT: dict[str, Any] = {"measure": "nats a byte", "highest": False, "target": 2.2, "rest": 0.005}
_TEXT["options"] = {"muon": {"momentum": 0.8}}
_AIRBENCH = partial(cifar, widths=(64, 256, 256))
# Of a ninth, as airbench94 has them, logits cannot grow enough in so few steps, by FOP's or by Muon's. With
# halves both end highest (records/race).
_HALF = partial(cifar, logits=1 / 2)
_GPT_2M = partial(gpt, dim=192, depth=4)  # 1.9 million parameters
_SQUARES: dict[str, Any] = {"target": 0.02, "measure": "training MSE", "highest": False}
TASKS = {
    "cifar-half-500": Task(_HALF, 500, 120, **_IMAGES),
    "cifar-half-2000": Task(_HALF, 2000, 60, **_IMAGES),
    "cifar-half-5000": Task(_HALF, 5000, 30, **_IMAGES),
    "cifar-half-16384": Task(_HALF, 16384, 24, **_IMAGES),
    "cifar-half-25000": Task(_HALF, 25000, 20, **_IMAGES),
    "cifar-half-50000": Task(_HALF, 50000, 20, **_IMAGES),
    # As airbench94 has it.
    "cifar-500": Task(cifar, 500, 120, **_IMAGES),
    "cifar-5000": Task(cifar, 5000, 30, **_IMAGES),
    "cifar-16384": Task(cifar, 16384, 24, **_IMAGES),
    "cifar-25000": Task(cifar, 25000, 20, **_IMAGES),
    "cifar-50000": Task(cifar, 50000, 20, **_IMAGES),
    # For a GPU: the network of airbench in full (2.0 million parameters).
    "cifar-full-2000": Task(_AIRBENCH, 2000, 200, **_IMAGES | {"target": 85.0}),
    "cifar-full-5000": Task(_AIRBENCH, 5000, 60, **_IMAGES | {"target": 85.0}),
    "cifar-full-16384": Task(_AIRBENCH, 16384, 30, **_IMAGES | {"target": 80.0}),
    "cifar-full-50000": Task(_AIRBENCH, 50000, 30, **_IMAGES | {"target": 80.0}),
    "gpt-128": Task(gpt, 128, 100, **_TEXT),
    "gpt-1024": Task(gpt, 1024, 60, **_TEXT),
    "gpt-tied-128": Task(partial(gpt, tied=True), 128, 100, **_TEXT),
    "gpt-2m-128": Task(_GPT_2M, 128, 100, **_TEXT),
    "gpt-2m-1024": Task(_GPT_2M, 1024, 60, **_TEXT),
    "gpt-2m-4096": Task(_GPT_2M, 4096, 60, **_TEXT),
    "digits-autoencoder": Task(digits(digits_autoencoder, itself=True), FULL, 200, **_SQUARES),
    # The sizes of Hinton and Salakhutdinov 2006.
    "deep-autoencoder": Task(
        digits(partial(digits_autoencoder, (1000, 500, 250, 30)), itself=True), FULL, 200, **_SQUARES
    ),
    "digits-cnn": Task(digits(digits_cnn), FULL, 40, target=95.0),
    "digits-lstm": Task(digits(DigitsLSTM), 128, 200, target=95.0),
    # Long, with little but noise in a step.
    "digits-cnn-long": Task(digits(digits_cnn), 32, 2000, target=98.0),
    "digits-mlp-long": Task(digits(partial(mlp, (64, 64, 64, 10))), 32, 2000, target=96.0),
}
# Names for several tasks together.
GROUPS = {
    "cifar10-fast": [name for name in TASKS if name.startswith("cifar-half")],
    "cifar10-full": [name for name in TASKS if name.startswith("cifar-full")],
    "language-model": [name for name in TASKS if name.startswith("gpt")],
    "autoencoder": [name for name in TASKS if name.endswith("autoencoder")],
}
