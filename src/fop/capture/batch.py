"""Which dimension of a layer's input counts samples: sub-batches split samples, never tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fop.layers import EmbeddingLayer, Layer


@dataclass(frozen=True)
class Layout:
    """Where the samples of a layer's input are.

    Attributes:
        dim: the dimension that counts them; None for an input without one.
        samples: N.
        rows: entries of that dimension for each sample, as where images are cut up and folded into the batch.
        problem: why the samples cannot be told from each other, None if they can.
        folded: whether dimensions 0 and 1 are one, (length·N).
    """

    dim: int | None
    samples: int
    rows: int = 1
    problem: str | None = None
    folded: bool = False

    def batched(self, values: Tensor) -> Tensor:
        """Return input or output gradient with the samples along dim 0."""
        if self.dim is None:
            return values[None]
        if self.folded:
            values = values.unflatten(0, (-1, self.samples * self.rows))
        return values.transpose(0, self.dim) if self.dim else values


@dataclass
class Batch:
    """What is known of the batch in one forward pass of a model.

    Attributes:
        size: dim 0 of the model's own input, None if it has no tensor input.
        ambiguous: whether some modules may have the samples in another dimension, unknown which.
        storages: addresses of the model's tensor inputs, None where they are not known.
        sequences: (length, N) of every input to a module with ``batch_first=False``.
        asked: whether a backward pass has asked for a layout.
    """

    size: int | None = None
    ambiguous: bool = False
    storages: frozenset[int | None] | None = None
    sequences: set[tuple[int, int]] = field(default_factory=set)
    asked: bool = False

    def see(self, inputs: Iterable[Any]) -> None:
        """Take the size of the batch from the inputs of a model, or of one of its modules."""
        tensors = [x for x in _tensors(inputs) if x.dim() > 0]
        sizes = [x.shape[0] for x in tensors]
        # A single time step, for instance, may come before the samples.
        known = [size for size in sizes if size != 1] or sizes
        self.size = known[0] if known else None
        if not torch.compiler.is_compiling():
            self.storages = frozenset(map(_address, tensors))

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x``, input of ``layer``, are."""
        self.asked = True
        shape = tuple(x.shape[: layer.leading_dims(x)])
        if not shape:
            return Layout(None, 1)
        if layer.options.batch_dim is not None:
            return self._fixed(layer.options.batch_dim, shape)
        if isinstance(layer, EmbeddingLayer) and self._positions(x):
            why = f"its input {shape} holds positions, the same for all samples"
            return Layout(0, self.size or shape[0], problem=why)
        if self.sequences:
            return self._among_sequences(shape)
        if self.ambiguous:
            why = "a compiled model with batch_first=False needs batch_dim in layer_options"
            return Layout(0, shape[0], problem=why)
        N = shape[0] if self.size is None else self.size
        return Layout(0, N) if shape[0] == N else _not_first(N, shape, x.dim())

    def _fixed(self, dim: int, shape: tuple[int, ...]) -> Layout:
        if dim >= len(shape):
            return Layout(0, shape[0], problem=f"batch_dim={dim}, but its input is {shape}")
        if dim == 0 and self.size and not self.sequences and shape[0] % self.size == 0:
            return Layout(0, self.size, rows=shape[0] // self.size)
        return Layout(dim, shape[dim])

    def _positions(self, ids: Tensor) -> bool:
        """Return whether token numbers are a row for all samples, and not for each."""
        if self.size is None or (ids.dim() > 1 and ids.shape[0] == self.size):
            return False
        if ids.dim() > 1 and ids.shape[0] == 1:
            return True
        # What is not the model's input, it has made itself; under torch.compile there are no addresses.
        return ids.dim() == 1 if self.storages is None else _address(ids) not in self.storages

    def _among_sequences(self, shape: tuple[int, ...]) -> Layout:
        sizes = {N for _, N in self.sequences}
        N = max(sizes)
        if len(sizes) > 1:
            return Layout(0, N, problem=f"its model has batches of {sorted(sizes)} in one forward pass")
        along = [dim for dim, size in enumerate(shape[:2]) if size == N]
        if len(along) == 1:
            return Layout(along[0], N)
        how = "more than one dimension" if along else "no dimension"
        why = f"its input {shape} has {how} of the {N} samples; set batch_dim in layer_options"
        return Layout(0, N, problem=why)


def _not_first(N: int, shape: tuple[int, ...], dims: int) -> Layout:
    """Return the layout of an input whose dim 0 does not count the N samples."""
    # Rows with no other dimension may be tokens in any order; batch_dim=0 says that they go by sample.
    second, folded = shape[1:2] == (N,), N > 0 and shape[0] % N == 0
    if second and not folded:
        return Layout(1, N)
    if folded and not second and dims > 2:
        return Layout(0, N, rows=shape[0] // N)
    how = "set batch_dim in layer_options" if second or folded else "no dimension counts samples"
    return Layout(0, N, problem=f"its input is {shape} for a batch of {N}; {how}")


@dataclass
class AttentionBatch(Batch):
    """The batch of a projection inside an attention module, (length, N, features) or (length·N, features)."""

    rows: int = 1

    @classmethod
    def of(cls, module: nn.MultiheadAttention, query: Tensor, model: Batch) -> AttentionBatch:
        """Return the batch of an attention module from its first input and the batch of its model."""
        size = query.shape[0 if module.batch_first else 1] if query.dim() == 3 else 1
        if module.batch_first and not model.sequences and model.size and size % model.size == 0:
            return cls(model.size, rows=size // model.size)
        return cls(size)

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        assert self.size is not None
        return Layout(1, self.size, self.rows, folded=x.dim() == 2)


def _address(x: Tensor) -> int | None:
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # Sparse tensors, and those that stand for others (fake ones, torch.func's), have none.
        return None


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, tuple) or (isinstance(value, list) and len(value) == 1):
            # A longer list may hold the samples themselves, as images of different sizes.
            yield from _tensors(value)
