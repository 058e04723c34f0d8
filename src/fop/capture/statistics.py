"""What one use of a weight adds to the curvature statistics: which rows, and whose output gradient."""

from __future__ import annotations

from torch import Tensor

from fop.layers import FactorSums, Layer, Statistics

# A convolution has a row for every output position, at very large batch far more than its factors have
# entries. Statistics then take every k-th sample, with k as large as leaves this many samples and rows.
MIN_SAMPLES = 2048
MIN_ROWS_PER_DIM = 8


def gather_statistics(layer: Layer, x: Tensor, b: Tensor, samples: int) -> Statistics:
    """Return the statistics of one use of a weight.

    ``b`` is the gradient of the output, of the loss or of one with other labels. Dim 0 of ``x`` and ``b`` has
    the N samples, each perhaps with several entries.
    """
    step, batch = 1, x.shape[0]
    if layer.subsampled:
        needed = -(-MIN_ROWS_PER_DIM * max(layer.in_dim, layer.out_dim) // max(1, b[0, 0].numel()))
        step = max(1, batch // max(MIN_SAMPLES, needed))
    sums = layer.factor_sums(x[::step], b[::step])
    if step > 1 and sums.g is not None:
        # As if all samples had been summed: b is 1/batch of a sample's own gradient.
        share, rows = batch / sums.samples, batch * int(sums.rows) // max(1, sums.samples)
        sums = FactorSums(sums.a * share, sums.g * share, batch, rows)
    sums.samples = samples
    return Statistics({layer.swapped: sums})
