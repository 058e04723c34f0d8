"""Table 1 of the paper: ResNet-18 on CIFAR-10 at batch 2048 to 50,000, epochs and seconds to 91 %.

As in the paper: network, batch sizes, target, a learning rate that falls on plateaus, 5 seeds.
The paper does not say: augmentation (flip and shift by 4 here), weight decay (tuned here), how long a run may
take (100 epochs here: one more than its longest). One GPU here, two there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fop_bench.augmentation import Augmentation
from fop_bench.images import Source
from fop_bench.models import resnet18
from fop_bench.recipes.recipe import Contender, ImageTask, Recipe, Study, by_plateau, curvature_interval

IMAGES = 50_000
EPOCHS = dict.fromkeys((2048, 4096, 8192, 16384, 32768, IMAGES), 100)


def second_order(batch_size: int) -> Mapping[str, Any]:
    """Fixed options of K-FAC and FOP: an interval that shrinks as the batch grows, down to 5 steps."""
    return {"momentum": 0.9, "kl_clip": 1e-2, "curvature_interval": curvature_interval(batch_size, 2048)}


TRUST = {"lr": (0.03, 0.1), "damping": (1e-4, 1e-3), "weight_decay": (5e-4, 5e-3)}

RECIPE = Recipe(
    name="cifar10-resnet18",
    title="ResNet-18 on CIFAR-10 (the paper's Table 1)",
    tasks={"cifar10": ImageTask(Source("uoft-cs/cifar10", image="img", classes=10))},
    model=resnet18,
    studies={
        "comparison": Study(
            {
                "sgd": Contender("sgd", {"lr": (0.1, 0.3, 1.0, 3.0), "weight_decay": (1e-4, 5e-4)}),
                "adamw": Contender("adamw", {"lr": (0.001, 0.003, 0.01, 0.03), "weight_decay": (0.01, 0.1)}),
                "kfac": Contender("kfac", TRUST, second_order),
                "fop": Contender("fop", TRUST, second_order),
                "muon": Contender("muon", {"lr": (0.01, 0.03, 0.1, 0.3), "adamw_lr": (0.001, 0.01)}),
            },
            EPOCHS,
            seeds=(1, 2, 3, 4, 5),
        )
    },
    targets={"accuracy": 0.91},
    augmentation=Augmentation(flip=True, shift=4),
    schedule=by_plateau,
)
