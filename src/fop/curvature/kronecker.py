"""Kronecker-factored curvature F = A ⊗ G with π-split damping (Martens & Grosse 2015).

Shapes: A is (groups, in, in), G is (groups, out, out), a gradient V is (groups, out, in); groups is 1 except
in grouped convolutions, whose curvature is one block per group. A factor of which only the diagonal is kept
is (groups, in) or (groups, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fop.curvature.base import Curvature, Damping, Shape
from fop.curvature.cost import LayerSize
from fop.curvature.inversion import Inversion, mean_eigenvalue
from fop.curvature.packing import pack_symmetric, packed_shape, unpack_symmetric
from fop.layers import FactorSums, Layer, Statistics


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
            (groups, columns), (_, out) = A.shape[:2], G.shape[:2]
            if groups * out * columns in (numel, numel + groups * out):
                of_A, of_G = (groups, columns, columns)[: A.dim()], (groups, out, out)[: G.dim()]
        return {"A": of_A, "A_inv": of_A, "G": of_G, "G_inv": of_G}

    def matrices(self, damping: Damping) -> tuple[list[Tensor], list[Tensor]]:
        return [self.state["A"], self.state["G"]], list(self._shifts(damping))

    def _shifts(self, damping: Damping) -> tuple[Tensor, Tensor]:
        A, G, root = self.state["A"], self.state["G"], damping.value**0.5
        if not damping.relative:
            return damping_split(A, G, damping.value)
        return root * typical_squares(A, bias=self.layer.bias), root * typical_squares(G, bias=False)

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
        A, G = self.state["A"], self.state["G"]
        trace: Tensor = (mean_eigenvalue(A) * mean_eigenvalue(G)).sum() * (A.shape[-1] * G.shape[-1])
        return trace

    def input_units(self) -> Tensor | None:
        if not self.layer.bias:
            return None
        squares = typical_squares(self.state["A"], bias=True).mean(0)
        units = torch.ones_like(squares)
        units[-1] = squares[0] / squares[-1]
        return units

    def describe(self) -> str:
        groups, out, columns = self.layer.matrix_shape
        A = f"A {columns}" + ("" if self.layer.diagonal_A else "²")
        G = f"G {out}" + ("" if self.layer.diagonal_G else "²")
        return f"{f'{groups}×' if groups > 1 else ''}({A}, {G})"

    def damping_shares(self, damping: Damping) -> list[float | None]:
        A, G = self.state["A"], self.state["G"]
        shares = []
        for factor, added in zip((A, G), self._shifts(damping), strict=True):
            shift = added.mean(-1) if damping.relative else added
            whole = shift + mean_eigenvalue(factor)
            shares.append((shift / torch.where(whole > 0, whole, 1)).mean())
        return list(torch.stack(shares).tolist())

    def size(self, name: str) -> LayerSize:
        diagonal_A, diagonal_G = (len(shape) == 2 for shape in self.layer.factor_shapes)
        return LayerSize(name, *self.layer.matrix_shape, diagonal_A=diagonal_A, diagonal_G=diagonal_G)

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


def kronecker_product(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """Return (A ⊗ G)·V = G V A for A (groups, in, in), G (groups, out, out), V (groups, out, in)."""
    right = V * A[:, None, :] if A.dim() == 2 else V @ A
    return G[:, :, None] * right if G.dim() == 2 else G @ right


def typical_squares(M: Tensor, *, bias: bool) -> Tensor:
    """Return for every entry of a factor's diagonal the size that relative damping takes, (groups, d).

    That is the mean eigenvalue; but the last entry, where it belongs to a ``bias``, counts by itself: its
    input is 1, whatever the units of the others are.
    """
    diagonal = M if M.dim() == 2 else M.diagonal(dim1=-2, dim2=-1)
    if not bias:
        return diagonal.mean(-1, keepdim=True).expand_as(diagonal)
    mean, own = diagonal[:, :-1].mean(-1, keepdim=True), diagonal[:, -1:]
    # Inputs that are all 0 have no size; nor has the gradient that is divided by it.
    return torch.cat([torch.where(mean > 0, mean, own).expand_as(diagonal[:, :-1]), own], 1)


def damping_split(A: Tensor, G: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return what is added to the diagonals of A and G: (π·γ, γ/π), each of shape (groups,).

    γ = sqrt(damping), π² = (tr A / dim A) / (tr G / dim G); π = 1 where a trace is 0 (Martens & Grosse
    2015, section 6.3).
    """
    a, g = mean_eigenvalue(A), mean_eigenvalue(G)
    defined = (a > 0) & (g > 0)
    # Not the root of the quotient, which leaves float32's range where gradients are tiny.
    pi = torch.where(defined, a.sqrt() / torch.where(defined, g, 1).sqrt(), 1)
    gamma = damping**0.5
    return gamma * pi, gamma / pi
