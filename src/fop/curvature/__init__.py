"""One object owns a weight's curvature: statistics, averages, damped inverse, products, state and cost."""

from fop.curvature.base import NEVER, Curvature
from fop.curvature.cost import LayerSize
from fop.curvature.diagonal import DiagonalCurvature
from fop.curvature.inversion import Fallback, Inversion, damped_inverses, mean_eigenvalue
from fop.curvature.kronecker import KroneckerCurvature, damping_split, kronecker_product
from fop.curvature.packing import pack_symmetric, packed_shape, unpack_symmetric
from fop.curvature.refresh import NOTHING_PENDING, Estimate, Fallbacks, Refresher, next_refresh
from fop.curvature.registry import KINDS, entry_names, expected_entries, kind_of, make_curvature

__all__ = [
    "KINDS",
    "NEVER",
    "NOTHING_PENDING",
    "Curvature",
    "DiagonalCurvature",
    "Estimate",
    "Fallback",
    "Fallbacks",
    "Inversion",
    "KroneckerCurvature",
    "LayerSize",
    "Refresher",
    "damped_inverses",
    "damping_split",
    "entry_names",
    "expected_entries",
    "kind_of",
    "kronecker_product",
    "make_curvature",
    "mean_eigenvalue",
    "next_refresh",
    "pack_symmetric",
    "packed_shape",
    "unpack_symmetric",
]
