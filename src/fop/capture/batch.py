"""Which dimension of a layer's input counts samples: the pair splits samples, never tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.lifetime import InertCopy, remove_all
from fop.layers import EmbeddingLayer, Layer

# In place of the size of a batch where it is not known, or where another dimension may be meant.
UNKNOWN, AMBIGUOUS = -1, -2


@dataclass(frozen=True)
class Layout:
    """Where the samples of a layer's input are.

    Attributes:
        dim: their dimension; None for an input without one.
        samples: N.
        rows: entries of that dimension for each sample (windows folded into the batch).
        problem: why the samples cannot be told apart, None if they can.
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
            values = values.unflatten(0, (-1, self.samples))
        return values.transpose(0, self.dim) if self.dim else values


class Batch:
    """What is known of the batch in one forward pass of a model.

    Attributes:
        size: dim 0 of the model's own input, None if it has no tensor input.
        sequences: (length, N) of every input to a module with ``batch_first=False``.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.sequences: set[tuple[int, int]] = set()

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x``, input of ``layer``, are."""
        shape = tuple(x.shape[: layer.leading_dims(x)])
        if not shape:
            return Layout(None, 1)
        if layer.options.batch_dim is not None:
            return _fixed(layer.options.batch_dim, shape)
        if self.size == AMBIGUOUS:
            why = "a compiled model with batch_first=False needs batch_dim in layer_options"
            return Layout(0, shape[0], problem=why)
        if self.sequences:
            return self._among_sequences(shape)
        if self.size is None or self.size == UNKNOWN:
            return Layout(0, shape[0])
        return _of_size(self.size, shape, layer)

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


def _fixed(dim: int, shape: tuple[int, ...]) -> Layout:
    if dim < len(shape):
        return Layout(dim, shape[dim])
    return Layout(0, shape[0], problem=f"batch_dim={dim}, but its input is {shape}")


def _of_size(N: int, shape: tuple[int, ...], layer: Layer) -> Layout:
    if shape[0] == N:
        return Layout(0, N)
    if shape[1:2] == (N,):
        return Layout(1, N)
    # Token numbers that are not the model's input are positions, the same for all samples.
    if N > 0 and shape[0] % N == 0 and not isinstance(layer, EmbeddingLayer):
        return Layout(0, N, rows=shape[0] // N)
    return Layout(0, N, problem=f"its input is {shape} for a batch of {N}")


class SequenceFirst(Batch):
    """The batch of a projection inside an attention module, (length, N, features) or (length·N, features)."""

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x`` are."""
        assert self.size is not None
        return Layout(1, self.size, folded=x.dim() == 2)


class ModelWatch:
    """Hooks on a model that note the size of the batch in each of its forward passes.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self.current: Batch | None = None
        self._last: Batch | None = None
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            root.register_forward_hook(_Leave(self), always_call=True),
        ]
        self.sequence_first = False
        for module in root.modules():
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
                self._handles.append(module.register_forward_pre_hook(_Sequence(self), with_kwargs=True))
                self.sequence_first = True
        weakref.finalize(self, remove_all, self._handles)

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass."""
        self.current = self._last = Batch(_batch_size([*args, *kwargs.values()]))

    def leave(self) -> None:
        """End a forward pass."""
        self.current = None

    def traced_size(self) -> int:
        """Return the size of the batch for `tap`, in a forward pass that torch.compile traces."""
        if self.sequence_first:
            return AMBIGUOUS
        return UNKNOWN if self.current is None or self.current.size is None else self.current.size

    def batch(self) -> Batch:
        """Return what is known of the batch of the running forward pass."""
        if self.current is not None:
            return self.current
        # A part of the model that runs in the backward pass is being recomputed (reentrant checkpointing);
        # elsewhere somebody calls the part by itself, and its own input is all there is.
        if torch._C._current_graph_task_id() != -1 and self._last is not None:
            return self._last
        return Batch(None)


class _Enter(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (watch := self.target()) is not None:
            watch.enter(args, kwargs)


class _Leave(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (watch := self.target()) is not None:
            watch.leave()


class _Sequence(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = self.target()
        x = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if watch is not None and x is not None and x.dim() == 3:
            watch.batch().sequences.add((x.shape[0], x.shape[1]))


def _batch_size(inputs: Iterable[Any]) -> int | None:
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
        if isinstance(value, Mapping) and (size := _batch_size(value.values())) is not None:
            return size
    return None
