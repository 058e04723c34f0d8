"""What the tests of any optimizer's behaviour run over: torch's own optimizers beside ours."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fop import FOP, KFAC
from models import Mixed, tokens, train_step

Make = Callable[..., Optimizer]
State = dict[str, Any]

LR = 0.05


def falling(step: int) -> float:
    """A damping."""
    return 0.1 * 0.8**step


def cycling(step: int) -> int:
    """A curvature interval."""
    return 1 + step % 4


OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    "FOP": partial(FOP, lr=LR),
    "KFAC": partial(KFAC, lr=LR),
}
FUNCTIONS: dict[str, Any] = {"damping": falling, "curvature_interval": cycling}
# Dense, blocked, diagonal and averaged factors, and the diagonal Fisher of a norm.
FORMS: dict[Any, dict[str, Any]] = {
    "*": {"max_factor_dim": 5, "block_dim": 3, "weight_sharing": "reduce"},
    nn.LayerNorm: {"path": "fop"},
}
BUSY: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "curvature_interval": 4}
OF_MODULE = partial(FOP, lr=LR)
# Ours with more of their options: for what must hold whatever the options are.
VARIANTS: dict[str, Make] = {
    **OPTIMIZERS,
    "FOP-module": OF_MODULE,
    "FOP-busy": partial(FOP, lr=LR, **BUSY),
    "FOP-functions": partial(FOP, lr=LR, **FUNCTIONS),
    "KFAC-functions": partial(KFAC, lr=LR, **FUNCTIONS),
    "FOP-forms": partial(FOP, lr=LR, layer_options=FORMS),
}
ours = pytest.mark.parametrize("library", [FOP, KFAC])


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test over these optimizers; the others differ by their own documentation."""
    return pytest.mark.parametrize("make", [VARIANTS[name] for name in names], ids=names)


every = only(*OPTIMIZERS)
every_variant = only(*VARIANTS)


def start(make: Make, model: nn.Module, **options: object) -> Optimizer:
    """The optimizer of a whole model."""
    return make(model if make is OF_MODULE else model.parameters(), **options)


def train(model: nn.Module, optimizer: Optimizer, seeds: Iterable[int]) -> None:
    """One step a seed on `Mixed` and its batches."""
    for seed in seeds:
        train_step(model, optimizer, *tokens(6, seed))


def trained(make: Make, steps: int = 3, **options: object) -> tuple[Mixed, Optimizer]:
    """A `Mixed` and its optimizer after some steps."""
    model = Mixed()
    optimizer = start(make, model, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def copied(model: Mixed) -> Mixed:
    """Another model with the same weights, without `copy.deepcopy`."""
    twin = Mixed(seed=7)
    twin.load_state_dict(model.state_dict())
    return twin


def saved(state: State) -> State:
    """The state by way of a file that may hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}
