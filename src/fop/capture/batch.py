"""Which dimension of a layer's input counts samples: sub-batches split samples, never tokens."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fop.layers import Layer


@dataclass(frozen=True)
class Layout:
    """Where the samples of a layer's input are.

    Attributes:
        dim: the dimension that counts them; None for an input without one.
        samples: N.
        rows: entries of that dimension for each sample, as where images are cut up and folded into the batch.
        problem: why the samples cannot be told from each other, None if they can.
        unclear: whether the user can say where they are.
        folded: whether dimensions 0 and 1 are one, (length·N).
    """

    dim: int | None
    samples: int
    rows: int = 1
    problem: str | None = None
    unclear: bool = False
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
        size: N, dim 0 of the model's own inputs; None if it has no tensor input, or they do not agree.
        sizes: what N may be, if they do not agree.
        seconds: dim 1 of the inputs; None where they are not known.
        ambiguous: whether some modules may have the samples in another dimension, unknown which.
        sequences: (length, N) of every input to a module with ``batch_first=False``.
        asked: whether a backward pass has asked for a layout.
    """

    size: int | None = None
    sizes: list[int] = field(default_factory=list)
    seconds: list[int] | None = None
    ambiguous: bool = False
    sequences: set[tuple[int, int]] = field(default_factory=set)
    asked: bool = False

    def tell(self, size: Any) -> None:
        """Take the size of the batch from the user; TypeError or ValueError if it is none."""
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"batch_size gave {size!r}; it must give the number of samples of a batch")
        if size < 0:
            raise ValueError(f"batch_size gave {size}; it must give the number of samples, 0 or more")
        self.size, self.sizes = int(size), []

    def see(self, inputs: Iterable[Any]) -> None:
        """Take the size of the batch from the inputs of a model, or of one of its modules."""
        shapes = [x.shape for x in tensors_in(inputs) if x.dim() > 0]
        # A single time step, for instance, may come beside the samples.
        firsts = [shape[0] for shape in shapes if shape[0] != 1] or [1] * bool(shapes)
        # With lists alone: torch 2.5 can trace neither `firsts.count` nor generators.
        counts = [len([other for other in firsts if other == size]) for size in firsts]
        common = [size for size, count in zip(firsts, counts, strict=True) if count == max(counts)]
        agreed = not [size for size in common if size != common[0]]
        self.size = common[0] if common and agreed else None
        self.sizes = [] if agreed else firsts
        self.seconds = [shape[1] for shape in shapes if len(shape) > 1]

    def doubt(self, outputs: set[int]) -> None:
        """Take into account that the model's outputs have other sizes along dim 0 than N."""
        if self.size is not None and (moved := outputs.intersection(self.seconds or [])):
            self.sizes, self.size = [*moved, self.size], None

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x``, input of ``layer``, are."""
        self.asked = True
        shape = tuple(x.shape[layer.leading])
        if not shape:
            return Layout(None, 1)
        if layer.options.batch_dim is not None:
            return self._fixed(layer.options.batch_dim, shape)
        if layer.by_index and self._positions(shape):
            why = f"its input {shape} holds positions, the same for all samples"
            return Layout(0, self.size or shape[0], problem=why)
        if self.sequences or self.ambiguous or self.sizes:
            return self._in_doubt(shape, x.dim())
        N = shape[0] if self.size is None else self.size
        return Layout(0, N) if shape[0] == N else _not_first(N, shape, x.dim())

    def _fixed(self, dim: int, shape: tuple[int, ...]) -> Layout:
        if dim >= len(shape):
            return Layout(0, shape[0], problem=f"batch_dim={dim}, but its input is {shape}")
        if dim == 0 and self.size and not self.sequences and shape[0] % self.size == 0:
            return Layout(0, self.size, rows=shape[0] // self.size)
        return Layout(dim, shape[dim])

    def _positions(self, shape: tuple[int, ...]) -> bool:
        """Return whether token numbers of this shape are a row for all samples, and not for each."""
        if self.size is None or len(shape) > 1:
            return self.size is not None and shape[0] == 1 != self.size
        # There may be as many positions as samples.
        return shape[0] != self.size or self.seconds is None or self.size in self.seconds

    def _in_doubt(self, shape: tuple[int, ...], dims: int) -> Layout:
        if self.sequences:
            return self._among_sequences(shape)
        if self.ambiguous:
            why = "a compiled model with batch_first=False, or inputs of several sizes, needs batch_dim"
            return Layout(0, shape[0], problem=why)
        fitting = set(self.sizes).intersection(shape[:2])
        if len(fitting) == 1:
            (N,) = fitting
            return Layout(0, N) if shape[0] == N else _not_first(N, shape, dims)
        why = f"its input is {shape}, and the model has inputs or outputs of {sorted(set(self.sizes))}"
        return Layout(0, shape[0], problem=why, unclear=True)

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
        return Layout(0, N, problem=why, unclear=len(along) > 1)


def _not_first(N: int, shape: tuple[int, ...], dims: int) -> Layout:
    """Return the layout of an input whose dim 0 does not count the N samples."""
    # Rows with no other dimension may be tokens in any order; batch_dim=0 says that they go by sample.
    second, folded = shape[1:2] == (N,), N > 0 and shape[0] % N == 0
    if second and not folded:
        return Layout(1, N)
    if folded and not second and dims > 2:
        return Layout(0, N, rows=shape[0] // N)
    how = "set batch_dim in layer_options" if second or folded else "no dimension counts samples"
    why = f"its input is {shape} for a batch of {N}; {how}"
    return Layout(0, N, problem=why, unclear=second or folded)


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


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in arguments or results of a model; of a packed sequence the first step, (N, …)."""
    # Not a generator, as in `Batch.see`.
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, PackedSequence):
            found.append(value.data[: int(value.batch_sizes[0])])
        elif isinstance(value, Mapping):
            found += tensors_in(value.values())
        elif isinstance(value, tuple) or (isinstance(value, list) and len(value) == 1):
            # A longer list may hold the samples themselves, as images of different sizes.
            found += tensors_in(value)
    return found
