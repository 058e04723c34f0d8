"""What every use of every weight of any small model does, sample by sample, and the factors that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reference.attention import densify
from reference.kinds import Kind, Lookup, Norm, Rows, kind_of, normalised

LossFn = Callable[[Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """One use in a forward pass; x and out hold a tensor for each input and output of the use."""

    kind: Kind
    weight: nn.Parameter
    bias: nn.Parameter | None
    x: list[Tensor]
    out: list[Tensor]


class Tape:
    """Records the uses of a forward pass, from hooks on the modules and from `DenseAttention`."""

    def __init__(self, model: nn.Module) -> None:
        self.entries: list[Entry] = []
        densify(model, self)
        for module in model.modules():
            if (kind := kind_of(module)) is not None:
                module.register_forward_hook(partial(self._called, kind))

    def _called(self, kind: Kind, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = normalised(module, args[0]) if isinstance(kind, Norm) else args[0]
        return self.record(kind, module.weight, getattr(module, "bias", None), [x], [output])[0]

    def record(
        self, kind: Kind, weight: Any, bias: Any, x: Sequence[Tensor], out: Sequence[Tensor]
    ) -> list[Tensor]:
        """Remember a use; what it returns stands in for ``out``, which no later operation may overwrite."""
        self.entries.append(Entry(kind, weight, bias, [t.detach() for t in x], list(out)))
        return [t.clone() for t in out]


@dataclass(frozen=True)
class Use:
    """One use of a weight by one sample; output gradients are those of the sample's own loss (N·b)."""

    kind: Kind
    inputs: Rows
    outputs: Rows

    def gradient(self, bias: bool) -> Tensor:
        """(groups, out, in) that this use adds to the gradient of weight and bias."""
        if isinstance(self.kind, Norm):
            parts = [(self.inputs[0] * self.outputs[0]).sum(0), self.outputs[0].sum(0)]
            return torch.stack(parts[: 1 + bias])[None]
        return torch.stack([b.T @ a for a, b in zip(self._inputs(bias), self.outputs, strict=True)])

    def factor_rows(self, bias: bool, reduce: bool) -> tuple[Rows, Rows]:
        """Rows for A and G: all of them (expand), or one mean input and one summed gradient (reduce)."""
        inputs, outputs = self._inputs(bias), self.outputs
        if not reduce:
            return inputs, outputs
        return [a.mean(0, keepdim=True) for a in inputs], [b.sum(0, keepdim=True) for b in outputs]

    def _inputs(self, bias: bool) -> Rows:
        return [torch.cat([a, a.new_ones(len(a), 1)], dim=1) if bias else a for a in self.inputs]


@dataclass(frozen=True)
class Block:
    """A weight, the bias that belongs to it, and what each sample does with them (`Use` by use)."""

    weight: str
    bias: str | None
    samples: list[list[Use]]

    @property
    def kind(self) -> Kind:
        """The orientation of the matrix: that of a tied Linear goes before its Embedding's."""
        kinds = [use.kind for use in self.samples[0]]
        return next((kind for kind in kinds if not isinstance(kind, Lookup)), kinds[0])

    @property
    def diagonal(self) -> bool:
        """Whether the block has a diagonal Fisher in place of Kronecker factors."""
        return isinstance(self.kind, Norm)

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        """(groups, out, in) from tensors shaped like the parameters, by name."""
        matrix = self.kind.matrix(tensors[self.weight])
        if self.bias is None:
            return matrix
        bias = tensors[self.bias]
        if self.diagonal:
            return torch.cat([matrix, bias.reshape(matrix.shape)], dim=1)
        return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], dim=2)

    def sample_gradient(self, n: int) -> Tensor:
        """(groups, out, in), gradient of sample n's own loss, from its rows."""
        total = torch.zeros(())
        for use in self.samples[n]:
            gradient = use.gradient(self.bias is not None)
            turned = isinstance(use.kind, Lookup) and not isinstance(self.kind, Lookup)
            total = total + (gradient.mT if turned else gradient)
        return total

    def mean_gradient(self, samples: Iterable[int]) -> Tensor:
        """Gradient of the mean loss of these samples."""
        return torch.stack([self.sample_gradient(n) for n in samples]).mean(0)


# --- observing a batch -------------------------------------------------------------------------------


def observe(
    model: nn.Module, tape: Tape, inputs: Inputs, y: Tensor, loss_fn: LossFn, *, whole: bool = False
) -> dict[str, Block]:
    """The blocks of all weights that ``model``, whose tape it is, uses, by name of the weight.

    Samples go through the model one at a time, or, for models whose samples depend on each other (BatchNorm
    in train mode), all together with dim 0 as the batch: a sample's gradient is then its part of the batch's.
    """
    N = len(y)
    by_sample: list[dict[int, list[Use]]]
    if whole:
        by_sample = _uses(model, tape, inputs, y, loss_fn, N)
    else:
        by_sample = [
            _uses(model, tape, tuple(t[n : n + 1] for t in inputs), y[n : n + 1], loss_fn, 1)[0]
            for n in range(N)
        ]
    names = {id(p): name for name, p in model.named_parameters()}
    biases: dict[int, set[nn.Parameter | None]] = {}
    for entry in tape.entries:
        biases.setdefault(id(entry.weight), set()).add(entry.bias)
    blocks = {}
    for weight, found in biases.items():
        # Uses with different biases leave each of them to itself; so do several weights with one bias.
        common = next(iter(found)) if len(found) == 1 else None
        if sum(common in others for others in biases.values()) > 1:
            common = None
        samples = [uses[weight] for uses in by_sample]
        blocks[names[weight]] = Block(names[weight], None if common is None else names[id(common)], samples)
    return blocks


def _uses(
    model: nn.Module, tape: Tape, inputs: Inputs, y: Tensor, loss_fn: LossFn, N: int
) -> list[dict[int, list[Use]]]:
    """Uses of each of the N samples of one forward pass, by id of the weight."""
    tape.entries.clear()
    loss = loss_fn(model(*inputs), y)
    outputs = [out for entry in tape.entries for out in entry.out]
    gradients = iter(torch.autograd.grad(loss, outputs))
    found: list[dict[int, list[Use]]] = [{} for _ in range(N)]
    for entry in tape.entries:
        b = [N * next(gradients) for _ in entry.out]
        for n in range(N):
            # A single sample is all there is, in whatever dimension a module has its batch.
            part = slice(None) if N == 1 else slice(n, n + 1)
            rows = entry.kind.rows([t[part] for t in entry.x], [t[part] for t in b])
            found[n].setdefault(id(entry.weight), []).append(Use(entry.kind, *rows))
    return found


# --- curvature of a batch ----------------------------------------------------------------------------


def estimate(
    block: Block, *, reduce: bool = False, max_factor_dim: int = 8192, block_dim: int = 512
) -> dict[str, Tensor]:
    """A and G of one batch by name, or A alone, which holds the diagonal Fisher of a norm.

    Entries outside of the blocks of a factor that is kept in blocks are 0.
    """
    if block.diagonal:
        gradients = torch.stack([block.sample_gradient(n) for n in range(len(block.samples))])
        return {"A": gradients.square().mean(0)}
    bias = block.bias is not None
    terms = []
    for lookup in (False, True):
        samples = [[use for use in uses if isinstance(use.kind, Lookup) is lookup] for uses in block.samples]
        if any(samples):
            terms.append(_kronecker(samples, bias, reduce))
    A, G = terms[0]
    if len(terms) == 2:
        # The second is the Embedding's, whose matrix is the Linear's transposed.
        A, G = _joined([terms[0], terms[1][::-1]])
    if isinstance(block.kind, Lookup) or A.shape[1] - bias > max_factor_dim:
        A = A.diagonal(dim1=1, dim2=2)
    if G.shape[1] > max_factor_dim:
        G = G.diagonal(dim1=1, dim2=2)
    return {"A": _block_diagonal(A, block_dim, bias), "G": _block_diagonal(G, block_dim, False)}


def _block_diagonal(factor: Tensor, block_dim: int, bias: bool) -> Tensor:
    side = factor.shape[-1]
    if factor.dim() == 2 or side - bias <= block_dim:
        return factor
    block = math.ceil(side / math.ceil((side - bias) / block_dim))
    number = torch.arange(side) // block
    return factor * (number[:, None] == number)


def _kronecker(samples: list[list[Use]], bias: bool, reduce: bool) -> tuple[Tensor, Tensor]:
    """A sums over rows and uses, G averages over them; each group has rows of its own."""
    rows = [use.factor_rows(bias, reduce) for uses in samples for use in uses]
    groups = range(len(rows[0][0]))
    A = [torch.cat([inputs[g] for inputs, _ in rows]) for g in groups]
    G = [torch.cat([outputs[g] for _, outputs in rows]) for g in groups]
    return (
        torch.stack([a.T @ a / len(samples) for a in A]),
        torch.stack([b.T @ b / len(b) for b in G]),
    )


def _joined(terms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One Kronecker product for a sum of them, with the trace of the sum.

    Each term's factors count by the term's share of the trace.
    """
    traces = [(float(A[0].trace()), float(G[0].trace())) for A, G in terms]
    total = sum(a * g for a, g in traces)
    A = sum((a * g / total) * A / a for (A, _), (a, g) in zip(terms, traces, strict=True))
    G = sum((a * g / total) * G / g for (_, G), (a, g) in zip(terms, traces, strict=True))
    return total**0.5 * torch.as_tensor(A), total**0.5 * torch.as_tensor(G)
