"""A dense float64 oracle for FOP and K-FAC, written from the paper's equations alone.

It never imports the library, and takes the slow road wherever the library could take a fast one: samples one
at a time through autograd, patches by index loops, the Kronecker block as one full matrix, the inverse by a
dense solve, every inner product as a dot product of long vectors.

- equations: the step from dense F, F̂ and gradients.
- sequential: `ReferenceFOP`, whole runs on an `nn.Sequential` of Linear and Conv2d.
- kinds, patches, attention: the rows of every other kind of layer.
- observe: rows and factors of all weights of any small model.
- steps: an optimizer's steps on such a model against all of these.
- cases: the models, one or more for every kind of layer.
"""

from reference.equations import (
    Correction,
    Mixing,
    correct,
    dense_damped_fisher,
    dense_fisher,
    full,
    momentum_step,
    unvec,
    vec,
)
from reference.observe import Block, Tape, Use, estimate, observe
from reference.patches import patches, transposed_patches
from reference.sequential import (
    Layer,
    LayerSample,
    LossFn,
    ReferenceFOP,
    factors,
    from_matrix,
    half_squared_error,
    layers_of,
    mean_gradient,
    per_sample,
    to_matrix,
)
from reference.steps import Case, check_rows, check_steps, double

__all__ = [
    "Block",
    "Case",
    "Correction",
    "Layer",
    "LayerSample",
    "LossFn",
    "Mixing",
    "ReferenceFOP",
    "Tape",
    "Use",
    "check_rows",
    "check_steps",
    "correct",
    "dense_damped_fisher",
    "dense_fisher",
    "double",
    "estimate",
    "factors",
    "from_matrix",
    "full",
    "half_squared_error",
    "layers_of",
    "mean_gradient",
    "momentum_step",
    "observe",
    "patches",
    "per_sample",
    "to_matrix",
    "transposed_patches",
    "unvec",
    "vec",
]
