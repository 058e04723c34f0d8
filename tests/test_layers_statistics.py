"""Row statistics of single layers: chunks, memory formats, precision, and how uses and batches add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fop.layers.conv as conv_module
from fop.layers import FactorSums, Layer, LayerOptions, describe
from reference import Tape, estimate, observe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(module: nn.Module, **options: Any) -> Layer:
    described = describe(module, LayerOptions(**options))
    assert isinstance(described, list), described
    (slot,) = described
    return slot.build(getattr(module, "bias", None) is not None, LayerOptions())


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    assert value.shape == expected.shape
    assert (value - expected).norm() <= rtol * expected.norm(), f"{value} is not {expected}"


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 3, 3),
    "no bias": lambda: nn.Conv2d(4, 3, 3, bias=False, padding=1),
    "groups": lambda: nn.Conv2d(4, 6, (2, 3), groups=2, stride=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
    "same reflect": lambda: nn.Conv2d(4, 3, (2, 4), padding="same", padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1),
    "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, bias=False),
}


def conv_case(name: str, samples: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    module = CONVOLUTIONS[name]().double()
    x = torch.randn(samples, 4, 6, 5, dtype=torch.float64)
    return module, x, torch.randn_like(module(x))


def expected_of(module: nn.Module, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and the gradient by the oracle, for output gradients ``b`` of the samples' own losses."""
    model = nn.Sequential(module)
    (block,) = observe(model, Tape(model), (x,), b, lambda out, dot: (out * dot).sum()).values()
    held = estimate(block)
    return held["A"], held["G"], block.mean_gradient(0, len(x))


def chunks_of(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The rows of A that will be in memory at a time."""
    found: list[Tensor] = []
    columns = layer.input_columns

    def seen(x: Tensor) -> Tensor:
        found.append(columns(x))
        return found[-1]

    monkeypatch.setattr(layer, "input_columns", seen)
    return found


@pytest.mark.parametrize("elements", [1, 1000, 2000])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_chunks_change_no_statistics(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, b = conv_case(name)
    layer = layer_of(module)
    whole = layer.factor_sums(x, b)
    chunks = chunks_of(layer, monkeypatch)
    monkeypatch.setattr(conv_module, "CHUNK_ELEMENTS", elements)
    parts = layer.factor_sums(x, b)
    assert sum(map(len, chunks)) == len(x)
    assert elements > 1 or len(chunks) == len(x)
    assert_close(parts.a, whole.a)
    assert_close(parts.g, whole.g)
    assert (parts.samples, parts.rows) == (whole.samples, whole.rows)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_chunk_limit_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows are larger than the limit, and the limit is used: chunks are not single samples."""
    module, x, b = conv_case(name)
    layer = layer_of(module)
    chunks = chunks_of(layer, monkeypatch)
    layer.factor_sums(x[:1], b[:1])
    one = chunks.pop().numel()
    monkeypatch.setattr(conv_module, "CHUNK_ELEMENTS", 3 * one + 1)
    layer.factor_sums(x, b)
    assert [chunk.numel() for chunk in chunks] == [3 * one, 3 * one, one]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_statistics_and_gradient_against_the_oracle(name: str) -> None:
    module, x, b = conv_case(name)
    layer = layer_of(module)
    # The oracle's output gradients are those of one sample; ours come from a loss that is a mean.
    A, G = layer.factor_sums(x, b / len(x)).factors()
    expected_A, expected_G, gradient = expected_of(module, x, b)
    assert_close(A, expected_A)
    assert_close(G, expected_G)
    assert_close(layer.gradient(x, b / len(x)), gradient)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3, 2)])
def test_linear_statistics_and_gradient_with_many_leading_dims(lead: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(4, 3, bias=bias).double()
    x = torch.randn(6, *lead, 4, dtype=torch.float64)
    b = torch.randn(6, *lead, 3, dtype=torch.float64)
    layer = layer_of(module)
    A, G = layer.factor_sums(x, b / 6).factors()
    expected_A, expected_G, gradient = expected_of(module, x, b)
    assert_close(A, expected_A)
    assert_close(G, expected_G)
    assert_close(layer.gradient(x, b / 6), gradient)


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
