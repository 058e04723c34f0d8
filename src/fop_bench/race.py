"""Trainings of a minute or so that tell optimizers apart, and a line search for each of them.

Everybody gets the same batches, schedule, norms of convolutions, rate for what is no weight, and line search.
"""

from __future__ import annotations

import ast
import json
import math
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fop import FOP
from fop_bench.environment import device_name, source_tree
from fop_bench.models import placed
from fop_bench.optimizers import Joined, make_peer
from fop_bench.race_tasks import TASKS, WithMirrorImage
from fop_bench.records import Record, read_lines
from fop_bench.runner import Begun, Run
from fop_bench.tables import plus_minus, section
from fop_bench.training import Training

Found = dict[float, float | None]  # values by rate, None where a run diverged

# What two lines must differ in to be runs of two optimizers, beside their seeds and rates.
SIDE = (
    *("task", "optimizer", "options", "batch_size", "steps", "rest", "keep_norm", "bf16"),
    *("source", "machine", "held_out", "test_flip"),
)
# What lines of earlier versions lack: whether training samples that were held out choose the rate; by what
# this run was judged, "test" or "held-out", and whether with mirror images; and of each evaluation step,
# value, and seconds, of a processor, or on a GPU of the clock; of FOP also the noise share of then, the mean
# over the layers.
OLD: Record = {"held_out": False, "test_flip": False, "split": "test", "curve": [], "noise": []}
RESULT = ("rate", "seed", "measure", "value", "last_loss", "diverged", "processor_seconds")
KEYS = (*(key for key in SIDE if key not in OLD), "variant", *RESULT, "environment")
CPU = torch.device("cpu")
MOST_RATES = 12  # of one line search
EVALUATIONS = 12  # of one run, at most
JUDGED_ON_THE_WAY = 2000  # samples, about; at the end all


def read(path: Path) -> list[Record]:
    """Read a file's lines, those of earlier versions, too."""
    rows = [OLD | row for row in read_lines(path, KEYS, "race")]
    for key, known in (("task", [*TASKS]), ("optimizer", [*STARTS])):
        if others := [row[key] for row in rows if row[key] not in known]:
            raise ValueError(
                f"{path} has a line of {key} {others[0]!r}; known are {', '.join(known)}; delete that line, "
                "or check out the commit that wrote it"
            )
    return rows


# --- Optimizers

# By name, where the line search begins; None for the default options alone, the rate among them.
STARTS: dict[str, float | None] = {
    **{"sgd": 0.1, "adamw": 0.004, "muon": 0.04, "soap": 0.01, "kfac": 0.2, "fop": 0.2},
    **{"kfac-default": None, "fop-default": None},
}
_NO_DECAY = {"weight_decay": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    **{"adamw": _NO_DECAY, "muon": _NO_DECAY, "soap": _NO_DECAY | {"precondition_frequency": 1}},
    **{name: {"step_length": "weight"} for name in ("kfac", "fop", "kfac-default", "fop-default")},
}


def make_racer(
    name: str, model: nn.Module, rate: float | None, rest: float, options: Mapping[str, Any]
) -> Optimizer:
    """Build an optimizer: ``rate`` is of weights, ``rest`` of what AdamW takes; None for its defaults."""
    if rate is None:
        return make_peer(name.removesuffix("-default"), model, **{"lr": None, **options})
    if name in ("muon", "kfac", "fop"):  # split by themselves
        return make_peer(name, model, rate, **{"adamw_lr": rest, **options})
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights, others = list[nn.Parameter](), list[nn.Parameter]()
    for key, p in model.named_parameters():
        # LSTM's are weight_ih_l0 and so on.
        matrix = p.ndim >= 2 and key.rpartition(".")[2].startswith("weight") and p not in embeddings
        if p.requires_grad:
            (weights if matrix else others).append(p)
    adamw = [AdamW(others, lr=rest, betas=(0.9, 0.99), weight_decay=0.0)] if others else []
    return Joined(make_peer(name, nn.ParameterList(weights), rate, **options), *adamw)


def parsed_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return options by optimizer from texts such as ``fop.damping=0.1``; raises ValueError for others."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.+)", text)
        if match is None or STARTS.get(match[1]) is None:
            known = ", ".join(name for name, start in STARTS.items() if start is not None)
            raise ValueError(f"--set {text!r} is not NAME.OPTION=VALUE with NAME one of {known}")
        try:
            value = ast.literal_eval(match[3])
        except (ValueError, SyntaxError):
            value = match[3]  # a word
        found.setdefault(match[1], {})[match[2]] = value
    return found


# --- Runs


def schedule(step: int, steps: int) -> float:
    """Return the share of the rate: a linear warm-up over 15 % of the steps, and linearly down."""
    warm = max(1, int(0.15 * steps))
    return min((step + 1) / warm, max(0.02, (steps - step) / max(1, steps - warm)))


def side_of(
    name: str,
    task: str,
    options: Mapping[str, Any],
    *,
    keep_norm: bool,
    bf16: bool,
    held_out: bool = False,
    test_flip: bool = False,
    steps: int | None = None,
    device: torch.device = CPU,
) -> Record:
    """Return what the runs of an optimizer on a task have in common; ``steps`` if not the task's.

    Training samples are ``held_out``, and images judged with their mirror images (``test_flip``), where the
    task can do it.
    """
    todo = TASKS[task]
    given = {**OPTIONS.get(name, {}), **todo.options.get(name, {}), **options}
    variant = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
    return {
        **{"task": task, "optimizer": name, "variant": variant, "options": given, "measure": todo.measure},
        **{"batch_size": todo.batch_size, "steps": steps or todo.steps, "rest": todo.rest},
        **{"keep_norm": keep_norm, "bf16": bf16, "held_out": held_out and todo.held_out},
        "test_flip": test_flip and todo.mirrored,
        "source": source_tree(),
        # Python's version because its sources are a task's data.
        "machine": f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}",
    }


@dataclass(frozen=True)
class RaceRun(Run):
    """A run of an optimizer on a task, at a rate (None for its own) and from a seed.

    It is judged by the test samples, or by samples of the training that are held out.
    """

    of_one_commit = False  # its side names the source of the library
    side: Record  # what `side_of` returns
    rate: float | None
    seed: int
    split: str = "test"

    @property
    def title(self) -> str:
        what = "{task} · {variant} · {steps} steps".format(**self.side)
        return f"{what} · rate {self.rate} · seed {self.seed} · {self.split}"

    def begin(self, data: str | None, device: torch.device) -> Begun:
        side, task = self.side, TASKS[self.side["task"]]
        problem = task.load(data, device)
        if self.split != "test":
            assert problem.held_out is not None
            problem = problem.held_out
        torch.manual_seed(self.seed)
        model, shuffle = placed(problem.build(), device), Generator().manual_seed(self.seed)
        on_cpu = device.type == "cpu"
        draw = shuffle if on_cpu else Generator(device).manual_seed(self.seed)
        kept = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] if side["keep_norm"] else []
        norms = [weight.detach().norm() for weight in kept]

        @torch.no_grad()
        def keep_norms() -> None:
            for weight, norm in zip(kept, norms, strict=True):
                weight.mul_(norm / weight.norm())

        def evaluate() -> float:
            at_end = training.progress.steps == training.steps
            finite = all(p.isfinite().all() for p in model.parameters())
            now = training.progress
            now.layers = now.layers or {"noise": []}
            now.layers["noise"] += noise_shares(optimizer)
            judged = WithMirrorImage(model) if side["test_flip"] else model
            return problem.value(judged, None if at_end else JUDGED_ON_THE_WAY) if finite else math.nan

        try:
            optimizer = make_racer(side["optimizer"], model, self.rate, task.rest, side["options"])
        except TypeError as error:  # of an option that it does not have, or of a value
            raise ValueError(f"{side['variant']}: {error}; give another --set") from error
        training = Training(
            model,
            optimizer,
            lambda optimizer, steps: LambdaLR(optimizer, lambda step: schedule(step, steps)),
            lambda numbers: problem.batch(numbers, draw),
            evaluate,
            samples=problem.samples,
            batch_size=min(task.batch_size, problem.samples),
            steps=side["steps"],
            shuffle=shuffle,
            order=problem.order,
            loss=problem.loss,
            every=math.ceil(side["steps"] / EVALUATIONS),
            after_step=keep_norms,
            bf16=side["bf16"],
            draw=None if on_cpu else draw,
        )
        clock = "processor_seconds" if on_cpu else "seconds"

        def record(warned: list[str]) -> Record:
            now = training.progress
            ends: Record = dict.fromkeys(("value", "last_loss", "processor_seconds", "seconds"))
            curve = [[at["step"], at["accuracy"], at[clock]] for at in now.curve]
            if not now.diverged:
                assert now.last_loss is not None
                ends = {"value": now.curve[-1]["accuracy"], "last_loss": now.last_loss.item()}
                ends |= {"processor_seconds": now.processor_seconds, "seconds": now.seconds}
            result = {"rate": self.rate, "seed": self.seed, "diverged": now.diverged, **ends}
            noise = (now.layers or OLD)["noise"]
            return {**side, "split": self.split, **result, "curve": curve, "noise": noise}

        return training, record


def noise_shares(optimizer: Optimizer) -> list[float]:
    """Return the noise share of now, the mean over the layers, in a list; nothing where it is not known."""
    if not isinstance(optimizer, FOP):
        return []
    shares = [each.noise for each in optimizer.diagnostics().layers.values() if each.noise is not None]
    return [statistics.fmean(shares)] if shares else []


def next_rate(found: Found, start: float, highest: bool) -> float | None:
    """Return the next rate to try, twice or half the best of those found; None once both are known.

    There is no next one after `MOST_RATES` either.
    """
    if not found:
        return start
    best = best_rate(found, start, highest)
    left = [rate for rate in (2 * best, best / 2) if rate not in found]
    return left[0] if left and len(found) < MOST_RATES else None


def best_rate(found: Found, start: float, highest: bool) -> float:
    """Return the rate with the best value, of equals that nearest to the start; if none ended, the lowest."""

    def rank(rate: float) -> tuple[float, float]:
        value = found[rate]
        if value is None:
            return math.inf, rate
        return -value if highest else value, abs(math.log(rate / start))

    return min(found, key=rank)


def identity(row: Record) -> str:
    """Return the same text for two runs of one optimizer on one task that differ in rate and seed only."""
    return json.dumps([row[key] for key in SIDE], sort_keys=True)


def planned(
    sides: Sequence[Record], seeds: int, fixed: float | None, done: Sequence[Record]
) -> tuple[list[RaceRun], int]:
    """Return the next run of every side that is not finished, and the number of these sides."""
    runs = [run for side in sides if (run := next_run(side, done, seeds, fixed)) is not None]
    return runs, len(runs)


def next_run(side: Record, rows: Sequence[Record], seeds: int, fixed: float | None) -> RaceRun | None:
    """Return what to run next: the line search by seed 0, or one rate; then other seeds at the best."""
    own = [row for row in rows if identity(row) == identity(side)]
    start, rate, highest = STARTS[side["optimizer"]], fixed, TASKS[side["task"]].highest
    if start is None:
        rate = None
    elif fixed is None:
        found = searched(own)
        if (new := next_rate(found, start, highest)) is not None:
            return RaceRun(side, new, 0, "held-out" if side["held_out"] else "test")
        rate = best_rate(found, start, highest)
    done = {row["seed"] for row in own if row["rate"] == rate and row["split"] == "test"}
    return next((RaceRun(side, rate, seed) for seed in range(seeds) if seed not in done), None)


def searched(side: Sequence[Record]) -> Found:
    """Return the values by which a search among the runs of an optimizer on a task decides: of seed 0."""
    return {
        row["rate"]: row["value"]
        for row in side
        if row["seed"] == 0 and (row["split"] == "held-out") == row["held_out"]
    }


# --- Tables

NOTE = (
    "Each optimizer at its best rate for seed 0, by the same value; mean ± standard deviation over n seeds. "
    "*Tried*: the rates of seed 0, and whether the best is inside of them; *held out*: training samples that "
    "were held out chose it; – without a search. Seconds, without evaluations: of a processor, one thread; "
    "on a GPU of the clock, with other runs beside it. *To …*: steps and seconds until an evaluation "
    f"was that good, of which a run has at most {EVALUATIONS}; on the way about "
    f"{JUDGED_ON_THE_WAY:,} samples judge. Source: the tree of src/fop."
)


def sides_of(rows: Sequence[Record]) -> list[list[Record]]:
    """Return the runs of every optimizer on every task, in the order of the first of each."""
    sides: dict[str, list[Record]] = {}
    for row in rows:
        sides.setdefault(identity(row), []).append(row)
    return [*sides.values()]


def newest(rows: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return the newest runs by task and variant, of as many steps as the task has."""
    return {
        (side[0]["task"], side[0]["variant"]): side
        for side in sides_of(rows)
        if side[0]["steps"] == TASKS[side[0]["task"]].steps
    }


def race_table(rows: Sequence[Record], note: str = NOTE) -> str:
    """Lay out a section a task, the best optimizer first, from the lines alone."""
    tables = []
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
        cells = sorted(map(cells_of, sides_of(mine)), key=lambda of: of[0])
        machines = "; ".join(dict.fromkeys(row["machine"] for row in mine))
        what = "{measure}; batch {batch_size}, {steps} steps. ".format(**mine[0]) + f"{machines}. {note}"
        title = task if steps == TASKS[task].steps else f"{task}, {steps} steps"
        tables.append(section(title, what, [row for _, row in cells]))
    return "\n\n".join(tables) + "\n"


def at_best_rate(side: Sequence[Record]) -> tuple[Found, float | None, list[Record]]:
    """Return what seed 0 found, the best of its rates (None for the default), and the runs at that rate."""
    start, highest = STARTS[side[0]["optimizer"]], TASKS[side[0]["task"]].highest
    found = searched(side) or searched([row | OLD for row in side])  # of one rate there is no search
    if start is not None and not found:
        who = "{variant} on {task}".format(**side[0])
        raise ValueError(f"{who} has no run of seed 0, which chooses the rate; make it, or delete its lines")
    rate = None if start is None else best_rate(found, start, highest)
    return found, rate, [each for each in side if each["rate"] == rate and each["split"] == "test"]


def reached(run: Record, target: float, highest: bool) -> tuple[int, float] | None:
    """Return the step and the processor seconds of the first evaluation that was so good, None if none."""
    for step, value, seconds in run["curve"]:
        if value >= target if highest else value <= target:
            return step, seconds
    return None


def cells_of(side: Sequence[Record]) -> tuple[float, Record]:
    """Return by what to sort, and the cells, of all runs of an optimizer on a task."""
    row, highest = side[0], TASKS[side[0]["task"]].highest
    found, rate, runs = at_best_rate(side)
    values = [each["value"] for each in runs if not each["diverged"]]
    clock = "seconds" if runs and runs[0]["environment"]["processor"] == "cuda" else "processor_seconds"
    seconds = [each[clock] for each in runs if not each["diverged"]]
    inside = "inside" if rate and {2 * rate, rate / 2} <= found.keys() else "at the edge"
    ways = ("bf16", row["bf16"]), ("norms free", not row["keep_norm"]), ("test flip", row["test_flip"])
    how = [each for each, is_so in ways if is_so]
    target = TASKS[row["task"]].target
    times = [reached(each, target, highest) for each in runs]
    there = [each for each in times if each is not None]
    to = "–"
    if there:
        to = "{:.0f}, {:.0f} s".format(*map(statistics.fmean, zip(*there, strict=True)))
        to += "" if len(there) == len(runs) else f" ({len(there)} of {len(runs)})"
    cells = {
        "optimizer": ", ".join([row["variant"], *how]),
        "rate": "default" if rate is None else f"{rate:g}",
        "tried": f"{len(found)}, {inside}{', held out' * row['held_out']}" if len(found) > 1 else "–",
        **{"n": len(runs), "diverged": len(runs) - len(values)},
        "value": plus_minus(values, 2 if highest else 4),
        "seconds": f"{statistics.fmean(seconds):.0f}" if seconds else "–",
        f"to {target:g}": to,
        "source": row["source"],
    }
    mean = statistics.fmean(values) if values else math.inf
    return -mean if highest and values else mean, cells
