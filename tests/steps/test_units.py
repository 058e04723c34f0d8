"""Nothing has units: loss, inputs or one layer's parametrisation times 10^k leave a training as it is."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC

STEPS = 8
POWERS = [-6, -3, 3, 6]
# Of the distance between two runs, in how far the run went. The eps of 1e-17 is 1e-9 of gradients of 1e-8.
ROUNDING = {torch.float32: 2e-3, torch.float64: 1e-8}


class Scaled(nn.Module):
    """A layer in other units: ``inner`` sees its input times ``of_input``, and gives its output divided."""

    def __init__(self, inner: nn.Module, of_input: float, of_output: float) -> None:
        super().__init__()
        self.inner, self.of_input, self.of_output = inner, of_input, of_output
        with torch.no_grad():
            inner.weight.mul_(of_output / of_input)  # type: ignore[union-attr, operator]
            if inner.bias is not None:
                inner.bias.mul_(of_output)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.of_input) / self.of_output
        return out

    def own_units(self, name: str, param: Tensor) -> Tensor:
        """A parameter as it would be in a plain layer."""
        return param / self.of_output * (self.of_input if name == "weight" else 1.0)


class Net(nn.Module):
    """Every path: convolution, norm by AdamW, linear layers with and without bias, embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 12)
        self.conv = nn.Conv1d(4, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.middle = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x + self.embed(ids).unflatten(1, (4, 3)).repeat(1, 1, 2)))
        out: Tensor = self.head(torch.tanh(self.middle(self.norm(x.mean(-1)))))
        return out


def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 9, (24,), generator=generator)
    x = torch.randn(24, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x.mean((1, 2)), x[:, 0, 0].sin(), ids / 9 - 0.5], 1)
    return ids, x.to(dtype), y.to(dtype)


def run(
    change: Callable[[Net], Net],
    *,
    loss_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    kind: type[FOP] = FOP,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """All parameters in the units of a plain `Net`, before and after a training."""
    model = change(Net().to(dtype))
    optimizer = kind(model, curvature_interval=2, **options)
    before = in_own_units(model)
    for step in range(STEPS):
        ids, x, y = data(step, dtype)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(ids, x)
        (loss_scale * (out.to(dtype) - y).square().mean()).backward()
        optimizer.step()
    return before, in_own_units(model)


@functools.cache
def expected_run(
    dtype: torch.dtype, kind: type[FOP] = FOP, *, autocast: bool = False
) -> tuple[Tensor, Tensor]:
    return run(plain, dtype=dtype, kind=kind, autocast=autocast)


def in_own_units(model: nn.Module) -> Tensor:
    parts = []
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            owner = next((m for m in model.modules() if isinstance(m, Scaled) and m.inner is module), None)
            parts.append(
                (param if owner is None else owner.own_units(name, param)).detach().double().flatten()
            )
    return torch.cat(parts)


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """How far two runs end from each other, in units of how far the first went."""
    return float((one[1] - other[1]).norm() / (one[1] - one[0]).norm())


def plain(model: Net) -> Net:
    return model


def scaled(part: str, of_input: float = 1.0, of_output: float = 1.0) -> Callable[[Net], Net]:
    def change(model: Net) -> Net:
        setattr(model, part, Scaled(getattr(model, part), of_input, of_output))
        return model

    return change


CHANGES: dict[str, Callable[[float], dict[str, Any]]] = {
    "loss": lambda c: {"change": plain, "loss_scale": c},
    "inputs of a convolution": lambda c: {"change": scaled("conv", of_input=c)},
    "inputs of a linear layer": lambda c: {"change": scaled("middle", of_input=c)},
    "a convolution": lambda c: {"change": scaled("conv", of_output=c)},
    "a linear layer": lambda c: {"change": scaled("middle", of_output=c)},
    "a layer without bias": lambda c: {"change": scaled("head", c, 1 / c)},
    "loss and inputs": lambda c: {"change": scaled("middle", of_input=c), "loss_scale": 1 / c},
}
each_change = pytest.mark.parametrize("what", CHANGES)


@pytest.mark.parametrize("kind", [FOP, KFAC])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("power", POWERS)
@each_change
def test_units(what: str, power: int, dtype: torch.dtype, kind: type[FOP]) -> None:
    expected = expected_run(dtype, kind)
    assert distance(expected, run(**CHANGES[what](10.0**power), dtype=dtype, kind=kind)) < ROUNDING[dtype]


@pytest.mark.parametrize("power", [-20, 20])
@each_change
def test_units_under_autocast(what: str, power: int) -> None:
    """Powers of two: others would round otherwise in bfloat16, as two other networks do."""
    expected = expected_run(torch.float32, autocast=True)
    assert distance(expected, expected_run(torch.float32)) > 1e-3, "autocast did nothing"
    # Units of inputs and bias meet in one factor. What float32 rounds there may fall on the boundary between
    # two numbers of bfloat16 later; everything else is exact.
    bound = torch.finfo(torch.bfloat16).eps if "inputs" in what else 1e-15
    assert distance(expected, run(**CHANGES[what](2.0**power), autocast=True)) < bound


@pytest.mark.parametrize("options", [
    {"step_length": "paper"}, {"damping_kind": "absolute"}, {"eps": 1e-8}
], ids=str)  # fmt: skip
def test_what_has_units_is_found(options: dict[str, Any]) -> None:
    one, other = (run(plain, loss_scale=scale, dtype=torch.float64, **options) for scale in (1.0, 1e-6))
    assert distance(one, other) > 1e-3


# --- how long a step is ------------------------------------------------------------------------------------


def trained(model: nn.Module, steps: int = 1, lr: float = 0.2, **options: Any) -> FOP:
    optimizer = FOP(model, lr, curvature_interval=1, **{"anneal": False, **options})
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        optimizer.zero_grad()
        (model(x) - torch.sin(x[:, :3])).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_moves_by_the_rate_times_its_norm(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=bias))
    old, norm = model[0].weight.detach().clone(), float(model[0].weight.norm())
    trained(model, lr=0.125)
    weight, gradient = model[0].weight.detach(), model[0].weight.grad
    assert gradient is not None
    turned = float(torch.acos((old * weight).sum() / norm / weight.norm()))
    # The part of the gradient along the weight changes its norm instead.
    along = float((old * gradient).sum() / norm / gradient.norm())
    length = 0.125 * math.sqrt(1 - along**2)
    if bias:
        assert 0.5 * length < math.tan(turned) < length
    else:
        assert math.tan(turned) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_weight_of_zero_starts_as_one_whose_outputs_have_size_one(size: float) -> None:
    """And grows by as much until it is; without it it could only grow by 20 % of nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight)
    start = model[0].bias.detach().clone()
    optimizer = FOP(model, 0.2, damping=0.01, anneal=False)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(30):
        x = torch.randn(256, 6, generator=generator)
        optimizer.zero_grad()
        (model(size * x) - x @ torch.ones(6, 3)).square().mean().backward()
        optimizer.step()
        norms.append(size * float(model[0].weight.detach().norm()))
        if len(norms) == 1:
            reference = size * float(optimizer.state[model[0].weight]["reference_norm"])
            assert reference == pytest.approx(math.sqrt(3), rel=0.1)
            bias = (model[0].bias - start).detach() * reference / math.sqrt(3)
            assert math.hypot(norms[0], float(bias.norm())) == pytest.approx(0.2 * reference, rel=1e-5)
    assert norms[9] > 0.8 * reference
    assert norms[-1] == pytest.approx(math.sqrt(18), rel=0.3)


@pytest.mark.parametrize("power", [-6, 6])
@pytest.mark.parametrize("part", ["conv", "middle", "head"])
def test_a_weight_of_zero_starts_without_units(part: str, power: int) -> None:
    """Of the loss and of its inputs; those of its outputs nothing tells."""
    # AdamW's own has units: 1e-9 of gradients of 1e-8, which the other layers' noise makes 1e-7.
    exact: dict[str, Any] = {"dtype": torch.float64, "eps": 1e-30}

    def zeroed(model: Net) -> Net:
        nn.init.zeros_(getattr(model, part).weight)
        return model

    expected = run(zeroed, **exact)
    c = 10.0**power
    others = [run(zeroed, **exact, loss_scale=c)]
    if part != "head":
        others.append(run(lambda model: scaled(part, c)(zeroed(model)), **exact))
    assert max(distance(expected, other) for other in others) < ROUNDING[torch.float64]


@pytest.mark.parametrize("steps", [0, 3])
def test_a_gradient_of_zero_moves_nothing_and_is_no_nan(steps: int) -> None:
    """Not even by what is left of the momentum, which would otherwise be stretched for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = trained(model, steps)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        (0 * model(torch.randn(8, 6))).sum().backward()
        optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(32, 6)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_an_embedding_moves_as_far_as_rows_of_it_move() -> None:
    """Were all rows' norm given to the few that a batch uses, each of these would move ten times too far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 3))
    old = model[0].weight.detach().clone()
    optimizer = FOP(model, 0.1, momentum=0.0, anneal=False)
    ids = torch.arange(10)
    (model(ids) - torch.randn(10, 3)).square().mean().backward()
    optimizer.step()
    moved = (model[0].weight.detach() - old).norm(dim=1)
    assert not moved[10:].any()
    typical = float(old.square().sum(1).mean().sqrt())
    assert 0.2 * 0.1 * typical < float(moved[:10].square().mean().sqrt()) <= 0.1 * typical * (1 + 1e-5)


def test_a_bias_of_another_rate_and_a_frozen_one() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 3)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    start = copy.deepcopy(models[0].state_dict())
    models[2][0].bias.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [models[1][0].weight]},
        {"params": [models[1][0].bias], "lr": 0.4},
    ]
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    for model, params in zip(models, (models[0], groups, models[2]), strict=True):
        optimizer = FOP(params, 0.2, anneal=False)
        (model(x) - y).square().mean().backward()
        optimizer.step()
    moved = [{key: value - start[key] for key, value in model.state_dict().items()} for model in models]
    torch.testing.assert_close(moved[1]["0.weight"], moved[0]["0.weight"])
    torch.testing.assert_close(moved[1]["0.bias"], 2 * moved[0]["0.bias"])
    assert not moved[2]["0.bias"].any()
    # Without the bias all of the length is the weight's.
    frozen, joined = (float(moved[n]["0.weight"].norm() / start["0.weight"].norm()) for n in (2, 0))
    assert joined < frozen < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Their squares do not fit into float16; norms are taken in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(3e-4 / model[0].weight.norm())
    model = model.to(dtype)
    old = model[0].weight.detach().float()
    optimizer = FOP(model, 0.2, anneal=False)
    x = torch.randn(32, 6).to(dtype)
    (model(x).float() - x[:, :3].float()).square().mean().backward()
    optimizer.step()
    moved = float((model[0].weight.detach().float() - old).norm() / old.norm())
    # A chord of the angle whose tangent is 0.2, less what changes the norm.
    assert 0.19 < moved < 0.2
