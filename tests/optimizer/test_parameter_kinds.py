"""Parameters of every dtype and shape: integer, quantised, complex, half precision, scalar, lazy, moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import assert_equal, batch, loss_of, mlp, train_step, weights

# --- integers and quantised numbers -------------------------------------------------------------------


def codes(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 100, (6, 5)).to(dtype)


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.randn(6, 5), 0.1, 0, torch.qint8)


class Frozen(nn.Module):
    """A layer of frozen numbers, as QLoRA has them, beside one that trains."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.numbers = nn.Parameter(numbers, requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        dense = self.numbers.dequantize() if self.numbers.is_quantized else self.numbers.float() / 100
        out: Tensor = self.head(x.float() @ dense.T)
        return out


INTEGERS: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: codes(torch.uint8),
    "int8": lambda: codes(torch.int8),
    "int64": lambda: codes(torch.int64),
    "bool": lambda: codes(torch.bool),
    "qint8": quantised,
    "float8": lambda: codes(torch.float32).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.parameters(), lambda m: m.named_parameters()])
@pytest.mark.parametrize("kind", INTEGERS)
def test_numbers_that_cannot_be_trained_stay(kind: str, given: Callable[[nn.Module], object]) -> None:
    """The rest trains as without them; checkpoints fit."""
    results = []
    numbers = INTEGERS[kind]()
    for known in (True, False):
        model = Frozen(numbers.clone())
        optimizer = FOP(given(model if known else model.head), weight_decay=0.1, max_grad_norm=1.0)  # type: ignore[arg-type]
        for seed in range(3):
            train_step(model, optimizer, *batch(8, seed))
        results.append(weights(model.head))
        if known:
            other = Frozen(numbers.clone())
            FOP(given(other)).load_state_dict(optimizer.state_dict())  # type: ignore[arg-type]
            assert model.numbers.dtype is numbers.dtype
            assert model.numbers not in optimizer.state
            assert str(optimizer.summary())
    assert_equal(*results)


# --- complex numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 3, 4)])
@pytest.mark.parametrize("maximize", [False, True])
def test_complex_parameters_are_those_of_adamw(
    shape: tuple[int, ...], dtype: torch.dtype, maximize: bool
) -> None:
    """Bit for bit, also where the state was saved and loaded on the way."""
    torch.manual_seed(0)
    value = torch.randn(shape, dtype=dtype)
    param, twin = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    optimizer = FOP([param], adamw_lr=0.01, weight_decay=0.1, maximize=maximize)
    adamw = torch.optim.AdamW([twin], lr=0.01, eps=1e-17, weight_decay=0.1, maximize=maximize)
    for step in range(10):
        param.grad = torch.randn(shape, dtype=dtype)
        twin.grad = param.grad.clone()
        optimizer.step()
        adamw.step()
        if step == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            del optimizer
            optimizer = FOP([param], adamw_lr=0.01, weight_decay=0.1, maximize=maximize)
            optimizer.load_state_dict(saved)
    assert torch.equal(param, twin)


@pytest.mark.parametrize("value", [complex("nan"), complex(0, float("inf"))])
def test_complex_gradients_that_are_not_finite_are_refused(value: complex) -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    optimizer = FOP([param])
    param.grad = torch.ones(3, dtype=torch.cfloat)
    param.grad[1] = value
    with pytest.warns(RuntimeWarning, match="refused"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, dtype=torch.cfloat))


class Spectral(nn.Module):
    """A Fourier layer with complex weights between real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(5, 8)
        self.modes = nn.Parameter(0.3 * torch.randn(5, dtype=torch.cdouble))
        self.head = nn.Linear(8, 3)
        self.lift.double()
        self.head.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.fft.irfft(torch.fft.rfft(self.lift(x)) * self.modes, n=8))
        return out


COMPLEX: list[tuple[Callable[..., nn.Module], tuple[int, ...]]] = [
    (partial(nn.Linear, 4, 3), (6, 4)),
    (partial(nn.Conv1d, 2, 3, 2), (6, 2, 4)),
    (partial(nn.ConvTranspose1d, 2, 3, 2), (6, 2, 4)),
]


@pytest.mark.parametrize(("kind", "shape"), COMPLEX)
def test_complex_layers_are_those_of_adamw(kind: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    """Bit for bit, though the class of the module has Kronecker factors."""
    torch.manual_seed(0)
    model = kind(dtype=torch.cdouble)
    twin = copy.deepcopy(model)
    optimizer = FOP(model, adamw_lr=0.01, eps=1e-8)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(shape, dtype=torch.cdouble)
        for each, its in ((model, optimizer), (twin, adamw)):
            its.zero_grad()
            each(x).abs().square().mean().backward()
            its.step()
    assert_equal(weights(model), weights(twin))
    rows = optimizer.summary().rows
    assert [row.path for row in rows] == ["AdamW"] * 2 and rows[0].reason == "its dtype is torch.complex128"


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_complex_weights_among_real_ones(max_norm: float | None) -> None:
    model = Spectral()
    optimizer = FOP(model, adamw_lr=0.01, max_grad_norm=max_norm)
    losses = []
    for seed in range(30):
        losses.append(float(loss_of(model, *batch(6, seed % 2))))
        train_step(model, optimizer, *batch(6, seed % 2))
    assert losses[-1] < 0.7 * losses[0]
    assert {row.name: row.path for row in optimizer.summary().rows}["modes"] == "AdamW"


# --- half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_step_of_float64_but_for_rounding(dtype: torch.dtype) -> None:
    """The first update, before it is added to a weight of few digits."""
    torch.manual_seed(0)
    half = mlp().to(dtype)
    x, y = (each.to(dtype) for each in batch(32))
    updates = []
    for model in (half, copy.deepcopy(half).double()):
        optimizer = FOP(model, momentum=0.5, damping=0.1, kl_clip=None)
        kind = next(model.parameters()).dtype
        (model(x.to(kind)) - y.to(kind)).square().mean().backward()
        optimizer.step()
        updates.append([optimizer.state[p]["momentum_buffer"].double().flatten() for p in model.parameters()])
    taken, exact = (torch.cat(each) for each in updates)
    assert float((taken - exact).norm() / exact.norm()) < (0.05 if dtype is torch.bfloat16 else 0.01)


# --- scalars, lazy modules, moves ---------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.body = nn.Parameter(torch.ones(())), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.body(x)
        return out


def test_a_scalar_takes_adamw() -> None:
    model = Scaled()
    optimizer = FOP(model)
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
    assert float(model.scale) != 1
    assert {row.name: row.path for row in optimizer.summary().rows}["scale"] == "AdamW"


LAZY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.LazyLinear(3), (5,)),
    "convolution": (lambda: nn.Sequential(nn.LazyConv1d(2, 2), nn.Flatten(), nn.LazyLinear(3)), (2, 4)),
    "norm": (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(3)), (5,)),
}


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_module_must_have_run_once(kind: str) -> None:
    build, shape = LAZY[kind]
    model = build().double()
    with pytest.raises(ValueError, match="uninitialised; run the lazy module once before"):
        FOP(model)
    x, y = batch(6, 0, shape)
    model(x)
    optimizer, before = FOP(model), weights(model)
    train_step(model, optimizer, x, y)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "FOP" in {row.path for row in optimizer.summary().rows}


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float64])
def test_another_dtype_after_the_optimizer_was_made(to: torch.dtype, steps: int) -> None:
    """Before the first step, and in mid-training."""
    model = Scaled()
    optimizer = FOP(model)
    for seed in range(steps):
        train_step(model, optimizer, *batch(6, 9 - seed))
    model.to(to)
    for seed in range(3):
        before = weights(model)
        x, y = (each.to(to) for each in batch(6, seed))
        train_step(model, optimizer, x, y)
        assert all(p.dtype is to and torch.isfinite(p).all() for p in model.parameters())
        assert not torch.equal(model.body.weight, before["body.weight"])
