"""What a recipe is made of: data, a network, and the studies that compare optimizers on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fop_bench.augmentation import Augmentation
from fop_bench.images import Choice, Images, Source, by_class, load
from fop_bench.optimizers import BUILDERS
from fop_bench.training import cosine

# Given the optimizer and the number of all steps.
Schedule = Callable[[Optimizer, int], LRScheduler]


@dataclass(frozen=True)
class Parts:
    """The images of a task.

    Attributes:
        train: what tuning runs train on.
        held_out: training images that tuning runs are judged by.
        test: what final runs are judged by.
        everything: what final runs train on, where that is the held-out images too; None for ``train``.
    """

    train: Images
    held_out: Images
    test: Images
    everything: Images | None = None

    def judging(self, *, final: bool) -> Images:
        """Give the images that a run is judged by."""
        return self.test if final else self.held_out

    def training(self, *, final: bool) -> Images:
        """Give the images to train on."""
        return self.everything if final and self.everything is not None else self.train


class Task(Protocol):
    """A data set; ``origin`` says where it comes from."""

    @property
    def origin(self) -> str: ...

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts: ...


@dataclass(frozen=True)
class ImageTask:
    """A data set of images, and which of them are used.

    Attributes:
        source: where it comes from.
        train: chooses the training images.
        held_out: share of every class of these that is held out for tuning, or a choice of other images.
        test: chooses the test images.
    """

    source: Source
    train: Choice | None = None
    held_out: float | Choice = 0.1
    test: Choice | None = None

    @property
    def origin(self) -> str:
        """The data set's name on the hub."""
        return self.source.hub

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        """Load a rank's share of the images from a folder, a name on the hub, or (None) the source itself."""

        def mine(choose: Choice | None) -> Choice:
            return lambda labels: (_all(labels) if choose is None else choose(labels))[rank::ranks]

        test = load(self.source, data, test=True, choose=mine(self.test))
        if callable(self.held_out):
            train = load(self.source, data, choose=mine(self.train))
            return Parts(train, load(self.source, data, choose=mine(self.held_out)), test)
        share = self.held_out

        def held_out_last(labels: Tensor) -> Tensor:
            chosen = mine(self.train)(labels)
            held = _held_out(labels[chosen], share)
            return torch.cat([chosen[~held], chosen[held]])

        # In this order both parts are views, and ImageNet's 193 GB are held once.
        everything = load(self.source, data, choose=held_out_last)
        count = len(everything) - int(_held_out(everything.labels, share).sum())
        return Parts(everything[:count], everything[count:], test, everything)


def _all(labels: Tensor) -> Tensor:
    return torch.arange(len(labels))


def _held_out(labels: Tensor, share: float) -> Tensor:
    """Mark the last images of every class, one at least where there are two."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for _, of_class in by_class(labels):
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        held[of_class[len(of_class) - count :]] = True
    return held


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        optimizer: key of `BUILDERS`.
        grid: the values that tuning chooses from; every combination is one tuning run.
        options: those that are fixed, given the batch size.
        label: how a table names it; the optimizer's label by default.
        halves: what decides in which half of its batch a sample is: chance ("random"), the sample, which is
            in the same one every time, as far as batches allow ("fixed"), or its class ("classes").
        formula: "paper", or a key of `FORMULAS` for a changed equation.
    """

    optimizer: str
    grid: Mapping[str, Sequence[Any]]
    options: Callable[[int], Mapping[str, Any]] = lambda batch_size: {}
    label: str = ""
    halves: str = "random"
    formula: str = "paper"

    @property
    def title(self) -> str:
        """The label in tables."""
        return self.label or BUILDERS[self.optimizer][0]

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Give every combination of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class Study:
    """A comparison: who, at which batch sizes for how many epochs, and over which seeds.

    Attributes:
        contenders: by name.
        epochs: by batch size.
        seeds: of the final runs; the tuning seed is 0.
        tuned: whether the best options of the grid, by runs on the held-out images, go into the final runs;
            if not, every combination does, which maps the grid.
    """

    contenders: Mapping[str, Contender]
    epochs: Mapping[int, int]
    seeds: Sequence[int]
    tuned: bool = True


@dataclass(frozen=True)
class Recipe:
    """Data, network and studies.

    Attributes:
        name: as given on the command line.
        title: one line for reports.
        tasks: by name.
        model: builds the network from the number of classes.
        studies: by name; "comparison" is the default one.
        targets: what "reached" means: an "accuracy" or "train_loss".
        augmentation: of training images.
        schedule: of the learning rate, the same for every optimizer.
        bf16: whether all runs use bf16 autocast on a GPU.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    model: Callable[[int], nn.Module]
    studies: Mapping[str, Study]
    targets: Mapping[str, float]
    augmentation: Augmentation = field(default_factory=Augmentation)
    schedule: Schedule = field(default_factory=lambda: by_cosine)
    bf16: bool = True


def by_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Go down half a cosine from the learning rate to 0."""
    return LambdaLR(optimizer, lambda step: cosine(step / steps))


def by_plateau(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate when the epoch's training loss has not fallen for five epochs."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=5)


def curvature_interval(batch_size: int, smallest: int) -> int:
    """Give the steps between new curvatures: 100 at the smallest batch, fewer at larger ones, 5 at least."""
    return max(5, 100 * smallest // batch_size)
