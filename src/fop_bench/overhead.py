"""One optimizer on one model and batch; time and peak memory of its steps, side by side with others."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fop_bench.models import ViT, mlp, resnet18
from fop_bench.optimizers import BUILDERS
from fop_bench.report import section

CLASSES = 10
PLAIN_STEPS = 3  # timed plain steps in a row at every turn of an optimizer
COMPARED = ("sgd", "adamw", "kfac", "fop")
# So small that the model hardly moves: every step does the same work, and no loss or gradient vanishes.
LEARNING_RATE = 1e-4
# An interval that no measurement lives to see the end of.
NEVER = 10**9

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 32, 32)),
    "vit": (ViT, (3, 32, 32)),
    "mlp": (mlp, (784,)),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A model by name, the batch size of one rank, and whether the forward pass runs under bf16 autocast."""

    model: str
    batch_size: int
    bf16: bool


@dataclass(frozen=True)
class Trainer:
    """A model of its own with its optimizer and a fixed random batch on the device."""

    model: nn.Module
    optimizer: Optimizer
    inputs: Tensor
    targets: Tensor
    bf16: bool

    def step(self, curvature: bool | None = None) -> None:
        """Take one training step; raises RuntimeError if it updates the curvature against expectation."""
        due = getattr(self.optimizer, "curvature_due", False)
        if curvature is not None and due != curvature:
            raise RuntimeError(f"the next step has curvature_due={due}, the measurement needs {curvature}")
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.inputs.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        """Take the first steps and go to the steady state: curvature updates by `request_curvature` alone."""
        self.step()
        for group in self.optimizer.param_groups:
            if "curvature_interval" in group:
                # As late in training: in the first steps updates come more often than the interval says.
                group |= {"curvature_interval": NEVER, "step": 10 * NEVER}
        self.request_curvature()
        for _ in range(3):
            self.step()

    def request_curvature(self) -> bool:
        """Make the next step update every layer's curvature; False for an optimizer that has none."""
        if hasattr(self.optimizer, "request_curvature"):
            self.optimizer.request_curvature()
        return hasattr(self.optimizer, "request_curvature")


def prepare(workload: Workload, optimizer: str, device: torch.device, **options: Any) -> Trainer:
    """Build the model, its optimizer and this rank's batch; the weights are equal for all optimizers."""
    build, shape = MODELS[workload.model]
    torch.manual_seed(0)
    model, rank = build().to(device), 0
    if dist.is_initialized():
        model, rank = DistributedDataParallel(model), dist.get_rank()
    torch.manual_seed(1 + rank)
    inputs = torch.randn(workload.batch_size, *shape, device=device)
    targets = torch.randint(CLASSES, (workload.batch_size,), device=device)
    stepper = BUILDERS[optimizer][1](model, lr=LEARNING_RATE, **options)
    return Trainer(model, stepper, inputs, targets, workload.bf16)


def amortised(plain: float, curvature: float | None, interval: int | None) -> float:
    """Return the mean time of a step with one curvature update in every interval."""
    if curvature is None or interval is None:
        return plain
    return (plain * (interval - 1) + curvature) / interval


# --- Time and bytes, the optimizers taking turns


def in_turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yield A B C D, then B C D A, …: drift hits all alike, and nobody always follows the same neighbour."""
    for number in range(rounds):
        turn = number % len(names)
        yield [*names[turn:], *names[:turn]]


def measure_in_turns(trainers: Mapping[str, Trainer], rounds: int) -> dict[str, Row]:
    """Return for every trainer the seconds of its timed steps and the bytes sent in one, by kind of step."""
    for trainer in trainers.values():
        trainer.warm_up()
    seen: dict[str, Row] = {
        name: {kind: {"seconds": [], "bytes": {}} for kind in ("plain", "curvature")} for name in trainers
    }
    for names in in_turns([*trainers], rounds):
        for name in names:
            _take_turn(trainers[name], **seen[name])
    return seen


def _take_turn(trainer: Trainer, plain: Row, curvature: Row) -> None:
    """Time plain steps, after an untimed one that fills the caches, and a curvature step if there is one."""
    cuda = trainer.inputs.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(trainer.inputs.device)
    if dist.is_initialized():
        dist.barrier()
    # Events on the GPU's own stream, for which the host does not wait between steps, or the host's seconds.
    marks: list[Any] = []

    def step(of: Row) -> None:
        before = getattr(trainer.optimizer, "bytes_sent", {})
        trainer.step(of is curvature)
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
        after = getattr(trainer.optimizer, "bytes_sent", {})
        of["bytes"] |= {what: n - before.get(what, 0) for what, n in after.items() if n > before.get(what, 0)}

    for _ in range(1 + PLAIN_STEPS):
        step(plain)
    if trainer.request_curvature():
        step(curvature)
    if cuda:
        marks[-1].synchronize()
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(marks)]
    plain["seconds"] += seconds[:PLAIN_STEPS]
    curvature["seconds"] += seconds[PLAIN_STEPS:]


def measure_overhead(workload: Workload, device: torch.device, rounds: int) -> list[Row]:
    """Measure memory, one optimizer by one, then time, in turns; a row each with medians over `samples`."""
    memory = peak_memory(workload, device)
    trainers = {name: prepare(workload, name, device) for name in COMPARED}
    # Before the measurement sets it to `NEVER`.
    groups = {name: trainer.optimizer.param_groups[0] for name, trainer in trainers.items()}
    intervals = {name: group.get("curvature_interval") for name, group in groups.items()}
    rows: list[Row] = []
    for name, seen in measure_in_turns(trainers, rounds).items():
        samples = {kind: each["seconds"] for kind, each in seen.items()}
        row: Row = {"workload": asdict(workload), "optimizer": name, "interval": intervals[name]}
        row |= {
            f"{kind}_seconds": statistics.median(each) if each else None for kind, each in samples.items()
        }
        times = row["plain_seconds"], row["curvature_seconds"]
        row |= {"amortised_seconds": amortised(*times, intervals[name]), "memory": memory[name]}
        rows.append(row | {"samples": samples})
    for row in rows:
        row["ratio_to_sgd"] = row["amortised_seconds"] / rows[0]["plain_seconds"]
        row["plain_ratio_to_sgd"] = row["plain_seconds"] / rows[0]["plain_seconds"]
    return rows


# --- Peak memory, with one model alive at a time

M_MMAP_THRESHOLD = -3  # glibc's name and number
MMAP_BYTES = 64 * 1024


def peak_memory(workload: Workload, device: torch.device) -> dict[str, Row]:
    """Measure the peak bytes of a step, of the allocator or of Linux's resident set; None where unknown."""
    if device.type == "cuda":
        return _measure_memory(workload, device)
    # The resident set of this process would hold what earlier measurements left behind: take a fresh one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure_memory, workload, device, torch.get_num_threads()).result()


def _measure_memory(workload: Workload, device: torch.device, threads: int = 1) -> dict[str, Row]:
    if device.type == "cpu":
        torch.set_num_threads(threads)
        try:
            _reset_peak(device)
        except OSError:
            return {name: {"plain_bytes": None, "curvature_bytes": None} for name in COMPARED}
        # Tensors get pages of their own, so that freed ones leave the resident set at once.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    # Whoever comes first also pays for libraries and their workspaces, which stay: that is not counted.
    return {name: _peaks(workload, name, device) for name in ("fop", *COMPARED)}


def _peaks(workload: Workload, name: str, device: torch.device) -> Row:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
    before = _reset_peak(device)
    trainer = prepare(workload, name, device)
    trainer.warm_up()
    _reset_peak(device)
    trainer.step(curvature=False)
    trainer.step(curvature=False)
    peaks = {"plain_bytes": _peak(device) - before, "curvature_bytes": None}
    _reset_peak(device)
    if trainer.request_curvature():
        trainer.step(curvature=True)
        peaks["curvature_bytes"] = _peak(device) - before
    return peaks


def _reset_peak(device: torch.device) -> int:
    """Forget the peak so far and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


# By heading: key, and by what a value is multiplied.
COLUMNS = {
    **{f"{kind} ms": (f"{kind}_seconds", 1e3) for kind in ("plain", "curvature", "amortised")},
    **{f"{kind} MiB": (f"{kind}_bytes", 2**-20) for kind in ("plain", "curvature")},
}


def overhead_table(rows: Sequence[Row]) -> str:
    """Lay out time and peak memory per step, one row per workload and optimizer."""

    def cells(each: Row) -> Row:
        workload, known = each["workload"], each | each["memory"]
        values = {head: (known[key], scale) for head, (key, scale) in COLUMNS.items()}
        return {
            **{"model": workload["model"], "batch": workload["batch_size"]},
            "precision": "bf16" if workload["bf16"] else "float32",
            **{"optimizer": BUILDERS[each["optimizer"]][0], "interval": each["interval"] or "–"},
            **{head: "–" if v is None else f"{v * scale:.2f}" for head, (v, scale) in values.items()},
            "×SGD": f"{each['ratio_to_sgd']:.3f}",
        }

    note = "amortised: one curvature step per interval, the others plain; ×SGD: amortised over SGD's."
    return section("Median time and peak memory of a step", note, [cells(row) for row in rows])
