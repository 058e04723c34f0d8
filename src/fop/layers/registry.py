"""Which modules have weights that take the FOP step, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from fop.layers.attention import PackedLayer
from fop.layers.base import Layer, LayerOptions
from fop.layers.conv import ConvLayer, TransposedConvLayer
from fop.layers.embedding import EmbeddingLayer, unsupported_embedding
from fop.layers.linear import LinearLayer
from fop.layers.norm import NormLayer, unsupported_norm

EXCLUDED = "layer_options say so"


@dataclass(frozen=True)
class Unfit:
    """Why a module has no weights that take the FOP step.

    ``watched`` says whether functions that use its parameters may show what they are.
    """

    reason: str
    watched: bool = False


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


def _slot(weight: str, bias: str | None, make: Callable[..., Layer]) -> Slot:
    return Slot(weight, bias, lambda has_bias, options: make(bias=has_bias, options=options))


def _own(layer: Callable[..., Layer], module: nn.Module) -> list[Slot]:
    return [_slot("weight", "bias", partial(layer, module))]


def _linear(module: nn.Linear) -> list[Slot]:
    return [_slot("weight", "bias", partial(LinearLayer, module.out_features, module.in_features))]


def _embedding(module: nn.Embedding) -> list[Slot]:
    tied = partial(EmbeddingLayer, module, tied=True)
    return [Slot("weight", None, lambda _, options: EmbeddingLayer(module, options, tied=False), tied)]


def _attention(module: nn.MultiheadAttention) -> list[Slot]:
    E = module.embed_dim
    output = _slot("out_proj.weight", "out_proj.bias", partial(LinearLayer, E, E))
    if module._qkv_same_embed_dim:
        return [_slot("in_proj_weight", "in_proj_bias", partial(PackedLayer, E)), output]
    # Their biases are slices of one parameter, which no single block could own.
    dims = {"q_proj_weight": E, "k_proj_weight": module.kdim, "v_proj_weight": module.vdim}
    return [*(_slot(name, None, partial(LinearLayer, E, dim)) for name, dim in dims.items()), output]


_Kinds: TypeAlias = tuple[type[nn.Module], ...]
_Check: TypeAlias = Callable[[Any], str | None]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# To add a kind of layer: a file with its `Layer`, and one row here: modules, their weights, and what makes a
# module unfit beside a forward of its own.
_KINDS: tuple[tuple[_Kinds, Callable[[Any], list[Slot]], _Check | None], ...] = (
    ((nn.Linear,), _linear, None),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), partial(_own, ConvLayer), None),
    (_TRANSPOSED, partial(_own, TransposedConvLayer), None),
    ((nn.Embedding,), _embedding, unsupported_embedding),
    ((nn.MultiheadAttention,), _attention, None),
    (_NORMS, partial(_own, NormLayer), unsupported_norm),
)


def describe(module: nn.Module, options: LayerOptions) -> list[Slot] | Unfit:
    """Return the module's weights that can take the FOP step, or why its class does not tell."""
    if options.path == "adamw":
        return Unfit(EXCLUDED)
    if isinstance(module, torch.jit.ScriptModule):
        return Unfit("torch.jit.script runs its module", watched=True)
    for kinds, slots, check in _KINDS:
        if isinstance(module, kinds):
            return _unsupported(module, kinds, check, options) or slots(module)
    # Hugging Face's Conv1D, a Linear with its weight as (in, out).
    weight = module._parameters.get("weight") if type(module).__name__ == "Conv1D" else None
    if weight is not None and weight.dim() == 2 and getattr(module, "nf", None) == weight.shape[1]:
        in_dim, out_dim = weight.shape
        return [_slot("weight", "bias", partial(LinearLayer, out_dim, in_dim, transposed=True))]
    kind = type(module)
    known = kind.__module__.startswith("torch.nn.modules.") and not kind.__module__.endswith(".container")
    return Unfit(f"no Kronecker factors for {kind.__name__}", watched=not known)


def _unsupported(
    module: nn.Module, kinds: _Kinds, check: _Check | None, options: LayerOptions
) -> Unfit | None:
    """Return why a module of these kinds cannot take the FOP step, None if it can."""
    # Not through the attribute: a parametrized weight would be computed, which may change buffers.
    if "weight" not in module._parameters and not isinstance(module, nn.MultiheadAttention):
        return Unfit("its weight is computed from other parameters", watched=True)
    if "forward" in vars(module):
        return Unfit("its forward was replaced", watched=True)
    own, base = type(module), next(kind for kind in kinds if isinstance(module, kind))
    methods = ("forward", "_conv_forward")
    same = all(getattr(own, method, None) is getattr(base, method, None) for method in methods)
    if not same and kinds is not _NORMS:
        return Unfit(f"{own.__name__} overrides {base.__name__}.forward", watched=True)
    if check is not None and (why := check(module)) is not None:
        return Unfit(why)
    if kinds is _NORMS and options.path is None:
        return Unfit(f"{own.__name__}; a diagonal Fisher with path='fop' in layer_options")
    return None
