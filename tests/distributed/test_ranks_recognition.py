"""Weights that functions tell about train on several ranks as torch's own modules do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import OPTIONS, Weights, steps, whole, wrapped
from torch import nn

from fop import FOP
from models import Own
from ranks import run_ranks


def trained(rank: int, layer: Any, wrap: str, mode: str) -> tuple[Weights, set[str]]:
    torch.manual_seed(0)
    inner = nn.Sequential(layer(5, 6), nn.Tanh(), layer(6, 3)).double()
    model = wrapped(inner, wrap)
    optimizer = FOP(model, **OPTIONS, distributed={"mode": mode} if wrap == "ddp" else None)
    steps(model, optimizer, rank, 0, 6)
    return whole(inner), {row.path for row in optimizer.summary().rows}


@pytest.mark.parametrize(
    ("wrap", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("fsdp-layers", ""), ("", "")]
)
def test_two_ranks(wrap: str, mode: str) -> None:
    results = [run_ranks(trained, 2, layer, wrap, mode) for layer in (Own, nn.Linear)]
    for (found, paths), (expected, _) in zip(*results, strict=True):
        assert paths == {"FOP"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
