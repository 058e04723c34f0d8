"""What the conformance suite (`test_contract*.py`) runs over: torch's own optimizers beside ours."""

from __future__ import annotations

import io
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

OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(torch.optim.SGD, lr=LR, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    "FOP": partial(FOP, lr=LR),
    "KFAC": partial(KFAC, lr=LR),
}


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test over these optimizers; the others differ by their own documentation."""
    return pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in names], ids=names)


every = only(*OPTIMIZERS)


def train(model: nn.Module, optimizer: Optimizer, seeds: Iterable[int]) -> None:
    """One step a seed on `Mixed` and its batches."""
    for seed in seeds:
        train_step(model, optimizer, *tokens(6, seed))


def trained(make: Make, steps: int = 3, **options: object) -> tuple[Mixed, Optimizer]:
    """A `Mixed` and its optimizer after some steps."""
    model = Mixed()
    optimizer = make(model.parameters(), **options)
    train(model, optimizer, range(steps))
    return model, optimizer


def copied(model: Mixed) -> Mixed:
    """Another model with the same weights, without `copy.deepcopy`."""
    twin = Mixed(seed=7)
    twin.load_state_dict(model.state_dict())
    return twin


def saved(state: State) -> State:
    """The state by way of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded
