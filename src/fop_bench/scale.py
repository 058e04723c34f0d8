"""What several ranks pay for a step, measured on this machine."""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fop.curvature import entry_names
from fop_bench.overhead import Row, Workload, amortised, measure_in_turns, prepare_pair
from fop_bench.tables import section

# An optimizer among several ranks: its label, and how FOP shares its work.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "kfac": ("K-FAC", {}),
    "fop": ("FOP", {}),
    "fop-compatible": ("FOP compatible", {"distributed": {"mode": "compatible"}}),
    "fop-lean": ("FOP lean", {"distributed": {"mode": "lean"}}),
}
SENT = ("gradients", "updates", "curvature factors", "control")
INTERVAL = 100  # steps for one curvature update, in means


def measure_scale(workload: Workload, ranks: int, rounds: int) -> list[Row]:
    """Measure all optimizers on new processes of this machine; a row each, with medians and mean bytes."""
    names = ["sgd", "kfac", *(["fop"] if ranks == 1 else ["fop-compatible", "fop-lean"])]
    by_rank = run_ranks(_measure_rank, ranks, workload, names, rounds)
    rows = [_evaluate(name, [samples[name] for samples in by_rank]) for name in names]
    sgd = rows[0]
    for row in rows:
        row["ratio_to_sgd"] = row["amortised_seconds"] / sgd["amortised_seconds"]
        row["ratio_to_ddp"] = row["amortised_bytes"] / sgd["amortised_bytes"] if ranks > 1 else None
    return rows


def _measure_rank(workload: Workload, names: Sequence[str], rounds: int) -> dict[str, Row]:
    """Return for every optimizer what its steps took, by kind of step, and the bytes of its curvature."""
    cpu = torch.device("cpu")
    pairs = {name: prepare_pair(workload, name.split("-")[0], cpu, **CONTENDERS[name][1]) for name in names}
    found = measure_in_turns(pairs, rounds)
    for name, (trainer, _) in pairs.items():
        states = trainer.optimizer.state.values()
        held = (state[key].nbytes for state in states for key in entry_names() if key in state)
        found[name] |= {
            "factor_bytes": sum(held),
            # In lean mode DistributedDataParallel does not average the gradients of layers: no p.grad.
            "gradient_bytes": sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None),
            "buffer_bytes": sum(buffer.nbytes for buffer in trainer.model.buffers()),
            # No public name tells them.
            "layers": [asdict(b.curvature.size(b.name)) for b in getattr(trainer.optimizer, "_bindings", ())],
        }
    return found


def _evaluate(name: str, samples: list[Row]) -> Row:
    def mean(kind: str) -> dict[str, float]:
        whats = sorted(set().union(*(each[kind]["bytes"] for each in samples)))
        return {what: statistics.fmean(s[kind]["bytes"].get(what, 0.0) for s in samples) for what in whats}

    def medians(kind: str) -> list[float]:
        return [statistics.median(each[kind]["seconds"]) for each in samples if each[kind]["seconds"]]

    plain, curvature = medians("plain"), medians("curvature")
    sent = {kind: mean(kind) for kind in ("plain", "curvature")}
    # What DistributedDataParallel sends in a step, which nobody counts.
    ddp = (2 * samples[0]["gradient_bytes"] + samples[0]["buffer_bytes"]) * (1 - 1 / len(samples))
    of_plain, of_curvature = (sum(of_kind.values()) for of_kind in sent.values())
    return {
        **{"ranks": len(samples), "optimizer": name},
        **{"plain_seconds": plain, "curvature_seconds": curvature or None},
        "amortised_seconds": amortised(max(plain), max(curvature, default=None), INTERVAL),
        **{"traffic": {"wrapper": ddp, **sent}, "factor_bytes": [each["factor_bytes"] for each in samples]},
        "amortised_bytes": ddp + amortised(of_plain, of_curvature, INTERVAL),
        "samples": samples,
    }


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call a function in ``ranks`` new processes of one thread, joined by gloo; return its results by rank.

    Raises ProcessException with the traceback if a process failed; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, Path(folder), function, arguments), ranks)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        if sys.platform.startswith("linux"):
            # Otherwise gloo looks up the name of the host, which need not have an address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    (folder / f"result{rank}").write_bytes(pickle.dumps(function(*arguments)))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


# --- Tables


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
        return {
            "DDP": _mb(each["traffic"]["wrapper"]),
            **{what: _mb(known.get(what, 0.0)) for what in SENT},
            **{"amortised": _mb(each["amortised_bytes"]), "×DDP": f"{each['ratio_to_ddp']:.3f}"},
        }

    def held(each: Row) -> Row:
        per_rank = ", ".join(f"{count / 1e6:.1f}" for count in each["factor_bytes"])
        return {"MB per rank": per_rank, "sum": _mb(sum(each["factor_bytes"]))}

    tables = [
        section(
            "Time of a step",
            f"Medians of the slowest rank; amortised: one curvature step in {INTERVAL}; ×SGD: amortised "
            "over SGD's on as many ranks.",
            [named(each, times(each)) for each in rows],
        ),
        section(
            "Bytes that a rank sends in a step",
            "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors "
            f"and control in curvature steps only. Amortised: one curvature step in {INTERVAL}; ×DDP: "
            "over plain DistributedDataParallel.",
            [named(each, sent(each)) for each in rows if each["ranks"] > 1],
        ),
        section(
            "Factors and inverses",
            "MB in the state of rank 0, 1, …",
            [named(each, held(each)) for each in rows if each["curvature_seconds"]],
        ),
    ]
    return "\n\n".join(filter(None, tables))


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}"
