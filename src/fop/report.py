"""What the optimizer tells about itself: `summary()` and `diagnostics()`."""

from __future__ import annotations

import html
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fop.binding import Binding, Bindings
from fop.curvature import Fallback
from fop.graphs import capturing
from fop.step_size import UNMEASURED
from fop.torch_internals import outside
from fop.transfer import Transfer

_SUMMARY_HEAD = ("parameter", "shape", "path", "why", "factors", "state")
_FALLBACKS = {
    Fallback.FLOAT64: "needed float64",
    Fallback.DAMPING: "needed more damping",
    Fallback.KEPT: "failed and the last good inverse was kept",
}
_UNSEEN = (
    "no statistics: no backward pass through its {} was seen (a gradient set by hand, a function in place of "
    "the module, or attention under torch.compile)"
)


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
    """All parameters, in the order of the groups: a table in a terminal, for `rich`, and in a notebook."""

    rows: list[SummaryRow]

    def __str__(self) -> str:
        return f"{_table(_SUMMARY_HEAD, self._cells())}\n{self._total()}"

    def _repr_html_(self) -> str:
        lines = (_html_row("th", _SUMMARY_HEAD), *(_html_row("td", cells) for cells in self._cells()))
        return f"<table>\n{chr(10).join(lines)}\n</table>\n<p>{html.escape(self._total())}</p>"

    def __rich__(self) -> Any:
        # rich asks for it: it is installed.
        table = import_module("rich.table").Table(*_SUMMARY_HEAD, caption=self._total())
        for cells in self._cells():
            plain = map(import_module("rich.markup").escape, cells)
            table.add_row(*plain, style="dim" if cells[2] == "AdamW" else None)
        return table

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (r.name, "×".join(map(str, r.shape)) or "scalar", r.path, r.reason, r.factors, _size(r.bytes))
            for r in self.rows
        ]

    def _total(self) -> str:
        paths = Counter(row.path for row in self.rows)
        return (
            f"{len(self.rows)} parameters: {', '.join(f'{n} {path}' for path, n in paths.items())}; "
            f"{_size(sum(r.bytes for r in self.rows))} of optimizer state"
        )


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer in the last step that updated it.

    Attributes:
        beta: mixing coefficient β used; 0 for a K-FAC step, None before the first.
        eta: step scale η used; 1 for a K-FAC step, None before the first.
        rho: ρ ∈ [0, 1], None before the first step.
        noise: ν ∈ [0, 0.99], the share of noise in ‖gradient‖² in the metric of the inverse, averaged over
            about ten steps; None if none was measured, without sub-batches.
        length: ‖update‖ ÷ ‖weight‖, an embedding's by the rows that moved; None with ``step_length="paper"``.
        damping_A: share of the damping in the mean eigenvalue of A + πγI, in [0, 1]; None where another rank
            owns the layer.
        damping_G: the same for G + γ/π I; None for a diagonal curvature, which has no G.
        steps_since_curvature: age of the statistics in the inverses, in steps; None before the first.
        fallbacks: how often an inversion needed each fallback.
        kfac_steps: number of steps so far that had no gradient pair and were K-FAC's.
        why_kfac: why the last step was one of them, None if it was not.
    """

    beta: float | None
    eta: float | None
    rho: float | None
    noise: float | None
    length: float | None
    damping_A: float | None
    damping_G: float | None
    steps_since_curvature: int | None
    fallbacks: dict[str, int]
    kfac_steps: int
    why_kfac: str | None


@dataclass(frozen=True)
class Diagnostics:
    """Layers that have curvature by name, and the KL clip's factor in the last step (1 without a clip)."""

    layers: dict[str, LayerDiagnostics] = field(default_factory=dict)
    kl_scale: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by ``layer/name``, as loggers take them; what is None is left out."""
        found = {"kl_scale": self.kl_scale}
        for layer, of_layer in self.layers.items():
            numbers = {**asdict(of_layer), "fallbacks": sum(of_layer.fallbacks.values())}
            found |= {f"{layer}/{key}": float(v) for key, v in numbers.items() if isinstance(v, (int, float))}
        return found

    def __str__(self) -> str:
        shown = ("beta", "eta", "rho", "noise", "length", "damping_A", "damping_G", "steps_since_curvature")
        head = ("layer", *(name.replace("_", " ") for name in shown[:-1]), "age", "fallbacks", "no pair")
        body = []
        for name, d in self.layers.items():
            numbers = (getattr(d, each) for each in shown)
            cells = ("–" if number is None else f"{number:.4g}" for number in numbers)
            body.append((name, *cells, str(sum(d.fallbacks.values())), str(d.kfac_steps)))
        why = [f"{name} took K-FAC's step: {d.why_kfac}" for name, d in self.layers.items() if d.why_kfac]
        return "\n".join([_table(head, body), f"KL scale {self.kl_scale:.4g}", *why])


class Refusals:
    """Counts updates that were refused because they were not finite, on the device until it is asked.

    Attributes:
        at_hand: whether there is something to report that costs no wait.
    """

    def __init__(self) -> None:
        self.at_hand = False
        # By device, too: the model may have moved since the last report.
        self._counts: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._sent: list[tuple[tuple[str, ...], Transfer]] = []

    def count(self, names: tuple[str, ...], finite: Tensor) -> None:
        """Add one step: ``finite`` holds a bool for each of ``names``.

        A captured step does not count: replays would write into memory that is another's by then.
        """
        if capturing():
            return
        key = names, finite.device
        self._counts[key] = (~finite).int() + self._counts.get(key, 0)
        self.at_hand |= finite.device.type == "cpu"

    def report(self, *, wait: bool = True) -> None:
        """Warn of what was refused since the last report, or, not to wait, of what was before the last."""
        sent = self._sent
        self._sent = [(names, Transfer(count)) for (names, _), count in self._counts.items()]
        self._counts, self.at_hand = {}, False
        if wait:
            sent, self._sent = sent + self._sent, []
        read = [zip(names, refused.read(), strict=True) for names, refused in sent]
        if which := dict.fromkeys(name for of_one in read for name, count in of_one if count):
            warnings.warn(
                f"the update of {', '.join(which)} was not finite (NaN or infinite loss?) and was "
                "refused; these weights are as before",
                RuntimeWarning,
                stacklevel=outside(),
            )


def warn_of_curvature(
    refused: Sequence[Binding], fallbacks: Sequence[tuple[str, Fallback]], warned: set[tuple[str, Fallback]]
) -> None:
    """Warn of statistics that were not finite, and of each layer's fallbacks once; ``warned`` holds those."""
    if refused:
        names = ", ".join(binding.name for binding in refused)
        warnings.warn(
            f"statistics of {names} are not finite in this step and were not used",
            RuntimeWarning,
            stacklevel=outside(),
        )
    for name, fallback in fallbacks:
        if (name, fallback) not in warned:
            warned.add((name, fallback))
            warnings.warn(
                f"the inversion of a curvature factor of {name} {_FALLBACKS[fallback]}; reported once, "
                "counted in diagnostics(). More damping avoids it.",
                RuntimeWarning,
                stacklevel=outside(),
            )


def summarise(
    groups: Mapping[Tensor, Mapping[str, Any]], bindings: Bindings, state: Mapping[Tensor, Mapping[str, Any]]
) -> Summary:
    """Return the table of every parameter's path."""
    by_param = {param: binding for binding in bindings for param in binding.params}
    rows = []
    for index, (param, group) in enumerate(groups.items()):
        binding = by_param.get(param)
        path, reason, factors = "AdamW", bindings.reasons.get(param, ""), ""
        if binding is None and not reason:
            path, reason = "unknown", bindings.why_unknown
        if binding is not None:
            corrected = group["beta"] != 0.0 and group["sub_batches"] > 1
            kfac = not corrected and group["eta"] in (1.0, "adaptive")
            path, reason = "K-FAC" if kfac else "FOP", binding.kind
            if len(binding.modules) > 1:
                reason += f", shared by {', '.join(binding.modules)}"
            if param is binding.weight:
                factors = binding.curvature.describe()
            if not param.requires_grad:
                reason += ", frozen"
            elif param is binding.bias and not binding.weight.requires_grad:
                path, reason = "AdamW", f"the weight of its {binding.kind} is frozen"
            elif binding.by_adamw:
                path, reason, factors = "AdamW", _UNSEEN.format(binding.kind), ""
            elif not binding.curvature.ready:
                reason += ", no curvature yet"
        held = state.get(param, {})
        size = sum(t.numel() * t.element_size() for t in held.values() if isinstance(t, Tensor))
        name = bindings.names.get(param, f"parameter {index}")
        rows.append(SummaryRow(name, tuple(param.shape), path, reason, factors, size))
    return Summary(rows)


def diagnose(
    groups: Mapping[Tensor, Mapping[str, Any]], bindings: Bindings, kl_scale: Tensor | None
) -> Diagnostics:
    """Return the diagnostics of the last step; one transfer from the device per layer."""
    layers: dict[str, LayerDiagnostics] = {}
    for binding in bindings:
        group, curvature, last = groups[binding.weight], binding.curvature, binding.last
        if last is None and not curvature.estimated:
            continue
        held: dict[str, Tensor | None] = {"length": binding.length}
        if last is not None:
            held |= {"beta": last.beta, "eta": last.eta, "rho": last.rho, "noise": last.noise}
        told = {name: value for name, value in held.items() if value is not None}
        # No float64 where there is none: some devices lack it.
        dtype = torch.float64 if torch.float64 in {value.dtype for value in told.values()} else torch.float32
        values = torch.stack([value.to(dtype) for value in told.values()]).tolist() if told else []
        of_step = dict(zip(told, values, strict=True))
        # Another rank may own the curvature.
        known = curvature.estimated
        share_A, share_G = curvature.damping_shares(curvature.damping(group)) if known else (None, None)
        refreshed_at = binding.state.get("refreshed_at")
        layers[binding.name] = LayerDiagnostics(
            of_step.get("beta"),
            of_step.get("eta"),
            of_step.get("rho"),
            None if of_step.get("noise") == UNMEASURED else of_step.get("noise"),
            of_step.get("length"),
            share_A,
            share_G,
            None if refreshed_at is None else group["step"] - 1 - refreshed_at,
            {each.name.lower(): curvature.fallbacks[each] for each in _FALLBACKS},
            *binding.kfac_steps(),
        )
    return Diagnostics(layers, 1.0 if kl_scale is None else float(kl_scale))


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rows = [head, ["-" * width for width in widths], *body]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
