"""What a recipe is made of, data, a network and the studies that compare optimizers; and all recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fop_bench.images import Augmentation, Choice, Images, Source, load, long_tail, of_each_class, per_class
from fop_bench.models import ResNet, digits_cnn, resnet18
from fop_bench.optimizers import PEERS
from fop_bench.training import cosine

# By phase, "tuning" or "final", the images to train on and those to judge by.
Parts = dict[str, tuple[Images, Images]]


@dataclass(frozen=True)
class ImageTask:
    """A data set of images, and which of them are used; None for all."""

    source: Source
    train: Choice | None = None
    held_out: Choice | None = None  # of other images; None for the last tenth of every class of `train`
    test: Choice | None = None

    @property
    def origin(self) -> str:
        return self.source.hub

    def load(self, data: str | None) -> Parts:
        """Load the images from a folder or a name on the hub; None for ``origin``."""
        part = partial(load, self.source, data)
        everything, test = part(choose=self.train), part(choose=self.test, test=True)
        held = _last_tenth(everything.labels)
        tuning = everything[~held], everything[held]
        if self.held_out is not None:
            tuning = everything, part(choose=self.held_out)
        return {"tuning": tuning, "final": (everything, test)}


def _last_tenth(labels: Tensor) -> Tensor:
    """Mark the last tenth of every class, at least one image where there are two."""

    def last(_: int, of_class: Tensor) -> Tensor:
        count = min(len(of_class) - 1, max(1, round(0.1 * len(of_class))))
        return of_class[len(of_class) - count :]

    return torch.zeros(len(labels), dtype=torch.bool).index_fill(0, of_each_class(labels, last), True)


@dataclass(frozen=True)
class DigitsTask:
    """Scikit-learn's 1797 handwritten digits, 8×8 grey pixels whose 0 to 16 become 0 to 240; no download."""

    origin: str = "scikit-learn"

    def load(self, data: str | None) -> Parts:
        """Return 1024, 386 and 387 digits, stratified; raises ValueError if other data are asked for."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if data is not None:
            raise ValueError(f"--data is {data}; the digits come with scikit-learn, leave it out")
        digits = load_digits()
        pixels = torch.tensor(digits.images * 15, dtype=torch.uint8).unsqueeze(-1)
        everything = Images(pixels, torch.tensor(digits.target), tuple(map(str, digits.target_names)))
        numbers, labels, split = range(len(pixels)), digits.target, partial(train_test_split, random_state=0)
        first, rest = split(numbers, train_size=1024, stratify=labels)
        parts = first, *split(rest, train_size=0.5, stratify=labels[rest])
        train, held_out, test = (everything[part] for part in parts)
        return {"tuning": (train, held_out), "final": (train, test)}


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    optimizer: str  # key of `PEERS`
    grid: Mapping[str, Sequence[Any]]  # what tuning chooses from; every combination is one tuning run
    # Its other options; a function is given the batch size.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""  # in tables; the optimizer's by default

    @property
    def title(self) -> str:
        return self.label or PEERS[self.optimizer].label

    def options(self, batch_size: int) -> dict[str, Any]:
        return {key: each(batch_size) if callable(each) else each for key, each in self.fixed.items()}

    def combinations(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class Study:
    """A comparison: who, at which batch sizes for how many epochs, and over which seeds."""

    contenders: Mapping[str, Contender]
    epochs: Mapping[int, int]  # by batch size
    seeds: Sequence[int]  # of the runs with the best options, which runs with seed 0 find


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


def grids(**of: Mapping[str, Sequence[Any]]) -> dict[str, Contender]:
    """Return optimizers with these grids and otherwise their defaults."""
    return {name: Contender(name, grid) for name, grid in of.items()}


def second_order(grid: Mapping[str, Sequence[Any]], **fixed: Any) -> dict[str, Contender]:
    """Return K-FAC and FOP with the same grid and the same fixed options."""
    return {name: Contender(name, grid, fixed) for name in ("kfac", "fop")}


def by_plateau(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate when the epoch's training loss has not fallen for five epochs."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=5)


CLIPPED: dict[str, Any] = {"momentum": 0.9, "kl_clip": 1e-2}
CIFAR10 = Source("uoft-cs/cifar10", image="img", classes=10)
CIFAR100 = Source("uoft-cs/cifar100", image="img", label="fine_label", classes=100)

# --- Digits: seconds a run, no download

RATES = second_order({"lr": (0.01, 0.03, 0.1, 0.3)})
FIRST_ORDER = grids(sgd={"lr": (0.03, 0.1, 0.3, 1.0)}, adamw={"lr": (0.003, 0.01, 0.03, 0.1)})
TUNED = FIRST_ORDER | second_order({"lr": (0.03, 0.3), "damping": (1e-4, 1e-3)})

DIGITS = Recipe(
    name="digits",
    title="A small CNN on handwritten digits",
    tasks={"digits": DigitsTask()},
    model=digits_cnn,
    studies={
        "comparison": Study(TUNED, {64: 5, 1024: 20}, seeds=(1, 2, 3)),
        "demo": Study(FIRST_ORDER | RATES, {64: 10, 512: 25, 1024: 50}, seeds=(1, 2, 3)),
    },
    targets={"accuracy": 0.97, "train_loss": 0.05},
)

# --- A narrow ResNet on 10,000 CIFAR-10 images: well under a minute a run on one CPU core

IMAGES = 10_000
SMALL_EPOCHS = {500: 15, 2000: 20, 5000: 30, IMAGES: 30}
RATE = (0.03, 0.1, 0.3)


def small_resnet(classes: int) -> nn.Module:
    """Build a ResNet of three blocks behind a stem that turns patches of 4×4 pixels into 8 channels."""
    model = ResNet(width=8, blocks=(1, 1, 1), classes=classes)
    model.features[0] = nn.Conv2d(3, 8, 4, stride=4, bias=False)
    return model


SMALL = CLIPPED | {"curvature_interval": lambda batch_size: max(1, round(IMAGES / batch_size))}  # an epoch


def _variant(label: str, optimizer: str = "fop", **changes: Any) -> Contender:
    return Contender(optimizer, {"lr": RATE}, {**SMALL, "damping": 1e-4, **changes}, label)


# With beta = 0, η* = 1: "η* only" is K-FAC. What is left of η* is β*'s step with and without it.
ABLATION = {
    "fop": _variant("FOP: β* and η*"),
    "beta-only": _variant("β* only (η = 1)", eta=1.0),
    "mixing-0.1": _variant("fixed β = 0.1, η = 1", beta=0.1, eta=1.0),
    "mixing-0.01": _variant("fixed β = 0.01, η = 1", beta=0.01, eta=1.0),
    "kfac": _variant("K-FAC with KL clip (= η* only)", "kfac"),
    "kfac-noclip": _variant("K-FAC without KL clip", "kfac", kl_clip=None),
    "fop-noclip": _variant("FOP without KL clip", kl_clip=None),
}
LIBRARY = grids(
    muon={"lr": (0.01, 0.03, 0.1), "adamw_lr": (0.003, 0.01)},
    soap={"lr": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)},
    lamb={"lr": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)},
)
SIX_RATES = grids(
    sgd={"lr": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}, adamw={"lr": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)}
) | second_order({"lr": RATE, "damping": (1e-4, 1e-3)}, **SMALL)
FIRST, LATER = per_class(IMAGES // 10), per_class(200, skip=IMAGES // 10)
SEEDS = (1, 2, 3)
CIFAR10_SMALL = Recipe(
    name="cifar10-small",
    title="A narrow ResNet on 10,000 CIFAR-10 images",
    tasks={"cifar10": ImageTask(CIFAR10, train=FIRST, held_out=LATER, test=per_class(500))},
    model=small_resnet,
    studies={
        "comparison": Study(SIX_RATES, SMALL_EPOCHS, SEEDS),
        "ablation": Study(ABLATION, {2000: 20, IMAGES: 30}, SEEDS),
        "library": Study(LIBRARY, SMALL_EPOCHS, SEEDS),
    },
    targets={"accuracy": 0.45, "train_loss": 1.3},
    augmentation=Augmentation(flip=True),
)

# --- The paper's tables; what is not said to be otherwise is the paper's

# The paper does not say: augmentation (flip and shift by 4 here), weight decay (tuned here), how long a run
# may take (100 epochs here: one more than its longest). One GPU here, two there.
CIFAR10_RESNET18 = Recipe(
    name="cifar10-resnet18",
    title="ResNet-18 on CIFAR-10 (the paper's Table 1)",
    tasks={"cifar10": ImageTask(CIFAR10)},
    model=resnet18,
    studies={
        "comparison": Study(
            grids(
                sgd={"lr": (0.1, 0.3, 1.0, 3.0), "weight_decay": (1e-4, 5e-4)},
                adamw={"lr": (0.001, 0.003, 0.01, 0.03), "weight_decay": (0.01, 0.1)},
                muon={"lr": (0.01, 0.03, 0.1, 0.3), "adamw_lr": (0.001, 0.01)},
            )
            | second_order(
                {"lr": (0.03, 0.1), "damping": (1e-4, 1e-3), "weight_decay": (5e-4, 5e-3)},
                **CLIPPED,
                curvature_interval=lambda batch_size: max(5, 100 * 2048 // batch_size),
            ),
            dict.fromkeys((2048, 4096, 8192, 16384, 32768, 50_000), 100),
            seeds=range(1, 6),
        )
    },
    targets={"accuracy": 0.91},
    augmentation=Augmentation(flip=True, shift=4),
    schedule=by_plateau,
)

# The paper does not say: batch size, epochs and weight decay; batch 128 and 200 epochs are those of
# Cao et al. 2019, whose long-tailed CIFAR this is.
CIFAR_LT_RESNET32 = Recipe(
    name="cifar-lt-resnet32",
    title="ResNet-32 on long-tailed CIFAR (the paper's Table 4)",
    tasks={
        f"CIFAR-{source.classes}-LT {factor}": ImageTask(source, train=long_tail(factor, largest))
        for source, largest in ((CIFAR10, 5000), (CIFAR100, 500))
        for factor in (100, 50, 10)
    },
    model=partial(ResNet, 16, (5, 5, 5)),
    studies={
        "comparison": Study(
            grids(
                sgd={"lr": (0.03, 0.1, 0.3), "weight_decay": (2e-4, 1e-3)},
                adamw={"lr": (0.001, 0.003, 0.01), "weight_decay": (0.01, 0.1)},
            )
            | second_order(
                {"lr": (0.01, 0.03, 0.1), "weight_decay": (5e-4, 5e-3)},
                **CLIPPED | {"damping": 1e-3, "curvature_interval": 100},
            ),
            {128: 200},
            seeds=range(1, 6),
        )
    },
    augmentation=Augmentation(flip=True, shift=4),
)

ALL = (DIGITS, CIFAR10_SMALL, CIFAR10_RESNET18, CIFAR_LT_RESNET32)
RECIPES: dict[str, Recipe] = {each.name: each for each in ALL}


def recipe(name: str) -> Recipe:
    """Return a recipe by its name; raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
