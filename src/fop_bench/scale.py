"""What several ranks pay for a step: measurement on this machine, and the tables of it and of predictions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fop.curvature import entry_names
from fop_bench.cost_model import (
    GPUS_PER_NODE,
    H100,
    INTERVAL,
    Architecture,
    Method,
    Traffic,
    architecture_of,
    factor_bytes,
    plan_for,
    predict,
    published,
    traffic,
)
from fop_bench.overhead import MODELS, Row, Workload, amortised, measure_in_turns, prepare
from fop_bench.report import section
from fop_bench.world import run_ranks

# An optimizer among several ranks: its label, what the cost model calls it, and how FOP shares its work.
CONTENDERS: dict[str, tuple[str, Method, dict[str, Any]]] = {
    "sgd": ("SGD", "sgd", {}),
    "kfac": ("K-FAC", "kfac", {}),
    "fop": ("FOP", "compatible", {}),
    "fop-compatible": ("FOP compatible", "compatible", {"distributed": {"mode": "compatible"}}),
    "fop-lean": ("FOP lean", "lean", {"distributed": {"mode": "lean"}}),
}


def measure_scale(workload: Workload, ranks: int, rounds: int) -> list[Row]:
    """Measure all optimizers on ``ranks`` new processes of this machine; a row each.

    Times are in seconds, medians of every rank, and bytes means over the ranks. Raises ProcessException if a
    process failed.
    """
    names = ["sgd", "kfac", *(["fop"] if ranks == 1 else ["fop-compatible", "fop-lean"])]
    by_rank = run_ranks(_measure_rank, ranks, workload, names, rounds)
    architecture = architecture_of(MODELS[workload.model][0](), workload.model)
    rows: list[Row] = []
    for name in names:
        rows.append(_evaluate(architecture, ranks, name, [samples[name] for samples in by_rank]))
        rows[-1]["ratio_to_sgd"] = rows[-1]["amortised_seconds"] / rows[0]["amortised_seconds"]
    return rows


def _measure_rank(workload: Workload, names: Sequence[str], rounds: int) -> dict[str, Row]:
    """Return for every optimizer what its steps took, by kind of step, and the bytes of its curvature."""
    cpu = torch.device("cpu")
    trainers = {name: prepare(workload, name.split("-")[0], cpu, **CONTENDERS[name][2]) for name in names}
    found = measure_in_turns(trainers, rounds)
    for name, trainer in trainers.items():
        states = trainer.optimizer.state.values()
        held = (state[key].nbytes for state in states for key in entry_names() if key in state)
        found[name]["factor_bytes"] = sum(held)
    return found


def _evaluate(architecture: Architecture, ranks: int, name: str, samples: list[Row]) -> Row:
    def mean(kind: str) -> dict[str, float]:
        counts = [each[kind]["bytes"] for each in samples]
        whats = sorted(set().union(*counts))
        return {what: statistics.fmean(each.get(what, 0.0) for each in counts) for what in whats}

    def medians(kind: str) -> list[float] | None:
        return [statistics.median(each[kind]["seconds"]) for each in samples if each[kind]["seconds"]] or None

    predicted = traffic(architecture, ranks, CONTENDERS[name][1])
    # What DistributedDataParallel sends is not counted by anybody.
    counted = Traffic(predicted.wrapper, mean("plain"), mean("curvature"))
    plain, curvature = medians("plain") or [], medians("curvature")
    baseline = traffic(architecture, ranks, "sgd").wrapper
    plan = plan_for(architecture.layers, ranks)
    return {
        "ranks": ranks,
        "optimizer": name,
        "plain_seconds": plain,
        "curvature_seconds": curvature,
        "amortised_seconds": amortised(max(plain), max(curvature) if curvature else None, INTERVAL),
        "traffic": asdict(counted),
        "predicted": asdict(predicted),
        "amortised_bytes": counted.amortised(),
        "predicted_bytes": predicted.amortised(),
        "ratio_to_ddp": counted.amortised() / baseline if baseline else None,
        "factor_bytes": [each["factor_bytes"] for each in samples],
        "predicted_factor_bytes": factor_bytes(architecture.layers, plan) if curvature else [0] * ranks,
        "samples": samples,
    }


# --- Tables of what was measured


def measured_tables(rows: Sequence[Row]) -> str:
    """Return the tables of time, bytes and curvature as Markdown."""

    def named(each: Row, **cells: object) -> dict[str, object]:
        return {"ranks": each["ranks"], "optimizer": CONTENDERS[each["optimizer"]][0], **cells}

    def sent(each: Row) -> dict[str, object]:
        all_of = {**each["traffic"]["plain"], **each["traffic"]["curvature"]}
        return {
            what: _mb(all_of.get(what, 0.0))
            for what in ("gradients", "updates", "curvature factors", "control")
        }

    tables = [
        section(
            "Time of a step",
            f"Medians of the slowest rank; amortised: one curvature step in {INTERVAL}; ×SGD: amortised over "
            "SGD's on as many ranks.",
            [
                named(each)
                | {
                    "plain ms": _ms(each["plain_seconds"]),
                    "curvature ms": _ms(each["curvature_seconds"]),
                    "amortised ms": _ms([each["amortised_seconds"]]),
                    "×SGD": f"{each['ratio_to_sgd']:.2f}",
                }
                for each in rows
            ],
        ),
        section(
            "Bytes that a rank sends in a step",
            "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors "
            f"and control in curvature steps only. Amortised: one curvature step in {INTERVAL}; ×DDP: over "
            "plain DistributedDataParallel; predicted: by the cost model, from the sizes of the modules.",
            [
                named(each, DDP=_mb(each["traffic"]["wrapper"]), **sent(each))
                | {
                    "amortised": _mb(each["amortised_bytes"]),
                    "×DDP": f"{each['ratio_to_ddp']:.3f}",
                    "predicted": _mb(each["predicted_bytes"]),
                    "counted/predicted": f"{each['amortised_bytes'] / each['predicted_bytes']:.5f}",
                }
                for each in rows
                if each["ranks"] > 1
            ],
        ),
        section(
            "Factors and inverses",
            "MB in the state of rank 0, 1, …; predicted: by the plan from the sizes of the modules.",
            [
                named(each)
                | {
                    "MB per rank": _each(each["factor_bytes"]),
                    "predicted": _each(each["predicted_factor_bytes"]),
                    "sum": _mb(sum(each["factor_bytes"])),
                }
                for each in rows
                if each["curvature_seconds"]
            ],
        ),
    ]
    return "\n\n".join(filter(None, tables))


# --- Tables of what is predicted

REPLICATED = 3 * 4  # bytes of weight, gradient and momentum of a parameter, which DDP has on every rank
GPU_BYTES = 80e9
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LABELS: dict[Method, str] = {"kfac": "K-FAC", "compatible": "compatible", "lean": "lean", "fsdp": "FOP"}
ASSUMED = (
    f"Assumed for an H100: {H100['matmul'] / 1e12:.0f} TFLOPS in products, "
    f"{H100['inversion'] / 1e12:.0f} TFLOPS in Cholesky inversions, {H100['inside'] / 1e9:.0f} GB/s inside a "
    f"node of {GPUS_PER_NODE}, {H100['outside'] / 1e9:.0f} GB/s per GPU between nodes."
)


def predictions(gpus: Sequence[int] = GPUS) -> dict[str, list[Row]]:
    """Predict every published architecture on every number of GPUs, by title."""
    return {each.title: [predict(each, ranks, _methods(each)) for ranks in gpus] for each in published()}


def _methods(architecture: Architecture) -> Sequence[Method]:
    fits = REPLICATED * architecture.elements < GPU_BYTES
    return ("kfac", "compatible", "lean") if fits else ("fsdp",)


def predicted_tables(predicted: Mapping[str, Sequence[Row]]) -> str:
    """Return one table an architecture as Markdown, as docs/scaling.md has them."""
    return "\n\n".join(_predicted(each, predicted[each.title]) for each in published()) + "\n"


def _predicted(architecture: Architecture, rows: Sequence[Row]) -> str:
    methods = _methods(architecture)
    wrapper, where = ("FSDP", "over all GPUs.") if "fsdp" in methods else ("DDP", "on every GPU.")
    memory = REPLICATED * architecture.elements / 1e9

    def cells(row: Row) -> dict[str, object]:
        ratios = {name: row["ratios"][name] for name in methods}
        return {
            "GPUs": row["ranks"],
            f"{wrapper} GB": _short(row["baseline_bytes"] / 1e9),
            **{f"{LABELS[n]} ×{wrapper}": f"{r:.3f}" if r else "–" for n, r in ratios.items()},
            "owners": row["owners"],
            "curvature GB": _short(row["factor_bytes"] / 1e9),
            "products ms": _short(row["product_seconds"] * 1e3),
            "inversion ms": _short(row["inversion_seconds"] * 1e3),
            f"inversion ms ÷ {INTERVAL}": _short(row["inversion_seconds"] * 1e3 / INTERVAL),
            **{f"{LABELS[n]} sending ms": _short(row["extra_seconds"][n] * 1e3) for n in methods},
        }

    return section(
        f"{architecture.title}, under {wrapper}",
        f"{architecture.elements / 1e6:,.1f} million parameters, {len(architecture.layers)} layers with "
        f"curvature. Weights, gradients and momentum in float32: {memory:,.1f} GB {where}",
        [cells(row) for row in rows],
        level=3,
    )


def _ms(seconds: Sequence[float] | None) -> str:
    """Write the longest of some times."""
    return "–" if seconds is None else f"{max(seconds) * 1e3:.1f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}"


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value / 1e6:.1f}" for value in values)


def _short(value: float) -> str:
    """Write three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"
