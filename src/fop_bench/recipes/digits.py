"""A small CNN on scikit-learn's handwritten digits: seconds a run, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn

from fop_bench.digits import TRAIN_SIZE, split_indices
from fop_bench.images import Images
from fop_bench.models import digits_cnn
from fop_bench.recipes.recipe import Contender, Parts, Recipe, Study


@dataclass(frozen=True)
class DigitsTask:
    """The bundled digits, each pixel's 0 to 16 as three equal colours."""

    origin: str = "scikit-learn"

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        """Give a rank's share of the three parts; raises ValueError if other data are asked for."""
        if data is not None:
            raise ValueError(f"--data is {data}; the digits come with scikit-learn, leave it out")
        digits = load_digits()
        pixels = torch.tensor(digits.images * 15, dtype=torch.uint8).unsqueeze(-1).expand(-1, -1, -1, 3)
        everything = Images(pixels, torch.tensor(digits.target), tuple(map(str, digits.target_names)))
        train, held_out, test = (everything[torch.from_numpy(part)[rank::ranks]] for part in split_indices())
        return Parts(train, held_out, test)


def network(classes: int) -> nn.Module:
    """Build the demo's CNN."""
    return digits_cnn(classes, channels=3)


RECIPE = Recipe(
    name="digits",
    title="A small CNN on handwritten digits",
    tasks={"digits": DigitsTask()},
    model=network,
    studies={
        "comparison": Study(
            {
                "sgd": Contender("sgd", {"lr": (0.03, 0.1, 0.3, 1.0)}),
                "adamw": Contender("adamw", {"lr": (0.003, 0.01, 0.03, 0.1)}),
                "kfac": Contender("kfac", {"lr": (0.03, 0.3), "damping": (1e-4, 1e-3)}),
                "fop": Contender("fop", {"lr": (0.03, 0.3), "damping": (1e-4, 1e-3)}),
            },
            {64: 5, TRAIN_SIZE: 20},
            seeds=(1, 2, 3),
        )
    },
    targets={"accuracy": 0.97, "train_loss": 0.05},
)
