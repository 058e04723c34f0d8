"""The optimizers that are compared, each with as many learning rates to choose from as the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fop import FOP, KFAC


@dataclass(frozen=True)
class Contender:
    """An optimizer under its default options: how to build it from a model and a learning rate."""

    label: str
    build: Callable[[nn.Module, float], Optimizer]
    learning_rates: tuple[float, ...]


def _sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)


def _adamw(model: nn.Module, lr: float) -> Optimizer:
    return AdamW(model.parameters(), lr=lr)


def _kfac(model: nn.Module, lr: float) -> Optimizer:
    return KFAC(model, lr=lr)


def _fop(model: nn.Module, lr: float) -> Optimizer:
    return FOP(model, lr=lr)


CONTENDERS = {
    "sgd": Contender("SGD", _sgd, (0.03, 0.1, 0.3, 1.0)),
    "adamw": Contender("AdamW", _adamw, (0.003, 0.01, 0.03, 0.1)),
    "kfac": Contender("K-FAC", _kfac, (0.01, 0.03, 0.1, 0.3)),
    "fop": Contender("FOP", _fop, (0.01, 0.03, 0.1, 0.3)),
}


def contender(name: str) -> Contender:
    """Look an optimizer up by its name; raises ValueError for an unknown one."""
    if name not in CONTENDERS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
