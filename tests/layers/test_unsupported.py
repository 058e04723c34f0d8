"""Layers that do not take the FOP step: AdamW trains them, exactly, and `summary()` says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fop import FOP


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


class OtherTransposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(x, output_size)


class OtherEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.tanh()[ids]


class OtherAttention(nn.MultiheadAttention):
    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        return super().forward(*(2 * x for x in args), **kwargs)


def replaced_forward() -> nn.Linear:
    module = nn.Linear(3, 3)
    original = module.forward
    module.forward = lambda x: original(2 * x)  # type: ignore[method-assign]
    return module


class Scale(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


Call = Callable[[nn.Module, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "plain": lambda module, x: module(x),
    "first": lambda module, x: module(x)[0],
    "pair": lambda module, x: module(x, x),
    "tokens": lambda module, x: module((x > 0).long()),
    "attention": lambda module, x: module(x, x, x)[0],
}
NORM, SPECTRAL = parametrizations.weight_norm, parametrizations.spectral_norm
COMPUTED = "weight is computed from other parameters"
PARAMETRIZED, LIST = "parametrizations.weight.original", "ParametrizationList"

# Module, how it is called, shape of a sample, and part of the reason by parameter.
Row = tuple[Callable[[], nn.Module], str, tuple[int, ...], dict[str, str]]
UNSUPPORTED: dict[str, Row] = {
    "overridden embedding": (lambda: OtherEmbedding(2, 3), "tokens", (4,), {
        "weight": "OtherEmbedding overrides Embedding.forward"}),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3, bias=False)), "plain", (3,), {
        PARAMETRIZED: LIST}),
    "max_norm": (lambda: nn.Embedding(2, 3, max_norm=0.5), "tokens", (4,), {"weight": "max_norm"}),
    "scaled by frequency": (lambda: nn.Embedding(2, 3, scale_grad_by_freq=True), "tokens", (4,), {
        "weight": "scale_grad_by_freq"}),
    "embedding bag": (lambda: nn.EmbeddingBag(2, 3), "tokens", (4,), {"weight": "EmbeddingBag"}),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), "pair", (3,), {"weight": "Bilinear", "bias": "Bilinear"}),
    "lstm": (lambda: nn.LSTM(3, 2, batch_first=True), "first", (4, 3), {
        "weight_ih_l0": "LSTM", "bias_hh_l0": "LSTM"}),
    "gru": (lambda: nn.GRU(3, 2), "first", (4, 3), {"weight_hh_l0": "GRU"}),
    "rnn cell": (lambda: nn.RNNCell(3, 2), "plain", (3,), {"weight_ih": "RNNCell", "bias_hh": "RNNCell"}),
    "layer norm": (lambda: nn.LayerNorm(3), "plain", (3,), {"weight": "LayerNorm", "bias": "LayerNorm"}),
    "rms norm": (lambda: nn.RMSNorm(3), "plain", (3,), {"weight": "RMSNorm"}),
    "group norm": (lambda: nn.GroupNorm(1, 3), "plain", (3, 2), {"weight": "GroupNorm"}),
    "batch norm": (lambda: nn.BatchNorm1d(3), "plain", (3,), dict.fromkeys(("weight", "bias"), "Norm1d")),
    "another's layer norm": (lambda: type("LayerNorm", (nn.LayerNorm,), {})(3), "plain", (3,), {
        "weight": "test_unsupported.LayerNorm is none of torch's LayerNorm"}),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), "plain", (3, 4), {"weight": "Instance"}),
    "prelu": (lambda: nn.PReLU(), "plain", (3,), {"weight": "PReLU"}),
    "bare parameter": (Scale, "plain", (3,), {"scale": "Scale"}),
}  # fmt: skip


def trained(case: str, make: Callable[..., torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, Any]:
    """A module after four steps, always from the same start and on the same inputs.

    The gradient of a key's bias is rounding, which a small eps would blow up.
    """
    build, call, shape, _ = {**UNSUPPORTED, **RECOGNISED}[case]
    torch.manual_seed(1)
    module = build().double()
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = make(module.parameters(), betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1, **options)
    for _ in range(4):
        optimizer.zero_grad()
        CALLS[call](module, torch.randn(8, *shape, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(old, p) for old, p in zip(start, module.parameters(), strict=True))
    return module, optimizer


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_layers_step_exactly_as_adamw_and_visibly(case: str) -> None:
    """With the learning rate of the AdamW path, torch.optim.AdamW gives the same weights."""
    module, optimizer = trained(case, FOP, lr=0.5, adamw_lr=0.02)
    expected, _ = trained(case, torch.optim.AdamW, lr=0.02)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    rows, reasons = {row.name: row for row in optimizer.summary().rows}, UNSUPPORTED[case][3]
    assert rows.keys() == dict(module.named_parameters()).keys() >= reasons.keys()
    table = str(optimizer.summary())
    assert f"{len(rows)} parameters: {len(rows)} AdamW;" in table
    for name, row in rows.items():
        assert row.path == "AdamW"
        assert row.reason and reasons.get(name, "") in row.reason and row.reason in table, name


# Modules whose class does not tell what they compute, and how functions on their weights are recognised.
RECOGNISED: dict[str, Row] = {
    "overridden linear": (lambda: Doubled(3, 2), "plain", (3,), {
        "weight": "F.linear in Doubled", "bias": "F.linear in Doubled"}),
    "overridden conv": (lambda: Standardized(2, 3, 3, bias=False), "plain", (2, 4, 4), {
        "weight": "F.conv2d of a computed weight in Standardized"}),
    "overridden _conv_forward": (lambda: OtherConvolution(2, 3, 3), "plain", (2, 4, 4), {
        "weight": "F.conv2d of a computed weight in OtherConvolution"}),
    "overridden transposed": (lambda: OtherTransposed(2, 3, 3), "plain", (2, 4), {
        "weight": "F.conv_transpose1d in OtherTransposed", "bias": "F.conv_transpose1d in OtherTransposed"}),
    # The projections of query, key and value are parts of one parameter.
    "overridden attention": (lambda: OtherAttention(4, 2, batch_first=True), "attention", (3, 4), {
        "out_proj.weight": "F.linear in OtherAttention", "out_proj.bias": "F.linear in OtherAttention"}),
    # Of the instance, which no look at the class shows.
    "replaced forward": (replaced_forward, "plain", (3,), {
        "weight": "F.linear in Linear", "bias": "F.linear in Linear"}),
    "weight_norm": (lambda: NORM(nn.Linear(3, 2)), "plain", (3,), {
        f"{PARAMETRIZED}1": "F.linear of a computed weight in ParametrizedLinear"}),
    "spectral_norm": (lambda: SPECTRAL(nn.Conv2d(2, 3, 3)), "plain", (2, 4, 4), {
        PARAMETRIZED: "F.conv2d of a computed weight in ParametrizedConv2d"}),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2), "plain", (3,), {
        "weight_orig": "F.linear of a computed weight in Linear"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:it is not clear where the samples")
@pytest.mark.parametrize("case", RECOGNISED)
def test_recognised_by_their_functions(case: str) -> None:
    """These take FOP, and say how they were recognised; every other parameter takes AdamW and says why."""
    _, optimizer = trained(case, FOP, lr=0.01, adamw_lr=0.02)
    rows, reasons = {row.name: row for row in optimizer.summary().rows}, RECOGNISED[case][3]
    assert {name: row.reason for name, row in rows.items() if row.path == "FOP"} == reasons
    assert all(row.path == "AdamW" and row.reason for name, row in rows.items() if name not in reasons)


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


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def with_positive_bias() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(3, 2), "bias", Positive())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (CalledAsFunction, {"inner.weight": ("FOP", "(A 4², G 2²)"), "inner.bias": ("FOP", "")}),
        # A parametrized bias leaves the weight its step.
        (
            with_positive_bias,
            {"weight": ("FOP", "(A 3², G 2²)"), "parametrizations.bias.original": ("AdamW", "")},
        ),
    ],
)
def test_seen_after_the_first_steps(
    build: Callable[[], nn.Module], expected: dict[str, tuple[str, str]]
) -> None:
    module = build()
    optimizer = FOP(module)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
    assert {row.name: (row.path, row.factors) for row in optimizer.summary().rows} == expected


def test_supported_and_unsupported_in_one_model() -> None:
    norm = parametrizations.weight_norm(nn.Linear(12, 4))
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Flatten(), norm, nn.Linear(4, 4), nn.BatchNorm1d(4), Doubled(4, 2)
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
    fop = {name for name, path in paths.items() if path == "FOP"}
    layers = {f"{layer}.{name}" for layer in (0, 3, 5) for name in ("weight", "bias")}
    assert fop == {*layers, "2.parametrizations.weight.original1"}
    assert losses[-1] < losses[0]
