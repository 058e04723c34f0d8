"""The optimizers that are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fop import FOP, KFAC

Build = Callable[..., Optimizer]


def _sgd(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return SGD(model.parameters(), **{"lr": lr, "momentum": 0.9, "nesterov": True, **options})


def _adamw(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, **options)


def _library(name: str) -> Build:
    def build(model: nn.Module, lr: float, **options: Any) -> Optimizer:
        # Imported here, because it takes seconds.
        optimizer: Optimizer = getattr(importlib.import_module("pytorch_optimizer"), name)(
            model.parameters(), lr=lr, **options
        )
        return optimizer

    return build


def _muon(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Give Muon the hidden weights; its authors leave the last layer, gains and biases to AdamW."""
    from pytorch_optimizer import Muon

    last = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    hidden = [p for p in model.parameters() if p.ndim >= 2 and not any(p is weight for weight in last)]
    known = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in known]
    adamw_lr = options.pop("adamw_lr", 1e-3)
    groups = [
        {"params": hidden, "use_muon": True, "lr": lr, **options},
        {"params": others, "use_muon": False, "lr": adamw_lr},
    ]
    return Muon(groups, lr=lr, adamw_lr=adamw_lr)


# Labels and constructors: build(model, lr, **options).
BUILDERS: dict[str, tuple[str, Build]] = {
    "sgd": ("SGD", _sgd),
    "adamw": ("AdamW", _adamw),
    "kfac": ("K-FAC", KFAC),
    "fop": ("FOP", FOP),
    "lamb": ("LAMB", _library("Lamb")),
    "soap": ("SOAP", _library("SOAP")),
    "shampoo": ("Shampoo", _library("Shampoo")),
    "muon": ("Muon", _muon),
}
