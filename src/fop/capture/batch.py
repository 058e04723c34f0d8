"""Which dimension of a layer's input counts samples: the pair splits samples, never tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture.lifetime import InertCopy, in_place, remove_all
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
            values = values.unflatten(0, (-1, self.samples * self.rows))
        return values.transpose(0, self.dim) if self.dim else values


class Batch:
    """What is known of the batch in one forward pass of a model.

    Attributes:
        size: dim 0 of the model's own input, None if it has no tensor input.
        storages: addresses of the model's tensor inputs, None where they are not known.
        sequences: (length, N) of every input to a module with ``batch_first=False``.
    """

    def __init__(self, size: int | None, storages: frozenset[int] | None = None) -> None:
        self.size = size
        self.storages = storages
        self.sequences: set[tuple[int, int]] = set()

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x``, input of ``layer``, are."""
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
        if self.size is None or self.size < 0:
            ambiguous = "a compiled model with batch_first=False needs batch_dim in layer_options"
            return Layout(0, shape[0], problem=ambiguous if self.size == AMBIGUOUS else None)
        return _of_size(self.size, shape, x.dim())

    def _fixed(self, dim: int, shape: tuple[int, ...]) -> Layout:
        if dim >= len(shape):
            return Layout(0, shape[0], problem=f"batch_dim={dim}, but its input is {shape}")
        N = self.size
        if dim == 0 and not self.sequences and N is not None and N > 0 and shape[0] % N == 0:
            return Layout(0, N, rows=shape[0] // N)
        return Layout(dim, shape[dim])

    def _positions(self, ids: Tensor) -> bool:
        """Tell whether token numbers are a row for all samples, and not for each."""
        if self.size is None or self.size < 0 or (ids.dim() > 1 and ids.shape[0] == self.size):
            return False
        if ids.dim() > 1 and ids.shape[0] == 1:
            return True
        if self.storages is None:
            # Under torch.compile.
            return ids.dim() == 1
        # What is not the model's input, it has made itself.
        return _address(ids) not in self.storages

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


def _of_size(N: int, shape: tuple[int, ...], dims: int) -> Layout:
    if shape[0] == N:
        return Layout(0, N)
    # Rows with no other dimension may be tokens in any order; batch_dim=0 says that they go by sample.
    second, folded = shape[1:2] == (N,), N > 0 and shape[0] % N == 0
    if second and not folded:
        return Layout(1, N)
    if folded and not second and dims > 2:
        return Layout(0, N, rows=shape[0] // N)
    how = "set batch_dim in layer_options" if second or folded else "no dimension counts samples"
    return Layout(0, N, problem=f"its input is {shape} for a batch of {N}; {how}")


class Attention(Batch):
    """The batch of a projection inside an attention module, (length, N, features) or (length·N, features).

    Args:
        module: the attention module.
        query: its first input.
        model: the batch of the model that it is part of.
    """

    def __init__(self, module: nn.MultiheadAttention, query: Tensor, model: Batch) -> None:
        super().__init__(query.shape[0 if module.batch_first else 1] if query.dim() == 3 else 1)
        self.rows = 1
        assert self.size is not None
        folds = module.batch_first and not model.sequences and model.size is not None and model.size > 0
        if folds and model.size is not None and self.size % model.size == 0:
            # Windows, folded into the batch.
            self.size, self.rows = model.size, self.size // model.size

    def layout(self, layer: Layer, x: Tensor) -> Layout:
        """Return where the samples of ``x`` are."""
        assert self.size is not None
        return Layout(1, self.size, self.rows, folded=x.dim() == 2)


class ModelWatch:
    """Hooks on a model that note the size of the batch in each of its forward passes.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self.current: Batch | None = None
        self._last: Batch | None = None
        self._handles: list[RemovableHandle] = []
        self.sequence_first = False
        self._register(root)
        weakref.finalize(self, remove_all, self._handles)

    def _register(self, root: nn.Module) -> None:
        self._handles += [
            root.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            root.register_forward_hook(_Leave(self), always_call=True),
        ]
        for module in root.modules():
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first:
                self._handles.append(module.register_forward_pre_hook(_Sequence(self), with_kwargs=True))
                self.sequence_first = True

    def repair(self, root: nn.Module) -> None:
        """Put the hooks back if somebody has cleared hooks of the model."""
        if not all(map(in_place, self._handles)):
            remove_all(self._handles)
            self._handles.clear()
            self._register(root)

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass."""
        inputs = [*_tensors([*args, *kwargs.values()])]
        storages = None
        if not torch.compiler.is_compiling():
            storages = frozenset(address for x in inputs if (address := _address(x)) is not None)
        size = next((x.shape[0] for x in inputs if x.dim() > 0), None)
        self.current = self._last = Batch(size, storages)

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
