"""What the optimizer tells about itself: `summary()` and `diagnostics()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fop.algebra import Rung, damping_split
from fop.optim.block import Block


@dataclass(frozen=True)
class SummaryRow:
    """One parameter: its path ("FOP", "K-FAC" or "AdamW"), why, factor shapes and bytes of state."""

    name: str
    shape: tuple[int, ...]
    path: str
    reason: str
    factors: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """All parameters, in the order of the groups; prints as a table."""

    rows: list[SummaryRow]

    def __str__(self) -> str:
        head = ("parameter", "shape", "path", "why", "factors", "state")
        body = [
            (r.name, "×".join(map(str, r.shape)) or "scalar", r.path, r.reason, r.factors, _size(r.bytes))
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *body]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        count = sum(r.path != "AdamW" for r in self.rows)
        lines.append(
            f"{len(self.rows)} parameters: {count} preconditioned, {len(self.rows) - count} by AdamW; "
            f"{_size(sum(r.bytes for r in self.rows))} of optimizer state"
        )
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer in the last step that updated it.

    Attributes:
        beta: mixing coefficient β used; 0 for a K-FAC step.
        eta: step scale η used; 1 for a K-FAC step.
        rho: ρ ∈ [0, 1].
        damping_A: share of the damping in the mean eigenvalue of A + πγI, in [0, 1].
        damping_G: the same for G + γ/π I.
        steps_since_curvature: steps since the inverses were computed; None before the first time.
        rescues: how often an inversion needed each rung of the ladder.
    """

    beta: float
    eta: float
    rho: float
    damping_A: float
    damping_G: float
    steps_since_curvature: int | None
    rescues: dict[str, int]


@dataclass(frozen=True)
class Diagnostics:
    """Layers by name, and the factor that the KL clip applied in the last step (1 without a clip)."""

    layers: dict[str, LayerDiagnostics] = field(default_factory=dict)
    kl_scale: float = 1.0


def summarise(
    groups: Mapping[Tensor, Mapping[str, Any]],
    blocks: Mapping[Tensor, Block],
    names: Mapping[Tensor, str],
    reasons: Mapping[Tensor, str],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> Summary:
    """Return the table of every parameter's path."""
    by_param: dict[Tensor, Block] = {
        p: block for block in blocks.values() for p in (block.weight, block.bias) if p is not None
    }
    rows = []
    for index, (param, group) in enumerate(groups.items()):
        block = by_param.get(param)
        path, reason, factors = "AdamW", reasons.get(param, "its module was not called yet"), ""
        if block is not None:
            kfac = group["beta"] == 0.0 and group["eta"] in (1.0, "adaptive")
            path, reason = "K-FAC" if kfac else "FOP", type(block.capture.module).__name__
            g, out_dim, in_dim = block.layer.matrix_shape
            if param is block.weight:
                factors = f"{f'{g}×' if g > 1 else ''}(A {in_dim}², G {out_dim}²)"
            if not param.requires_grad:
                reason += ", frozen"
            elif not block.ready:
                reason += ", no curvature yet"
        held = state.get(param, {})
        size = sum(t.numel() * t.element_size() for t in held.values() if isinstance(t, Tensor))
        name = names.get(param, f"parameter {index}")
        rows.append(SummaryRow(name, tuple(param.shape), path, reason, factors, size))
    return Summary(rows)


def diagnose(
    groups: Mapping[Tensor, Mapping[str, Any]], blocks: Mapping[Tensor, Block], kl_scale: Tensor | None
) -> Diagnostics:
    """Return the diagnostics of the last step; one transfer from the device per layer."""
    layers: dict[str, LayerDiagnostics] = {}
    for weight, block in blocks.items():
        if block.last is None or not block.ready:
            continue
        A, G, group = block.state["A"], block.state["G"], groups[weight]
        shares = [
            (shift / (shift + factor.diagonal(dim1=-2, dim2=-1).mean(-1))).mean()
            for factor, shift in zip((A, G), damping_split(A, G, group["damping"]), strict=True)
        ]
        last = block.last
        beta, eta, rho, share_A, share_G = torch.stack([last.beta, last.eta, last.rho, *shares]).tolist()
        name = block.name
        while name in layers:
            name += "'"
        layers[name] = LayerDiagnostics(
            beta,
            eta,
            rho,
            share_A,
            share_G,
            steps_since_curvature=group["step"] - 1 - block.state["refreshed_at"],
            rescues={rung.name.lower(): block.rescues[rung] for rung in Rung if rung is not Rung.NONE},
        )
    return Diagnostics(layers, 1.0 if kl_scale is None else float(kl_scale))


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
