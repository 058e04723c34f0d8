"""Under autocast autograd keeps a copy of a layer's input, and the original may be overwritten."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fop import FOP


def run(overwrite: int) -> dict[str, Tensor]:
    """Two steps; in step ``overwrite`` the input is tripled in place after the layer has used it."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = FOP(layer, lr=0.1, stat_decay=0.0, curvature_interval=1)
    for step in range(2):
        hidden = torch.randn(6, 3) * 1.0
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(hidden)
        if step == overwrite:
            hidden.mul_(3)
        optimizer.zero_grad()
        out.float().square().mean().backward()
        optimizer.step()
    state = optimizer.state[layer.weight]
    return {"A": state["A"], "G": state["G"], "weight": layer.weight.detach()}


def test_overwritten_input_enters_nothing() -> None:
    untouched, overwritten = run(overwrite=-1), run(overwrite=1)
    torch.manual_seed(0)
    nn.Linear(3, 2, bias=False)
    first = torch.randn(6, 3)
    # The statistics of the second step are left out, not taken from the tripled input.
    torch.testing.assert_close(overwritten["A"][0], first.T @ first / 6)
    assert not torch.equal(untouched["A"], overwritten["A"])
    assert torch.isfinite(overwritten["weight"]).all()
