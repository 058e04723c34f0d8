"""Which functions multiply the rows of an input by a weight, and the layer that each call is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fop.layers.base import Layer, LayerOptions
from fop.layers.conv import ConvLayer, TransposedConvLayer
from fop.layers.embedding import EmbeddingLayer, unsupported_embedding
from fop.layers.linear import LinearLayer


class FunctionCall(NamedTuple):
    """A call of one of the `FUNCTIONS`: its arguments by name, and what it returned."""

    function: Any
    given: Mapping[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """The function's name."""
        name: str = self.function.__name__.strip("_")
        return name if self.function not in _IN_F else f"F.{name}"

    def layer(self, *, turned: bool, bias: bool, options: LayerOptions) -> Layer | None:
        """Return the layer that the call is; None for a call that is none.

        ``turned`` says that the weight was given the other way round, ``bias`` that the bias belongs to it.
        """
        return FUNCTIONS[self.function].build(self.given, turned, bias, options)


@dataclass(frozen=True)
class Function:
    """How a function uses a weight.

    Attributes:
        names: of its arguments, in their order.
        build: makes the `Layer` from the arguments of a call, whether the weight is given the other way round
            (transposed), whether the bias belongs to it, and the options; None for a call that is no layer.
    """

    names: tuple[str, ...]
    build: Callable[[Mapping[str, Any], bool, bool, LayerOptions], Layer | None]


@dataclass(frozen=True)
class _Geometry:
    """The arguments of a convolution under the names that `torch.nn.Conv2d` gives them."""

    weight: Tensor
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"


@dataclass(frozen=True)
class _Table:
    """The arguments of an embedding under the names that `torch.nn.Embedding` gives them."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    scale_grad_by_freq: bool


def _linear(
    given: Mapping[str, Any], turned: bool, bias: bool, options: LayerOptions, *, by_columns: bool = False
) -> Layer | None:
    weight = given["weight"]
    if weight.dim() != 2 or given.keys() & {"alpha", "beta", "out"}:
        return None
    out_dim, in_dim = weight.shape[::-1] if by_columns else weight.shape
    return LinearLayer(out_dim, in_dim, bias=bias, options=options, transposed=by_columns is not turned)


def _convolution(
    given: Mapping[str, Any], turned: bool, bias: bool, options: LayerOptions, *, transposed: bool
) -> Layer | None:
    weight, groups = given["weight"], given.get("groups", 1)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_tuple(given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padding = given.get("padding", 0)
    padding = padding if isinstance(padding, str) else _tuple(padding, len(kernel))
    first, second = weight.shape[0], weight.shape[1] * groups
    channels = (first, second) if transposed else (second, first)
    geometry: Any = _Geometry(weight, *channels, groups, kernel, stride, padding, dilation)
    return (TransposedConvLayer if transposed else ConvLayer)(geometry, bias=bias, options=options)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * length if len(values) == 1 else values


def _embedding(given: Mapping[str, Any], turned: bool, bias: bool, options: LayerOptions) -> Layer | None:
    padding_idx, (tokens, features) = given.get("padding_idx"), given["weight"].shape
    if padding_idx is not None and padding_idx < 0:
        padding_idx += tokens
    by_freq = given.get("scale_grad_by_freq", False)
    table: Any = _Table(tokens, features, padding_idx, given.get("max_norm"), by_freq)
    if turned or given.get("sparse", False) or unsupported_embedding(table) is not None:
        return None
    return EmbeddingLayer(table, options, tied=False)


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_MATMUL = Function(("input", "weight"), partial(_linear, by_columns=True))

# To add a function: one row.
FUNCTIONS: dict[Any, Function] = {
    F.linear: Function(("input", "weight", "bias"), _linear),
    **{
        conv: Function(_CONV, partial(_convolution, transposed=False))
        for conv in (F.conv1d, F.conv2d, F.conv3d)
    },
    **{
        conv: Function(_TRANSPOSED, partial(_convolution, transposed=True))
        for conv in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    F.embedding: Function(_EMBEDDING, _embedding),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _MATMUL),
    **dict.fromkeys(
        (torch.addmm, Tensor.addmm), Function(("bias", "input", "weight"), partial(_linear, by_columns=True))
    ),
}


_IN_F = {function for name, function in vars(F).items() if not name.startswith("_") and callable(function)}


def function_call(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> FunctionCall:
    """Return a call of one of the `FUNCTIONS`."""
    given = {**dict(zip(FUNCTIONS[function].names, args, strict=False)), **kwargs}
    given.setdefault("weight", given.pop("mat2", given.pop("other", None)))
    return FunctionCall(function, given, output)
