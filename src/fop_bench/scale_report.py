"""Tables of `fop-bench scale`: what was measured on this machine, and what is predicted for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fop_bench.architectures import Architecture, published
from fop_bench.cost_model import (
    DDP_METHODS,
    FSDP_METHODS,
    GPUS_PER_NODE,
    H100,
    INTERVAL,
    Prediction,
    predict,
)
from fop_bench.defaults_report import markdown_table
from fop_bench.scale import CONTENDERS, Carried, Measurement

REPLICATED = 3 * 4  # bytes of weight, gradient and momentum of a parameter, which DDP has on every rank
GPU_BYTES = 80e9
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Sheet:
    """A table, for the terminal or for a README."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def table(self) -> Table:
        """Lay it out for the terminal."""
        table = Table(title=self.title, caption=self.note)
        for heading in self.head:
            table.add_column(heading, justify="left" if heading == "optimizer" else "right")
        previous = None
        for row in self.rows:
            if previous is not None and row[0] != previous and "optimizer" in self.head:
                table.add_section()
            previous = row[0]
            table.add_row(*row)
        return table

    def markdown(self, level: int = 2) -> str:
        """Lay it out as Markdown."""
        return "\n\n".join([f"{'#' * level} {self.title}", self.note, markdown_table(self.head, self.rows)])


# Measured


def measured_sheets(measurements: Sequence[Measurement]) -> list[Sheet]:
    """Make the tables of time, bytes, transport, curvature, and of the reduces behind the backward pass."""
    several = [each for each in measurements if each.ranks > 1]
    sheets = [_times(measurements)]
    if several:
        sheets += [_bytes(several), _transport(several)]
    sheets.append(_curvature([each for each in measurements if each.inversion_seconds is not None]))
    overlapping = [each for each in several if _overlap(each) is not None]
    return [*sheets, _overlaps(overlapping)] if overlapping else sheets


def _times(measurements: Sequence[Measurement]) -> Sheet:
    return Sheet(
        "Time of a step",
        f"Medians of the slowest rank; amortised: one curvature step in {INTERVAL}; ×SGD: amortised over "
        "SGD's on as many ranks.",
        ["ranks", "optimizer", "plain ms", "curvature ms", "amortised ms", "×SGD"],
        [
            [
                *_name(each),
                f"{max(each.plain_seconds) * 1e3:.1f}",
                "–" if each.curvature_seconds is None else f"{max(each.curvature_seconds) * 1e3:.1f}",
                f"{each.amortised_seconds * 1e3:.1f}",
                f"{each.ratio_to_sgd:.2f}",
            ]
            for each in measurements
        ],
    )


def _bytes(measurements: Sequence[Measurement]) -> Sheet:
    categories = ["gradients", "updates", "curvature factors", "control"]
    return Sheet(
        "Bytes that a rank sends in a step",
        "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors and "
        f"control in curvature steps only. Amortised: one curvature step in {INTERVAL}; ×DDP: over plain "
        "DistributedDataParallel; predicted: by the cost model, from the sizes of the modules.",
        ["ranks", "optimizer", "DDP", *categories, "amortised", "×DDP", "predicted", "counted/predicted"],
        [
            [
                *_name(each),
                _mb(each.traffic.wrapper),
                *(
                    _mb({**each.traffic.plain, **each.traffic.curvature}.get(what, 0.0))
                    for what in categories
                ),
                _mb(each.amortised_bytes),
                f"{each.ratio_to_ddp:.3f}",
                _mb(each.predicted_bytes),
                f"{each.amortised_bytes / each.predicted_bytes:.5f}",
            ]
            for each in measurements
        ],
    )


def _transport(measurements: Sequence[Measurement]) -> Sheet:
    first = measurements[0].transport
    return Sheet(
        "Bytes through the loopback interface, over those above",
        "Counted by Linux for all ranks together, the smallest of all rounds. Expected: with what gloo's "
        "reduce sends beyond the n(W-1)/W of a pipeline, which is what the optimizer counts: 1 + 1/W times "
        "as much, and above 2W MiB up to W/(W-1) + 1/W (gloo/reduce.cc). The rest: part segments, headers."
        + (f" Not measured: {first.missing}." if first.plain is None else ""),
        ["ranks", "optimizer", "plain", "expected", "curvature", "expected"],
        [
            [*_name(each), *_carried(each.transport.plain), *_carried(each.transport.curvature)]
            for each in measurements
        ],
    )


def _curvature(measurements: Sequence[Measurement]) -> Sheet:
    return Sheet(
        "Factors and inverses, and their inversion",
        "MB in the state of rank 0, 1, …; predicted: by the plan from the sizes of the modules. Inversion: "
        "milliseconds in the profiler's region fop::inversion on rank 0, 1, …, in one curvature step.",
        ["ranks", "optimizer", "MB per rank", "predicted", "sum", "inversion ms per rank", "largest"],
        [
            [
                *_name(each),
                _each(each.factor_bytes, 1e-6),
                _each(each.predicted_factor_bytes, 1e-6),
                _mb(sum(each.factor_bytes)),
                _each(each.inversion_seconds or [], 1e3),
                f"{max(each.inversion_seconds or [0.0]) * 1e3:.1f}",
            ]
            for each in measurements
        ],
    )


def _overlaps(measurements: Sequence[Measurement]) -> Sheet:
    rows = []
    for each in measurements:
        overlap = _overlap(each)
        assert overlap is not None
        rows.append(
            [
                *_name(each),
                f"{overlap.started_inside} of {overlap.reduces}",
                f"{overlap.seconds_inside * 1e3:.1f} of {overlap.seconds * 1e3:.1f}",
            ]
        )
    return Sheet(
        "Reduces behind the backward pass",
        "Rank 0, one curvature step under the profiler: how many reduces to owners (of K-FAC's factors, of "
        "FOP's factors and gradients) started before the backward pass ended, and how much of the time in "
        "which at least one was under way lies inside it.",
        ["ranks", "optimizer", "started inside", "ms inside"],
        rows,
    )


def _overlap(measurement: Measurement) -> Any:
    profiled = measurement.samples[0].profiled
    return None if profiled is None else profiled.overlap


def measured_markdown(measurements: Sequence[Measurement], environment: Mapping[str, Any], cores: int) -> str:
    """Give all tables as a README, with the command and the machine."""
    crowd = max(each.ranks for each in measurements)
    crowded = (
        f"This machine has {cores} cores for up to {crowd} ranks: the times of more ranks than cores say "
        "little. Bytes and memory do not depend on it."
    )
    return "\n\n".join(
        [
            "# Several ranks on one machine",
            "Made by `fop-bench scale`; `scale.json` has every sample. To repeat it:",
            f"```\n{environment['command']}\n```",
            *([crowded] if crowd > cores else []),
            *(sheet.markdown() for sheet in measured_sheets(measurements)),
            "## Environment",
            "\n".join(f"- {key}: `{value}`" for key, value in environment.items()) + "\n",
        ]
    )


# Predicted


def predictions(gpus: Sequence[int] = GPUS) -> dict[str, list[Prediction]]:
    """Predict every published architecture on every number of GPUs, by title."""
    return {
        architecture.title: [predict(architecture, ranks, _methods(architecture)) for ranks in gpus]
        for architecture in published()
    }


def predicted_sheets(predicted: Mapping[str, Sequence[Prediction]]) -> list[Sheet]:
    """Make one table an architecture."""
    by_title = {architecture.title: architecture for architecture in published()}
    return [_predicted(by_title[title], rows) for title, rows in predicted.items()]


def predicted_markdown(predicted: Mapping[str, Sequence[Prediction]]) -> str:
    """Give the tables of predictions, as docs/scaling.md has them."""
    return "\n\n".join(sheet.markdown(level=3) for sheet in predicted_sheets(predicted)) + "\n"


def _methods(architecture: Architecture) -> Any:
    return DDP_METHODS if REPLICATED * architecture.elements < GPU_BYTES else FSDP_METHODS


def _predicted(architecture: Architecture, rows: Sequence[Prediction]) -> Sheet:
    methods = list(rows[0].ratios)
    wrapper = "FSDP" if "fsdp" in methods else "DDP"
    memory = REPLICATED * architecture.elements / 1e9
    labels = {"kfac": "K-FAC", "compatible": "compatible", "lean": "lean", "fsdp": "FOP"}
    return Sheet(
        f"{architecture.title}, under {wrapper}",
        f"{architecture.elements / 1e6:,.1f} million parameters, {len(architecture.layers)} layers with "
        f"curvature. Weights, gradients and momentum in float32: {memory:,.1f} GB "
        + ("on every GPU." if wrapper == "DDP" else "over all GPUs."),
        [
            "GPUs",
            f"{wrapper} GB",
            *(f"{labels[method]} ×{wrapper}" for method in methods),
            "owners",
            "curvature GB",
            "products ms",
            "inversion ms",
            f"inversion ms ÷ {INTERVAL}",
            *(f"{labels[method]} sending ms" for method in methods),
        ],
        [
            [
                str(row.ranks),
                _short(row.baseline_bytes / 1e9),
                *("–" if ratio is None else f"{ratio:.3f}" for ratio in row.ratios.values()),
                str(row.burden.owners),
                _short(row.burden.factor_bytes / 1e9),
                _short(row.product_seconds * 1e3),
                _short(row.inversion_seconds * 1e3),
                _short(row.inversion_seconds * 1e3 / INTERVAL),
                *(_short(row.extra_seconds[method] * 1e3) for method in methods),
            ]
            for row in rows
        ],
    )


def assumptions() -> str:
    """Say what the predicted times rest on."""
    return (
        f"Assumed for an H100: {H100.matmul / 1e12:.0f} TFLOPS in products, "
        f"{H100.inversion / 1e12:.0f} TFLOPS in Cholesky inversions, {H100.inside / 1e9:.0f} GB/s inside a "
        f"node of {GPUS_PER_NODE}, {H100.outside / 1e9:.0f} GB/s per GPU between nodes."
    )


def _name(measurement: Measurement) -> list[str]:
    return [str(measurement.ranks), CONTENDERS[measurement.optimizer].label]


def _short(value: float) -> str:
    """Give three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}"


def _each(values: Sequence[float], scale: float) -> str:
    return ", ".join(f"{value * scale:.1f}" for value in values)


def _carried(value: Carried | None) -> list[str]:
    return ["–", "–"] if value is None else [f"{value.ratio:.3f}", f"{value.expected:.3f}"]
