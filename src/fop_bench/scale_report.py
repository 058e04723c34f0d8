"""Tables of `fop-bench scale`: what was measured on this machine, and what is predicted for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fop_bench.architectures import Architecture, published
from fop_bench.cost_model import DDP_METHODS, FSDP_METHODS, GPUS_PER_NODE, H100, INTERVAL, Prediction, predict
from fop_bench.report import Sheet, markdown_list
from fop_bench.scale import CONTENDERS, Carried, Measurement

REPLICATED = 3 * 4  # bytes of weight, gradient and momentum of a parameter, which DDP has on every rank
GPU_BYTES = 80e9
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Column = tuple[str, Callable[[Any], object]]
NAME: list[Column] = [
    ("ranks", lambda each: each.ranks),
    ("optimizer", lambda each: CONTENDERS[each.optimizer].label),
]
SENT = ("gradients", "updates", "curvature factors", "control")


def measured_sheets(measurements: Sequence[Measurement]) -> list[Sheet]:
    """Make the tables of time, bytes, transport, curvature, and of the reduces behind the backward pass."""
    several = [each for each in measurements if each.ranks > 1]
    transport = several[0].transport if several else None
    unmeasured = f" Not measured: {transport.missing}." if transport and transport.plain is None else ""
    # Title, note, rows, columns behind ranks and optimizer.
    sheets: list[tuple[str, str, list[Measurement], list[Column]]] = [
        (
            "Time of a step",
            f"Medians of the slowest rank; amortised: one curvature step in {INTERVAL}; ×SGD: amortised over "
            "SGD's on as many ranks.",
            list(measurements),
            [
                ("plain ms", lambda each: _ms(each.plain_seconds)),
                ("curvature ms", lambda each: _ms(each.curvature_seconds)),
                ("amortised ms", lambda each: _ms([each.amortised_seconds])),
                ("×SGD", lambda each: f"{each.ratio_to_sgd:.2f}"),
            ],
        ),
        (
            "Bytes that a rank sends in a step",
            "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors "
            f"and control in curvature steps only. Amortised: one curvature step in {INTERVAL}; ×DDP: over "
            "plain DistributedDataParallel; predicted: by the cost model, from the sizes of the modules.",
            several,
            [
                ("DDP", lambda each: _mb(each.traffic.wrapper)),
                *((what, lambda each, what=what: _mb(_sent(each, what))) for what in SENT),
                ("amortised", lambda each: _mb(each.amortised_bytes)),
                ("×DDP", lambda each: f"{each.ratio_to_ddp:.3f}"),
                ("predicted", lambda each: _mb(each.predicted_bytes)),
                ("counted/predicted", lambda each: f"{each.amortised_bytes / each.predicted_bytes:.5f}"),
            ],
        ),
        (
            "Bytes through the loopback interface, over those above",
            "Counted by Linux for all ranks together, the smallest of all rounds. Expected: with what gloo's "
            "reduce sends beyond the n(W-1)/W of a pipeline, which is what the optimizer counts: 1 + 1/W "
            "times as much, and above 2W MiB up to W/(W-1) + 1/W (gloo/reduce.cc). The rest: part segments, "
            f"headers.{unmeasured}",
            several,
            [
                ("plain", lambda each: _carried(each.transport.plain, "ratio")),
                ("expected", lambda each: _carried(each.transport.plain, "expected")),
                ("curvature", lambda each: _carried(each.transport.curvature, "ratio")),
                ("expected", lambda each: _carried(each.transport.curvature, "expected")),
            ],
        ),
        (
            "Factors and inverses, and their inversion",
            "MB in the state of rank 0, 1, …; predicted: by the plan from the sizes of the modules. "
            "Inversion: milliseconds in the profiler's region fop::inversion on rank 0, 1, …, in one "
            "curvature step.",
            [each for each in measurements if each.inversion_seconds is not None],
            [
                ("MB per rank", lambda each: _each(each.factor_bytes, 1e-6)),
                ("predicted", lambda each: _each(each.predicted_factor_bytes, 1e-6)),
                ("sum", lambda each: _mb(sum(each.factor_bytes))),
                ("inversion ms per rank", lambda each: _each(each.inversion_seconds, 1e3)),
                ("largest", lambda each: _ms(each.inversion_seconds)),
            ],
        ),
        (
            "Reduces behind the backward pass",
            "Rank 0, one curvature step under the profiler: how many reduces to owners (of K-FAC's factors, "
            "of FOP's factors and gradients) started before the backward pass ended, and how much of the "
            "time in which at least one was under way lies inside it.",
            [each for each in several if _overlap(each) is not None],
            [
                ("started inside", lambda each: "{0.started_inside} of {0.reduces}".format(_overlap(each))),
                ("ms inside", lambda each: _ms_inside(_overlap(each))),
            ],
        ),
    ]
    return [Sheet.of(title, note, rows, NAME + columns) for title, note, rows, columns in sheets if rows]


def measured_markdown(measurements: Sequence[Measurement], environment: Mapping[str, Any], cores: int) -> str:
    """Return all tables as a README, with the command and the machine."""
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
            markdown_list(environment),
        ]
    )


def predictions(gpus: Sequence[int] = GPUS) -> dict[str, list[Prediction]]:
    """Predict every published architecture on every number of GPUs, by title."""
    return {each.title: [predict(each, ranks, _methods(each)) for ranks in gpus] for each in published()}


def _methods(architecture: Architecture) -> Any:
    return DDP_METHODS if REPLICATED * architecture.elements < GPU_BYTES else FSDP_METHODS


def predicted_sheets(predicted: Mapping[str, Sequence[Prediction]]) -> list[Sheet]:
    """Make one table an architecture."""
    by_title = {architecture.title: architecture for architecture in published()}
    return [_predicted(by_title[title], rows) for title, rows in predicted.items()]


def predicted_markdown(predicted: Mapping[str, Sequence[Prediction]]) -> str:
    """Return the tables of predictions, as docs/scaling.md has them."""
    return "\n\n".join(sheet.markdown(level=3) for sheet in predicted_sheets(predicted)) + "\n"


def _predicted(architecture: Architecture, rows: Sequence[Prediction]) -> Sheet:
    methods = list(rows[0].ratios)
    wrapper, where = ("FSDP", "over all GPUs.") if "fsdp" in methods else ("DDP", "on every GPU.")
    memory = REPLICATED * architecture.elements / 1e9
    labels = {"kfac": "K-FAC", "compatible": "compatible", "lean": "lean", "fsdp": "FOP"}
    columns: list[Column] = [
        ("GPUs", lambda row: row.ranks),
        (f"{wrapper} GB", lambda row: _short(row.baseline_bytes / 1e9)),
        *(
            (f"{labels[each]} ×{wrapper}", lambda row, each=each: _ratio(row.ratios[each]))
            for each in methods
        ),
        ("owners", lambda row: row.burden.owners),
        ("curvature GB", lambda row: _short(row.burden.factor_bytes / 1e9)),
        ("products ms", lambda row: _short(row.product_seconds * 1e3)),
        ("inversion ms", lambda row: _short(row.inversion_seconds * 1e3)),
        (f"inversion ms ÷ {INTERVAL}", lambda row: _short(row.inversion_seconds * 1e3 / INTERVAL)),
        *(
            (f"{labels[each]} sending ms", lambda row, each=each: _short(row.extra_seconds[each] * 1e3))
            for each in methods
        ),
    ]
    return Sheet.of(
        f"{architecture.title}, under {wrapper}",
        f"{architecture.elements / 1e6:,.1f} million parameters, {len(architecture.layers)} layers with "
        f"curvature. Weights, gradients and momentum in float32: {memory:,.1f} GB {where}",
        rows,
        columns,
        sections=0,
    )


def assumptions() -> str:
    """Say what the predicted times rest on."""
    return (
        f"Assumed for an H100: {H100.matmul / 1e12:.0f} TFLOPS in products, "
        f"{H100.inversion / 1e12:.0f} TFLOPS in Cholesky inversions, {H100.inside / 1e9:.0f} GB/s inside a "
        f"node of {GPUS_PER_NODE}, {H100.outside / 1e9:.0f} GB/s per GPU between nodes."
    )


# Cells


def _sent(measurement: Measurement, what: str) -> float:
    return {**measurement.traffic.plain, **measurement.traffic.curvature}.get(what, 0.0)


def _overlap(measurement: Measurement) -> Any:
    profiled = measurement.samples[0].profiled
    return None if profiled is None else profiled.overlap


def _ms_inside(overlap: Any) -> str:
    return f"{overlap.seconds_inside * 1e3:.1f} of {overlap.seconds * 1e3:.1f}"


def _ms(seconds: Sequence[float] | None) -> str:
    """Write the longest of some times."""
    return "–" if seconds is None else f"{max(seconds) * 1e3:.1f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}"


def _each(values: Sequence[float], scale: float) -> str:
    return ", ".join(f"{value * scale:.1f}" for value in values)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _carried(value: Carried | None, part: str) -> str:
    return "–" if value is None else f"{getattr(value, part):.3f}"


def _short(value: float) -> str:
    """Write three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"
