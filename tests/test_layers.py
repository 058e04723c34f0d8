"""Kinds of layer: which are supported and why not, row statistics, layouts, and unusual input shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fop.layers.conv as conv_module
import reference
from fop import FOP
from fop.layers import FactorSums, Layer, describe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(module: nn.Module) -> Layer:
    layer = describe(module, bias=getattr(module, "bias", None) is not None)
    assert isinstance(layer, Layer), layer
    return layer


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    assert value.shape == expected.shape
    assert (value - expected).norm() <= rtol * expected.norm(), f"{value} is not {expected}"


# --- what is supported -----------------------------------------------------------------------------


class PlainLinear(nn.Linear):
    """A subclass that adds nothing to what is computed."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 2), (1, 2, 4)),
        (nn.Linear(3, 2, bias=False), (1, 2, 3)),
        (PlainLinear(3, 2), (1, 2, 4)),
        (nn.Bilinear(2, 3, 4), None),
        (nn.Conv2d(4, 6, (2, 3)), (1, 6, 25)),
        (nn.Conv2d(4, 6, (2, 3), groups=2), (2, 3, 13)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 1, 9)),
    ],
)
def test_supported_kinds(module: nn.Module, shape: tuple[int, int, int] | None) -> None:
    layer = describe(module, bias=module.bias is not None)
    assert (layer.matrix_shape if isinstance(layer, Layer) else None) == shape


def test_bias_of_somebody_else() -> None:
    layer = describe(nn.Linear(3, 2), bias=False)
    assert isinstance(layer, Layer)
    assert layer.matrix_shape == (1, 2, 3)


def replaced_forward() -> nn.Linear:
    module = nn.Linear(3, 3)
    original = module.forward
    module.forward = lambda x: original(2 * x)  # type: ignore[method-assign]
    return module


Wrapped = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def as_is(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


def first(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)[0]


def looked_up(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module((x.sum(1) > 0).long())


def attended(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x[:, None], x[:, None], x[:, None])[0]


# Module, how it is called on (8, ...) inputs, shape of a sample, and the reason by parameter.
UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], Wrapped, tuple[int, ...], dict[str, str]]] = {
    "overridden linear": (
        lambda: Doubled(3, 2),
        as_is,
        (3,),
        {"weight": "Doubled overrides Linear.forward", "bias": "Doubled overrides Linear.forward"},
    ),
    "overridden conv": (
        lambda: Standardized(2, 3, 3, bias=False),
        as_is,
        (2, 4, 4),
        {"weight": "Standardized overrides Conv2d.forward"},
    ),
    "overridden _conv_forward": (
        lambda: OtherConvolution(2, 3, 3),
        as_is,
        (2, 4, 4),
        {"weight": "OtherConvolution overrides Conv2d.forward"},
    ),
    "replaced forward": (
        replaced_forward,
        as_is,
        (3,),
        # Of the instance, which no look at the class shows.
        {"weight": "forward", "bias": "forward"},
    ),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
        as_is,
        (3,),
        {
            "bias": "weight is computed from other parameters",
            "parametrizations.weight.original0": "ParametrizationList",
            "parametrizations.weight.original1": "ParametrizationList",
        },
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)),
        as_is,
        (2, 4, 4),
        {
            "bias": "weight is computed from other parameters",
            "parametrizations.weight.original": "ParametrizationList",
        },
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3, bias=False)),
        as_is,
        (3,),
        {"parametrizations.weight.original": "ParametrizationList"},
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2),
        as_is,
        (3,),
        {"weight_orig": "weight is computed from other parameters"},
    ),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), as_is, (2, 5), {"weight": "Conv1d is not one of Linear, Conv2d"}),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), as_is, (1, 3, 3, 3), {"weight": "Conv3d is not one of"}),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 3, 2),
        as_is,
        (2, 3, 3),
        {"weight": "ConvTranspose2d is not one of Linear, Conv2d", "bias": "ConvTranspose2d is not one of"},
    ),
    "embedding": (lambda: nn.Embedding(2, 3), looked_up, (4,), {"weight": "Embedding is not one of Linear"}),
    "lstm": (
        lambda: nn.LSTM(3, 2, batch_first=True),
        first,
        (4, 3),
        {"weight_ih_l0": "LSTM is not one of", "bias_hh_l0": "LSTM is not one of"},
    ),
    "gru": (lambda: nn.GRU(3, 2), first, (4, 3), {"weight_hh_l0": "GRU is not one of Linear, Conv2d"}),
    "layer norm": (lambda: nn.LayerNorm(3), as_is, (3,), {"weight": "LayerNorm is not one of Linear"}),
    "prelu": (lambda: nn.PReLU(), as_is, (3,), {"weight": "PReLU is not one of Linear, Conv2d"}),
    # Its out_proj is a Linear that is never called, only its weight is used.
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        attended,
        (4,),
        {"in_proj_weight": "MultiheadAttention is not one of", "out_proj.weight": ""},
    ),
}


def inputs_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(8, *shape, dtype=torch.float64)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_layers_take_adamw_visibly(case: str) -> None:
    build, wrap, shape, reasons = UNSUPPORTED[case]
    module = build().double()
    optimizer = FOP(module, lr=0.01, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        wrap(module)(inputs_of(shape)).square().sum().backward()
        optimizer.step()
    rows = {row.name: row for row in optimizer.summary().rows}
    assert rows.keys() == dict(module.named_parameters()).keys()
    assert {row.path for row in rows.values()} == {"AdamW"}
    table = str(optimizer.summary())
    for name, reason in reasons.items():
        assert reason in rows[name].reason
        assert rows[name].reason in table
        assert rows[name].reason
    assert f"{len(rows)} parameters: {len(rows)} AdamW;" in table


@pytest.mark.parametrize("case", [case for case in UNSUPPORTED if case != "replaced forward"])
def test_unsupported_layers_step_exactly_as_adamw(case: str) -> None:
    """With the learning rate of the AdamW path, torch.optim.AdamW gives the same weights."""
    build, wrap, shape, _ = UNSUPPORTED[case]
    data = [inputs_of(shape) for _ in range(4)]
    results = []
    for make in (
        lambda params: FOP(params, lr=0.5, adamw_lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
    ):
        torch.manual_seed(1)
        module = build().double()
        start = [p.detach().clone() for p in module.parameters()]
        optimizer = make(module.parameters())
        for x in data:
            optimizer.zero_grad()
            wrap(module)(x).square().sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in module.parameters()])
        assert any(not torch.equal(old, p) for old, p in zip(start, module.parameters(), strict=True))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_describing_a_module_does_not_run_it() -> None:
    """Reading the weight of a module with spectral_norm does a power iteration: the model would change."""
    module = parametrizations.spectral_norm(nn.Linear(4, 3))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    FOP(module)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


class CalledAsFunction(nn.Module):
    """Uses the weight of a Linear without ever calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


def test_a_linear_that_is_never_called_is_seen_to_take_adamw() -> None:
    module = CalledAsFunction()
    optimizer = FOP(module)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    assert {row.path for row in optimizer.summary().rows} == {"AdamW"}


def test_a_parametrized_bias_leaves_the_weight_its_step() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    module = nn.Linear(3, 2)
    parametrize.register_parametrization(module, "bias", Positive())
    optimizer = FOP(module)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    rows = {row.name: row for row in optimizer.summary().rows}
    assert (rows["weight"].path, rows["weight"].factors) == ("FOP", "(A 3², G 2²)")
    assert rows["parametrizations.bias.original"].path == "AdamW"


def test_supported_and_unsupported_in_one_model() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(12, 4)),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        Doubled(4, 2),
    )
    optimizer = FOP(model, lr=0.01)
    x, y = torch.randn(16, 2, 5), torch.randn(16, 2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    paths = {row.name: row.path for row in optimizer.summary().rows}
    assert {name for name, path in paths.items() if path == "FOP"} == {"3.weight", "3.bias"}
    assert losses[-1] < losses[0]


# --- statistics ------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 3, 3),
    "no bias": lambda: nn.Conv2d(4, 3, 3, bias=False, padding=1),
    "groups": lambda: nn.Conv2d(4, 6, (2, 3), groups=2, stride=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
    "same reflect": lambda: nn.Conv2d(4, 3, (2, 4), padding="same", padding_mode="reflect"),
}


def conv_case(name: str, samples: int = 7) -> tuple[nn.Conv2d, Tensor, Tensor]:
    module = CONVOLUTIONS[name]().double()
    x = torch.randn(samples, 4, 6, 5, dtype=torch.float64)
    return module, x, torch.randn_like(module(x))


@pytest.mark.parametrize("elements", [1, 1000, 2000])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_chunks_change_no_statistics(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, b = conv_case(name)
    layer = layer_of(module)
    whole = layer.factor_sums(x, b)
    chunks: list[int] = []
    unfold = F.unfold

    def counting(part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chunks.append(len(part))
        return unfold(part, *args, **kwargs)

    monkeypatch.setattr(conv_module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(conv_module.F, "unfold", counting)
    parts = layer.factor_sums(x, b)
    assert sum(chunks) == len(x)
    if elements == 1:
        assert chunks == [1] * len(x)
    assert_close(parts.a, whole.a)
    assert_close(parts.g, whole.g)
    assert (parts.samples, parts.rows) == (whole.samples, whole.rows)


def test_the_chunk_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unfolded input is larger than the limit, and the limit is used: chunks are not single samples."""
    module, x, b = conv_case("plain")
    sizes: list[int] = []
    unfold = F.unfold

    def measuring(part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = unfold(part, *args, **kwargs)
        sizes.append(result.numel())
        return result

    one = unfold(x[:1], 3).numel()
    monkeypatch.setattr(conv_module, "CHUNK_ELEMENTS", 3 * one + 1)
    monkeypatch.setattr(conv_module.F, "unfold", measuring)
    layer_of(module).factor_sums(x, b)
    assert sizes == [3 * one, 3 * one, one]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_statistics_and_gradient_against_the_oracle(name: str) -> None:
    module, x, b = conv_case(name)
    samples = reference.per_sample(nn.Sequential(module), x, b, lambda out, dot: (out * dot).sum())["0"]
    layer = layer_of(module)
    # The oracle's output gradients are those of one sample; ours come from a loss that is a mean.
    A, G = layer.factor_sums(x, b / len(x)).factors()
    expected_A, expected_G = reference.factors(samples)
    assert_close(A, expected_A)
    assert_close(G, expected_G)
    assert_close(layer.gradient(x, b / len(x)), reference.mean_gradient(samples))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3, 2)])
def test_linear_statistics_and_gradient_with_many_leading_dims(lead: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(4, 3, bias=bias).double()
    x = torch.randn(6, *lead, 4, dtype=torch.float64)
    b = torch.randn(6, *lead, 3, dtype=torch.float64)
    samples = reference.per_sample(nn.Sequential(module), x, b, lambda out, dot: (out * dot).sum())["0"]
    layer = layer_of(module)
    A, G = layer.factor_sums(x, b / 6).factors()
    expected_A, expected_G = reference.factors(samples)
    assert_close(A, expected_A)
    assert_close(G, expected_G)
    assert_close(layer.gradient(x, b / 6), reference.mean_gradient(samples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2)], ids=["linear", "conv"])
def test_statistics_of_half_precision_are_summed_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(6, 4, 3, 3) if isinstance(module, nn.Conv2d) else torch.randn(6, 4)
    b = torch.randn_like(module(x))
    x, b = x.to(dtype), b.to(dtype)
    sums = layer_of(module).factor_sums(x, b)
    exact = layer_of(module).factor_sums(x.double(), b.double())
    assert sums.a.dtype == sums.g.dtype == torch.float32
    assert_close(sums.a.double(), exact.a, 1e-6)
    assert_close(sums.g.double(), exact.g, 1e-6)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channels_last_changes_nothing(name: str) -> None:
    module, x, b = conv_case(name)
    layer = layer_of(module)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, b)]
    assert_close(layer.gradient(*last), layer.gradient(x, b))
    for ours, plain in zip(
        layer.factor_sums(*last).factors(), layer.factor_sums(x, b).factors(), strict=True
    ):
        assert_close(ours, plain)


def random_sums(samples: int, rows: int) -> FactorSums:
    return FactorSums(torch.rand(1, 3, 3).double(), torch.rand(1, 2, 2).double(), samples, rows)


def test_uses_share_samples_and_batches_add_them() -> None:
    a, b = random_sums(4, 12), random_sums(4, 8)
    expected_a, expected_g = a.a + b.a, a.g + b.g
    used, added = random_sums(0, 0), random_sums(0, 0)
    for sums in (used, added):
        sums.a, sums.g, sums.samples, sums.rows = a.a.clone(), a.g.clone(), a.samples, a.rows
    used.add_use(b)
    added.add_batch(b)
    assert (used.samples, used.rows) == (4, 20)
    assert (added.samples, added.rows) == (8, 20)
    for sums in (used, added):
        assert_close(sums.a, expected_a)
        assert_close(sums.g, expected_g)
    A, G = added.factors()
    assert_close(A, expected_a / 8)
    assert_close(G, expected_g * 64 / 20)


# --- layouts ---------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "linear no bias": lambda: nn.Linear(4, 3, bias=False),
    **CONVOLUTIONS,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_and_back(name: str) -> None:
    module = LAYOUTS[name]().double()
    layer = layer_of(module)
    matrix = layer.to_matrix(module.weight, module.bias)
    assert tuple(matrix.shape) == layer.matrix_shape
    assert torch.equal(matrix, reference.to_matrix(module, module.weight, module.bias))
    weight, bias = layer.from_matrix(matrix, module.weight)
    assert torch.equal(weight, module.weight)
    assert (bias is None) == (module.bias is None)
    assert bias is None or torch.equal(bias, module.bias)
    # A matrix that is no weight comes back too: nothing is averaged or lost.
    other = torch.randn_like(matrix)
    assert torch.equal(layer.to_matrix(*layer.from_matrix(other, module.weight)), other)


def test_missing_bias_gradient_is_a_column_of_zeros() -> None:
    module = nn.Conv2d(4, 6, 2, groups=2)
    matrix = layer_of(module).to_matrix(module.weight, None)
    assert torch.equal(matrix[..., -1], torch.zeros(2, 3))
    assert torch.equal(matrix[..., :-1], module.weight.reshape(2, 3, 8))


def test_matrix_of_half_precision_is_float32() -> None:
    module = nn.Linear(4, 3).bfloat16()
    matrix = layer_of(module).to_matrix(module.weight, module.bias)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix[0, :, :-1], module.weight.float())


# --- shapes of inputs ------------------------------------------------------------------------------


def trained(build: Callable[[], nn.Module], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    module = build().double()
    optimizer = FOP(module, lr=0.1, damping=1e-2, **options)
    for x in inputs:
        optimizer.zero_grad()
        module(x).sin().sum().backward()
        optimizer.step()
    rows = optimizer.summary().rows
    assert {row.path for row in rows} == {"FOP"}
    assert not any("no curvature" in row.reason for row in rows)
    return [p.detach().clone() for p in module.parameters()]


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (4, 3, 3)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_equals_a_batch_of_one(name: str) -> None:
    build, shape = UNBATCHED[name]
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    plain, batch = trained(build, inputs), trained(build, [x[None] for x in inputs])
    for p, q in zip(plain, batch, strict=True):
        assert_close(p, q)


def test_leading_dims_of_one_change_nothing() -> None:
    def build() -> nn.Module:
        return nn.Linear(4, 3)

    inputs = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    plain, deep = trained(build, inputs), trained(build, [x[:, None, None] for x in inputs])
    for p, q in zip(plain, deep, strict=True):
        assert_close(p, q)


def test_rows_of_a_sample_may_be_folded_anyhow() -> None:
    def build() -> nn.Module:
        return nn.Linear(4, 3)

    inputs = [torch.randn(6, 2, 3, 5, 4, dtype=torch.float64) for _ in range(3)]
    deep, flat = trained(build, inputs), trained(build, [x.flatten(1, 3) for x in inputs])
    for p, q in zip(deep, flat, strict=True):
        assert_close(p, q)


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), (0, 4)),
    "linear sequence": (lambda: nn.Linear(4, 3), (5, 2, 4), (0, 2, 4)),
    "linear without rows": (lambda: nn.Linear(4, 3), (5, 2, 4), (5, 0, 4)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (5, 4, 3, 3), (0, 4, 3, 3)),
    "conv reflect": (
        lambda: nn.Conv2d(4, 3, 2, padding=1, padding_mode="reflect", bias=False),
        (5, 4, 3, 3),
        (0, 4, 3, 3),
    ),
}


@pytest.mark.parametrize("empty_step", [0, 2])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_a_step_of_nothing(name: str, empty_step: int) -> None:
    """Before there is any curvature, and later, in a step in which curvature is due."""
    build, shape, empty = EMPTY[name]
    module = build()
    optimizer = FOP(module, lr=0.1, momentum=0.0, curvature_interval=1)
    for step in range(4):
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty batch is no reason to warn
            module(torch.randn(empty if step == empty_step else shape)).square().sum().backward()
            optimizer.step()
        for p, old in zip(module.parameters(), before, strict=True):
            assert torch.isfinite(p).all()
            assert torch.equal(p, old) == (step == empty_step)
    A, G = (optimizer.state[module.weight][key] for key in ("A", "G"))
    assert torch.isfinite(A).all()
    assert torch.isfinite(G).all()
    # Nothing came in from the empty batch: the trace of A is the mean of real samples, not pulled to 0.
    assert A.diagonal(dim1=1, dim2=2).sum() > 1


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_leaves_the_curvature(name: str) -> None:
    build, shape, empty = EMPTY[name]
    module = build()
    optimizer = FOP(module, curvature_interval=1)
    for step in range(3):
        before = {k: v.clone() for k, v in optimizer.state[module.weight].items() if isinstance(v, Tensor)}
        optimizer.zero_grad()
        module(torch.randn(empty if step == 2 else shape)).square().sum().backward()
        optimizer.step()
    for key in ("A", "G", "A_inv", "G_inv"):
        assert torch.equal(before[key], optimizer.state[module.weight][key])
