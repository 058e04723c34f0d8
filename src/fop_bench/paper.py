"""What the paper reports (arXiv:2508.13898, Tables 1 to 4), as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Epochs and time to the target, or the error in percent.
Value = tuple[int, float] | float


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
        number: in the paper.
        title: what it measures.
        columns: batch sizes, or tasks.
        values: by contender, one a column; None where the paper has none: the target was not reached.
        target: the accuracy that epochs and time are measured to; None for a table of errors.
        unit: seconds of the table's unit of time, and its name.
        gpus: how many GPUs each column used.
        upright: whether the paper has a row for every contender.
    """

    number: int
    title: str
    columns: Sequence[int | str]
    values: Mapping[str, Sequence[Value | None]]
    target: float | None = None
    unit: tuple[float, str] = (1.0, "seconds")
    gpus: Sequence[int] = ()
    upright: bool = True


# As the paper names the optimizers; in Table 4 SGD is "baseline (SGD)".
LABELS = {"sgd": "SGD", "adamw": "AdamW", "shampoo": "Shampoo", "lamb": "LAMB", "kfac": "K-FAC", "fop": "FOP"}

# By recipe.
PAPER_TABLES = {
    "cifar10-resnet18": PaperTable(
        number=1,
        title="CIFAR-10, ResNet-18, epochs / seconds to 91 % top-1",
        columns=(2048, 4096, 8192, 16384, 32768, 50000),
        values={
            "sgd": ((58, 743.3), (73, 457.9), None, None, None, None),
            "adamw": ((61, 768.4), (73, 454.0), None, None, None, None),
            "kfac": ((37, 588.7), (34, 270.5), (71, 296.4), (99, 186.4), None, None),
            "fop": ((29, 475.2), (22, 181.9), (35, 157.5), (58, 121.2), (60, 90.6), (82, 84.3)),
        },
        target=0.91,
        gpus=(2, 2, 2, 2, 2, 2),
        upright=False,
    ),
    "imagenet100-t2tvit": PaperTable(
        number=2,
        title="ImageNet-100, T2T-ViT, epochs / minutes to 80.6 %",
        columns=(512, 1024, 2048, 4096),
        values={
            "adamw": ((97, 291.6), None, None, None),
            "kfac": ((42, 138.6), (49, 76.7), (57, 46.0), (87, 45.3)),
            "fop": ((44, 158.9), (41, 67.3), (48, 42.3), (49, 27.8)),
        },
        target=0.806,
        unit=(60.0, "minutes"),
        gpus=(1, 2, 4, 8),
    ),
    "imagenet1k-resnet50": PaperTable(
        number=3,
        title="ImageNet-1K, ResNet-50, epochs / minutes to 75.9 %",
        columns=(1024, 2048, 4096, 8192),
        values={
            "sgd": ((71, 2511.1), None, None, None),
            "shampoo": ((65, 2523.1), None, None, None),
            "lamb": ((67, 2492.7), None, None, None),
            "kfac": ((35, 1336.5), None, None, None),
            "fop": ((32, 1306.1), (33, 999.5), (34, 514.9), (40, 335.1)),
        },
        target=0.759,
        unit=(60.0, "minutes"),
        gpus=(1, 2, 4, 8),
    ),
    "cifar-lt-resnet32": PaperTable(
        number=4,
        title="CIFAR-LT, ResNet-32, top-1 error %",
        columns=("CIFAR-10-LT 100", "CIFAR-10-LT 50", "CIFAR-100-LT 100", "CIFAR-100-LT 50"),
        values={
            "sgd": (28.05, 23.55, 62.27, 56.22),
            "kfac": (28.59, 22.29, 61.78, 55.02),
            "fop": (26.65, 20.55, 58.97, 53.67),
        },
    ),
}
