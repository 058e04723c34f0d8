"""What several ranks pay for a step: measured on this machine, or predicted from what one rank takes."""

from __future__ import annotations

import math
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fop.curvature import LayerSize, entry_names, packed_shape
from fop.distributed import SKETCH, make_plan
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
KINDS = ("plain", "curvature")  # of steps
INTERVAL = 100  # steps for one curvature update, in means
PREDICTED = tuple(2**n for n in range(11))  # ranks, by default
BYTES = 4  # of an element: gradients, updates and factors travel and stay in float32
SCALARS = 13  # numbers that go with the update of a layer


def contenders(ranks: int) -> list[str]:
    """Return who is measured on so many ranks: one has no modes."""
    return ["sgd", "kfac", *(["fop"] if ranks == 1 else ["fop-compatible", "fop-lean"])]


def measure_scale(workload: Workload, ranks: int, rounds: int) -> list[Row]:
    """Measure all optimizers on new processes of this machine; a row each, with medians and mean bytes."""
    names = contenders(ranks)
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
    """Return the row of an optimizer from what every rank measured."""
    plain, curvature = ([median(s[kind]["seconds"]) for s in samples if s[kind]["seconds"]] for kind in KINDS)
    sent: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for kind, mean in sent.items():
        for what in sorted({what for each in samples for what in each[kind]["bytes"]}):
            mean[what] = fmean(each[kind]["bytes"].get(what, 0.0) for each in samples)
    # What DistributedDataParallel sends in a step, which nobody counts.
    ddp = (2 * samples[0]["gradient_bytes"] + samples[0]["buffer_bytes"]) * (1 - 1 / len(samples))
    of_plain, of_curvature = (sum(mean.values()) for mean in sent.values())
    return {
        **{"ranks": len(samples), "optimizer": name},
        **{"plain_seconds": plain, "curvature_seconds": curvature or None},
        "amortised_seconds": amortised(max(plain), max(curvature, default=None), INTERVAL),
        **{"traffic": {"wrapper": ddp, **sent}, "factor_bytes": [each["factor_bytes"] for each in samples]},
        **{"amortised_bytes": ddp + amortised(of_plain, of_curvature, INTERVAL), "samples": samples},
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


# --- Predicted


def predict(one: Sequence[Row], ranks: Sequence[int], bandwidth: float) -> list[Row]:
    """Predict every optimizer on every number of ranks, which send ``bandwidth`` bytes a second.

    ``one`` are the rows that `measure_scale` gives of one rank.
    """
    measured = {row["optimizer"]: row for row in one}
    return [
        _predict(measured["sgd"], measured[name.split("-")[0]], count, bandwidth, name)
        for count in ranks
        for name in contenders(count)
    ]


def _predict(sgd: Row, row: Row, ranks: int, bandwidth: float, name: str) -> Row:
    sample = row["samples"][0]
    layers = [LayerSize(**each) for each in sample["layers"]]
    plan = make_plan(layers, ranks, curvature_interval=1)
    owners = set(plan.owners)

    def fullest(what: str) -> int:
        sums = (sum(getattr(layers[n], what) for n in plan.layers_of(rank)) for rank in owners)
        return max(sums, default=0)

    def share(what: str) -> float:
        return fullest(what) / (sum(getattr(layer, what) for layer in layers) or 1)

    sent = traffic(layers, sample["gradient_bytes"], sample["buffer_bytes"], ranks, name)
    of_sgd, plain = sgd["plain_seconds"][0], row["plain_seconds"][0]
    least = of_sgd + (plain - of_sgd) * share("product_flops")
    seconds = {"plain": (least, plain)}
    if row["curvature_seconds"]:
        update = row["curvature_seconds"][0] - plain
        seconds["curvature"] = (least + update * share("inversion_flops"), plain + update)
    total = {kind: sent["wrapper"] + sum(sent[kind].values()) for kind in seconds}
    return {
        **{"ranks": ranks, "optimizer": name, "owners": len(owners), "traffic": sent, "bytes": total},
        "factor_bytes": 2 * BYTES * fullest("factor_elements"),
        "seconds": {
            kind: [each + total[kind] / bandwidth for each in bounds] for kind, bounds in seconds.items()
        },
    }


def traffic(layers: Sequence[LayerSize], gradients: int, buffers: int, ranks: int, name: str) -> Row:
    """Predict the bytes that a rank sends in a step, as `measure_scale` has them: docs/scaling.md.

    ``gradients`` and ``buffers`` are the bytes of all parameters' gradients and of the model's buffers.
    """
    others, count = (ranks - 1) / ranks, len(layers)
    update = BYTES * sum(layer.gradient_elements for layer in layers)
    averaged = gradients - update if name == "fop-lean" else gradients
    sent: Row = {"wrapper": (2 * averaged + buffers) * others, "plain": {}, "curvature": {}}
    if not layers or ranks == 1:
        return sent
    plain = {"updates": (update + BYTES * SCALARS * count) * others}
    if name == "fop-compatible":
        # This rank's part of Gd, a sketch of its gradient, and whether it has a pair.
        plain["gradients"] = (update + BYTES * (SKETCH + 1) * count) * others
    elif name == "fop-lean":
        # The gradient, among the ranks of a side and between owners side by side, and how many ranks use the
        # layer; for an odd number of ranks its part of Gd, too, and whether it has a pair.
        twice = 1 + ranks % 2
        plain["gradients"] = twice * (update + BYTES * count) * others
    factors = {"curvature factors": BYTES * sum(map(_sent_elements, layers)) * others}
    # Numbers of samples and rows in float64, and what became of each layer.
    control = 8 * sum(1 + layer.groups for layer in layers) + 4 * count
    return sent | {"plain": plain, "curvature": plain | factors | {"control": 2 * control * others}}


def _sent_elements(layer: LayerSize) -> int:
    """Return the elements of A and G as sent: a triangle as a rectangle, for odd sides half a row longer."""
    if layer.single:
        return layer.gradient_elements
    elements = 0
    for side, blocks, diagonal in (
        (layer.in_dim, layer.blocks_A, layer.diagonal_A),
        (layer.out_dim, layer.blocks_G, layer.diagonal_G),
    ):
        block = -(-side // blocks)
        shape = (layer.groups, side) if diagonal else (layer.groups * blocks, block, block)
        elements += math.prod(packed_shape(shape))
    return elements


# --- Tables

NOTE = (
    "A prediction: **nobody has checked it against a cluster**. It is made of what one rank was measured to "
    "take, and of the sizes of the layers. MB: what a rank sends in a step, on average over the ranks, "
    "DistributedDataParallel's own included. Factors: factors and inverses of the fullest rank; owners: "
    "ranks that have any. Milliseconds, from least to most: what a step takes beyond SGD's is divided "
    "among the owners, as their products and inversions are, or not at all; and a rank sends {:g} GB a "
    "second, hidden behind nothing and without latency. *Curvature*: a step with a curvature update."
)


def measured_tables(rows: Sequence[Row]) -> str:
    """Return the tables of time, with the memory of curvature, and of bytes as Markdown."""
    times, sent = list[Row](), list[Row]()
    for row in rows:
        who: Row = {"ranks": row["ranks"], "optimizer": CONTENDERS[row["optimizer"]][0]}
        slowest = {f"{kind} ms": row[f"{kind}_seconds"] for kind in KINDS}
        slowest["amortised ms"] = [row["amortised_seconds"]]
        shown = {kind: f"{max(each) * 1e3:.1f}" if each else "–" for kind, each in slowest.items()}
        held = ", ".join(f"{count / 1e6:.1f}" for count in row["factor_bytes"])
        times.append(who | shown | {"×SGD": f"{row['ratio_to_sgd']:.2f}", "factors MB": held})
        if row["ranks"] > 1:
            counted = row["traffic"]["plain"] | row["traffic"]["curvature"]
            parts = {"DDP": row["traffic"]["wrapper"], **{what: counted.get(what, 0.0) for what in SENT}}
            parts["amortised"] = row["amortised_bytes"]
            megabytes = {what: f"{count / 1e6:.3f}" for what, count in parts.items()}
            sent.append(who | megabytes | {"×DDP": f"{row['ratio_to_ddp']:.3f}"})
    tables = [
        section(
            "Time of a step",
            f"Medians of the slowest rank; amortised: one curvature step in {INTERVAL}; ×SGD: amortised "
            "over SGD's on as many ranks; factors: with inverses, in the state of rank 0, 1, …",
            times,
        ),
        section(
            "Bytes that a rank sends in a step",
            "MB, mean over the ranks: DDP's own computed, those of the optimizer as it counts them; factors "
            f"and control in curvature steps only. Amortised: one curvature step in {INTERVAL}; ×DDP: "
            "over plain DistributedDataParallel.",
            sent,
        ),
    ]
    return "\n\n".join(filter(None, tables)) + "\n"


def predicted_table(rows: Sequence[Row], bandwidth: float) -> str:
    """Return the table of what was predicted as Markdown."""
    cells = []
    for row in rows:
        shown: Row = {"ranks": row["ranks"], "optimizer": CONTENDERS[row["optimizer"]][0]}
        shown |= {"owners": row["owners"] or "–", "factors MB": f"{row['factor_bytes'] / 1e6:.1f}"}
        for kind in KINDS:
            shown |= {f"{kind} MB": "–", f"{kind} ms": "–"}
            if kind in row["seconds"]:
                bounds = [f"{each * 1e3:.1f}" for each in row["seconds"][kind]]
                shown[f"{kind} MB"] = f"{row['bytes'][kind] / 1e6:.1f}"
                shown[f"{kind} ms"] = "–".join(dict.fromkeys(bounds))
        cells.append(shown)
    return section("Predicted", NOTE.format(bandwidth / 1e9), cells) + "\n"
