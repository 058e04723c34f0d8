"""Time, peak memory and state of an optimizer's steps on one model and batch, side by side with others."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fop_bench.models import GPT, ResNet, ViT, airbench, mlp, placed, resnet18
from fop_bench.optimizers import PEERS, Joined, Peer, class_loss, gradients, make_peer
from fop_bench.records import read_lines
from fop_bench.tables import section

PLAIN_STEPS = 3  # timed plain steps in a row at every turn of an optimizer
COMPARED = ("sgd", "adamw", "kfac", "fop")
# So small that the model hardly moves: every step does the same work, and no loss or gradient vanishes.
LEARNING_RATE = 1e-4
# An interval that no measurement lives to see the end of.
NEVER = 10**9
INTERVALS = (10, 100)  # between curvature updates, beside 1, that tables give the mean step for

Batch = Callable[[int], tuple[Tensor, Tensor]]


def _images(*shape: int) -> Batch:
    return lambda count: (torch.randn(count, *shape), torch.randint(10, (count,)))


def _tokens(count: int) -> tuple[Tensor, Tensor]:
    inputs, targets = torch.randint(256, (2, count, 256))
    return inputs, targets


MODELS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "resnet18": (resnet18, _images(3, 32, 32)),
    "vit": (ViT, _images(3, 32, 32)),
    "mlp": (mlp, _images(784)),
    "mlp-3072": (partial(mlp, (3072, 512, 512, 10)), _images(3072)),
    "resnet18-16": (partial(ResNet, 16, (2, 2, 2, 2)), _images(3, 32, 32)),
    "vit-128": (partial(ViT, dim=128, heads=4), _images(3, 32, 32)),
    "gpt-256": (GPT, _tokens),
    "airbench": (lambda: airbench(torch.randn(5000, 3, 2, 2), (64, 256, 256)), _images(3, 32, 32)),
}
# What is measured by default, and the batch size.
TASKS = {"mlp-3072": 1024, "resnet18-16": 128, "vit-128": 128, "gpt-256": 64}

Row = dict[str, Any]
ROW_KEYS = ("workload", "optimizer", "label", "rounds", "environment")
read = partial(read_lines, keys=ROW_KEYS, command="overhead")  # a file's rows


@dataclass(frozen=True)
class Workload:
    """A model by name, the batch size of one rank, and whether the forward pass runs under bf16 autocast."""

    model: str
    batch_size: int
    bf16: bool

    @property
    def title(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {'bf16' if self.bf16 else 'float32'}"


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
        due = getattr(self.optimizer, "curvature_due", curvature)
        if curvature is not None and due != curvature:
            raise RuntimeError(f"the next step has curvature_due={due}, the measurement needs {curvature}")
        gradients(self.optimizer, self.model, self.inputs, self.targets, class_loss, self.bf16)
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Return the bytes of the tensors that the optimizer holds, weights and gradients left out."""
        of_model = [*self.model.parameters(), *self.model.buffers(), self.inputs, self.targets]
        of_model += [p.grad for p in self.model.parameters() if p.grad is not None]
        found = {each.untyped_storage().data_ptr(): 0 for each in of_model}
        seen, todo = set[int](), [self.optimizer]
        while todo:
            each: Any = todo.pop()
            if id(each) in seen or isinstance(each, (type, ModuleType)):
                continue
            seen.add(id(each))
            if isinstance(each, Tensor):
                found.setdefault(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes())
            elif isinstance(each, (list, tuple, set)):
                todo += each
            else:
                todo += (each if isinstance(each, Mapping) else getattr(each, "__dict__", {})).values()
        return sum(found.values())


# Two trainers with the same optimizer: one that never updates its curvature, and one that always does.
Pair = tuple[Trainer, Trainer | None]


def prepare(workload: Workload, optimizer: str, device: torch.device, **options: Any) -> Trainer:
    """Build model, optimizer and this rank's batch, alike for all optimizers, and take the first steps."""
    build, batch = MODELS[workload.model]
    torch.manual_seed(0)
    model, rank = placed(build(), device), 0
    if dist.is_initialized():
        model, rank = DistributedDataParallel(model), dist.get_rank()
    torch.manual_seed(1 + rank)
    inputs, targets = (each.to(device) for each in batch(workload.batch_size))
    if device.type == "cuda" and inputs.dim() == 4:  # as `placed` has the weights
        inputs = inputs.to(memory_format=torch.channels_last)
    if optimizer in ("kfac", "fop"):
        options["step_length"] = "weight"  # the default; in `PEERS` they have the paper's steps
    stepper = make_peer(optimizer, model, LEARNING_RATE, **options)
    trainer = Trainer(model, stepper, inputs, targets, workload.bf16)
    trainer.step()
    for group in stepper.param_groups:
        if group.get("curvature_interval") == NEVER:
            # As late in training: in FOP's first steps updates come more often than the interval says.
            group["step"] = 10 * NEVER
    trainer.step()
    return trainer


def prepare_pair(workload: Workload, optimizer: str, device: torch.device, **options: Any) -> Pair:
    """Prepare both trainers of an optimizer, the second only where there is curvature."""
    plain = prepare(workload, optimizer, device, interval=NEVER, **options)
    if PEERS[optimizer].interval is None:
        return plain, None
    return plain, prepare(workload, optimizer, device, interval=1, **options)


def amortised(plain: float, curvature: float | None, interval: int) -> float:
    """Return the mean time of a step with one curvature update in every interval."""
    return plain if curvature is None else (plain * (interval - 1) + curvature) / interval


# --- Time and bytes, the optimizers taking turns


def in_turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yield A B C D, then B C D A, …: drift hits all alike, and nobody always follows the same neighbour."""
    for number in range(rounds):
        turn = number % len(names)
        yield [*names[turn:], *names[:turn]]


@contextmanager
def _noted(name: str, failed: dict[str, str] | None) -> Iterator[None]:
    """Note an error under a name, or, without ``failed``, raise it."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = f"{type(error).__name__}: {error}"


def measure_in_turns(
    pairs: Mapping[str, Pair],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    failed: dict[str, str] | None = None,
) -> dict[str, Row]:
    """Return for every pair the seconds of its timed steps and the bytes sent in one, by kind of step.

    An error is raised, or, given ``failed``, noted there by name, and the others go on.
    """
    seen: dict[str, Row] = {
        name: {kind: {"seconds": [], "bytes": {}} for kind in ("plain", "curvature")} for name in pairs
    }
    for names in in_turns([*pairs], rounds):
        for name in names:
            if name not in (failed or {}):
                with _noted(name, failed):
                    _take_turn(*pairs[name], clock, **seen[name])
    return seen


def _take_turn(
    first: Trainer, second: Trainer | None, clock: Callable[[], float], plain: Row, curvature: Row
) -> None:
    """Time plain steps, after an untimed one that fills the caches, and a curvature step if there is one."""
    cuda = first.inputs.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(first.inputs.device)
    if dist.is_initialized():
        dist.barrier()
    # Events on the GPU's own stream, for which the host does not wait between steps, or the host's seconds.
    marks: list[Any] = []

    def step(trainer: Trainer, of: Row) -> None:
        before = getattr(trainer.optimizer, "bytes_sent", {})
        trainer.step(of is curvature)
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else clock())
        if cuda:
            marks[-1].record()
        after = getattr(trainer.optimizer, "bytes_sent", {})
        of["bytes"] |= {what: n - before.get(what, 0) for what, n in after.items() if n > before.get(what, 0)}

    for _ in range(1 + PLAIN_STEPS):
        step(first, plain)
    if second is not None:
        step(second, curvature)
    if cuda:
        marks[-1].synchronize()
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in pairwise(marks)]
    plain["seconds"] += seconds[:PLAIN_STEPS]
    curvature["seconds"] += seconds[PLAIN_STEPS:]


def measure_overhead(
    workload: Workload, names: Sequence[str], device: torch.device, rounds: int
) -> list[Row]:
    """Measure memory, one optimizer by one, then time, in turns with SGD and AdamW; return a row for each.

    A row of an optimizer that is not installed or that fails has an ``error`` instead of numbers. Raises
    ValueError if SGD or AdamW fails, with which the others are compared.
    """
    everybody = list(dict.fromkeys(("sgd", "adamw", *names)))
    memory = peak_memory(workload, device, everybody)
    pairs, failed = dict[str, Pair](), dict[str, str]()
    for name in everybody:
        with _noted(name, failed):
            pairs[name] = prepare_pair(workload, name, device)
    # Processor seconds: what else runs on the machine counts little.
    seen = measure_in_turns(pairs, rounds, time.process_time, failed)
    if broken := {"sgd", "adamw"} & {*failed}:
        raise ValueError(f"{workload.title}: the others cannot be compared with {failed[broken.pop()]}")
    sgd, adamw = _by_round(seen["sgd"]["plain"]["seconds"], rounds), memory["adamw"]["plain_bytes"]
    rows = list[Row]()
    for name in names:
        row: Row = {"workload": asdict(workload), "optimizer": name, "label": PEERS[name].label}
        rows.append(row)
        if name in failed:
            row["error"] = failed[name]
            continue
        samples = {kind: each["seconds"] for kind, each in seen[name].items()}
        plain, curvature = pairs[name]
        made = plain.optimizer
        kind_of = type(made.parts[0] if type(made) is Joined else made)
        row["class"] = f"{kind_of.__module__}.{kind_of.__qualname__}"
        for kind, seconds in samples.items():
            row[f"{kind}_seconds"] = statistics.median(seconds) if seconds else None
        row["ratios_to_sgd"] = {
            kind: (_by_round(seconds, rounds) / sgd).tolist() if seconds else []
            for kind, seconds in samples.items()
        }
        row["memory"] = memory[name]
        row["memory_to_adamw"] = [each / adamw for each in memory[name].values() if each and adamw]
        row |= {"state_bytes": (curvature or plain).state_bytes(), "samples": samples}
    return rows


def _by_round(seconds: Sequence[float], rounds: int) -> Tensor:
    """Return the median of every round's steps, all of one kind."""
    return torch.tensor(seconds, dtype=torch.float64).view(rounds, -1).median(dim=1).values


# --- Peak memory, with one model alive at a time

M_MMAP_THRESHOLD = -3  # glibc's name and number
MMAP_BYTES = 64 * 1024
UNKNOWN: Row = {"plain_bytes": None, "curvature_bytes": None}


def peak_memory(workload: Workload, device: torch.device, names: Sequence[str]) -> dict[str, Row]:
    """Measure the peak bytes of a step, of the allocator or of Linux's resident set; None where unknown."""
    # The resident set of this process would hold what earlier measurements left behind: take a fresh one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        threads = torch.get_num_threads()
        jobs = {
            name: fresh.submit(_measure_memory, workload, name, PEERS[name], device, threads)
            for name in names
        }
        return {name: UNKNOWN if job.exception() else job.result() for name, job in jobs.items()}


def _measure_memory(workload: Workload, name: str, peer: Peer, device: torch.device, threads: int) -> Row:
    PEERS[name] = peer  # which a script may have added
    torch.empty(0, device=device)  # so that the allocator of a GPU knows it
    if device.type == "cpu":
        torch.set_num_threads(threads)
        # Tensors get pages of their own, so that freed ones leave the resident set at once.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    # The first step also pays for libraries and their workspaces, which stay: that is not counted.
    _peak_of_step(workload, name, device, NEVER)
    plain = _peak_of_step(workload, name, device, NEVER)
    curvature = None if peer.interval is None else _peak_of_step(workload, name, device, 1)
    return {"plain_bytes": plain, "curvature_bytes": curvature}


def _peak_of_step(workload: Workload, name: str, device: torch.device, interval: int) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
    before = _peak(device, reset=True)
    trainer = prepare(workload, name, device, interval=interval)
    _peak(device, reset=True)
    trainer.step()
    return _peak(device) - before


def _peak(device: torch.device, reset: bool = False) -> int:
    """Return the most bytes in use since the last ``reset``, with it those in use now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


# --- Tables

NOTE = (
    "Processor seconds of one thread on a CPU, events on a GPU. ÷ SGD: of the same round in one process, the "
    "median over the rounds, lowest and highest in brackets. *Every step*: statistics and inversion in each "
    "(interval 1). *Every 10th*, *100th*: computed from the two medians. ÷ AdamW: peak memory of a plain "
    "step / one with statistics and inversion. State: all tensors that the optimizer holds."
)


def newest(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the newest row of every optimizer, by the title of the workload."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(Workload(**row["workload"]).title, {})[row["optimizer"]] = row
    return {title: [*of.values()] for title, of in found.items()}


def overhead_table(rows: Sequence[Row], note: str = NOTE) -> str:
    """Lay out the newest row of every workload and optimizer, and name what could not be measured."""
    tables = []
    for title, found in newest(rows).items():
        tables.append(section(title, note, [_cells(row) for row in found if "error" not in row]))
        tables += [f"Not measured: {row['label']}: {row['error']}" for row in found if "error" in row]
    return "\n\n".join(filter(None, tables)) + "\n"


def _cells(row: Row) -> Row:
    ratios = row["ratios_to_sgd"]
    plain, fresh = (statistics.median(each) if each else None for each in ratios.values())
    assert plain is not None
    every = [f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f})" if v else "–" for v in ratios.values()]
    return {
        **{"optimizer": row["label"], "plain ms": f"{row['plain_seconds'] * 1e3:.2f}"},
        **dict(zip(("plain ÷ SGD", "every step ÷ SGD"), every, strict=True)),
        **{f"every {n}th": f"{amortised(plain, fresh, n):.2f}" for n in INTERVALS},
        "peak ÷ AdamW": " / ".join(f"{each:.2f}" for each in row["memory_to_adamw"]) or "–",
        "state MiB": f"{row['state_bytes'] / 2**20:.2f}",
    }
