"""Models of norms, with a diagonal Fisher or left to AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference.kinds import BATCH_NORMS, NORMS
from reference.steps import Case, double


def fisher(*norms: type[nn.Module]) -> dict[str, Any]:
    """Options that give these norms a diagonal Fisher."""
    return {"layer_options": {norm: {"path": "fop"} for norm in norms}}


def scrambled(module: nn.Module) -> nn.Module:
    """Random weights, biases and running averages: torch's ones and zeros would hide mistakes."""
    for norm in module.modules():
        if isinstance(norm, NORMS):
            for param in norm.parameters(recurse=False):
                nn.init.normal_(param)
            if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None:
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module


def norm(build: Callable[[], nn.Module], *shape: int, whole: bool = False) -> Case:
    return Case(
        lambda: scrambled(nn.Sequential(build())),
        double(*shape),
        {"0.weight"},
        whole,
        options=fisher(type(build())),
    )


class Twice(nn.Module):
    """One LayerNorm in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(torch.sin(self.norm(x)) + x)
        return out


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3), nn.RMSNorm(3))


def conv_net() -> nn.Module:
    """Convolutions without bias before BatchNorm, as everywhere."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 2, groups=2),
        nn.Flatten(),
        nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    )


WEIGHTS = {"0.weight", "3.weight", "6.weight"}
AFFINE: dict[str, Case] = {
    "layer-norm": norm(lambda: nn.LayerNorm(5), 5),
    "layer-norm-sequence": norm(lambda: nn.LayerNorm(5), 3, 5),
    "layer-norm-2d": norm(lambda: nn.LayerNorm((2, 3)), 2, 2, 3),
    "layer-norm-no-bias": norm(lambda: nn.LayerNorm(5, bias=False, eps=0.1), 2, 5),
    "rms-norm": norm(lambda: nn.RMSNorm(5), 5),
    "rms-norm-sequence-eps": norm(lambda: nn.RMSNorm(5, eps=0.1), 3, 5),
    "rms-norm-2d": norm(lambda: nn.RMSNorm([2, 3]), 4, 2, 3),
    "group-norm": norm(lambda: nn.GroupNorm(2, 4), 4),
    "group-norm-image": norm(lambda: nn.GroupNorm(2, 4, eps=0.1), 4, 2, 3),
    "batch-norm1d": norm(lambda: nn.BatchNorm1d(3), 3, whole=True),
    "batch-norm1d-sequence": norm(lambda: nn.BatchNorm1d(3), 3, 4, whole=True),
    "batch-norm2d": norm(lambda: nn.BatchNorm2d(3, eps=0.1), 3, 2, 2, whole=True),
    "batch-norm3d": norm(lambda: nn.BatchNorm3d(2), 2, 2, 1, 2, whole=True),
    "batch-norm1d-eval": norm(lambda: nn.BatchNorm1d(3).eval(), 3),
    "batch-norm2d-eval": norm(lambda: nn.BatchNorm2d(3).eval(), 3, 2, 2),
    # Without running averages the batch's own are used in evaluation too.
    "batch-norm2d-eval-untracked": norm(
        lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), 3, 2, 2, whole=True
    ),
    "norm-called-twice": Case(
        lambda: scrambled(Twice()), double(3, 4), {"norm.weight"}, options=fisher(nn.LayerNorm)
    ),
    "between-linear-layers": Case(
        lambda: scrambled(mixed()),
        double(2, 4),
        {"0.weight", "1.weight", "3.weight", "4.weight"},
        options=fisher(nn.LayerNorm, nn.RMSNorm),
    ),
    "norm-by-name": Case(
        lambda: scrambled(mixed()),
        double(2, 4),
        {"0.weight", "1.weight", "3.weight"},
        options={"layer_options": {"1": {"path": "fop"}}},
    ),
    "conv-net-train": Case(
        lambda: scrambled(conv_net()),
        double(2, 4, 3),
        WEIGHTS | {"1.weight", "5.weight"},
        True,
        options=fisher(nn.BatchNorm1d, nn.BatchNorm2d),
    ),
    "conv-net-eval": Case(
        lambda: scrambled(conv_net()).eval(),
        double(2, 4, 3),
        WEIGHTS | {"1.weight", "5.weight"},
        options=fisher(nn.BatchNorm1d, nn.BatchNorm2d),
    ),
    # Norms take AdamW unless asked for.
    "conv-net-adamw": Case(lambda: scrambled(conv_net()), double(2, 4, 3), WEIGHTS, True),
}
