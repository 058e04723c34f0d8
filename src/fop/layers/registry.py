"""Which modules have weights that take the FOP step, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from fop.layers.attention import PackedLayer, unsupported_attention
from fop.layers.base import Layer, LayerOptions
from fop.layers.conv import ConvLayer, TransposedConvLayer, unsupported_conv
from fop.layers.embedding import EmbeddingLayer, unsupported_embedding
from fop.layers.linear import LinearLayer, unsupported_linear
from fop.layers.norm import NormLayer, unsupported_norm

EXCLUDED = "layer_options say so"


@dataclass(frozen=True)
class Slot:
    """One weight of a module.

    Attributes:
        weight: its name, dotted where a submodule owns it.
        bias: likewise the bias' name, None if it has none.
        build: makes the `Layer`, given whether the bias belongs to the block, and the options.
        tied: makes the `Layer` of an embedding that shares its weight with an output layer.
    """

    weight: str
    bias: str | None
    build: Callable[[bool, LayerOptions], Layer]
    tied: Callable[[LayerOptions], Layer] | None = None


def _own(layer: Callable[..., Layer], module: nn.Module) -> list[Slot]:
    return [Slot("weight", "bias", lambda bias, options: layer(module, bias=bias, options=options))]


def _embedding(module: nn.Embedding) -> list[Slot]:
    def build(_: bool, options: LayerOptions) -> Layer:
        return EmbeddingLayer(module, tied=False, options=options)

    def tied(options: LayerOptions) -> Layer:
        return EmbeddingLayer(module, tied=True, options=options)

    return [Slot("weight", None, build, tied)]


def _packed(embed_dim: int) -> Callable[[bool, LayerOptions], Layer]:
    return lambda bias, options: PackedLayer(embed_dim, bias=bias, options=options)


def _attention(module: nn.MultiheadAttention) -> list[Slot]:
    E = module.embed_dim

    def linear(in_dim: int) -> Callable[[bool, LayerOptions], Layer]:
        return lambda bias, options: LinearLayer(E, in_dim, bias=bias, options=options)

    slots = [Slot("out_proj.weight", "out_proj.bias", linear(E))]
    if module._qkv_same_embed_dim:
        return [Slot("in_proj_weight", "in_proj_bias", _packed(E)), *slots]
    # Their biases are parts of one parameter, which no single block could own.
    dims = {"q_proj_weight": E, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
    return [*(Slot(name, None, linear(dim)) for name, dim in dims.items()), *slots]


_Check: TypeAlias = Callable[[Any], str | None]
_Slots: TypeAlias = Callable[[Any], list[Slot]]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)

# To add a kind of layer: a file with its `Layer` and its check, and one row here.
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], _Check, _Slots], ...] = (
    ((nn.Linear,), unsupported_linear, partial(_own, LinearLayer.of)),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), unsupported_conv, partial(_own, ConvLayer)),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        unsupported_conv,
        partial(_own, TransposedConvLayer),
    ),
    ((nn.Embedding,), unsupported_embedding, _embedding),
    ((nn.MultiheadAttention,), unsupported_attention, _attention),
    (_NORMS, unsupported_norm, partial(_own, NormLayer)),
)


def describe(module: nn.Module, options: LayerOptions) -> list[Slot] | str:
    """Return the module's weights that can take the FOP step, or the reason why it has none."""
    if options.path == "adamw":
        return EXCLUDED
    for kinds, unsupported, slots in _KINDS:
        if isinstance(module, kinds):
            return _reason(module, kinds, unsupported, options) or slots(module)
    if _is_conv1d(module):
        return _own(LinearLayer.of_conv1d, module)
    return f"no Kronecker factors for {type(module).__name__}"


def _reason(
    module: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    unsupported: _Check,
    options: LayerOptions,
) -> str | None:
    # Not through the attribute: a parametrized weight would be computed, which may change buffers.
    if "weight" not in module._parameters and not isinstance(module, nn.MultiheadAttention):
        return "its weight is computed from other parameters"
    if "forward" in vars(module):
        return "its forward was replaced"
    if (why := unsupported(module)) is None and kinds is _NORMS and options.path is None:
        return f"{type(module).__name__}; a diagonal Fisher with path='fop' in layer_options"
    return why


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is Hugging Face's `Conv1D`, a Linear with its weight as (in, out)."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and weight is not None
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )
