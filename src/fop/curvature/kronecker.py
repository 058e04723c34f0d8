"""Kronecker-factored curvature F = A ⊗ G with π-split damping (Martens & Grosse 2015).

Shapes: A is (groups, in, in), G is (groups, out, out), a gradient V is (groups, out, in); groups is 1 except
in grouped convolutions, whose curvature is one block per group. A factor in k blocks is (groups·k, c, c), see
`fop.layers.blocks`; one of which only the diagonal is kept is (groups, in) or (groups, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fop.curvature.base import Curvature, Damping, Shape
from fop.curvature.cost import LayerSize
from fop.curvature.inversion import Inversion
from fop.curvature.packing import pack_symmetric, packed_shape, unpack_symmetric
from fop.layers import FactorSums, Layer, Statistics
from fop.layers.blocks import blocks_product, diagonal, in_blocks


class KroneckerCurvature(Curvature):
    """A from the inputs and G from the output gradients of the weight's layer."""

    averages = ("A", "G")
    inverses = ("A_inv", "G_inv")

    @classmethod
    def unsupported(cls, layer: Layer) -> str | None:
        return None if len(layer.factor_shapes) == 2 else "it has no Kronecker factors"

    @classmethod
    def entries(cls, layer: Layer) -> dict[str, Shape]:
        A, G = layer.factor_shapes
        return {"A": A, "A_inv": A, "G": G, "G_inv": G}

    @classmethod
    def plausible(cls, state: Mapping[str, Any], shape: torch.Size) -> dict[str, Shape] | None:
        if not state.keys() & {*cls.averages, *cls.inverses}:
            return None
        A, G, numel = state.get("A"), state.get("G"), shape.numel()
        out = shape[0] if shape else 1
        columns = numel // max(1, out)
        of_A: Shape = (1, columns, columns)
        of_G: Shape = (1, out, out)
        if isinstance(A, Tensor) and isinstance(G, Tensor) and min(A.dim(), G.dim()) > 1:
            (a, columns), (g, out) = A.shape[:2], G.shape[:2]
            if any(_may_be(a // n, columns, g // n, out, numel / n) for n in range(1, gcd(a, g) + 1)):
                of_A, of_G = (a, columns, columns)[: A.dim()], (g, out, out)[: G.dim()]
        return {"A": of_A, "A_inv": of_A, "G": of_G, "G_inv": of_G}

    def matrices(self, damping: Damping) -> tuple[list[Tensor], list[Tensor]]:
        return [self.state["A"], self.state["G"]], list(self._shifts(damping))

    def derive(self) -> None:
        # Of A and G, (groups, in) and (groups, out). They are views, which would keep A and G in memory.
        self._diagonals: tuple[Tensor, ...] = ()
        # `typical_squares` of these.
        self._squares: tuple[Tensor, ...] = ()
        if self.estimated:
            groups, out, columns = self.layer.matrix_shape
            a, g = diagonal(self.state["A"], groups, columns), diagonal(self.state["G"], groups, out)
            self._diagonals = a, g
            self._squares = typical_squares(a, bias=self.layer.bias), typical_squares(g, bias=False)
        super().derive()

    def _shifts(self, damping: Damping) -> tuple[Tensor, Tensor]:
        (a, g), shapes = self._diagonals, [self.state[name].shape for name in self.averages]
        counts = [shape[0] // self.layer.groups for shape in shapes]
        if not damping.relative:
            split = damping_split(a.mean(-1), g.mean(-1), damping.value)
            by_A, by_G = (s.repeat_interleave(count) for s, count in zip(split, counts, strict=True))
            return by_A, by_G
        root = damping.value**0.5
        by_A, by_G = (
            # Whatever is added to the rest, which is 0, it must not be 0.
            in_blocks(root * each, count, shape[-1], rest=each[:, -1:])
            for each, count, shape in zip(self._squares, counts, shapes, strict=True)
        )
        return by_A, by_G

    def store(self, inversions: Sequence[Inversion], damping: Damping) -> bool:
        A, G = (inversion.inverse for inversion in inversions)
        # The two inverses share one π, so one of them alone is not replaced.
        if A is None or G is None:
            return False
        self.state |= {"A_inv": A, "G_inv": G}
        return True

    def fisher(self, V: Tensor) -> Tensor:
        return kronecker_product(self.state["A"], self.state["G"], V)

    def solve(self, V: Tensor) -> Tensor:
        return kronecker_product(self.state["A_inv"], self.state["G_inv"], V)

    def fisher_trace(self) -> Tensor:
        a, g = self._diagonals
        trace: Tensor = (a.mean(-1) * g.mean(-1)).sum() * (a.shape[-1] * g.shape[-1])
        return trace

    def input_units(self) -> Tensor | None:
        if not self.layer.bias:
            return None
        squares = self._squares[0].mean(0)
        units = torch.ones_like(squares)
        units[-1] = squares[0] / squares[-1]
        return units

    def describe(self) -> str:
        (groups, out, columns), sides = self.layer.matrix_shape, []
        for name, side, shape in zip("AG", (columns, out), self.layer.factor_shapes, strict=True):
            if len(shape) == 2:
                sides.append(f"{name} {side}")
            else:
                count = shape[0] // groups
                sides.append(f"{name} {f'{count}×' if count > 1 else ''}{shape[-1]}²")
        return f"{f'{groups}×' if groups > 1 else ''}({', '.join(sides)})"

    def damping_shares(self, damping: Damping) -> list[float | None]:
        shares = []
        for squares, added in zip(self._diagonals, self._shifts(damping), strict=True):
            shift = added.reshape(len(squares), -1).mean(-1)
            whole = shift + squares.mean(-1)
            shares.append((shift / torch.where(whole > 0, whole, 1)).mean())
        return list(torch.stack(shares).tolist())

    def size(self, name: str) -> LayerSize:
        (A, G), groups = self.layer.factor_shapes, self.layer.groups
        return LayerSize(
            name,
            *self.layer.matrix_shape,
            diagonal_A=len(A) == 2,
            diagonal_G=len(G) == 2,
            blocks_A=A[0] // groups,
            blocks_G=G[0] // groups,
        )

    def message_shapes(self, layer: Layer) -> list[Shape]:
        return [packed_shape(shape) for shape in layer.sum_shapes]

    def pack(self, statistics: Statistics, device: torch.device) -> tuple[list[Tensor], Tensor]:
        pieces: list[Tensor] = []
        counts: list[Tensor] = []
        for swapped, layer in self.terms.items():
            sums = statistics.terms.get(swapped)
            if sums is None:
                pieces += [torch.zeros(shape, device=device) for shape in self.message_shapes(layer)]
                counts.append(torch.zeros(1 + layer.groups, dtype=torch.float64, device=device))
                continue
            assert sums.g is not None
            pieces += [pack_symmetric(sums.a), pack_symmetric(sums.g)]
            rows = torch.as_tensor(sums.rows, dtype=torch.float64, device=device).expand(layer.groups)
            counts.append(torch.cat([rows.new_full((1,), sums.samples), rows]))
        return pieces, torch.cat(counts)

    def unpack(self, message: Tensor, counts: Sequence[float], share: float) -> Statistics:
        statistics = Statistics()
        sizes = [torch.Size(s).numel() for layer in self.terms.values() for s in self.message_shapes(layer)]
        packed, left = iter(message.split(sizes)), list(counts)
        for swapped, layer in self.terms.items():
            a, g = (
                unpack_symmetric(next(packed).view(shape), dims[-1])
                for shape, dims in zip(self.message_shapes(layer), layer.sum_shapes, strict=True)
            )
            samples, rows, left = left[0], left[1 : 1 + layer.groups], left[1 + layer.groups :]
            if samples:
                counted = torch.tensor(rows, dtype=a.dtype, device=a.device)
                statistics.terms[swapped] = FactorSums(a, g * share, round(samples), counted)
        return statistics


def _may_be(blocks_A: int, side_A: int, blocks_G: int, side_G: int, numel: float) -> bool:
    """Return whether blocks of these sides may be the factors of a weight with so many entries a group."""
    columns, out = blocks_A * side_A, blocks_G * side_G
    # Less what fills up the last block, and the bias.
    return (columns - blocks_A) * (out - blocks_G + 1) <= numel <= columns * out


def kronecker_product(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """Return (A ⊗ G)·V = G V A for V (groups, out, in); what is kept of A and G their shapes say."""
    if A.dim() == 2:
        V = V * A[:, None, :]
    elif len(A) == len(V):
        V = torch.bmm(V, A)
    else:
        V = blocks_product(A, V.mT).mT
    if G.dim() == 2:
        return G[:, :, None] * V
    return torch.bmm(G, V) if len(G) == len(V) else blocks_product(G, V)


def typical_squares(diagonal: Tensor, *, bias: bool) -> Tensor:
    """Return for every entry of a factor's diagonal, (groups, d), the size that relative damping takes.

    That is the mean eigenvalue; but the last entry, where it belongs to a ``bias``, counts by itself: its
    input is 1, whatever the units of the others are.
    """
    if not bias:
        return diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    mean, own = diagonal[:, :-1].mean(-1, keepdim=True), diagonal[:, -1:]
    # Inputs that are all 0 have no size; nor has the gradient that is divided by it.
    return torch.cat([torch.where(mean > 0, mean, own).expand_as(diagonal[:, :-1]), own], 1)


def damping_split(a: Tensor, g: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return what is added to the diagonals of A and G: (π·γ, γ/π), each of shape (groups,).

    γ = sqrt(damping), π² = a/g of the mean eigenvalues a = tr A / dim A and g, (groups,); π = 1 where one is
    0 (Martens & Grosse 2015, section 6.3).
    """
    defined = (a > 0) & (g > 0)
    # Not the root of the quotient, which leaves float32's range where gradients are tiny.
    pi = torch.where(defined, a.sqrt() / torch.where(defined, g, 1).sqrt(), 1)
    gamma = damping**0.5
    return gamma * pi, gamma / pi
