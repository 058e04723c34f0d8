"""More than two sub-batches are for one process."""

from __future__ import annotations

import pytest
from torch import nn

from fop import FOP
from models import batch, mlp
from ranks import run_ranks


def too_many(rank: int) -> str:
    model = mlp()
    optimizer = FOP(model, sub_batches=3)
    x, y = batch(6, rank)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(ValueError) as error:
        optimizer.step()
    return str(error.value)


def test_ranks_take_two() -> None:
    for message in run_ranks(too_many, 2):
        assert message.startswith("sub_batches=3 is for one process; several ranks split the batch in two")
