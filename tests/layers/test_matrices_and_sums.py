"""Single layers without an optimizer: the matrix of a weight, and the sums that factors are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from internals import Layer, LayerOptions, conv, describe
from reference import Tape, estimate, observe
from reference.cases import Conv1D

Shape = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layers_of(module: nn.Module, **options: Any) -> dict[str, Layer]:
    """The layer of every weight, with the bias that it has."""
    described = describe(module, LayerOptions(**options))
    assert isinstance(described, list), described
    names = dict(module.named_parameters())
    return {slot.weight: slot.build(slot.bias in names, LayerOptions()) for slot in described}


def close(value: Tensor, expected: Tensor, rtol: float = 1e-12) -> bool:
    return value.shape == expected.shape and bool((value - expected).norm() <= rtol * expected.norm())


# --- matrices --------------------------------------------------------------------------------------


class PlainLinear(nn.Linear):
    """A subclass that adds nothing to what is computed."""


FACTORED: dict[str, tuple[nn.Module, dict[str, Shape]]] = {
    "linear": (nn.Linear(3, 2), {"weight": (1, 2, 4)}),
    "linear no bias": (nn.Linear(3, 2, bias=False), {"weight": (1, 2, 3)}),
    "plain subclass": (PlainLinear(3, 2), {"weight": (1, 2, 4)}),
    "transformers conv1d": (Conv1D(2, 3), {"weight": (1, 2, 4)}),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), {"weight": (2, 3, 7)}),
    "conv2d": (nn.Conv2d(4, 6, (2, 3)), {"weight": (1, 6, 25)}),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), {"weight": (4, 1, 9)}),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), bias=False), {"weight": (1, 3, 12)}),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 2), {"weight": (1, 6, 9)}),
    "transposed 2d groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), {"weight": (2, 3, 9)}),
    "embedding": (nn.Embedding(5, 3, padding_idx=1), {"weight": (1, 3, 5)}),
    "attention": (
        nn.MultiheadAttention(4, 2),
        {"in_proj_weight": (3, 4, 5), "out_proj.weight": (1, 4, 5)},
    ),
    "attention separate": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=6),
        {"q_proj_weight": (1, 4, 4), "k_proj_weight": (1, 4, 3), "v_proj_weight": (1, 4, 6),
         "out_proj.weight": (1, 4, 5)},
    ),
}  # fmt: skip
DIAGONAL: dict[str, tuple[nn.Module, dict[str, Shape]]] = {
    "layer norm": (nn.LayerNorm((2, 3)), {"weight": (1, 2, 6)}),
    "layer norm no bias": (nn.LayerNorm(3, bias=False), {"weight": (1, 1, 3)}),
    "rms norm": (nn.RMSNorm(3), {"weight": (1, 1, 3)}),
    "group norm": (nn.GroupNorm(2, 4), {"weight": (1, 2, 4)}),
    "batch norm": (nn.BatchNorm2d(4), {"weight": (1, 2, 4)}),
}
BIASES = {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias", "weight": "bias"}


@pytest.mark.parametrize("name", {**FACTORED, **DIAGONAL})
def test_a_weight_becomes_a_matrix_and_comes_back(name: str) -> None:
    """So does a matrix that is no weight. Norms have a layer only if asked for; with AdamW nothing has."""
    module, shapes = {**FACTORED, **DIAGONAL}[name]
    module = module.double()
    assert isinstance(describe(module, LayerOptions()), list) is (name not in DIAGONAL)
    assert not isinstance(describe(module, LayerOptions(path="adamw")), list)
    layers = layers_of(module, path="fop")
    assert {key: layer.matrix_shape for key, layer in layers.items()} == shapes
    parameters = {key: torch.randn_like(p) for key, p in module.named_parameters()}
    for key, layer in layers.items():
        weight, bias = parameters[key], parameters.get(BIASES.get(key, "")) if layer.bias else None
        matrix = layer.to_matrix(weight, bias)
        assert tuple(matrix.shape) == layer.matrix_shape
        back, bias_back = layer.from_matrix(matrix, weight)
        assert torch.equal(back, weight)
        assert (bias_back is None) == (bias is None)
        assert bias is None or torch.equal(bias_back.reshape(-1), bias.reshape(-1))
        other = torch.randn_like(matrix)
        assert torch.equal(layer.to_matrix(*layer.from_matrix(other, weight)), other)


def test_missing_bias_gradient_is_zero() -> None:
    module = nn.Conv2d(4, 6, 2, groups=2)
    matrix = layers_of(module)["weight"].to_matrix(module.weight, None)
    assert torch.equal(matrix, torch.cat([module.weight.reshape(2, 3, 8), torch.zeros(2, 3, 1)], dim=2))


def test_matrix_of_half_precision_is_float32() -> None:
    module = nn.Linear(4, 3).bfloat16()
    matrix = layers_of(module)["weight"].to_matrix(module.weight, module.bias)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix[0, :, :-1], module.weight.float())


# --- sums over rows --------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, nn.Module] = {
    "plain": nn.Conv2d(4, 3, 3),
    "no bias": nn.Conv2d(4, 3, 3, bias=False, padding=1),
    "groups": nn.Conv2d(4, 6, (2, 3), groups=2, stride=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
    "same reflect": nn.Conv2d(4, 3, (2, 4), padding="same", padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1),
    "transposed groups": nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_sum_in_chunks_of_bounded_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are the oracle's whatever the limit; it is kept, and used: chunks are not single samples."""
    module = CONVOLUTIONS[name].double()
    layer = layers_of(module)["weight"]
    x = torch.randn(7, 4, 6, 5, dtype=torch.float64)
    b = torch.randn_like(module(x))
    model = nn.Sequential(module)
    (block,) = observe(model, Tape(model), (x,), b, lambda out, dot: (out * dot).sum()).values()
    chunks: list[int] = []
    rows_of = layer.input_rows

    def seen(part: Tensor, *rest: Any) -> Tensor:
        rows = rows_of(part, *rest)
        chunks.append(rows.numel())
        return rows

    monkeypatch.setattr(layer, "input_rows", seen)
    layer.factor_sums(x[:1], b[:1])
    one = chunks.pop()
    for limit in (1, 3 * one + 1, 10**9):
        monkeypatch.setattr(conv, "CHUNK_ELEMENTS", limit)
        for memory in (torch.contiguous_format, torch.channels_last):
            chunks.clear()
            # The oracle's output gradients are those of one sample; ours come from a loss that is a mean.
            given = [t.contiguous(memory_format=memory) for t in (x, b / len(x))]
            A, G = layer.factor_sums(*given).factors()
            assert close(A, estimate(block)["A"]) and close(G, estimate(block)["G"])
            assert close(layer.gradient(*given), block.mean_gradient(range(7)))
            assert chunks == {1: [one] * 7, 3 * one + 1: [3 * one, 3 * one, one]}.get(limit, [7 * one])


@pytest.mark.parametrize("size", [4, 7, 8, 13])
def test_covariances_in_blocks_are_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fop.layers.base.GRAM_BLOCK", 2)
    x, b = torch.randn(9, size, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    sums = layers_of(nn.Linear(size, 6, bias=False))["weight"].factor_sums(x, b)
    assert sums.g is not None
    assert close(sums.a, (x.T @ x)[None]) and close(sums.g, (b.T @ b)[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2)], ids=["linear", "conv"])
def test_sums_of_half_precision_are_float32(module: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(6, 4, 3, 3) if isinstance(module, nn.Conv2d) else torch.randn(6, 4)
    x, b = x.to(dtype), torch.randn_like(module(x)).to(dtype)
    layer = layers_of(module)["weight"]
    sums, exact = layer.factor_sums(x, b), layer.factor_sums(x.double(), b.double())
    assert sums.a.dtype == sums.g.dtype == torch.float32
    assert close(sums.a.double(), exact.a, 1e-6) and close(sums.g.double(), exact.g, 1e-6)
