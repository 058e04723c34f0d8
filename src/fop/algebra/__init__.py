"""The paper's equations on tensors: no modules, no options of the optimizer, no transfers to the host."""

from fop.algebra.kronecker import (
    DiagonalBlock,
    Inversion,
    KroneckerBlock,
    Rung,
    damped_diagonal,
    damped_inverses,
    damping_split,
    kronecker_product,
    mean_eigenvalue,
)
from fop.algebra.projection import (
    Curvature,
    Direction,
    average_and_difference,
    fop_direction,
    inner,
    kfac_direction,
    mixing_coefficient,
    orthogonal_component,
    step_scale,
)

__all__ = [
    "Curvature",
    "DiagonalBlock",
    "Direction",
    "Inversion",
    "KroneckerBlock",
    "Rung",
    "average_and_difference",
    "damped_diagonal",
    "damped_inverses",
    "damping_split",
    "fop_direction",
    "inner",
    "kfac_direction",
    "kronecker_product",
    "mean_eigenvalue",
    "mixing_coefficient",
    "orthogonal_component",
    "step_scale",
]
