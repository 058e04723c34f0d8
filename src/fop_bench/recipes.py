"""What a recipe is made of, data, a network and the studies that compare optimizers; and all recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fop_bench.images import Augmentation, Choice, Images, Source, by_class, load, long_tail, per_class
from fop_bench.models import ResNet, T2TViT, digits_cnn, resnet18, resnet50
from fop_bench.optimizers import PEERS
from fop_bench.training import cosine

# By phase, "tuning" or "final", the images to train on and those to judge by.
Parts = dict[str, tuple[Images, Images]]


@dataclass(frozen=True)
class ImageTask:
    """A data set of images, and which of them are used; None for all."""

    source: Source
    train: Choice | None = None
    held_out: float | Choice = 0.1  # share of every class of `train`, or a choice of other images
    test: Choice | None = None

    @property
    def origin(self) -> str:
        """The data set's name on the hub."""
        return self.source.hub

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        """Load a rank's share of the images from a folder or a name on the hub; None for ``origin``."""

        def images(choose: Choice, test: bool = False) -> Images:
            return load(self.source, data, test=test, choose=choose)

        def mine(choose: Choice | None) -> Choice:
            return lambda labels: (choose(labels) if choose else torch.arange(len(labels)))[rank::ranks]

        def held_out_last(labels: Tensor) -> Tensor:
            chosen = mine(self.train)(labels)
            held = _held_out(labels[chosen], self.held_out)
            return torch.cat([chosen[~held], chosen[held]])

        test = images(mine(self.test), test=True)
        if callable(self.held_out):
            train = everything = images(mine(self.train))
            held_out = images(mine(self.held_out))
        else:
            # In this order both parts are views, and ImageNet's 193 GB are held once.
            everything = images(held_out_last)
            count = len(everything) - int(_held_out(everything.labels, self.held_out).sum())
            train, held_out = everything[:count], everything[count:]
        return {"tuning": (train, held_out), "final": (everything, test)}


def _held_out(labels: Tensor, share: Any) -> Tensor:
    """Mark the last images of every class, at least one where there are two."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for _, of_class in by_class(labels):
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        held[of_class[len(of_class) - count :]] = True
    return held


@cache
def digits_split() -> tuple[Tensor, Tensor, Tensor]:
    """Return the sample numbers of the stratified train, validation and test parts (1024, 386, 387)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

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
        from sklearn.datasets import load_digits

        if data is not None:
            raise ValueError(f"--data is {data}; the digits come with scikit-learn, leave it out")
        digits = load_digits()
        pixels = torch.tensor(digits.images * 15, dtype=torch.uint8).unsqueeze(-1)
        everything = Images(pixels, torch.tensor(digits.target), tuple(map(str, digits.target_names)))
        train, held_out, test = (everything[part[rank::ranks]] for part in digits_split())
        return {"tuning": (train, held_out), "final": (train, test)}


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    optimizer: str  # key of `PEERS`
    grid: Mapping[str, Sequence[Any]]  # what tuning chooses from; every combination is one tuning run
    # Its other options; a function is given the batch size.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""  # in tables; the optimizer's by default
    halves: str = "random"  # what decides a sample's half of its batch; or "fixed" (the sample), "classes"
    formula: str = "paper"  # or a key of `FORMULAS` for a changed equation

    @property
    def title(self) -> str:
        """The label in tables."""
        return self.label or PEERS[self.optimizer].label

    def options(self, batch_size: int) -> dict[str, Any]:
        """Return the fixed options at a batch size."""
        return {key: each(batch_size) if callable(each) else each for key, each in self.fixed.items()}

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of the grid."""
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

    def network(self, classes: int, device: torch.device) -> nn.Module:
        """Build the network on a device, for images whose channels come last in memory."""
        model = self.model(classes).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        return model


def falling(smallest: int) -> Callable[[int], int]:
    """Return a curvature interval of 100 steps at the smallest batch, fewer at larger ones, at least 5."""
    return lambda batch_size: max(5, 100 * smallest // batch_size)


def grids(**of: Mapping[str, Sequence[Any]]) -> dict[str, Contender]:
    """Return optimizers with these grids and otherwise their defaults."""
    return {name: Contender(name, grid) for name, grid in of.items()}


def second_order(grid: Mapping[str, Sequence[Any]], **fixed: Any) -> dict[str, Contender]:
    """Return K-FAC and FOP with the same grid and the same fixed options."""
    return {name: Contender(name, grid, fixed) for name in ("kfac", "fop")}


def _comparison(
    contenders: Mapping[str, Contender], epochs: Mapping[int, int], seeds: int
) -> dict[str, Study]:
    return {"comparison": Study(contenders, epochs, range(1, seeds + 1))}


def by_plateau(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate when the epoch's training loss has not fallen for five epochs."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=5)


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


def _once_in(epochs: float) -> Callable[[int], int]:
    return lambda batch_size: max(1, round(epochs * IMAGES / batch_size))


SMALL = {"momentum": 0.9, "kl_clip": 1e-2, "curvature_interval": _once_in(1.0)}


def _variant(
    label: str, optimizer: str = "fop", halves: str = "random", formula: str = "paper", **changes: Any
) -> Contender:
    fixed = {**SMALL, "damping": 1e-4, **changes}
    return Contender(optimizer, {"lr": RATE}, fixed, label, halves, formula)


# With beta = 0, η* = 1: "η* only" is K-FAC. What is left of η* is β*'s step with and without it.
ABLATION = {
    "fop": _variant("FOP: β* and η*, random halves"),
    "beta-only": _variant("β* only (η = 1)", eta=1.0),
    "mixing-0.1": _variant("fixed β = 0.1, η = 1", beta=0.1, eta=1.0),
    "mixing-0.01": _variant("fixed β = 0.01, η = 1", beta=0.01, eta=1.0),
    "kfac": _variant("K-FAC with KL clip (= η* only)", "kfac"),
    "kfac-noclip": _variant("K-FAC without KL clip", "kfac", kl_clip=None),
    "fop-noclip": _variant("FOP without KL clip", kl_clip=None),
    "halves-fixed": _variant("FOP, halves by position", halves="fixed"),
    "halves-classes": _variant("FOP, halves by class", halves="classes"),
}
FORMULA = {
    "fop": _variant("F in (4), Ga in (17)"),
    "damped": _variant("F̂ in (4)", formula="damped projection"),
    "combined": _variant("Gc in (17), so that η = 1", eta=1.0),
    "fresher": _variant("new curvature 5 × as often", curvature_interval=_once_in(0.2)),
    "staler": _variant("new curvature 1/5 as often", curvature_interval=_once_in(5.0)),
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
        "formula": Study(FORMULA, {2000: 20, IMAGES: 30}, SEEDS),
        "library": Study(LIBRARY, SMALL_EPOCHS, SEEDS),
    },
    targets={"accuracy": 0.45, "train_loss": 1.3},
    augmentation=Augmentation(flip=True),
)

# --- The paper's tables; what is not said to be otherwise is the paper's

TRUST = {"lr": (0.03, 0.1), "damping": (1e-4, 1e-3)}

# The paper does not say: augmentation (flip and shift by 4 here), weight decay (tuned here), how long a run
# may take (100 epochs here: one more than its longest). One GPU here, two there.
CIFAR10_RESNET18 = Recipe(
    name="cifar10-resnet18",
    title="ResNet-18 on CIFAR-10 (the paper's Table 1)",
    tasks={"cifar10": ImageTask(CIFAR10)},
    model=resnet18,
    studies=_comparison(
        grids(
            sgd={"lr": (0.1, 0.3, 1.0, 3.0), "weight_decay": (1e-4, 5e-4)},
            adamw={"lr": (0.001, 0.003, 0.01, 0.03), "weight_decay": (0.01, 0.1)},
            muon={"lr": (0.01, 0.03, 0.1, 0.3), "adamw_lr": (0.001, 0.01)},
        )
        | second_order(
            {**TRUST, "weight_decay": (5e-4, 5e-3)},
            momentum=0.9,
            kl_clip=1e-2,
            curvature_interval=falling(2048),
        ),
        dict.fromkeys((2048, 4096, 8192, 16384, 32768, 50_000), 100),
        seeds=5,
    ),
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
    studies=_comparison(
        grids(
            sgd={"lr": (0.03, 0.1, 0.3), "weight_decay": (2e-4, 1e-3)},
            adamw={"lr": (0.001, 0.003, 0.01), "weight_decay": (0.01, 0.1)},
        )
        | second_order(
            {"lr": (0.01, 0.03, 0.1), "weight_decay": (5e-4, 5e-3)},
            **{"momentum": 0.9, "damping": 1e-3, "kl_clip": 1e-2, "curvature_interval": 100},
        ),
        {128: 200},
        seeds=5,
    ),
    augmentation=Augmentation(flip=True, shift=4),
)

# T2T-ViT_t-14; the paper names no size. Any folder of classes will do. The images, 19 GB as bytes, are held
# in memory. Several GPUs: by torchrun.
IMAGENET100_T2TVIT = Recipe(
    name="imagenet100-t2tvit",
    title="T2T-ViT on ImageNet-100 (the paper's Table 2)",
    tasks={"imagenet100": ImageTask(Source("clane9/imagenet-100", test="validation", size=224))},
    model=lambda classes: T2TViT(classes=classes),
    studies=_comparison(
        grids(adamw={"lr": (0.0005, 0.001, 0.002, 0.004)})
        | second_order(TRUST, momentum=0.9, weight_decay=5e-3, curvature_interval=falling(512)),
        dict.fromkeys((512, 1024, 2048, 4096), 100),
        seeds=3,
    ),
    targets={"accuracy": 0.806},
    augmentation=Augmentation(flip=True, shift=28, cutout=56),
)

# The paper gives K-FAC and FOP 50 epochs with an exponential schedule and the others 80 with a cosine; here
# all have 80 and a cosine. The images, 193 GB as bytes, are held in memory, shared out over torchrun's ranks.
IMAGENET = Source("ILSVRC/imagenet-1k", test="validation", size=224, classes=1000)
IMAGENET1K_RESNET50 = Recipe(
    name="imagenet1k-resnet50",
    title="ResNet-50 on ImageNet-1K (the paper's Table 3)",
    tasks={"imagenet1k": ImageTask(IMAGENET, held_out=0.02)},
    model=resnet50,
    studies=_comparison(
        grids(
            sgd={"lr": (0.3, 1.0), "weight_decay": (3e-5, 1e-4)},
            shampoo={"lr": (0.1, 0.3, 1.0, 3.0)},
            lamb={"lr": (0.001, 0.003, 0.01, 0.03)},
        )
        | second_order(TRUST, momentum=0.9, weight_decay=5e-4, curvature_interval=falling(1024)),
        dict.fromkeys((1024, 2048, 4096, 8192), 80),
        seeds=3,
    ),
    targets={"accuracy": 0.759},
    augmentation=Augmentation(flip=True, shift=28),
)

PAPER = (CIFAR10_RESNET18, CIFAR_LT_RESNET32, IMAGENET100_T2TVIT, IMAGENET1K_RESNET50)
RECIPES: dict[str, Recipe] = {each.name: each for each in (DIGITS, CIFAR10_SMALL, *PAPER)}


def recipe(name: str) -> Recipe:
    """Return a recipe by its name; raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
