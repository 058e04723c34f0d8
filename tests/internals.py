"""What the tests take from behind the public API: when a name moves inside `fop`, only this file changes."""

from fop.algebra import (
    Curvature,
    DiagonalBlock,
    Direction,
    Inversion,
    KroneckerBlock,
    Rung,
    damped_diagonal,
    damped_inverses,
    damping_split,
    fop_direction,
    kfac_direction,
    kronecker_product,
    mean_eigenvalue,
)
from fop.capture.batch import Layout
from fop.layers import Layer, LayerOptions, conv, describe
from fop.layers.conv import ConvLayer
from fop.layers.linear import LinearLayer
from fop.optim.report import Refusals

__all__ = [
    "ConvLayer",
    "Curvature",
    "DiagonalBlock",
    "Direction",
    "Inversion",
    "KroneckerBlock",
    "Layer",
    "LayerOptions",
    "Layout",
    "LinearLayer",
    "Refusals",
    "Rung",
    "conv",
    "damped_diagonal",
    "damped_inverses",
    "damping_split",
    "describe",
    "fop_direction",
    "kfac_direction",
    "kronecker_product",
    "mean_eigenvalue",
]
