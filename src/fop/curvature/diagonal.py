"""A diagonal curvature in the shape of the gradient: the mean square of the samples' own gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fop.curvature.base import Curvature, Damping, Shape
from fop.curvature.cost import LayerSize
from fop.curvature.inversion import Inversion
from fop.layers import FactorSums, Layer, Statistics


class DiagonalCurvature(Curvature):
    """For layers whose statistics are the gradients of single samples (norms)."""

    averages = ("A",)
    inverses = ("A_inv",)
    by_inversion = False

    @classmethod
    def unsupported(cls, layer: Layer) -> str | None:
        return None if len(layer.factor_shapes) == 1 else "its statistics are Kronecker factors"

    @classmethod
    def entries(cls, layer: Layer) -> dict[str, Shape]:
        (diagonal,) = layer.factor_shapes
        return {"A": diagonal, "A_inv": diagonal}

    @classmethod
    def plausible(cls, state: Mapping[str, Any], shape: torch.Size) -> dict[str, Shape] | None:
        diagonal, numel = state.get("A"), shape.numel()
        if "G" in state or not (isinstance(diagonal, Tensor) and diagonal.dim() == 3):
            return None
        fits = diagonal.numel() in (numel, 2 * numel)
        return dict.fromkeys(("A", "A_inv"), tuple(diagonal.shape) if fits else (1, 1, numel))

    def matrices(self, damping: Damping) -> tuple[list[Tensor], list[Tensor]]:
        return [], []

    def store(self, inversions: Sequence[Inversion], damping: Damping) -> bool:
        damped = self.state["A"] + self._shift(damping)
        self.state["A_inv"] = torch.where(damped > 0, 1 / damped, 0)
        return True

    def damping(self, group: Mapping[str, Any], adaptive: Tensor | None = None) -> Damping:
        damping = super().damping(group, adaptive)
        if group["damping"] != "adaptive":
            return damping
        # One factor gets what two get together.
        return Damping((1 + damping.value**0.5) ** 2 - 1, damping.relative)

    def _shift(self, damping: Damping) -> float | Tensor:
        # Weight and bias have units of their own.
        return damping.value * self._means() if damping.relative else damping.value

    def _means(self) -> Tensor:
        means: Tensor = self.state["A"].mean(-1, keepdim=True)
        return means

    def fisher(self, V: Tensor) -> Tensor:
        return self.state["A"] * V  # type: ignore[no-any-return]

    def solve(self, V: Tensor) -> Tensor:
        return self.state["A_inv"] * V  # type: ignore[no-any-return]

    def fisher_trace(self) -> Tensor:
        return self.state["A"].sum()  # type: ignore[no-any-return]

    def input_units(self) -> Tensor | None:
        means = self._means()
        units = torch.where((means > 0).all(), means[:, :1] / means, 1)
        return units if self.layer.bias else None

    def describe(self) -> str:
        _, out, columns = self.layer.matrix_shape
        return f"diagonal {out * columns}"

    def damping_shares(self, damping: Damping) -> list[float | None]:
        shift = torch.as_tensor(self._shift(damping), dtype=self.state["A"].dtype).mean()
        whole = self.state["A"].mean() + shift
        return [float(torch.where(whole > 0, shift / whole, 0)), None]

    def size(self, name: str) -> LayerSize:
        return LayerSize(name, *self.layer.matrix_shape, single=True)

    def pack(self, statistics: Statistics, device: torch.device) -> tuple[list[Tensor], Tensor]:
        sums = statistics.terms[False]
        return [sums.squares()], torch.tensor([sums.samples] * 2, dtype=torch.float64, device=device)

    def unpack(self, message: Tensor, counts: Sequence[float], share: float) -> Statistics:
        (shape,) = self.message_shapes(self.layer)
        N = round(counts[0])
        squares = message.view(shape) * share
        return Statistics({False: FactorSums(squares, None, N, N, squared=True)})
