"""NaN and infinity: a step that is skipped leaves no trace, a step that is taken is refused and reported."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fop import FOP, KFAC
from models import (
    Attentive,
    Mixed,
    assert_differs,
    assert_equal,
    loss_of,
    mlp,
    sentences,
    snapshot,
    tokens,
    train_step,
    weights,
)

LAYERS = ("embed", "first", "second")
BUSY: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "kl_clip": 1e-2,
}


def poison(model: nn.Module, value: float = float("nan"), seed: int = 99) -> None:
    (loss_of(model, *tokens(6, seed)) * value).backward()


def curvature(optimizer: FOP) -> list[dict[str, Any]]:
    """State that must not change; counters of attempts may."""
    kept = ("A", "G", "A_inv", "G_inv", "refreshed_at", "momentum_buffer", "exp_avg", "exp_avg_sq")
    return [
        {key: value for key, value in copy.deepcopy(state).items() if key in kept}
        for state in snapshot(optimizer)["state"].values()
    ]


RESETS: dict[str, Callable[[nn.Module, FOP], None]] = {
    "zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
}


@pytest.mark.parametrize(
    ("reset", "when", "library"),
    [
        *zip(RESETS, (0, 4, 16), [FOP] * 3, strict=True),
        ("zeros", 16, FOP),
        ("model", 0, KFAC),
        ("zeros", 4, KFAC),
    ],
)
def test_skipped_step_never_happened(reset: str, when: int, library: type[FOP]) -> None:
    """Step 16 lies inside a curvature interval, 0 and 4 are due."""

    def run(poisoned: bool) -> tuple[Any, ...]:
        model = Mixed()
        optimizer = library(model.parameters(), curvature_interval=5, **BUSY)
        for seed in range(20):
            if seed == when and poisoned:
                RESETS[reset](model, optimizer)
                poison(model)
                assert not torch.isfinite(model.first.weight.grad).any()  # type: ignore[arg-type]
            RESETS[reset](model, optimizer)
            loss_of(model, *tokens(6, seed)).backward()
            optimizer.step()
        return weights(model), snapshot(optimizer), optimizer.diagnostics().kl_scale

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(run(poisoned=True), run(poisoned=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any], tuple[str, ...]]] = {
    "mixed": (Mixed, tokens, LAYERS),
    # Embedding, attention, convolutions, and norms with a diagonal Fisher.
    "attentive": (
        Attentive,
        sentences,
        ("embed", "attention.in_proj", "attention.out_proj", "norm", "down", "up", "group", "head"),
    ),
}


@pytest.mark.parametrize("when", [1, 4, 16])
@pytest.mark.parametrize(
    ("kind", "library", "value", "choice"),
    [
        ("mixed", FOP, float("nan"), {}),
        ("mixed", FOP, float("inf"), {}),
        ("mixed", KFAC, float("nan"), {}),
        ("attentive", FOP, float("nan"), {"path": "fop", "max_factor_dim": 0}),
        ("attentive", FOP, float("nan"), {"path": "fop", "max_factor_dim": 8192}),
    ],
)
def test_step_on_it_is_refused_and_reported(
    kind: str, library: type[FOP], value: float, choice: dict[str, Any], when: int
) -> None:
    """By the name of every layer, and nothing has changed; then training goes on."""
    build, data, names = MODELS[kind]
    model = build()
    optimizer = library(model, curvature_interval=5, layer_options={"*": choice} if choice else None, **BUSY)
    for seed in range(when):
        train_step(model, optimizer, *data(6, seed))
    before, state = weights(model), curvature(optimizer)
    optimizer.zero_grad()
    (loss_of(model, *data(6, 99)) * value).backward()
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    text = "\n".join(str(warning.message) for warning in caught)
    for name in names:
        assert re.search(rf"update of .*\b{re.escape(name)}\b.* refused", text), text
    assert choice or "AdamW" in text
    assert text.count("the update of") == 1, text
    assert_equal(weights(model), before)
    assert_equal(curvature(optimizer), state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            train_step(model, optimizer, *data(6, seed))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_differs(before, weights(model))


def test_refused_step_costs_only_the_count() -> None:
    """After it, training goes on as if the step had not been taken (curvature due at every step)."""
    results = []
    for poisoned in (False, True):
        model = Mixed()
        optimizer = FOP(model, curvature_interval=1, **BUSY)
        for seed in range(8):
            if poisoned and seed == 5:
                optimizer.zero_grad()
                poison(model)
                with pytest.warns(RuntimeWarning):
                    optimizer.step()
            train_step(model, optimizer, *tokens(6, seed))
        results.append((weights(model), curvature_without_time(optimizer)))
    assert_equal(*results)


def curvature_without_time(optimizer: FOP) -> list[dict[str, Any]]:
    return [{k: v for k, v in state.items() if k != "refreshed_at"} for state in curvature(optimizer)]


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("bare", [False, True])
def test_very_first_step(library: type[FOP], bare: bool) -> None:
    model = Mixed()
    before = weights(model)
    optimizer = library(model.parameters() if bare else model, **BUSY)
    poison(model)
    with pytest.warns(RuntimeWarning) as caught:
        optimizer.step()
    text = "\n".join(str(warning.message) for warning in caught)
    assert all(name in text for name in LAYERS), text
    assert_equal(weights(model), before)
    for state in optimizer.state_dict()["state"].values():
        assert all(torch.isfinite(v).all() for v in state.values() if isinstance(v, torch.Tensor))
    # From here it is a run that starts with the next batch: the weights of a layer never took AdamW.
    clean = Mixed()
    other = library(clean, **BUSY)
    for seed in range(2):
        train_step(model, optimizer, *tokens(6, seed))
        train_step(clean, other, *tokens(6, seed))
    assert_equal(weights(model), weights(clean))
    # No moments that a layer would keep, and save, for ever.
    assert "exp_avg" not in optimizer.state[model.first.weight]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_one_bad_layer_refuses_only_itself(where: str, value: float) -> None:
    """The others take the step, and the clip, that they take without it."""
    results = []
    for spoil in (False, True):
        model = Mixed()
        optimizer = FOP(model, **{**BUSY, "kl_clip": None})
        for seed in range(3):
            train_step(model, optimizer, *tokens(6, seed))
        before = weights(model)
        optimizer.zero_grad()
        loss_of(model, *tokens(6, seed=9)).backward()
        if spoil:
            getattr(model.first, where).grad.view(-1)[1] = value
            with pytest.warns(RuntimeWarning, match=r"update of layer 'first' was not finite"):
                optimizer.step()
            assert torch.equal(model.first.weight, before["first.weight"])
            assert torch.equal(model.first.bias, before["first.bias"])
        else:
            optimizer.step()
            assert not torch.equal(model.first.weight, before["first.weight"])
        results.append({name: p for name, p in weights(model).items() if not name.startswith("first")})
        for name, p in results[-1].items():
            assert not torch.equal(p, before[name]), f"{name} did not step"
    assert_equal(*results)


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("factor", ["A", "G"])
def test_a_factor_that_overflows_does_not_enter(library: type[FOP], factor: str) -> None:
    """Its gradient may be finite: inputs of 1e-25 meet output gradients of 1e25."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = library(model, curvature_interval=1)
    size = 1e-25 if factor == "G" else 1e25
    for inputs in (1.0, size):
        before = optimizer.state[model.weight]
        before = {key: before[key].clone() for key in "AG" if key in before}
        optimizer.zero_grad()
        (model(inputs * torch.randn(8, 3)) * torch.randn(8, 2) / inputs).sum().backward()
        assert model.weight.grad is not None and model.weight.grad.isfinite().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
    assert_equal({key: optimizer.state[model.weight][key] for key in "AG"}, before)


def test_clip_leaves_a_refused_layer_out() -> None:
    """ν is computed over the layers that step."""
    scales = []
    for spoil in (False, True):
        model = mlp()
        optimizer = FOP.paper(model, lr=0.1, kl_clip=1e-4, beta=0.0, eta=1.0)
        x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
        torch.manual_seed(3)
        train_step(model, optimizer, x.fill_(0.5).cumsum(0), y.fill_(1.0))
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        if spoil:
            model[0].weight.grad[0, 0] = float("nan")
        else:
            model[0].weight.grad = model[0].bias.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        scales.append(optimizer.diagnostics().kl_scale)
    assert scales[0] < 1
    assert scales[0] == scales[1]


def test_adamw_only_model_reports_too() -> None:
    model = nn.LayerNorm(4)
    optimizer = FOP(model)
    before = weights(model)
    (model(torch.randn(3, 4)) * float("nan")).sum().backward()
    with pytest.warns(RuntimeWarning, match="refused"):
        optimizer.step()
    assert_equal(weights(model), before)
