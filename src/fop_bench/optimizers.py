"""The optimizers that are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fop import FOP, KFAC

Build = Callable[..., Optimizer]


def _library(package: str, name: str, **fixed: Any) -> Build:
    def build(model: nn.Module, lr: float, **options: Any) -> Optimizer:
        kind = getattr(importlib.import_module(package), name)  # here, because it takes seconds
        optimizer: Optimizer = kind(model.parameters(), **{"lr": lr, **fixed, **options})
        return optimizer

    return build


def _muon(model: nn.Module, lr: float, adamw_lr: float = 1e-3, **options: Any) -> Optimizer:
    """Give Muon the hidden weights; its authors leave the last layer, gains and biases to AdamW."""
    from pytorch_optimizer import Muon

    last = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    hidden = [p for p in model.parameters() if p.ndim >= 2 and not any(p is weight for weight in last)]
    others = [p for p in model.parameters() if not any(p is weight for weight in hidden)]
    groups = [
        {"params": hidden, "use_muon": True, "lr": lr, **options},
        {"params": others, "use_muon": False, "lr": adamw_lr},
    ]
    return Muon(groups, lr=lr, adamw_lr=adamw_lr)


# Labels and constructors: build(model, lr, **options).
BUILDERS: dict[str, tuple[str, Build]] = {
    "sgd": ("SGD", _library("torch.optim", "SGD", momentum=0.9, nesterov=True)),
    "adamw": ("AdamW", _library("torch.optim", "AdamW")),
    # Recipes and records are of the paper's steps.
    "kfac": ("K-FAC", partial(KFAC, step_length="paper")),
    "fop": ("FOP", partial(FOP, step_length="paper")),
    "lamb": ("LAMB", _library("pytorch_optimizer", "Lamb")),
    "soap": ("SOAP", _library("pytorch_optimizer", "SOAP")),
    "shampoo": ("Shampoo", _library("pytorch_optimizer", "Shampoo")),
    "muon": ("Muon", _muon),
}
