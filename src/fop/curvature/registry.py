"""Which approximations of the curvature there are, and which one a weight has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fop.curvature.base import Curvature, Shape
from fop.curvature.diagonal import DiagonalCurvature
from fop.curvature.kronecker import KroneckerCurvature
from fop.layers import Layer

# To add an approximation: a file with its `Curvature`, and one row here.
KINDS: dict[str, type[Curvature]] = {
    "diagonal": DiagonalCurvature,
    "kronecker": KroneckerCurvature,
}


def kind_of(layer: Layer) -> type[Curvature]:
    """Return the approximation of a layer: the one that its options name, or the first that fits.

    ValueError if the layer's options name one that does not fit.
    """
    if layer.options.curvature is None:
        return next(kind for kind in KINDS.values() if kind.unsupported(layer) is None)
    kind = KINDS[layer.options.curvature]
    if (why := kind.unsupported(layer)) is not None:
        fitting = [name for name, other in KINDS.items() if other.unsupported(layer) is None]
        raise ValueError(
            f"layer_options: curvature={layer.options.curvature!r} does not fit a {type(layer).__name__}: "
            f"{why}; use {' or '.join(map(repr, fitting))}, or leave it out"
        )
    return kind


def make_curvature(layer: Layer, views: Sequence[Layer], state: dict[str, Any]) -> Curvature:
    """Return the curvature of a weight; ValueError if the layer's options name one that does not fit."""
    return kind_of(layer)(layer, views, state)


def entry_names() -> set[str]:
    """Return the names of all tensors that curvatures keep in the state."""
    return {name for kind in KINDS.values() for name in (*kind.averages, *kind.inverses)}


def expected_entries(state: Mapping[str, Any], shape: torch.Size, layer: Layer | None) -> dict[str, Shape]:
    """Return the names and shapes of the curvature's tensors that a parameter's saved state must have.

    ``shape`` is the parameter's; ``layer`` is None where that is not known yet.
    """
    if not state.keys() & entry_names():
        return {}
    kinds = KINDS.values() if layer is None else [kind_of(layer)]
    for kind in kinds:
        shapes = kind.plausible(state, shape) if layer is None else kind.entries(layer)
        if shapes is not None:
            # Averages without an inverse are those of a weight that has not been inverted yet.
            inverted = bool(state.keys() & set(kind.inverses))
            return {name: s for name, s in shapes.items() if inverted or name in kind.averages}
    return {}
