"""A loss that adds up the samples trains as the mean of them does, however the batch is cut up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    Attentive,
    Mixed,
    batch,
    conv_net,
    loss_of,
    mlp,
    sentences,
    snapshot,
    tokens,
    weights,
)

Batch = tuple[Tensor, Tensor]

# A clip that is active, and an interval in which most steps have no statistics. Without ``eps`` AdamW's step
# is the same for every multiple of the gradients, too.
OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.05,
    "damping": 0.01,
    "kl_clip": 1e-4,
    "curvature_interval": 5,
    "eps": 0.0,
}
NORMS: dict[Any, dict[str, Any]] = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}}


def images(n: int = 6, seed: int = 1) -> Batch:
    return batch(n, seed, (2, 5, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch], Any]] = {
    "mlp": (mlp, batch, None),
    "conv-net": (conv_net, images, None),
    "mixed": (Mixed, tokens, None),
    "attentive": (Attentive, sentences, None),
    "attentive-norms": (Attentive, sentences, NORMS),
    "attentive-diagonal": (Attentive, sentences, {"*": {"max_factor_dim": 3}}),
    # Without the attention: gradients of its keys add up to zero over a sentence, and G would be rounding.
    "attentive-reduce": (Attentive, sentences, {"[!a]*": {"weight_sharing": "reduce"}}),
}


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return len(x) * loss_of(model, x, y)


def check_same(left: tuple[nn.Module, FOP], right: tuple[nn.Module, FOP]) -> None:
    torch.testing.assert_close(weights(left[0]), weights(right[0]), rtol=1e-9, atol=1e-10)
    states = [snapshot(each)["state"] for _, each in (left, right)]
    kept = ("A", "G", "A_inv", "G_inv", "momentum_buffer", "refresh_at", "refreshed_at")
    for one, other in zip(*(state.values() for state in states), strict=True):
        # AdamW's averages are those of sums, and only a pass that is split tells whether p.grad is complete.
        assert one.keys() - {"complete"} == other.keys() - {"complete"}
        for key in one.keys() & set(kept):
            torch.testing.assert_close(one[key], other[key], rtol=1e-8, atol=1e-10)
    layers = [each.diagnostics() for _, each in (left, right)]
    assert layers[0].kl_scale == pytest.approx(layers[1].kl_scale, rel=1e-8)
    for name, one_layer in layers[0].layers.items():
        for key in ("beta", "eta", "rho"):
            other_value = getattr(layers[1].layers[name], key)
            assert getattr(one_layer, key) == pytest.approx(other_value, rel=1e-6, abs=1e-9), (
                f"{key} of {name}"
            )


@pytest.mark.parametrize(
    ("case", "library"), [*((case, FOP) for case in MODELS), ("mlp", KFAC), ("attentive-norms", KFAC)]
)
def test_sum_trains_as_mean(case: str, library: type[FOP]) -> None:
    """With and without statistics; in batches of changing size unless AdamW takes part, which knows no N."""
    build, data, choice = MODELS[case]
    sizes = (6, 3, 8, 5) if case in ("mlp", "conv-net", "attentive-norms") else (6,)
    runs = []
    for reduction in ("mean", "sum"):
        model = build()
        optimizer = library(model, loss_reduction=reduction, layer_options=choice, **OPTIONS)
        scales = []
        for step in range(12):
            optimizer.zero_grad()
            x, y = data(sizes[step % len(sizes)], step)
            (loss_of if reduction == "mean" else summed)(model, x, y).backward()
            optimizer.step()
            scales.append(optimizer.diagnostics().kl_scale)
        assert min(scales) < 0.9, "the clip is not active"
        runs.append((model, optimizer))
    check_same(*runs)


def test_the_reduction_matters() -> None:
    """The counterpart: with the other reduction the run is another."""
    results = []
    for reduction in ("mean", "sum"):
        model = mlp()
        optimizer = FOP(model, loss_reduction=reduction, **{**OPTIONS, "kl_clip": None})  # type: ignore[arg-type]
        for seed in range(3):
            optimizer.zero_grad()
            summed(model, *batch(6, seed)).backward()
            optimizer.step()
        results.append(weights(model))
    for name, value in results[0].items():
        assert float((value - results[1][name]).norm() / value.norm()) > 1e-3, name


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_clipping_of_a_sum_follows(scale: float) -> None:
    """A norm clipped at N times the bound is the clipped mean."""
    model, plain = mlp(), mlp()
    optimizer, other = FOP(model, loss_reduction="sum", **OPTIONS), FOP(plain, **OPTIONS)
    for step in range(4):
        optimizer.zero_grad()
        other.zero_grad()
        summed(model, *batch(6, step)).backward()
        loss_of(plain, *batch(6, step)).backward()
        # The 1e-6 that torch adds to the norm would not scale.
        for net, bound in ((model, 6 * 0.1 * scale), (plain, 0.1 * scale)):
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in net.parameters()]))  # type: ignore[union-attr]
            for p in net.parameters():
                p.grad.mul_(min(1.0, bound / float(norm)))  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    check_same((model, optimizer), (plain, other))
