"""Which dimension of a layer's input counts samples: the pair splits samples, never tokens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fop.capture.lifetime import InertCopy, in_place, remove_all
from fop.layers import EmbeddingLayer, Layer
from fop.torch_internals import current_backward_pass

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
        asked: whether a backward pass has asked for a layout.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.storages: frozenset[int] | None = None
        self.sequences: set[tuple[int, int]] = set()
        self.asked = False

    def see(self, inputs: Iterable[Any]) -> None:
        """Take the size of the batch from the inputs of a model, or of one of its parts."""
        tensors = [x for x in _tensors(inputs) if x.dim() > 0]
        sizes = [x.shape[0] for x in tensors]
        # A single time step, for instance, may come before the samples.
        self.size = next((size for size in sizes if size != 1), sizes[0] if sizes else None)
        if not torch.compiler.is_compiling():
            self.storages = frozenset(a for x in tensors if (a := _address(x)) is not None)

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
        if self.size == AMBIGUOUS:
            why = "a compiled model with batch_first=False needs batch_dim in layer_options"
            return Layout(0, shape[0], problem=why)
        N = shape[0] if self.size is None or self.size == UNKNOWN else self.size
        return _of_size(N, shape, x.dim())

    def _fixed(self, dim: int, shape: tuple[int, ...]) -> Layout:
        if dim >= len(shape):
            return Layout(0, shape[0], problem=f"batch_dim={dim}, but its input is {shape}")
        N = self.size
        if dim == 0 and not self.sequences and N is not None and N > 0 and shape[0] % N == 0:
            return Layout(0, N, rows=shape[0] // N)
        return Layout(dim, shape[dim])

    def _positions(self, ids: Tensor) -> bool:
        """Return whether token numbers are a row for all samples, and not for each."""
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
        # Threads run the same model, as one that trains and one that evaluates.
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []
        self.sequence_first = False
        self._register(root)
        weakref.finalize(self, remove_all, self._handles)

    def _register(self, root: nn.Module) -> None:
        self._handles += [
            root.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            root.register_forward_hook(_Leave(self), always_call=True),
        ]
        # Scripts also call the parts of a model one by one, from a method of their own.
        for part in _parts(root):
            self._handles.append(part.register_forward_pre_hook(_EnterPart(self), with_kwargs=True))
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

    @property
    def _running(self) -> list[Batch]:
        """Forward passes of the model that are running in this thread, the inner ones last."""
        stack: list[Batch] = self._local.__dict__.setdefault("running", [])
        return stack

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass."""
        batch = Batch(None)
        batch.see([*args, *kwargs.values()])
        self._running.append(batch)
        self._local.last = batch

    def enter_part(self, part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a call of a part of the model, which tells the batch if the model itself was not called."""
        if not self._running and torch.compiler.is_compiling():
            return
        batch = self.batch()
        if not self._running and current_backward_pass() == -1:
            if part in self._called:
                # The next round; the last one may have been an evaluation, which nobody asked about.
                batch = self._local.last = Batch(None)
                self._called.clear()
            self._called.add(part)
        if batch.size is None:
            batch.see([*args, *kwargs.values()])

    @property
    def _called(self) -> weakref.WeakSet[nn.Module]:
        """Parts that were called one by one since the last round."""
        called: weakref.WeakSet[nn.Module] = self._local.__dict__.setdefault("called", weakref.WeakSet())
        return called

    def leave(self) -> None:
        """End a forward pass."""
        if self._running:
            self._running.pop()

    def traced_size(self) -> int:
        """Return the size of the batch for `tap`, in a forward pass that torch.compile traces."""
        if self.sequence_first:
            return AMBIGUOUS
        size = self._running[-1].size if self._running else None
        return UNKNOWN if size is None else size

    def batch(self) -> Batch:
        """Return what is known of the batch of the running forward pass."""
        if self._running:
            return self._running[-1]
        last: Batch | None = getattr(self._local, "last", None)
        # A part of the model that runs in the backward pass is being recomputed (reentrant checkpointing);
        # elsewhere somebody calls the parts one by one, until the backward pass asks for what was seen.
        if last is None or (last.asked and current_backward_pass() == -1):
            last = self._local.last = Batch(None)
        return last


def _parts(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a model, those in lists and dictionaries of modules included."""
    for child in root.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child


class _Enter(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (watch := self.target()) is not None:
            watch.enter(args, kwargs)


class _EnterPart(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (watch := self.target()) is not None:
            watch.enter_part(module, args, kwargs)


class _Leave(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if (watch := self.target()) is not None:
            watch.leave()


class _Sequence(InertCopy[ModelWatch]):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (watch := self.target()) is None:
            return
        x = args[0] if args else kwargs.get("query", kwargs.get("input"))
        if isinstance(x, PackedSequence):
            watch.batch().sequences.add((len(x.batch_sizes), int(x.batch_sizes[0])))
        elif isinstance(x, Tensor) and x.dim() == 3:
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
