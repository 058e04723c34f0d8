"""One file per kind of layer: rows for A and G, the two gradient halves, the layout of the weights."""

from fop.layers.attention import PackedLayer
from fop.layers.base import Layer, LayerOptions
from fop.layers.embedding import EmbeddingLayer
from fop.layers.functions import FUNCTIONS, FunctionCall, function_call
from fop.layers.registry import EXCLUDED, Slot, Unfit, describe
from fop.layers.sampling import RowSampler, keyed_generator
from fop.layers.statistics import FactorSums, Reduction, Statistics

__all__ = [
    "EXCLUDED",
    "FUNCTIONS",
    "EmbeddingLayer",
    "FactorSums",
    "FunctionCall",
    "Layer",
    "LayerOptions",
    "PackedLayer",
    "Reduction",
    "RowSampler",
    "Slot",
    "Statistics",
    "Unfit",
    "describe",
    "function_call",
    "keyed_generator",
]
