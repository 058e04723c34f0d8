"""What several ranks pay for a step, measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fop.curvature import entry_names
from fop_bench import cost_model as cost
from fop_bench.overhead import MODELS, Row, Workload, amortised, measure_in_turns, prepare_pair
from fop_bench.tables import section
from fop_bench.world import run_ranks

# An optimizer among several ranks: its label, what the cost model calls it, and how FOP shares its work.
CONTENDERS: dict[str, tuple[str, cost.Method, dict[str, Any]]] = {
    "sgd": ("SGD", "sgd", {}),
    "kfac": ("K-FAC", "kfac", {}),
    "fop": ("FOP", "compatible", {}),
    "fop-compatible": ("FOP compatible", "compatible", {"distributed": {"mode": "compatible"}}),
    "fop-lean": ("FOP lean", "lean", {"distributed": {"mode": "lean"}}),
}
SENT = ("gradients", "updates", "curvature factors", "control")


def measure_scale(workload: Workload, ranks: int, rounds: int) -> list[Row]:
    """Measure all optimizers on new processes of this machine; a row each, with medians and mean bytes."""
    names = ["sgd", "kfac", *(["fop"] if ranks == 1 else ["fop-compatible", "fop-lean"])]
    by_rank = run_ranks(_measure_rank, ranks, workload, names, rounds)
    architecture = cost.architecture_of(MODELS[workload.model][0](), workload.model)
    rows = [_evaluate(architecture, name, [samples[name] for samples in by_rank]) for name in names]
    for row in rows:
        row["ratio_to_sgd"] = row["amortised_seconds"] / rows[0]["amortised_seconds"]
    return rows


def _measure_rank(workload: Workload, names: Sequence[str], rounds: int) -> dict[str, Row]:
    """Return for every optimizer what its steps took, by kind of step, and the bytes of its curvature."""
    cpu = torch.device("cpu")
    pairs = {name: prepare_pair(workload, name.split("-")[0], cpu, **CONTENDERS[name][2]) for name in names}
    found = measure_in_turns(pairs, rounds)
    for name, (trainer, _) in pairs.items():
        states = trainer.optimizer.state.values()
        held = (state[key].nbytes for state in states for key in entry_names() if key in state)
        found[name]["factor_bytes"] = sum(held)
    return found


def _evaluate(architecture: cost.Architecture, name: str, samples: list[Row]) -> Row:
    ranks = len(samples)

    def mean(kind: str) -> dict[str, float]:
        whats = sorted(set().union(*(each[kind]["bytes"] for each in samples)))
        return {what: statistics.fmean(s[kind]["bytes"].get(what, 0.0) for s in samples) for what in whats}

    def medians(kind: str) -> list[float]:
        return [statistics.median(each[kind]["seconds"]) for each in samples if each[kind]["seconds"]]

    predicted = cost.traffic(architecture, ranks, CONTENDERS[name][1])
    # What DistributedDataParallel sends is not counted by anybody.
    counted = cost.Traffic(predicted.wrapper, mean("plain"), mean("curvature"))
    plain, curvature = medians("plain"), medians("curvature")
    baseline = cost.traffic(architecture, ranks, "sgd").wrapper
    factors = cost.factor_bytes(architecture.layers, cost.plan_for(architecture.layers, ranks))
    return {
        **{"ranks": ranks, "optimizer": name, "plain_seconds": plain, "curvature_seconds": curvature or None},
        "amortised_seconds": amortised(max(plain), max(curvature, default=None), cost.INTERVAL),
        **{"traffic": asdict(counted), "predicted": asdict(predicted)},
        **{"amortised_bytes": counted.amortised(), "predicted_bytes": predicted.amortised()},
        "ratio_to_ddp": counted.amortised() / baseline if baseline else None,
        "factor_bytes": [each["factor_bytes"] for each in samples],
        "predicted_factor_bytes": factors if curvature else [0] * ranks,
        "samples": samples,
    }


# --- Tables of what was measured


def measured_tables(rows: Sequence[Row]) -> str:
    """Return the tables of time, bytes and curvature as Markdown."""

    def named(each: Row, cells: Row) -> Row:
        return {"ranks": each["ranks"], "optimizer": CONTENDERS[each["optimizer"]][0], **cells}

    def times(each: Row) -> Row:
        kinds = {kind: each[f"{kind}_seconds"] for kind in ("plain", "curvature")}
        shown: Row = {
            f"{kind} ms": f"{max(found) * 1e3:.1f}" if found else "–" for kind, found in kinds.items()
        }
        shown["amortised ms"] = f"{each['amortised_seconds'] * 1e3:.1f}"
        return shown | {"×SGD": f"{each['ratio_to_sgd']:.2f}"}

    def sent(each: Row) -> Row:
        known = each["traffic"]["plain"] | each["traffic"]["curvature"]
        counted, predicted = each["amortised_bytes"], each["predicted_bytes"]
        return {
            "DDP": _mb(each["traffic"]["wrapper"]),
            **{what: _mb(known.get(what, 0.0)) for what in SENT},
            **{"amortised": _mb(counted), "×DDP": f"{each['ratio_to_ddp']:.3f}"},
            **{"predicted": _mb(predicted), "counted/predicted": f"{counted / predicted:.5f}"},
        }

    def held(each: Row) -> Row:
        ours, predicted = each["factor_bytes"], each["predicted_factor_bytes"]
        per_rank = (", ".join(f"{count / 1e6:.1f}" for count in counts) for counts in (ours, predicted))
        cells: Row = dict(zip(("MB per rank", "predicted"), per_rank, strict=True))
        return cells | {"sum": _mb(sum(ours))}

    several = [each for each in rows if each["ranks"] > 1]
    second_order = [each for each in rows if each["curvature_seconds"]]
    tables = [
        section(
            "Time of a step",
            f"Medians of the slowest rank; amortised: one curvature step in {cost.INTERVAL}; ×SGD: amortised "
            "over SGD's on as many ranks.",
            [named(each, times(each)) for each in rows],
        ),
        section(
            "Bytes that a rank sends in a step",
            "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors "
            f"and control in curvature steps only. Amortised: one curvature step in {cost.INTERVAL}; ×DDP: "
            "over plain DistributedDataParallel; predicted: by the cost model, from the modules' sizes.",
            [named(each, sent(each)) for each in several],
        ),
        section(
            "Factors and inverses",
            "MB in the state of rank 0, 1, …; predicted: by the plan from the sizes of the modules.",
            [named(each, held(each)) for each in second_order],
        ),
    ]
    return "\n\n".join(filter(None, tables))


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}"
