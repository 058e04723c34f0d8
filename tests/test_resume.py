"""Checkpoints of every kind of layer: resuming is bit-exact, in another dtype it is close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import assert_equal, snapshot, weights

# The curvature of step 12 is kept in step 13.
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "damping": 1e-2}
NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def text() -> nn.Module:
    """Tied embedding and head, a factor kept as its diagonal."""
    embed, head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9)
    head.weight = embed.weight
    return nn.Sequential(embed, nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), head)


class Series(nn.Module):
    """Packed and separate attention with the batch in dim 1, and an LSTM, which takes AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.packed(x, x, x)[0]
        x = x + self.separate(x, x[..., :3], x[..., 2:])[0]
        out: Tensor = self.head(self.lstm(x)[0]).transpose(0, 1)
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "images": (images, lambda: torch.randn(6, 2, 4, 4)),
    "text": (text, lambda: torch.randint(9, (6, 3))),
    "series": (Series, lambda: torch.randn(6, 3, 4)),
}
models = pytest.mark.parametrize("kind", MODELS)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, seeds: range) -> None:
    dtype = next(model.parameters()).dtype
    for seed in seeds:
        torch.manual_seed(seed)
        x = MODELS[kind][1]()
        optimizer.zero_grad()
        out = model(x.to(dtype) if x.is_floating_point() else x)
        (out.float() - 1).square().flatten(1).sum(1).mean().backward()
        optimizer.step()


def optimizer_of(model: nn.Module, way: str, library: type[FOP] = FOP) -> FOP:
    chosen = {type(m): {"path": "fop"} for m in model.modules() if isinstance(m, NORMS)}
    return library(model if way == "module" else model.parameters(), **OPTIONS, layer_options=chosen)


def saved(path: Path, *things: Any) -> Any:
    torch.save([thing.state_dict() for thing in things], path)
    return torch.load(path, weights_only=True)


# --- resuming ----------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(
    ("stop", "way", "library"),
    [
        (1, "parameters", FOP),
        (13, "module", FOP),
        (13, "parameters", FOP),
        (13, "parameters-after-a-pass", FOP),
        (13, "module", KFAC),
    ],
)
def test_resuming_equals_never_having_stopped(
    stop: int, way: str, library: type[FOP], kind: str, tmp_path: Path
) -> None:
    """Through a file; the new optimizer knows its modules, or not yet, or from a forward pass."""
    model = make(kind)
    optimizer = optimizer_of(model, "module" if way == "module" else "parameters", library)
    train(model, optimizer, kind, range(stop))
    assert optimizer.curvature_due is (stop == 1)
    state = saved(tmp_path / "run.pt", model, optimizer)
    resumed = make(kind)
    other = optimizer_of(resumed, "module" if way == "module" else "parameters", library)
    if way == "parameters-after-a-pass":
        train(resumed, other, kind, range(50, 52))
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert_equal(snapshot(other), snapshot(optimizer))
    for seed in range(stop, stop + 3):
        train(model, optimizer, kind, range(seed, seed + 1))
        train(resumed, other, kind, range(seed, seed + 1))
        assert other.curvature_due is optimizer.curvature_due
        assert_equal(weights(resumed), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))
    ages = [layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()]
    assert [layer.steps_since_curvature for layer in other.diagnostics().layers.values()] == ages
    paths = [(row.path, row.factors, row.bytes) for row in optimizer.summary().rows]
    assert [(row.path, row.factors, row.bytes) for row in other.summary().rows] == paths


@models
def test_resuming_between_backward_and_step(kind: str, tmp_path: Path) -> None:
    """What an unfinished step had gathered is not part of the state, and does not leak into the next."""
    model = make(kind)
    optimizer = optimizer_of(model, "module")
    train(model, optimizer, kind, range(13))
    state = saved(tmp_path / "run.pt", model, optimizer)
    expected = make(kind)
    unbroken = optimizer_of(expected, "module")
    expected.load_state_dict(state[0])
    unbroken.load_state_dict(state[1])
    model(MODELS[kind][1]()).square().mean().backward()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(model, optimizer, kind, range(13, 18))
    train(expected, unbroken, kind, range(13, 18))
    assert_equal(weights(model), weights(expected))


# --- dtypes ------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(
    ("before", "after", "tolerance"),
    [
        (torch.float32, torch.float64, 1e-4),
        (torch.float64, torch.float32, 1e-4),
        # Weights in bfloat16 lose much of every update; 0.3 is measured.
        (torch.bfloat16, torch.float32, 0.4),
        (torch.float32, torch.bfloat16, 0.4),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_state_of_another_dtype(
    before: torch.dtype, after: torch.dtype, tolerance: float, kind: str, tmp_path: Path
) -> None:
    """Factors are in float32 at least; the run stays close to the one that goes on unchanged."""
    model = make(kind).to(before)
    optimizer = optimizer_of(model, "parameters")
    train(model, optimizer, kind, range(8))
    state = saved(tmp_path / "run.pt", model, optimizer)
    resumed = make(kind).to(after)
    resumed.load_state_dict(state[0])
    other = optimizer_of(resumed, "parameters")
    other.load_state_dict(state[1])
    held = torch.promote_types(after, torch.float32)
    for entries in other.state.values():
        assert {entries[key].dtype for key in ("A", "G", "A_inv", "momentum_buffer") if key in entries} <= {
            held
        }
    start = nn.utils.parameters_to_vector(resumed.parameters()).detach().double()
    for net, own in ((model, optimizer), (resumed, other)):
        train(net, own, kind, range(8, 12))
    ends = [nn.utils.parameters_to_vector(net.parameters()).detach().double() for net in (model, resumed)]
    assert (ends[0] - ends[1]).norm() < tolerance * (ends[0] - start).norm()


# --- another model -----------------------------------------------------------------------------------------


def linear_stack(*sizes: tuple[int, int], bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in sizes))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "layer-added": lambda: linear_stack((4, 5), (5, 5), (5, 3)),
    "layer-removed": lambda: linear_stack((4, 3)),
    "wider": lambda: linear_stack((4, 6), (6, 3)),
    "turned": lambda: linear_stack((3, 5), (5, 4)),
    "no-bias": lambda: linear_stack((4, 5), (5, 3), bias=False),
    "other-kind": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
}


@pytest.mark.parametrize("way", ["module", "parameters"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_state_of_a_model_with_other_layers(other: str, known: bool, way: str, tmp_path: Path) -> None:
    """An error that says what does not fit, before anything has changed."""
    model = linear_stack((4, 5), (5, 3))
    optimizer = FOP(model, **OPTIONS)
    model(torch.randn(6, 4)).square().mean().backward()
    optimizer.step()
    (state,) = saved(tmp_path / "run.pt", optimizer)
    changed = OTHERS[other]()
    mine = FOP(changed if way == "module" else changed.parameters(), **OPTIONS)
    if known:
        changed(torch.randn(6, next(changed.parameters()).shape[1]))
    before, held = weights(changed), snapshot(mine)
    with pytest.raises(ValueError, match=r"(parameters|parameter \d).*(another model|must have)"):
        mine.load_state_dict(state)
    assert_equal(weights(changed), before)
    assert_equal(snapshot(mine), held)
