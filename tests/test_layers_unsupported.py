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


Wrapped = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def as_is(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


def first(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)[0]


def paired(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, x)


def looked_up(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module((x > 0).long())


def attended(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, x, x)[0]


# Module, how it is called on (8, ...) inputs, shape of a sample, and part of the reason by parameter.
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
    "overridden transposed": (
        lambda: OtherTransposed(2, 3, 3),
        as_is,
        (2, 4),
        {"weight": "OtherTransposed overrides ConvTranspose1d.forward"},
    ),
    "overridden embedding": (
        lambda: OtherEmbedding(2, 3),
        looked_up,
        (4,),
        {"weight": "OtherEmbedding overrides Embedding.forward"},
    ),
    "overridden attention": (
        lambda: OtherAttention(4, 2, batch_first=True),
        attended,
        (3, 4),
        {"in_proj_weight": "OtherAttention overrides MultiheadAttention.forward", "out_proj.weight": ""},
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
    "embedding of bounded norm": (
        lambda: nn.Embedding(2, 3, max_norm=0.5),
        looked_up,
        (4,),
        {"weight": "max_norm"},
    ),
    "embedding scaled by frequency": (
        lambda: nn.Embedding(2, 3, scale_grad_by_freq=True),
        looked_up,
        (4,),
        {"weight": "scale_grad_by_freq"},
    ),
    "embedding bag": (lambda: nn.EmbeddingBag(2, 3), looked_up, (4,), {"weight": "EmbeddingBag"}),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), paired, (3,), {"weight": "Bilinear", "bias": "Bilinear"}),
    "lstm": (
        lambda: nn.LSTM(3, 2, batch_first=True),
        first,
        (4, 3),
        {"weight_ih_l0": "LSTM", "bias_hh_l0": "LSTM"},
    ),
    "gru": (lambda: nn.GRU(3, 2), first, (4, 3), {"weight_hh_l0": "GRU"}),
    "rnn cell": (lambda: nn.RNNCell(3, 2), as_is, (3,), {"weight_ih": "RNNCell", "bias_hh": "RNNCell"}),
    "layer norm": (lambda: nn.LayerNorm(3), as_is, (3,), {"weight": "LayerNorm", "bias": "LayerNorm"}),
    "rms norm": (lambda: nn.RMSNorm(3), as_is, (3,), {"weight": "RMSNorm"}),
    "group norm": (lambda: nn.GroupNorm(1, 3), as_is, (3, 2), {"weight": "GroupNorm"}),
    "batch norm": (lambda: nn.BatchNorm1d(3), as_is, (3,), {"weight": "BatchNorm1d", "bias": "BatchNorm1d"}),
    "instance norm": (
        lambda: nn.InstanceNorm1d(3, affine=True),
        as_is,
        (3, 4),
        {"weight": "InstanceNorm1d"},
    ),
    "prelu": (lambda: nn.PReLU(), as_is, (3,), {"weight": "PReLU"}),
    "bare parameter": (Scale, as_is, (3,), {"scale": "Scale"}),
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
    for name, row in rows.items():
        assert row.reason, name
        assert reasons.get(name, "") in row.reason
        assert row.reason in table
    assert reasons.keys() <= rows.keys()
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
    fop = {name for name, path in paths.items() if path == "FOP"}
    assert fop == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert losses[-1] < losses[0]
