"""The fallback ladder of damped inverses, through the optimizer: counted, reported once, no NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fop import FOP

Inputs = Callable[[int], Tensor]
# Factors as matrices, and as diagonals.
FORMS = pytest.mark.parametrize("max_factor_dim", [8192, 0])


def ordinary(step: int = 0) -> Tensor:
    return torch.randn(8, 2)


def twins(step: int) -> Tensor:
    """Both features 1 in all samples: A is exactly the matrix of ones."""
    return torch.ones(8, 2)


def dead_feature(step: int) -> Tensor:
    return torch.randn(8, 2) * torch.tensor([1.0, 0.0])


def zero_in(*steps: int) -> Inputs:
    return lambda step: torch.zeros(8, 2) if step in steps else torch.randn(8, 2)


class Run:
    """Training of one layer, with what it warned of and the curvature after every step."""

    def __init__(self, inputs: Inputs, steps: int, max_factor_dim: int = 8192, **options: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3, bias=False))
        choice = {"*": {"max_factor_dim": max_factor_dim}}
        options = {"step_length": "paper", "curvature_interval": 1, "layer_options": choice, **options}
        optimizer = FOP(model, lr=0.01, **options)
        self.curvature: list[dict[str, Tensor]] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                optimizer.zero_grad()
                (model(inputs(step)) - torch.randn(8, 3)).square().mean().backward()
                optimizer.step()
                state = optimizer.state[model[0].weight]
                self.curvature.append({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})
                assert torch.isfinite(model[0].weight).all()
        self.messages = [str(w.message) for w in caught]
        self.layer = optimizer.diagnostics().layers["0"]

    def same(self, key: str, one: int, other: int) -> bool:
        return torch.equal(self.curvature[one][key], self.curvature[other][key])


CASES: dict[str, tuple[Inputs, int, dict[str, Any], tuple[int, int, int], str]] = {
    "healthy": (ordinary, 5, {}, (0, 0, 0), ""),
    # A has eigenvalues 2 and 0: with a damping this small, float32 finds it singular and float64 does not.
    "float64": (twins, 3, {"damping": 1e-18}, (3, 0, 0), "needed float64"),
    "damping": (dead_feature, 4, {"damping": 0.0}, (0, 4, 0), "needed more damping"),
    "damping, diagonal": (
        dead_feature,
        4,
        {"damping": 0.0, "max_factor_dim": 0},
        (0, 4, 0),
        "needed more damping",
    ),
    # A layer that never had an inverse is reported all the same.
    "never any": (zero_in(0, 1, 2), 3, {"damping": 0.0}, (0, 0, 3), "failed"),
}


@pytest.mark.parametrize("case", CASES)
def test_counted_and_reported_once(case: str) -> None:
    inputs, steps, options, counts, message = CASES[case]
    run = Run(inputs, steps, **options)
    assert run.layer.fallbacks == dict(zip(("float64", "damping", "kept"), counts, strict=True))
    assert len(run.messages) == bool(message)
    assert all(f"curvature factor of 0 {message}" in text for text in run.messages)


@FORMS
def test_the_last_good_inverse_is_kept(max_factor_dim: int) -> None:
    """A = 0 without any damping has no inverse at any fallback. Keeping is not computing: its age goes on."""
    # stat_decay=0 forgets the earlier steps, momentum keeps the weights moving.
    run = Run(zero_in(2, 3), 6, max_factor_dim, damping=0.0, stat_decay=0.0)
    assert run.layer.fallbacks == {"float64": 0, "damping": 0, "kept": 2}
    (message,) = run.messages
    assert "curvature factor of 0 failed and the last good inverse was kept" in message
    assert not run.curvature[2]["A"].any() and run.curvature[2]["A"].dim() == (3 if max_factor_dim else 2)
    for key in ("A_inv", "G_inv"):
        # G could be inverted, but shares its π with A: both stay.
        assert run.same(key, 1, 2) and run.same(key, 1, 3) and not run.same(key, 3, 4)
    last = Run(zero_in(2), 3, max_factor_dim, damping=0.0, stat_decay=0.0).layer
    assert last.steps_since_curvature == 1
    assert (last.damping_A, last.damping_G) == (0.0, 0.0)


@FORMS
def test_statistics_that_are_not_finite_are_not_taken(max_factor_dim: int) -> None:
    run = Run(lambda step: ordinary() * (float("nan") if step == 1 else 1.0), 3, max_factor_dim)
    assert all(run.same(key, 0, 1) for key in ("A", "G", "A_inv", "G_inv"))
    assert not any(run.layer.fallbacks.values())
    assert len([m for m in run.messages if "statistics of 0 are not finite" in m]) == 1


def test_each_rung_and_each_layer_is_warned_of_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    options: dict[str, Any] = {"step_length": "paper", "damping": 0.0, "stat_decay": 0.0}
    optimizer = FOP(model, lr=0.0, curvature_interval=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            optimizer.zero_grad()
            # Zero inputs reach both layers, a dead feature too: the first layer passes its input on.
            x = torch.zeros(8, 2) if step in (2, 4) else dead_feature(step)
            (model(x) - torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    assert sorted(str(w.message).split(";")[0] for w in caught) == [
        f"the inversion of a curvature factor of {layer} {fallback}"
        for layer in ("0", "1")
        for fallback in ("failed and the last good inverse was kept", "needed more damping")
    ]
    for layer in optimizer.diagnostics().layers.values():
        assert (layer.fallbacks["kept"], layer.fallbacks["damping"]) == (2, 4)


@pytest.mark.parametrize("step_length", ["weight", "paper"])
def test_tiny_gradients_need_no_fallback(step_length: Literal["weight", "paper"]) -> None:
    """Their squares are no numbers of float32, nor is the inverse: such layers stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = FOP(model, step_length=step_length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            (1e-20 * model(torch.randn(6, 5))).sum().backward()
            optimizer.step()
    for layer in optimizer.diagnostics().layers.values():
        assert layer.steps_since_curvature is not None and not sum(layer.fallbacks.values())
    assert all(p.isfinite().all() for p in model.parameters())
