"""The optimizers that are compared, each with as many learning rates to choose from as the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytorch_optimizer import SOAP, Lamb, Muon, Shampoo
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fop import FOP, KFAC

Build = Callable[..., Optimizer]


@dataclass(frozen=True)
class DefaultContender:
    """An optimizer under its default options: how to build it from a model and a learning rate."""

    label: str
    build: Build
    learning_rates: tuple[float, ...]


def _sgd(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return SGD(model.parameters(), **{"lr": lr, "momentum": 0.9, "nesterov": True, **options})


def _adamw(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, **options)


def _kfac(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return KFAC(model, lr=lr, **options)


def _fop(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return FOP(model, lr=lr, **options)


def _lamb(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return Lamb(model.parameters(), lr=lr, **options)


def _soap(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return SOAP(model.parameters(), lr=lr, **options)


def _shampoo(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    return Shampoo(model.parameters(), lr=lr, **options)


def _muon(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Give Muon the hidden weights; its authors leave the last layer, gains and biases to AdamW."""
    last = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    hidden = [p for p in model.parameters() if p.ndim >= 2 and not any(p is weight for weight in last)]
    known = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in known]
    adamw_lr = options.pop("adamw_lr", 1e-3)
    return Muon(
        [
            {"params": hidden, "use_muon": True, "lr": lr, **options},
            {"params": others, "use_muon": False, "lr": adamw_lr},
        ],
        lr=lr,
        adamw_lr=adamw_lr,
    )


# Labels and constructors: build(model, lr, **options).
BUILDERS: dict[str, tuple[str, Build]] = {
    "sgd": ("SGD", _sgd),
    "adamw": ("AdamW", _adamw),
    "kfac": ("K-FAC", _kfac),
    "fop": ("FOP", _fop),
    "lamb": ("LAMB", _lamb),
    "soap": ("SOAP", _soap),
    "shampoo": ("Shampoo", _shampoo),
    "muon": ("Muon", _muon),
}

CONTENDERS = {
    name: DefaultContender(*BUILDERS[name], rates)
    for name, rates in {
        "sgd": (0.03, 0.1, 0.3, 1.0),
        "adamw": (0.003, 0.01, 0.03, 0.1),
        "kfac": (0.01, 0.03, 0.1, 0.3),
        "fop": (0.01, 0.03, 0.1, 0.3),
    }.items()
}


def contender(name: str) -> DefaultContender:
    """Look an optimizer up by its name; raises ValueError for an unknown one."""
    if name not in CONTENDERS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
