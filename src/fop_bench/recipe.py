"""What a recipe is made of: data, a network, and the studies that compare optimizers on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fop_bench.augmentation import Augmentation
from fop_bench.images import Choice, Images, Source, by_class, load
from fop_bench.optimizers import BUILDERS
from fop_bench.training import cosine


@dataclass(frozen=True)
class Parts:
    """The images of a task."""

    train: Images  # what tuning runs train on
    held_out: Images  # what tuning runs are judged on
    test: Images  # what final runs are judged on
    everything: Images | None = None  # what final runs train on, if that is the held-out images too

    def judging(self, *, final: bool) -> Images:
        """Return the images that a run is judged on."""
        return self.test if final else self.held_out

    def training(self, *, final: bool) -> Images:
        """Return the images to train on."""
        return self.everything if final and self.everything is not None else self.train


@dataclass(frozen=True)
class ImageTask:
    """A data set of images, and which of them are used; None for all. ``origin`` says where it is from."""

    source: Source
    train: Choice | None = None
    held_out: float | Choice = 0.1  # share of every class of `train`, or a choice of other images
    test: Choice | None = None
    has_test: bool = True  # False if there are only tuning runs: no test image is loaded

    @property
    def origin(self) -> str:
        """The data set's name on the hub."""
        return self.source.hub

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        """Load a rank's share of the images from a folder or a name on the hub; None for ``origin``."""

        def mine(choose: Choice | None) -> Choice:
            return lambda labels: (choose or _all)(labels)[rank::ranks]

        test = load(self.source, data, test=True, choose=mine(self.test)) if self.has_test else None
        if callable(self.held_out):
            train = load(self.source, data, choose=mine(self.train))
            held_out = load(self.source, data, choose=mine(self.held_out))
            return Parts(train, held_out, test or held_out)
        share = self.held_out

        def held_out_last(labels: Tensor) -> Tensor:
            chosen = mine(self.train)(labels)
            held = _held_out(labels[chosen], share)
            return torch.cat([chosen[~held], chosen[held]])

        # In this order both parts are views, and ImageNet's 193 GB are held once.
        everything = load(self.source, data, choose=held_out_last)
        count = len(everything) - int(_held_out(everything.labels, share).sum())
        return Parts(everything[:count], everything[count:], test or everything[count:], everything)


def _all(labels: Tensor) -> Tensor:
    return torch.arange(len(labels))


def _held_out(labels: Tensor, share: float) -> Tensor:
    """Mark the last images of every class, at least one where there are two."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for _, of_class in by_class(labels):
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        held[of_class[len(of_class) - count :]] = True
    return held


@cache
def digits_split() -> tuple[Tensor, Tensor, Tensor]:
    """Return the sample numbers of the fixed, stratified train, validation and test parts (1024, 386, 387).

    1024 = 16 × 64 = 2 × 512: no batch size of the demo leaves samples over.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    labels = load_digits().target
    train, rest = train_test_split(range(len(labels)), train_size=1024, stratify=labels, random_state=0)
    held_out, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=0)
    return torch.tensor(train), torch.tensor(held_out), torch.tensor(test)


@dataclass(frozen=True)
class DigitsTask:
    """Scikit-learn's 1797 handwritten digits, 8×8 grey pixels whose 0 to 16 become 0 to 240; no download."""

    origin: str = "scikit-learn"

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        """Return a rank's share of the three parts; raises ValueError if other data are asked for."""
        from sklearn.datasets import load_digits  # noqa: PLC0415

        if data is not None:
            raise ValueError(f"--data is {data}; the digits come with scikit-learn, leave it out")
        digits = load_digits()
        pixels = torch.tensor(digits.images * 15, dtype=torch.uint8).unsqueeze(-1)
        everything = Images(pixels, torch.tensor(digits.target), tuple(map(str, digits.target_names)))
        train, held_out, test = (everything[part[rank::ranks]] for part in digits_split())
        return Parts(train, held_out, test)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    ``halves`` decides in which half of its batch a sample is: chance ("random"), the sample, which is in the
    same one every time, as far as batches allow ("fixed"), or its class ("classes").
    """

    optimizer: str  # key of `BUILDERS`
    grid: Mapping[str, Sequence[Any]]  # what tuning chooses from; every combination is one tuning run
    options: Callable[[int], Mapping[str, Any]] = lambda batch_size: {}  # fixed ones, given the batch size
    label: str = ""  # in tables; the optimizer's by default
    halves: str = "random"
    formula: str = "paper"  # or a key of `FORMULAS` for a changed equation

    @property
    def title(self) -> str:
        """The label in tables."""
        return self.label or BUILDERS[self.optimizer][0]

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class Study:
    """A comparison: who, at which batch sizes for how many epochs, and over which seeds.

    If ``tuned``, the best options of the grid, by runs with seed 0 on the held-out images, go into the runs
    with ``seeds``; if not, every combination does, which maps the grid.
    """

    contenders: Mapping[str, Contender]
    epochs: Mapping[int, int]  # by batch size
    seeds: Sequence[int]
    tuned: bool = True
    phase: str = "final"  # of the runs with `seeds`; "tuning" to judge these on held-out images too


@dataclass(frozen=True)
class Recipe:
    """Data, network and studies."""

    name: str
    title: str
    tasks: Mapping[str, ImageTask | DigitsTask]
    model: Callable[[int], nn.Module]  # given the number of classes
    studies: Mapping[str, Study]  # "comparison" is the default one
    targets: Mapping[str, float] = field(default_factory=dict)  # what "reached" means: accuracy, train_loss
    augmentation: Augmentation = field(default_factory=Augmentation)
    schedule: Callable[[Optimizer, int], LRScheduler] = cosine  # given the number of all steps
    bf16: bool = True  # whether all runs use bf16 autocast on a GPU
