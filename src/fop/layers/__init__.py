"""One file per kind of layer: rows for A and G, the two gradient halves, the layout of the weights."""

from fop.layers.base import FactorSums, Layer
from fop.layers.registry import describe

__all__ = ["FactorSums", "Layer", "describe"]
