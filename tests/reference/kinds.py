"""Kinds of layer: the gradient matrix of a weight, and the rows that one sample contributes to it.

A use of a weight by one sample gives, for each of its groups, input rows a (R, in) and output gradients
b (R, out), so that the gradient matrix of the sample is Σ b aᵀ. The bias' column of ones is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.patches import patches, transposed_patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS)

# A list with one tensor a group.
Rows = list[Tensor]


class Kind:
    """The default is Linear: one group, the weight is the matrix."""

    groups = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """(groups, out, in) of a tensor shaped like the weight."""
        return weight[None]

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        """Input rows and output-gradient rows of one sample, whose tensors have a batch dimension of one."""
        return [x[0].reshape(-1, x[0].shape[-1])], [b[0].reshape(-1, b[0].shape[-1])]


class TransposedLinear(Kind):
    """Hugging Face's Conv1D: y = x W + bias."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T[None]


@dataclass
class Convolution(Kind):
    """A row is an output position."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __post_init__(self) -> None:
        self.groups = self.module.groups

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, len(weight) // self.groups, -1)

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        outputs = b[0].reshape(self.groups, self.module.out_channels // self.groups, -1).mT
        return list(patches(self.module, x[0][0])), list(outputs)


@dataclass
class TransposedConvolution(Kind):
    """A row is an output position."""

    module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    def __post_init__(self) -> None:
        self.groups = self.module.groups

    def matrix(self, weight: Tensor) -> Tensor:
        per_group = len(weight) // self.groups
        groups = [
            [
                torch.stack([weight[g * per_group + i, o] for i in range(per_group)]).reshape(-1)
                for o in range(weight.shape[1])
            ]
            for g in range(self.groups)
        ]
        return torch.stack([torch.stack(rows) for rows in groups])

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        outputs = b[0].reshape(self.groups, self.module.out_channels // self.groups, -1).mT
        return list(transposed_patches(self.module, x[0][0], b[0].shape[2:])), list(outputs)


@dataclass
class Lookup(Kind):
    """An Embedding is a Linear layer on one-hot rows; a position with ``padding_idx`` is no row."""

    module: nn.Embedding

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T[None]

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        size, width = self.module.weight.shape
        inputs, outputs = [], []
        for token, gradient in zip(x[0].flatten().tolist(), b[0].reshape(-1, width), strict=True):
            if token != self.module.padding_idx:
                inputs.append([float(token == v) for v in range(size)])
                outputs.append(gradient)
        if not inputs:
            return [b[0].new_zeros(0, size)], [b[0].new_zeros(0, width)]
        return [torch.tensor(inputs, dtype=torch.float64)], [torch.stack(outputs)]


class Packed(Kind):
    """The packed in-projection of an attention: q, k and v are three groups with rows of their own."""

    groups = 3

    def matrix(self, weight: Tensor) -> Tensor:
        return torch.stack(list(weight.chunk(3)))

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        return [t.reshape(-1, t.shape[-1]) for t in x], [t.reshape(-1, t.shape[-1]) for t in b]


@dataclass
class Norm(Kind):
    """Weight and bias are the two rows of one matrix; x is the normalised input, before the weight."""

    module: nn.Module

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(1, 1, -1)

    def rows(self, x: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Rows, Rows]:
        return [self._by_channel(x[0])], [self._by_channel(b[0])]

    def _by_channel(self, t: Tensor) -> Tensor:
        """(R, C) of one sample."""
        if not isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            t = t.movedim(1, -1)
        return t.reshape(-1, self.module.weight.numel())


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies with its weight, from the definition; x holds the whole batch."""
    if isinstance(module, nn.RMSNorm):
        dims = tuple(range(-len(module.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    if isinstance(module, nn.LayerNorm):
        dims = tuple(range(-len(module.normalized_shape), 0))
        return _standardised(x, x.mean(dims, keepdim=True), _variance(x, dims), module.eps)
    if isinstance(module, nn.GroupNorm):
        grouped = x.reshape(len(x), module.num_groups, -1)
        return _standardised(
            grouped, grouped.mean(2, keepdim=True), _variance(grouped, (2,)), module.eps
        ).reshape(x.shape)
    assert isinstance(module, BATCH_NORMS)
    shape = (1, -1, *[1] * (x.dim() - 2))
    if module.training or module.running_mean is None:
        dims = (0, *range(2, x.dim()))
        return _standardised(x, x.mean(dims, keepdim=True), _variance(x, dims), module.eps)
    return _standardised(x, module.running_mean.reshape(shape), module.running_var.reshape(shape), module.eps)


def _variance(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)


def _standardised(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (x - mean) / (variance + eps).sqrt()


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that owns a weight and uses it when called; None for all others."""
    if isinstance(module, nn.Linear):
        return Kind()
    if type(module).__name__ == "Conv1D":  # by name: the real one comes with transformers
        return TransposedLinear()
    if isinstance(module, CONVOLUTIONS):
        return Convolution(module)
    if isinstance(module, TRANSPOSED):
        return TransposedConvolution(module)
    if isinstance(module, nn.Embedding):
        return Lookup(module)
    if isinstance(module, NORMS) and module.weight is not None:
        return Norm(module)
    return None
