"""The rescue ladder of damped inverses, through the optimizer: counted, reported once, no NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP

NAN = float("nan")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


Inputs = Callable[[int], Tensor]


def ordinary(_: int) -> Tensor:
    return torch.randn(8, 2)


def twins(_: int) -> Tensor:
    # Both features 1 in all samples: A is exactly the matrix of ones.
    return torch.ones(8, 2)


def dead_feature(_: int) -> Tensor:
    x = torch.randn(8, 2)
    x[:, 1] = 0
    return x


def run(
    inputs: Inputs, steps: int, **options: Any
) -> tuple[nn.Module, FOP, list[str], list[dict[str, Tensor]]]:
    """Train; return model, optimizer, warnings and the curvature after every step."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    optimizer = FOP(model, lr=0.01, curvature_interval=1, **options)
    curvature: list[dict[str, Tensor]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            (model(inputs(step)) - torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            state = optimizer.state[model[0].weight]
            curvature.append({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})
    for p in model.parameters():
        assert torch.isfinite(p).all()
    return model, optimizer, [str(w.message) for w in caught], curvature


def rescues(optimizer: FOP) -> dict[str, int]:
    return optimizer.diagnostics().layers["0"].rescues


def test_a_healthy_run_has_no_rescues() -> None:
    _, optimizer, messages, _ = run(ordinary, 5)
    assert rescues(optimizer) == {"float64": 0, "damping": 0, "kept": 0}
    assert messages == []


def test_optimizer_counts_float64() -> None:
    # A has eigenvalues 2 and 0: with a damping this small, float32 finds it singular and float64 does not.
    _, optimizer, messages, _ = run(twins, 3, damping=1e-18)
    assert rescues(optimizer) == {"float64": 3, "damping": 0, "kept": 0}
    assert len(messages) == 1
    assert "curvature factor of 0 needed float64" in messages[0]


# Factors as matrices, and as diagonals.
FORMS = pytest.mark.parametrize("max_factor_dim", [8192, 0])


@FORMS
def test_optimizer_counts_more_damping(max_factor_dim: int) -> None:
    choice = {"*": {"max_factor_dim": max_factor_dim}}
    _, optimizer, messages, _ = run(dead_feature, 4, damping=0.0, layer_options=choice)
    assert rescues(optimizer) == {"float64": 0, "damping": 4, "kept": 0}
    assert len(messages) == 1
    assert "curvature factor of 0 needed more damping" in messages[0]


@FORMS
def test_optimizer_keeps_the_last_good_inverse(max_factor_dim: int) -> None:
    """A = 0 without any damping has no inverse at any rung."""

    def inputs(step: int) -> Tensor:
        return torch.zeros(8, 2) if step in (2, 3) else torch.randn(8, 2)

    # stat_decay=0 forgets the earlier steps, momentum keeps the weights moving.
    choice = {"*": {"max_factor_dim": max_factor_dim}}
    _, optimizer, messages, curvature = run(inputs, 6, damping=0.0, stat_decay=0.0, layer_options=choice)
    assert rescues(optimizer) == {"float64": 0, "damping": 0, "kept": 2}
    assert len(messages) == 1
    assert "curvature factor of 0 failed and the last good inverse was kept" in messages[0]
    assert torch.equal(curvature[2]["A"], torch.zeros((1, 2, 2) if max_factor_dim else (1, 2)))
    for key in ("A_inv", "G_inv"):
        # G could be inverted, but shares its π with A: both stay.
        assert torch.equal(curvature[1][key], curvature[2][key])
        assert torch.equal(curvature[1][key], curvature[3][key])
        assert not torch.equal(curvature[3][key], curvature[4][key])


def test_age_of_a_kept_inverse_goes_on() -> None:
    """The diagnostics give the steps since the inverses were computed, and keeping is not computing."""

    def inputs(step: int) -> Tensor:
        return torch.zeros(8, 2) if step == 2 else torch.randn(8, 2)

    _, optimizer, _, _ = run(inputs, 3, damping=0.0, stat_decay=0.0)
    assert optimizer.diagnostics().layers["0"].steps_since_curvature == 1


def test_damping_shares_without_any_damping() -> None:
    _, optimizer, _, _ = run(lambda step: torch.randn(8, 2) * (step < 2), 3, damping=0.0, stat_decay=0.0)
    layer = optimizer.diagnostics().layers["0"]
    assert (layer.damping_A, layer.damping_G) == (0.0, 0.0)


def test_a_layer_that_never_had_an_inverse_is_still_reported() -> None:
    """Its warning says "counted in diagnostics()", and there it must be found."""
    _, optimizer, messages, _ = run(lambda _: torch.zeros(8, 2), 3, damping=0.0)
    assert len(messages) == 1
    assert rescues(optimizer)["kept"] == 3


def test_each_rung_and_each_layer_is_warned_of_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    optimizer = FOP(model, lr=0.0, damping=0.0, stat_decay=0.0, curvature_interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            optimizer.zero_grad()
            # Zero inputs reach both layers, a dead feature too: the first layer passes its input on.
            x = torch.zeros(8, 2) if step in (2, 4) else dead_feature(step)
            (model(x) - torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    messages = sorted(str(w.message).split(";")[0] for w in caught)
    assert messages == [
        f"the inversion of a curvature factor of {layer} {rung}"
        for layer in ("0", "1")
        for rung in ("failed and the last good inverse was kept", "needed more damping")
    ]
    for layer in optimizer.diagnostics().layers.values():
        assert (layer.rescues["kept"], layer.rescues["damping"]) == (2, 4)


@FORMS
def test_statistics_that_are_not_finite_are_not_taken(max_factor_dim: int) -> None:
    def inputs(step: int) -> Tensor:
        return torch.full((8, 2), NAN) if step == 1 else torch.randn(8, 2)

    choice = {"*": {"max_factor_dim": max_factor_dim}}
    _, optimizer, messages, curvature = run(inputs, 3, layer_options=choice)
    for key in ("A", "G", "A_inv", "G_inv"):
        assert torch.equal(curvature[0][key], curvature[1][key])
    assert rescues(optimizer) == {"float64": 0, "damping": 0, "kept": 0}
    assert len([m for m in messages if "statistics of 0 are not finite" in m]) == 1
