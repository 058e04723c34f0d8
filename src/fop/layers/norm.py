"""Affine parameters of normalisation layers, with a diagonal Fisher."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fop.layers.base import Layer, LayerOptions, statistics_dtype
from fop.layers.sampling import RowSampler
from fop.layers.statistics import FactorSums

Norm: TypeAlias = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _BatchNorm


class NormLayer(Layer):
    """Weight and bias as rows of a (1, 2, size) matrix, or the weight alone as (1, 1, size).

    The input of its methods is the normalised input, what the weight is multiplied with. The curvature is
    the mean square of the samples' own gradients, element by element.
    """

    bias_dim = 1

    def __init__(self, module: Norm, *, bias: bool, options: LayerOptions) -> None:
        # LayerNorm and RMSNorm have a weight for the trailing dimensions, the others for dimension 1.
        self.trailing = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        shape = tuple(module.weight.shape)
        super().__init__(1, 1 + bias, prod(shape), bias=bias, options=options)
        self.leading = slice(None, -len(shape)) if self.trailing else slice(0, 1)
        self.bias_shape = shape
        self.matrix_shape = 1, self.out_dim, self.in_dim
        self.sum_shapes = self.factor_shapes = (self.matrix_shape,)

    @staticmethod
    def normalised(module: nn.Module, x: Tensor) -> Tensor:
        """Return the normalised input, what the weight is multiplied with."""
        x = x.detach()
        if isinstance(module, _BatchNorm):
            if module.training or module.running_mean is None:
                # Without the running averages, which the module itself has updated already.
                return F.batch_norm(x, None, None, training=True, eps=module.eps)
            return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        return _FUNCTIONS[type(module)](module, x)

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        return self._by_sample(x, b).sum(0, keepdim=True)

    def factor_sums(self, x: Tensor, b: Tensor, sampler: RowSampler | None = None) -> FactorSums:
        return FactorSums(self._by_sample(x, b), None, x.shape[0], x.shape[0])

    def _by_sample(self, x: Tensor, b: Tensor) -> Tensor:
        """Return the gradient of every sample, (N, 1 or 2, size)."""
        b = b.to(statistics_dtype(b))
        rows = [b * x.to(b.dtype), b] if self.bias else [b * x.to(b.dtype)]
        shape, dim = ((-1, self.in_dim), 1) if self.trailing else ((self.in_dim, -1), 2)
        return torch.stack([row.reshape(row.shape[0], *shape).sum(dim) for row in rows], dim=1)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, 1, self.in_dim)


def unsupported_norm(module: nn.Module) -> str | None:
    """Return why a normalisation layer cannot take the FOP step, None if it can."""
    known, kind = (*_FUNCTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), type(module)
    if kind not in known:
        # With its module: timm, too, has a LayerNorm.
        return f"{kind.__module__}.{kind.__name__} is none of torch's {', '.join(k.__name__ for k in known)}"
    return None


_FUNCTIONS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.LayerNorm: lambda module, x: F.layer_norm(x, module.normalized_shape, eps=module.eps),
    nn.RMSNorm: lambda module, x: F.rms_norm(x, module.normalized_shape, eps=module.eps),
    nn.GroupNorm: lambda module, x: F.group_norm(x, module.num_groups, eps=module.eps),
}
