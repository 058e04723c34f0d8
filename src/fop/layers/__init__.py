"""One file per kind of layer: rows for A and G, the two gradient halves, the layout of the weights."""

from fop.layers.attention import PackedLayer
from fop.layers.base import Layer, LayerOptions
from fop.layers.embedding import EmbeddingLayer
from fop.layers.registry import EXCLUDED, Slot, describe
from fop.layers.statistics import FactorSums, Reduction, Statistics

__all__ = [
    "EXCLUDED",
    "EmbeddingLayer",
    "FactorSums",
    "Layer",
    "LayerOptions",
    "PackedLayer",
    "Reduction",
    "Slot",
    "Statistics",
    "describe",
]
