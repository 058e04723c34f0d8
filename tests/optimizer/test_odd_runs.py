"""Odd batches, dtypes and scales of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    PLAIN,
    Attentive,
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    check_step,
    gradients,
    halves,
    loss_of,
    mlp,
    sentences,
    tokens,
    train_step,
    weights,
)
from reference import half_squared_error

# --- odd batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", ["adaptive", 0.75])
def test_batch_of_one_is_kfac(eta: float | str) -> None:
    model = mlp()
    optimizer = FOP(model, **{**PLAIN, "eta": eta})
    train_step(model, optimizer, *batch())
    twin = copy.deepcopy(model)
    x, y = batch(1, seed=4)
    pairs = {name: (average, None) for name, average in gradients(twin, loss_of(twin, x, y)).items()}
    train_step(model, optimizer, x, y)
    check_step(model, twin, optimizer, pairs)
    assert optimizer.diagnostics().layers["0"].beta == 0.0


@pytest.mark.parametrize("shape", [(5,), (2, 5, 6)])
def test_input_without_batch_dimension(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = (mlp() if len(shape) == 1 else nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))).double()
    plain = copy.deepcopy(model)
    results = []
    for net, single in ((model, True), (plain, False)):
        optimizer = FOP(net, **PLAIN)
        for seed in range(2):
            x = batch(1, seed, shape)[0]
            optimizer.zero_grad()
            out = net(x[0])[None] if single else net(x)
            out.square().mean().backward()
            optimizer.step()
        results.append(weights(net))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_empty_batch_changes_no_curvature(library: type[FOP]) -> None:
    """A rank or an expert that got no sample: the gradient is zero, and nothing is known about curvature."""
    model = mlp()
    optimizer = library(model, momentum=0.0, curvature_interval=1)
    train_step(model, optimizer, *batch())
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    model(torch.empty(0, 5).double()).sum().backward()
    optimizer.step()
    assert_equal(weights(model), before)
    for old, new in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        for key in ("A", "G", "A_inv", "G_inv"):
            assert_equal(old.get(key), new.get(key))


class Empties(nn.Module):
    """Parameters without elements: a layer of no outputs, one of no inputs, an empty vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.none = nn.Parameter(torch.empty(0))
        self.to_none = nn.utils.skip_init(nn.Linear, 5, 0)
        self.from_none = nn.utils.skip_init(nn.Linear, 0, 4)
        self.head = nn.Linear(9, 3)
        nn.init.zeros_(self.from_none.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.from_none(self.to_none(x))
        out: Tensor = self.head(torch.cat([x, hidden], dim=1)) + self.none.sum()
        return out


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_parameters_without_elements(library: type[FOP]) -> None:
    model = Empties()
    before = weights(model)
    optimizer = library(model)
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_differs(weights(model.head), {"weight": before["head.weight"], "bias": before["head.bias"]})
    assert str(optimizer.summary())


# --- dtypes and scales -------------------------------------------------------------------------------------


DATA: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, batch),
    "mixed": (Mixed, tokens),
    "attentive": (Attentive, sentences),
}


@pytest.mark.filterwarnings("ignore:layer_options")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", DATA)
def test_half_precision_parameters(case: str, dtype: torch.dtype) -> None:
    build, data = DATA[case]
    model = build().to(dtype)
    before = weights(model)
    optimizer = FOP(
        model, lr=0.1, adamw_lr=0.05, weight_decay=0.01, anneal=False, layer_options={"gr*": {"path": "fop"}}
    )
    for seed in range(5):
        x, y = data(8, seed)
        x = x.to(dtype) if x.is_floating_point() else x
        optimizer.zero_grad()
        half_squared_error(model(x).float(), y.float()).backward()
        optimizer.step()
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())
    assert_differs(before, weights(model))
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for key, value in state.items()
        if key in ("A", "G", "A_inv", "G_inv", "momentum_buffer")
    )


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(5)
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3).double()
        self.shift = nn.Parameter(torch.zeros(3).double())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.norm(x.float()))).double()) + self.shift
        return out


def test_float32_and_float64_in_one_model() -> None:
    model = TwoDtypes()
    before = weights(model)
    optimizer = FOP(model, weight_decay=0.1)
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
    assert_differs(before, weights(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.diagnostics().kl_scale > 0


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_scale_of_the_loss(scale: float) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **{**PLAIN, "lr": 0.5 * max(1.0, 1 / scale)})
    x, y = batch(12)

    def loss_fn(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return scale * loss_of(net, x, y)

    pairs = halves(twin, x, y, loss_fn)
    loss_fn(model, x, y).backward()
    optimizer.step()
    if scale == 1e20:
        # Nothing is left of the damping, so the factors are as singular as they come.
        assert all(torch.isfinite(p).all() for p in model.parameters())
    else:
        check_step(model, twin, optimizer, pairs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("case", ["mixed", "attentive"])
def test_float32_never_turns_an_extreme_loss_into_nan(case: str, scale: float) -> None:
    build, data = DATA[case]
    model = build().float()
    norms = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}} if case == "attentive" else None
    optimizer = FOP(model, layer_options=norms)
    for seed in range(3):
        x, y = data(6, seed)
        optimizer.zero_grad()
        (scale * half_squared_error(model(x), y.float())).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    start = weights(model)
    for seed in range(3):
        x, y = data(6, seed)
        optimizer.zero_grad()
        half_squared_error(model(x), y.float()).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if case == "mixed":
        # In `Attentive` some factors stay finite at 1e20, and so large that their layers stand still.
        assert_differs(weights(model.first), {"weight": start["first.weight"], "bias": start["first.bias"]})  # type: ignore[arg-type]
