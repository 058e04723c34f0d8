"""`torch.nn.Embedding`: a linear layer on one-hot rows, whose input factor is diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fop.layers.base import Layer, LayerOptions, add_covariance, statistics_dtype
from fop.layers.blocks import factor_shape
from fop.layers.sampling import RowSampler
from fop.layers.statistics import FactorSums


class EmbeddingLayer(Layer):
    """A holds how often each token comes in a sample, as a diagonal; rows of G are the output gradients.

    Every token is a row, also with ``weight_sharing="reduce"``. Matrices are (1, features, vocabulary); where
    the weight is ``tied`` to an output layer (1, vocabulary, features), as that layer has them.
    """

    by_index = True
    leading = slice(None)

    def __init__(self, module: nn.Embedding, options: LayerOptions, *, tied: bool) -> None:
        self.tokens, self.features = tokens, features = module.num_embeddings, module.embedding_dim
        sides = (tokens, features) if tied else (features, tokens)
        super().__init__(1, *sides, bias=False, options=options, diagonal_A=not tied)
        self.padding_idx = module.padding_idx
        self.tied = self.swapped = tied
        diagonal = features > options.max_factor_dim
        self.sum_shapes = (
            (1, tokens),
            (1, features) if diagonal else factor_shape(1, features, options.block_dim),
        )

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        ids, b_RD = x.reshape(-1), b.reshape(-1, self.features)
        if self.padding_idx is not None:
            b_RD = b_RD.masked_fill((ids == self.padding_idx)[:, None], 0)
        weight = b_RD.new_zeros(self.tokens, self.features).index_add_(0, ids, b_RD)
        return self.to_matrix(weight, None)

    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        ids, b_RD, scale = x.reshape(-1), b.reshape(-1, self.features), 1.0
        rows: int | Tensor = ids.numel()
        valid = torch.ones(ids.shape, dtype=statistics_dtype(b), device=b.device)
        if self.padding_idx is not None:
            valid = (ids != self.padding_idx).to(valid.dtype)
            # On the device: a batch may be all padding, and nobody here waits to know.
            rows = valid.sum().clamp(min=1)[None]
        a = valid.new_zeros(self.tokens).index_add_(0, ids, valid)
        if sampler is not None and (drawn := sampler.draw(ids.numel(), self.sum_shapes[1][-1])) is not None:
            b_RD, valid, scale = b_RD.index_select(0, drawn), valid[drawn], ids.numel() / len(drawn)
        b_RD, g = b_RD.to(valid.dtype) * valid[:, None], a.new_zeros(self.sum_shapes[1])
        add_covariance(g, b_RD[:, None], 1, ones=False, scale=scale)
        return FactorSums(a[None], g, x.shape[0], rows)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return (weight if self.tied else weight.T)[None]

    def weight_from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0] if self.tied else matrix[0].T


def unsupported_embedding(module: nn.Embedding) -> str | None:
    """Return why an embedding cannot take the FOP step, None if it can."""
    if module.max_norm is not None:
        return "an Embedding with max_norm changes its own weight in the forward pass"
    if module.scale_grad_by_freq:
        return "an Embedding with scale_grad_by_freq has gradients that are no sum over samples"
    return None
