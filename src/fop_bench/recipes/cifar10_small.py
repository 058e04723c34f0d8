"""A narrow ResNet on 10,000 CIFAR-10 images: well under a minute a run on one CPU core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fop_bench.augmentation import Augmentation
from fop_bench.images import Source, per_class
from fop_bench.models import ResNet
from fop_bench.recipes.recipe import Contender, ImageTask, Recipe, Study

IMAGES = 10_000
EPOCHS = {500: 15, 2000: 20, 5000: 30, IMAGES: 30}


def network(classes: int) -> nn.Module:
    """Build a ResNet of three blocks behind a stem that turns patches of 4×4 pixels into 8 channels."""
    model = ResNet(width=8, blocks=(1, 1, 1), classes=classes)
    model.features[0] = nn.Conv2d(3, 8, 4, stride=4, bias=False)
    return model


def second_order(batch_size: int) -> Mapping[str, Any]:
    """Fixed options of K-FAC and FOP: SGD's momentum, and new curvature once an epoch."""
    return {"momentum": 0.9, "kl_clip": 1e-2, "curvature_interval": IMAGES // batch_size}


def _without_clip(batch_size: int) -> Mapping[str, Any]:
    return {**second_order(batch_size), "kl_clip": None}


def _small_damping(**changes: Any) -> Any:
    return lambda batch_size: {**second_order(batch_size), "damping": 1e-4, **changes}


def _interval(factor: float) -> Any:
    return lambda batch_size: {
        **second_order(batch_size),
        "damping": 1e-4,
        "curvature_interval": max(1, round(factor * IMAGES / batch_size)),
    }


TRUST = {"lr": (0.03, 0.1, 0.3), "damping": (1e-4, 1e-3)}
RATES = {"lr": (0.03, 0.1, 0.3)}
MAP = {"lr": (0.03, 0.1, 0.3, 1.0), "damping": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}

COMPARISON = {
    "sgd": Contender("sgd", {"lr": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}),
    "adamw": Contender("adamw", {"lr": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)}),
    "kfac": Contender("kfac", TRUST, second_order),
    "fop": Contender("fop", TRUST, second_order),
}

LIBRARY = {
    "muon": Contender("muon", {"lr": (0.01, 0.03, 0.1), "adamw_lr": (0.003, 0.01)}),
    "soap": Contender("soap", {"lr": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)}),
    "lamb": Contender("lamb", {"lr": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)}),
}

MAPPED = {
    "kfac": Contender("kfac", MAP, second_order),
    "fop": Contender("fop", MAP, second_order),
    "kfac-noclip": Contender("kfac", MAP, _without_clip, "K-FAC, no KL clip"),
    "fop-noclip": Contender("fop", MAP, _without_clip, "FOP, no KL clip"),
}

# With beta = 0, η* = 1: "η* only" is K-FAC. What is left of η* is β*'s step with and without it.
ABLATION = {
    "fop": Contender("fop", RATES, _small_damping(), "FOP: β* and η*, random halves"),
    "beta-only": Contender("fop", RATES, _small_damping(eta=1.0), "β* only (η = 1)"),
    "mixing-0.1": Contender("fop", RATES, _small_damping(beta=0.1, eta=1.0), "fixed β = 0.1, η = 1"),
    "mixing-0.01": Contender("fop", RATES, _small_damping(beta=0.01, eta=1.0), "fixed β = 0.01, η = 1"),
    "kfac": Contender("kfac", RATES, _small_damping(), "K-FAC with KL clip (= η* only)"),
    "kfac-noclip": Contender("kfac", RATES, _small_damping(kl_clip=None), "K-FAC without KL clip"),
    "fop-noclip": Contender("fop", RATES, _small_damping(kl_clip=None), "FOP without KL clip"),
    "halves-fixed": Contender("fop", RATES, _small_damping(), "FOP, halves by position", halves="fixed"),
    "halves-classes": Contender("fop", RATES, _small_damping(), "FOP, halves by class", halves="classes"),
}

FORMULA = {
    "fop": Contender("fop", RATES, _small_damping(), "F in (4), Ga in (17)"),
    "damped": Contender("fop", RATES, _small_damping(), "F̂ in (4)", formula="damped projection"),
    "combined": Contender("fop", RATES, _small_damping(eta=1.0), "Gc in (17), so that η = 1"),
    "fresher": Contender("fop", RATES, _interval(0.2), "new curvature 5 × as often"),
    "staler": Contender("fop", RATES, _interval(5.0), "new curvature 1/5 as often"),
}

RECIPE = Recipe(
    name="cifar10-small",
    title="A narrow ResNet on 10,000 CIFAR-10 images",
    tasks={
        "cifar10": ImageTask(
            Source("uoft-cs/cifar10", image="img", classes=10),
            train=per_class(IMAGES // 10),
            held_out=per_class(200, skip=IMAGES // 10),
            test=per_class(500),
        )
    },
    model=network,
    studies={
        "comparison": Study(COMPARISON, EPOCHS, seeds=(1, 2, 3)),
        "map": Study(MAPPED, {2000: 10}, seeds=(1, 2), tuned=False),
        "map-full-batch": Study(MAPPED, {IMAGES: 20}, seeds=(1,), tuned=False),
        "ablation": Study(ABLATION, {2000: 20, IMAGES: 30}, seeds=(1, 2, 3)),
        "formula": Study(FORMULA, {2000: 20, IMAGES: 30}, seeds=(1, 2, 3)),
        "library": Study(LIBRARY, EPOCHS, seeds=(1, 2, 3)),
    },
    targets={"accuracy": 0.45, "train_loss": 1.3},
    augmentation=Augmentation(flip=True),
)
