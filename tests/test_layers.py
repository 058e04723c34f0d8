"""Kinds of layer that take the FOP step, and the layout of their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fop.layers import Layer, LayerOptions, describe
from reference.cases import Conv1D
from reference.kinds import kind_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- what is supported -----------------------------------------------------------------------------


class PlainLinear(nn.Linear):
    """A subclass that adds nothing to what is computed."""


SUPPORTED: dict[str, tuple[nn.Module, dict[str, tuple[int, int, int]]]] = {
    "linear": (nn.Linear(3, 2), {"weight": (1, 2, 4)}),
    "linear no bias": (nn.Linear(3, 2, bias=False), {"weight": (1, 2, 3)}),
    "plain subclass": (PlainLinear(3, 2), {"weight": (1, 2, 4)}),
    "transformers conv1d": (Conv1D(2, 3), {"weight": (1, 2, 4)}),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), {"weight": (2, 3, 7)}),
    "conv2d": (nn.Conv2d(4, 6, (2, 3)), {"weight": (1, 6, 25)}),
    "conv2d groups": (nn.Conv2d(4, 6, (2, 3), groups=2), {"weight": (2, 3, 13)}),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), {"weight": (4, 1, 9)}),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), bias=False), {"weight": (1, 3, 12)}),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 2), {"weight": (1, 6, 9)}),
    "transposed 2d groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), {"weight": (2, 3, 9)}),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=False), {"weight": (1, 3, 12)}),
    "embedding": (nn.Embedding(5, 3, padding_idx=1), {"weight": (1, 3, 5)}),
    "attention": (
        nn.MultiheadAttention(4, 2),
        {"in_proj_weight": (3, 4, 5), "out_proj.weight": (1, 4, 5)},
    ),
    "attention no bias": (
        nn.MultiheadAttention(4, 2, bias=False),
        {"in_proj_weight": (3, 4, 4), "out_proj.weight": (1, 4, 4)},
    ),
    "attention separate": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=6),
        {
            "q_proj_weight": (1, 4, 4),
            "k_proj_weight": (1, 4, 3),
            "v_proj_weight": (1, 4, 6),
            "out_proj.weight": (1, 4, 5),
        },
    ),
}
DIAGONAL: dict[str, tuple[nn.Module, dict[str, tuple[int, int, int]]]] = {
    "layer norm": (nn.LayerNorm((2, 3)), {"weight": (1, 2, 6)}),
    "layer norm no bias": (nn.LayerNorm(3, bias=False), {"weight": (1, 1, 3)}),
    "rms norm": (nn.RMSNorm(3), {"weight": (1, 1, 3)}),
    "group norm": (nn.GroupNorm(2, 4), {"weight": (1, 2, 4)}),
    "batch norm": (nn.BatchNorm2d(4), {"weight": (1, 2, 4)}),
}


def layers_of(module: nn.Module, **options: Any) -> dict[str, Layer]:
    """The layer of every weight, with the bias that it has."""
    described = describe(module, LayerOptions(**options))
    assert isinstance(described, list), described
    names = dict(module.named_parameters())
    return {slot.weight: slot.build(slot.bias in names, LayerOptions()) for slot in described}


def matrices(module: nn.Module, **options: Any) -> dict[str, tuple[int, int, int]]:
    return {name: layer.matrix_shape for name, layer in layers_of(module, **options).items()}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_kinds(name: str) -> None:
    module, shapes = SUPPORTED[name]
    assert matrices(module) == shapes


@pytest.mark.parametrize("name", DIAGONAL)
def test_kinds_that_are_supported_if_wanted(name: str) -> None:
    module, shapes = DIAGONAL[name]
    assert isinstance(describe(module, LayerOptions()), str)
    assert matrices(module, path="fop") == shapes


@pytest.mark.parametrize("name", SUPPORTED)
def test_kinds_that_are_not_wanted(name: str) -> None:
    assert isinstance(describe(SUPPORTED[name][0], LayerOptions(path="adamw")), str)


def test_bias_of_somebody_else() -> None:
    (slot,) = describe(nn.Linear(3, 2), LayerOptions())
    assert not isinstance(slot, str)
    assert slot.build(False, LayerOptions()).matrix_shape == (1, 2, 3)


# --- layouts ---------------------------------------------------------------------------------------

BIASES = {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias", "weight": "bias"}
LAYOUTS = {**SUPPORTED, **DIAGONAL}


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix_and_back(name: str) -> None:
    """A weight and its bias become a matrix and come back; so does a matrix that is no weight."""
    module = LAYOUTS[name][0].double()
    parameters = {key: torch.randn_like(p) for key, p in module.named_parameters()}
    for key, layer in layers_of(module, path="fop").items():
        weight, bias = parameters[key], parameters.get(BIASES.get(key, "")) if layer.bias else None
        matrix = layer.to_matrix(weight, bias)
        assert tuple(matrix.shape) == layer.matrix_shape
        back, bias_back = layer.from_matrix(matrix, weight)
        assert torch.equal(back, weight)
        assert (bias_back is None) == (bias is None)
        assert bias is None or torch.equal(bias_back.reshape(-1), bias.reshape(-1))
        other = torch.randn_like(matrix)
        assert torch.equal(layer.to_matrix(*layer.from_matrix(other, weight)), other)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "attention" not in name])
def test_the_matrix_is_the_oracles(name: str) -> None:
    module = LAYOUTS[name][0].double()
    kind = kind_of(module)
    assert kind is not None
    matrix = layers_of(module, path="fop")["weight"].weight_matrix(module.weight)
    assert torch.equal(matrix, kind.matrix(module.weight))


def test_missing_bias_gradient_is_zero() -> None:
    module = nn.Conv2d(4, 6, 2, groups=2)
    matrix = layers_of(module)["weight"].to_matrix(module.weight, None)
    assert torch.equal(matrix[..., -1], torch.zeros(2, 3))
    assert torch.equal(matrix[..., :-1], module.weight.reshape(2, 3, 8))


def test_matrix_of_half_precision_is_float32() -> None:
    module = nn.Linear(4, 3).bfloat16()
    matrix = layers_of(module)["weight"].to_matrix(module.weight, module.bias)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix[0, :, :-1], module.weight.float())
