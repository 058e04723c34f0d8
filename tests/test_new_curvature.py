"""A second approximation of the curvature is one class and one row of the registry."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from fop.curvature import KINDS, Curvature, Damping, LayerSize
from fop.curvature.inversion import Inversion
from fop.layers import Layer, Reduction, Statistics
from models import batch, mlp, weights


class ScaledIdentity(Curvature):
    """F = c·I with c the product of the factors' mean eigenvalues; F̂⁻¹ = 1/(c + damping)."""

    averages = ("scale",)
    inverses = ("scale_inv",)
    by_inversion = False

    @classmethod
    def entries(cls, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"scale": (), "scale_inv": ()}

    @classmethod
    def plausible(cls, state: Mapping[str, Any], shape: torch.Size) -> dict[str, tuple[int, ...]] | None:
        return {"scale": (), "scale_inv": ()} if "scale" in state else None

    def estimate(
        self, statistics: Statistics, reduction: Reduction, loss_scale: Tensor | None
    ) -> tuple[Tensor, ...]:
        A, G = statistics.factors(reduction, loss_scale)
        return (A.diagonal(dim1=-2, dim2=-1).mean() * G.diagonal(dim1=-2, dim2=-1).mean(),)

    def matrices(self, damping: Damping) -> tuple[list[Tensor], list[Tensor]]:
        return [], []

    def store(self, inversions: Sequence[Inversion], damping: Damping) -> bool:
        self.state["scale_inv"] = 1 / (self.state["scale"] + damping.value)
        return True

    def fisher(self, V: Tensor) -> Tensor:
        return self.state["scale"] * V  # type: ignore[no-any-return]

    def solve(self, V: Tensor) -> Tensor:
        return self.state["scale_inv"] * V  # type: ignore[no-any-return]

    def describe(self) -> str:
        return "scale"

    def damping_shares(self, damping: Damping) -> list[float | None]:
        return [float(damping.value / (self.state["scale"] + damping.value)), None]

    def size(self, name: str) -> LayerSize:
        return LayerSize(name, *self.layer.matrix_shape, single=True)

    def message_shapes(self, layer: Layer) -> list[tuple[int, ...]]:
        raise NotImplementedError

    def pack(self, statistics: Statistics, device: torch.device) -> tuple[list[Tensor], Tensor]:
        raise NotImplementedError

    def unpack(self, message: Tensor, counts: Sequence[float], share: float) -> Statistics:
        raise NotImplementedError


@pytest.fixture
def registered() -> Iterator[None]:
    KINDS["identity"] = ScaledIdentity
    yield
    del KINDS["identity"]


OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.1,
    "damping": 1e-2,
    "momentum": 0.0,
    "kl_clip": None,
    "curvature_interval": 1,
    "layer_options": {nn.Linear: {"curvature": "identity"}},
}


def step(model: nn.Module, optimizer: FOP, seed: int) -> None:
    x, y = batch(6, seed)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.usefixtures("registered")
def test_a_registered_curvature_preconditions() -> None:
    """With F a multiple of I, K-FAC's step is gradient descent with a rate of each layer's own."""
    model = mlp()
    optimizer = FOP(model, beta=0.0, eta=1.0, **OPTIONS)
    before = weights(model)
    step(model, optimizer, 0)
    for name, param in model.named_parameters():
        layer = name.split(".")[0]
        state = optimizer.state[model.get_submodule(layer).weight]
        assert param.grad is not None
        expected = before[name] - 0.1 * param.grad / (state["scale"] + 1e-2)
        torch.testing.assert_close(param.detach(), expected)
    assert {row.factors for row in optimizer.summary().rows if row.name.endswith("weight")} == {"scale"}
    assert all(layer.damping_A is not None for layer in optimizer.diagnostics().layers.values())


@pytest.mark.usefixtures("registered")
def test_a_curvature_may_return_the_gradient_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaledIdentity, "solve", lambda _, V: V)
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    optimizer = FOP(model, beta=0.0, eta=0.5, **OPTIONS)
    before, (param,) = weights(model), model.parameters()
    nn.functional.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 3)).backward()
    assert param.grad is not None
    gradient = param.grad.clone()
    optimizer.step()
    assert torch.equal(param.grad, gradient)
    torch.testing.assert_close(param.detach(), before["0.weight"] - 0.1 * 0.5 * gradient)


@pytest.mark.usefixtures("registered")
def test_a_registered_curvature_resumes() -> None:
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    for seed in range(3):
        step(model, optimizer, seed)
    other = copy.deepcopy(model)
    resumed = FOP(other, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    step(model, optimizer, 3)
    step(other, resumed, 3)
    for one, two in zip(weights(model).values(), weights(other).values(), strict=True):
        assert torch.equal(one, two)
    wrong = optimizer.state_dict()
    wrong["state"][0]["scale"] = torch.zeros(3)
    with pytest.raises(ValueError, match="'scale' of parameter 0"):
        resumed.load_state_dict(wrong)


def test_the_layer_must_fit() -> None:
    with pytest.raises(ValueError, match=r"curvature='diagonal' does not fit a LinearLayer: .*'kronecker'"):
        FOP(mlp(), layer_options={nn.Linear: {"curvature": "diagonal"}})
    with pytest.raises(ValueError, match="curvature='none' of Linear must be 'diagonal' or 'kronecker'"):
        FOP(mlp(), layer_options={nn.Linear: {"curvature": "none"}})
