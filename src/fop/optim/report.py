"""What the optimizer tells about itself: `summary()` and `diagnostics()`."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fop.algebra import Rung, damping_split, mean_eigenvalue
from fop.layers import Layer
from fop.optim.block import Block
from fop.optim.tracking import Tracker

_RESCUES = {
    Rung.FLOAT64: "needed float64",
    Rung.DAMPING: "needed more damping",
    Rung.KEPT: "failed and the last good inverse was kept",
}


@dataclass(frozen=True)
class SummaryRow:
    """One parameter: path ("FOP", "K-FAC", "AdamW" or "unknown"), why, factor shapes, bytes of state."""

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
        paths = Counter(row.path for row in self.rows)
        return "\n".join(
            [
                _table(head, body),
                f"{len(self.rows)} parameters: {', '.join(f'{n} {path}' for path, n in paths.items())}; "
                f"{_size(sum(r.bytes for r in self.rows))} of optimizer state",
            ]
        )


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer in the last step that updated it.

    Attributes:
        beta: mixing coefficient β used; 0 for a K-FAC step, None before the first.
        eta: step scale η used; 1 for a K-FAC step, None before the first.
        rho: ρ ∈ [0, 1], None before the first step.
        damping_A: share of the damping in the mean eigenvalue of A + πγI, in [0, 1]; None where another rank
            owns the layer.
        damping_G: the same for G + γ/π I; None for a diagonal curvature, which has no G.
        steps_since_curvature: steps since the inverses were computed; None before the first time.
        rescues: how often an inversion needed each rung of the ladder.
        kfac_steps: number of steps so far that had no gradient pair and were K-FAC's.
        why_kfac: why the last step was one of them, None if it was not.
    """

    beta: float | None
    eta: float | None
    rho: float | None
    damping_A: float | None
    damping_G: float | None
    steps_since_curvature: int | None
    rescues: dict[str, int]
    kfac_steps: int
    why_kfac: str | None


@dataclass(frozen=True)
class Diagnostics:
    """Layers that have curvature by name, and the KL clip's factor in the last step (1 without a clip)."""

    layers: dict[str, LayerDiagnostics] = field(default_factory=dict)
    kl_scale: float = 1.0

    def __str__(self) -> str:
        head = ("layer", "beta", "eta", "rho", "damping A", "damping G", "age", "rescues", "no pair")
        body = []
        for name, d in self.layers.items():
            numbers = (d.beta, d.eta, d.rho, d.damping_A, d.damping_G, d.steps_since_curvature)
            cells = ("–" if number is None else f"{number:.4g}" for number in numbers)
            body.append((name, *cells, str(sum(d.rescues.values())), str(d.kfac_steps)))
        why = [f"{name} took K-FAC's step: {d.why_kfac}" for name, d in self.layers.items() if d.why_kfac]
        return "\n".join([_table(head, body), f"KL scale {self.kl_scale:.4g}", *why])


class Refusals:
    """Counts updates that were refused because they were not finite, on the device until it is asked."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], Tensor] = {}

    def count(self, names: tuple[str, ...], refused: Tensor) -> None:
        """Add one step: ``refused`` holds a bool for each of ``names``; on the CPU, warn at once."""
        self._counts[names] = refused.int() + self._counts.get(names, 0)
        if refused.device.type == "cpu":
            self.report()

    def report(self) -> None:
        """Warn of what was refused since the last report; waits for the device."""
        counts, self._counts = self._counts, {}
        for names, refused in counts.items():
            which = [name for name, count in zip(names, refused.tolist(), strict=True) if count]
            if which:
                warnings.warn(
                    f"the update of {', '.join(which)} was not finite (NaN or infinite loss?) and was "
                    "refused; these weights are as before",
                    RuntimeWarning,
                    stacklevel=outside(),
                )


def outside() -> int:
    """Return the ``stacklevel`` of the first caller outside this library and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fop", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def warn_of_curvature(
    refused: Sequence[Block], rescues: Sequence[tuple[Block, Rung]], warned: set[tuple[str, Rung]]
) -> None:
    """Warn of statistics that were not finite, and of each layer's rescues once; ``warned`` holds those."""
    if refused:
        names = ", ".join(block.name for block in refused)
        warnings.warn(
            f"statistics of {names} are not finite in this step and were not used",
            RuntimeWarning,
            stacklevel=outside(),
        )
    for block, rung in rescues:
        if (block.name, rung) not in warned:
            warned.add((block.name, rung))
            warnings.warn(
                f"the inversion of a curvature factor of {block.name} {_RESCUES[rung]}; reported once, "
                "counted in diagnostics(). More damping avoids it.",
                RuntimeWarning,
                stacklevel=outside(),
            )


def summarise(
    groups: Mapping[Tensor, Mapping[str, Any]], tracker: Tracker, state: Mapping[Tensor, Mapping[str, Any]]
) -> Summary:
    """Return the table of every parameter's path."""
    by_param = {param: block for block in tracker.blocks.values() for param in block.params}
    rows = []
    for index, (param, group) in enumerate(groups.items()):
        block = by_param.get(param)
        path, reason, factors = "AdamW", tracker.reasons.get(param, ""), ""
        if block is None and not reason:
            path, reason = "unknown", "known after the first forward pass"
        if block is not None:
            kfac = group["beta"] == 0.0 and group["eta"] in (1.0, "adaptive")
            path, reason = "K-FAC" if kfac else "FOP", block.kind
            if len(block.modules) > 1:
                reason += f", shared by {', '.join(block.modules)}"
            if param is block.weight:
                factors = _factors(block.layer)
            if not param.requires_grad:
                reason += ", frozen"
            elif param is block.bias and not block.weight.requires_grad:
                path, reason = "AdamW", f"the weight of its {block.kind} is frozen"
            elif block.by_adamw:
                path, reason, factors = "AdamW", _unseen(block), ""
            elif not block.ready:
                reason += ", no curvature yet"
        held = state.get(param, {})
        size = sum(t.numel() * t.element_size() for t in held.values() if isinstance(t, Tensor))
        name = tracker.names.get(param, f"parameter {index}")
        rows.append(SummaryRow(name, tuple(param.shape), path, reason, factors, size))
    return Summary(rows)


def diagnose(
    groups: Mapping[Tensor, Mapping[str, Any]], blocks: Mapping[Tensor, Block], kl_scale: Tensor | None
) -> Diagnostics:
    """Return the diagnostics of the last step; one transfer from the device per layer."""
    layers: dict[str, LayerDiagnostics] = {}
    for weight, block in blocks.items():
        group, refreshed_at, last = groups[weight], block.state.get("refreshed_at"), block.last
        if last is None and "A" not in block.state:
            continue
        beta, eta, rho = (
            (None, None, None) if last is None else torch.stack([last.beta, last.eta, last.rho]).tolist()
        )
        share_A, share_G = _damping_shares(block, group["damping"])
        layers[block.name] = LayerDiagnostics(
            beta,
            eta,
            rho,
            share_A,
            share_G,
            None if refreshed_at is None else group["step"] - 1 - refreshed_at,
            {rung.name.lower(): block.rescues[rung] for rung in Rung if rung is not Rung.NONE},
            *block.pairs.report(),
        )
    return Diagnostics(layers, 1.0 if kl_scale is None else float(kl_scale))


def _unseen(block: Block) -> str:
    return (
        f"no statistics: no backward pass through its {block.kind} was seen (a gradient set by hand, a "
        "function in place of the module, or attention under torch.compile)"
    )


def _factors(layer: Layer) -> str:
    groups, out, columns = layer.matrix_shape
    if "G" not in layer.factor_shapes:
        return f"diagonal {out * columns}"
    A = f"A {columns}" + ("" if layer.diagonal_A else "²")
    G = f"G {out}" + ("" if layer.diagonal_G else "²")
    return f"{f'{groups}×' if groups > 1 else ''}({A}, {G})"


def _damping_shares(block: Block, damping: float) -> list[float | None]:
    if "A" not in block.state:
        # Another rank owns the curvature.
        return [None, None]
    A, G = block.state["A"], block.state.get("G")
    if G is None:
        whole = A.mean() + damping
        return [float(torch.where(whole > 0, damping / whole, 0)), None]
    shares = []
    for factor, shift in zip((A, G), damping_split(A, G, damping), strict=True):
        whole = shift + mean_eigenvalue(factor)
        shares.append((shift / torch.where(whole > 0, whole, 1)).mean())
    return list(torch.stack(shares).tolist())


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rows = [head, ["-" * width for width in widths], *body]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
