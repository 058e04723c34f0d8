"""Memory formats, strides and in-place operations: the same updates for every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import weights
from reference import half_squared_error

OPTIONS: dict[str, Any] = {"damping": 1e-2, "curvature_interval": 2}
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm2d, nn.BatchNorm3d)

Step = Callable[[nn.Module, FOP, Tensor, Tensor], Any]


def make(model: nn.Module, kind: type[FOP] = FOP, **options: Any) -> FOP:
    """Norms take the FOP step, too."""
    norms = {type(module): {"path": "fop"} for module in model.modules() if isinstance(module, NORMS)}
    return kind(model, layer_options=norms, **{**OPTIONS, **options})


def plain_step(model: nn.Module, optimizer: FOP, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    half_squared_error(model(x), y).backward()
    optimizer.step()


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module,
    inputs: Callable[[int], Tensor],
    step: Step = plain_step,
    steps: int = 3,
    **options: Any,
) -> tuple[dict[str, Tensor], FOP]:
    """Train; the targets have the shape of the output."""
    optimizer = make(model, **options)
    with torch.no_grad():
        shape = copy.deepcopy(model).eval()(inputs(0)).shape
    for seed in range(steps):
        step(model, optimizer, inputs(seed), draw((*shape,), seed + 50))
    return weights(model), optimizer


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(dict(left), dict(right), rtol=tolerance, atol=tolerance)


def assert_all_paired(optimizer: FOP) -> None:
    layers = optimizer.diagnostics().layers
    assert layers and {name: d.why_kfac for name, d in layers.items() if d.kfac_steps} == {}


# --- every kind of layer, alone ----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Conv1D(nn.Module):
    """As in `transformers.pytorch_utils`: a Linear with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return out.view((*x.shape[:-1], self.nf))


Kind = tuple[Callable[[], nn.Module], tuple[int, ...]]

KINDS: dict[str, Kind] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "rows": (lambda: nn.Linear(4, 3), (5, 4)),
    "rows-no-bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "hf-conv1d": (lambda: Conv1D(3, 4), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(2, 4, 3, groups=2), (2, 4, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (2, 2, 3, 2)),
    "attention": (SelfAttention, (5, 4)),
    "attention-bias": (lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True), (5, 4)),
    "layer-norm": (lambda: nn.LayerNorm(4), (5, 4)),
    "rms-norm": (lambda: nn.RMSNorm(4), (5, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "batch-norm": (lambda: nn.BatchNorm2d(3), (3, 4, 2)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def built(kind: str, *around: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(KINDS[kind][0](), *around).double()
    return model


def inputs_of(kind: str) -> Callable[[int], Tensor]:
    return lambda seed: draw((6, *KINDS[kind][1]), seed)


class Overwrite(nn.Module):
    """Changes what it is given, and not only by a function of the value."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 1.5
        x += 0.25
        return x.sin_()


class Copying(nn.Module):
    """The same as `Overwrite` out of place."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * 1.5 + 0.25)


@kinds
def test_in_place_operations_on_the_output(kind: str) -> None:
    expected, _ = run(built(kind, Copying()), inputs_of(kind))
    actual, optimizer = run(built(kind, Overwrite()), inputs_of(kind))
    assert_close(actual, expected)
    assert_all_paired(optimizer)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every-second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded": lambda x: x[:1].expand_as(x),
    "inner": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@kinds
def test_inputs_that_are_not_contiguous(kind: str, layout: str) -> None:
    def inputs(seed: int) -> Tensor:
        return LAYOUTS[layout](inputs_of(kind)(seed))

    assert not inputs(0).is_contiguous() or layout == "offset"
    expected, _ = run(built(kind), lambda seed: inputs(seed).clone(memory_format=torch.contiguous_format))
    actual, _ = run(built(kind), inputs)
    assert_close(actual, expected, 1e-10)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@kinds
def test_gradients_that_are_expanded(kind: str) -> None:
    """A sum gives its gradient as one number that is expanded over the output of the layer."""

    def step(model: nn.Module, optimizer: FOP, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        (model(x).sum() / (6 if len(model) == 1 else 12)).backward()  # type: ignore[arg-type]
        optimizer.step()

    expected, _ = run(built(kind, Doubled()), inputs_of(kind), step)
    actual, _ = run(built(kind), inputs_of(kind), step)
    assert_close(actual, expected, 1e-10)


# --- channels_last -----------------------------------------------------------------------------------------


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Conv2d(2, 3, 1),
        nn.Flatten(),
        nn.Linear(3 * 8 * 6, 3),
    ).double()


def volumes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 4, 2, groups=2),
        nn.ConvTranspose3d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 3 * 2 * 3, 3),
    ).double()


@pytest.mark.parametrize("kind", [FOP, KFAC])
@pytest.mark.parametrize("part", ["model", "inputs", "both"])
@pytest.mark.parametrize(
    ("build", "shape", "memory_format"),
    [(images, (6, 2, 6, 5), torch.channels_last), (volumes, (6, 2, 4, 3, 4), torch.channels_last_3d)],
)
def test_channels_last(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    part: str,
    kind: type[FOP],
) -> None:
    expected, _ = run(build(), lambda seed: draw(shape, seed), kind=kind)
    model = build()
    if part != "inputs":
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
    strides = {name: p.stride() for name, p in model.named_parameters()}

    def inputs(seed: int) -> Tensor:
        x = draw(shape, seed)
        return x if part == "model" else x.contiguous(memory_format=memory_format)

    actual, optimizer = run(model, inputs, kind=kind)
    assert_close(actual, expected, 1e-10)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    if kind is FOP:
        assert_all_paired(optimizer)
