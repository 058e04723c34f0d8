"""Table 2 of the paper: T2T-ViT on ImageNet-100, epochs and minutes to 80.6 %; any folder of classes will do.

As in the paper: network family (T2T-ViT_t-14 here; the paper names no size), batch sizes, cosine,
100 epochs, 3 seeds. The images, 19 GB as bytes at 224×224, are held in memory. Several GPUs: by torchrun.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fop_bench.augmentation import Augmentation
from fop_bench.imagenet_models import t2t_vit
from fop_bench.images import Source
from fop_bench.recipes.recipe import Contender, ImageTask, Recipe, Study, curvature_interval

EPOCHS = dict.fromkeys((512, 1024, 2048, 4096), 100)


def second_order(batch_size: int) -> Mapping[str, Any]:
    """Fixed options of K-FAC and FOP: an interval that shrinks as the batch grows."""
    return {"momentum": 0.9, "weight_decay": 5e-3, "curvature_interval": curvature_interval(batch_size, 512)}


TRUST = {"lr": (0.03, 0.1), "damping": (1e-4, 1e-3)}

RECIPE = Recipe(
    name="imagenet100-t2tvit",
    title="T2T-ViT on ImageNet-100 (the paper's Table 2)",
    tasks={"imagenet100": ImageTask(Source("clane9/imagenet-100", test="validation", size=224))},
    model=t2t_vit,
    studies={
        "comparison": Study(
            {
                "adamw": Contender("adamw", {"lr": (0.0005, 0.001, 0.002, 0.004)}),
                "kfac": Contender("kfac", TRUST, second_order),
                "fop": Contender("fop", TRUST, second_order),
            },
            EPOCHS,
            seeds=(1, 2, 3),
        )
    },
    targets={"accuracy": 0.806},
    augmentation=Augmentation(flip=True, shift=28, cutout=56),
)
