"""A dense float64 oracle for FOP and K-FAC, written from the paper's equations alone.

It never imports the library, and takes the slow road wherever the library could take a fast one: samples one
at a time through autograd, patches by index loops, the Kronecker block as one full matrix, the inverse by a
dense solve, every inner product as a dot product of long vectors.

- equations: the step from dense F, F̂ and gradients.
- kinds, patches, attention: the rows of every kind of layer.
- observe: rows and factors of all weights of any small model.
- optimizer: `ReferenceFOP`, whole runs.
- steps: an optimizer's steps on a small model against all of these.
- cases: the models, one or more for every kind of layer.
"""

from reference.equations import (
    Correction,
    Mixing,
    correct,
    correct_in_sizes,
    dense_damped_fisher,
    dense_fisher,
    dense_relative_fisher,
    full,
    joined,
    momentum_step,
    sizes,
    split,
    turned,
    unvec,
    vec,
)
from reference.observe import Block, LossFn, Tape, Use, estimate, observe
from reference.optimizer import Layer, ReferenceFOP, from_matrix, half_squared_error, layers_of, to_matrix
from reference.steps import Case, check_direction, check_rows, check_steps, double

__all__ = [
    "Block",
    "Case",
    "Correction",
    "Layer",
    "LossFn",
    "Mixing",
    "ReferenceFOP",
    "Tape",
    "Use",
    "check_direction",
    "check_rows",
    "check_steps",
    "correct",
    "correct_in_sizes",
    "dense_damped_fisher",
    "dense_fisher",
    "dense_relative_fisher",
    "double",
    "estimate",
    "from_matrix",
    "full",
    "half_squared_error",
    "joined",
    "layers_of",
    "momentum_step",
    "observe",
    "sizes",
    "split",
    "to_matrix",
    "turned",
    "unvec",
    "vec",
]
