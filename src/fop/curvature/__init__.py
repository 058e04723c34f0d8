"""One object owns a weight's curvature: statistics, averages, damped inverse, products, state and cost."""

from fop.curvature.base import AVERAGING_WEIGHT, LEAST_SIGNAL, NEVER, NOISE, NOISE_DECAY, Curvature, Damping
from fop.curvature.cost import LayerSize
from fop.curvature.inversion import Fallback
from fop.curvature.kronecker import KroneckerCurvature
from fop.curvature.packing import packed_shape
from fop.curvature.refresh import NOTHING_PENDING, Estimate, Refresher, next_refresh
from fop.curvature.registry import KINDS, entry_names, expected_entries, kind_of, make_curvature

__all__ = [
    "AVERAGING_WEIGHT",
    "KINDS",
    "LEAST_SIGNAL",
    "NEVER",
    "NOISE",
    "NOISE_DECAY",
    "NOTHING_PENDING",
    "Curvature",
    "Damping",
    "Estimate",
    "Fallback",
    "KroneckerCurvature",
    "LayerSize",
    "Refresher",
    "entry_names",
    "expected_entries",
    "kind_of",
    "make_curvature",
    "next_refresh",
    "packed_shape",
]
