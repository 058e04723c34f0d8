"""Table 4 of the paper: ResNet-32 on long-tailed CIFAR, top-1 error.

As in the paper: network, data sets, damping 1e-3, 5 seeds. The paper does not say: batch size, epochs and
weight decay; batch 128 and 200 epochs are those of Cao et al. 2019, whose long-tailed CIFAR this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fop_bench.augmentation import Augmentation
from fop_bench.images import Source, long_tail
from fop_bench.models import ResNet
from fop_bench.recipes.recipe import Contender, ImageTask, Recipe, Study

CIFAR10 = Source("uoft-cs/cifar10", image="img", classes=10)
CIFAR100 = Source("uoft-cs/cifar100", image="img", label="fine_label", classes=100)


def network(classes: int) -> nn.Module:
    """Build ResNet-32 for 32×32 images: three stages of five blocks, 16 to 64 channels."""
    return ResNet(width=16, blocks=(5, 5, 5), classes=classes)


def second_order(batch_size: int) -> Mapping[str, Any]:
    """Fixed options of K-FAC and FOP."""
    return {"momentum": 0.9, "damping": 1e-3, "kl_clip": 1e-2, "curvature_interval": 100}


DECAY = (2e-4, 1e-3)
TRUST = {"lr": (0.01, 0.03, 0.1), "weight_decay": (5e-4, 5e-3)}

RECIPE = Recipe(
    name="cifar-lt-resnet32",
    title="ResNet-32 on long-tailed CIFAR (the paper's Table 4)",
    tasks={
        "CIFAR-10-LT 100": ImageTask(CIFAR10, train=long_tail(100, 5000)),
        "CIFAR-10-LT 50": ImageTask(CIFAR10, train=long_tail(50, 5000)),
        "CIFAR-10-LT 10": ImageTask(CIFAR10, train=long_tail(10, 5000)),
        "CIFAR-100-LT 100": ImageTask(CIFAR100, train=long_tail(100, 500)),
        "CIFAR-100-LT 50": ImageTask(CIFAR100, train=long_tail(50, 500)),
        "CIFAR-100-LT 10": ImageTask(CIFAR100, train=long_tail(10, 500)),
    },
    model=network,
    studies={
        "comparison": Study(
            {
                "sgd": Contender("sgd", {"lr": (0.03, 0.1, 0.3), "weight_decay": DECAY}),
                "adamw": Contender("adamw", {"lr": (0.001, 0.003, 0.01), "weight_decay": (0.01, 0.1)}),
                "kfac": Contender("kfac", TRUST, second_order),
                "fop": Contender("fop", TRUST, second_order),
            },
            {128: 200},
            seeds=(1, 2, 3, 4, 5),
        )
    },
    targets={},
    augmentation=Augmentation(flip=True, shift=4),
)
