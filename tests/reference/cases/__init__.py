"""Small models for every kind of layer, each with the weights that must take the FOP step."""

from reference.cases.attention import ATTENTION, TRANSFORMERS
from reference.cases.layers import (
    CONV2D,
    CONVOLUTIONS,
    EMBEDDINGS,
    LINEAR,
    SHARED,
    TRANSPOSED,
    Conv1D,
    single,
)
from reference.cases.norms import AFFINE
from reference.cases.options import BLOCKS, DIAGONAL, REDUCE

__all__ = [
    "AFFINE",
    "ATTENTION",
    "BLOCKS",
    "CONV2D",
    "CONVOLUTIONS",
    "DIAGONAL",
    "EMBEDDINGS",
    "LINEAR",
    "REDUCE",
    "SHARED",
    "TRANSFORMERS",
    "TRANSPOSED",
    "Conv1D",
    "single",
]
