"""What one use of a weight adds to the curvature statistics."""

from __future__ import annotations

from torch import Tensor

from fop.layers import Layer, RowSampler, Statistics


def gather_statistics(
    layer: Layer, x: Tensor, b: Tensor, samples: int, sampler: RowSampler | None = None
) -> Statistics:
    """Return the statistics of one use of a weight, from all rows or from those that ``sampler`` draws.

    ``b`` is the gradient of the output, of the loss or of one with other labels. Dim 0 of ``x`` and ``b`` has
    the N samples, each perhaps with several entries.
    """
    sums = layer.factor_sums(x, b, sampler)
    sums.samples = samples
    return Statistics({layer.swapped: sums})
