"""Makes one run, with stops in between; a run of a recipe, from its description to its record."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fop import FOP
from fop_bench.environment import Git, commit_title, machine
from fop_bench.formulas import FORMULAS
from fop_bench.images import Normaliser, training_inputs
from fop_bench.optimizers import make_peer
from fop_bench.recipes import Contender, Parts, recipe
from fop_bench.records import Record, replacing
from fop_bench.training import Training, by_sub_batch, count_right, messages
from fop_bench.world import World

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
# Larger sets of images stay in the machine's memory, and batches are brought to the GPU.
RESIDENT_BYTES = 8e9
SCALARS = ("beta", "eta", "rho")


@dataclass(frozen=True)
class Sitting:
    """What the runs of one command have in common."""

    data: str | None  # folder or hub name; None for the run's own
    folder: Path  # for the states of unfinished runs
    deadline: float  # by `time.monotonic`, the same clock in all processes of a machine
    command: str  # what repeats it
    git: Git  # the commit that it began with


class Run:
    """One run, as the runner makes it; its fields tell it from all others."""

    of_one_commit = True  # whether it goes on only at the commit that it began with

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        raise NotImplementedError

    @property
    def formula(self) -> str:
        """The key of `FORMULAS` that it is made with."""
        return "paper"

    @property
    def key(self) -> str:
        """The same for two runs only if they are the same run."""
        return json.dumps(vars(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """The key as a name of files."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]

    def begin(self, data: str | None, world: World) -> tuple[Training, Callable[[list[str]], Record]]:
        """Return the training, and what makes a record of it at its end, given the warnings."""
        raise NotImplementedError


def execute(run: Run, sitting: Sitting, world: World) -> Record | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end.

    All processes of the world share the samples and every batch.
    """
    with warnings.catch_warnings(record=True) as caught, FORMULAS[run.formula]():
        warnings.simplefilter("always")
        training, record = run.begin(sitting.data, world)
        rank = "" if world.size == 1 else f".{world.rank}-of-{world.size}"
        saved = sitting.folder / f"{run.digest}{rank}.pt"
        git = sitting.git if run.of_one_commit else None
        earlier = _resume(training, saved, git, world)
        last = time.monotonic()

        def warned() -> list[str]:
            return list(dict.fromkeys(earlier + messages(caught)))

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over, due = world.agree((now >= sitting.deadline, now - last >= SECONDS_BETWEEN_SAVES))
            if over or due:
                training.stop_clock()  # the time that this takes does not count
                state = {"training": training.state_dict(), "git": git, "warnings": warned()}
                with replacing(saved) as unfinished:
                    torch.save(state, unfinished)
                training.start_clock()
                last = now
            return over

        if not training.run(stop):
            return None
        where = machine(world.device) | {"command": sitting.command, "git": sitting.git}
        return record(warned()) | {"environment": where}


def _resume(training: Training, saved: Path, git: Git, world: World) -> list[str]:
    """Go on from the saved state, if there is one, and return the warnings up to there."""
    try:
        state = torch.load(saved, weights_only=True) if saved.exists() else None
    except Exception as error:
        message = f"{saved} is not a saved run ({error}); delete it to start that run again"
        raise ValueError(message) from error
    step = state and state["training"]["progress"].get("steps")
    # Killed between their saves, ranks would go on from different steps; then all start again.
    same = step == world.agree(step) and state is not None
    if not world.least(int(same)) or state is None:
        return []
    if state["git"] != git:
        raise ValueError(
            f"{saved} is half a run of {commit_title(state['git'])}, and this is {commit_title(git)}; check "
            "that commit out to go on, or delete the file to start that run again"
        )
    training.load_state_dict(state["training"])
    return state["warnings"]


# --- Runs of recipes


@cache
def parts_of(recipe_name: str, task: str, data: str | None, rank: int, ranks: int) -> Parts:
    """Load a rank's share of a task's images, once a process."""
    return recipe(recipe_name).tasks[task].load(data, rank, ranks)


@dataclass(frozen=True)
class Description(Run):
    """A run of a recipe."""

    recipe: str
    task: str
    study: str
    phase: str  # "tuning" or "final"
    contender: str
    options: Mapping[str, Any]  # the chosen values of the contender's grid
    batch_size: int
    epochs: int
    seed: int  # of weights, order and augmentation

    @property
    def title(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.study} · {self.task} · {self.batch_size} · {self.contender} · {options} · {self.phase}"

    @property
    def _contender(self) -> Contender:
        return recipe(self.recipe).studies[self.study].contenders[self.contender]

    @property
    def formula(self) -> str:
        return self._contender.formula

    def begin(self, data: str | None, world: World) -> tuple[Training, Callable[[list[str]], Record]]:
        """Load the images, build network and optimizer; raises ValueError for a batch that cannot be."""
        plan, contender, device = recipe(self.recipe), self._contender, world.device
        final = self.phase == "final"
        parts = parts_of(self.recipe, self.task, data, world.rank, world.size)
        train, judged = parts[self.phase]
        lengths = torch.tensor([len(train), len(judged), len(parts["final"][0])])
        train_samples, judged_samples, everything = world.total(lengths).tolist()
        if self.batch_size > everything:  # asked before the tuning, so that it is not made in vain
            raise ValueError(
                f"batch size {self.batch_size} is larger than the {everything} training images of "
                f"{self.task}; choose smaller ones with --batch, or give all images with --data"
            )
        if self.batch_size % world.size:
            raise ValueError(f"batch size {self.batch_size} is not divisible by {world.size} ranks")
        if max(train.pixels.numel(), judged.pixels.numel()) <= RESIDENT_BYTES:
            train, judged = train.to(device), judged.to(device)
        torch.manual_seed(self.seed)
        draw = torch.Generator(device).manual_seed(self.seed * world.size + world.rank)
        model = world.wrap(plan.network(len(train.classes), device))
        options = {**contender.options(self.batch_size), **self.options}
        optimizer = make_peer(contender.optimizer, model, **options)
        normalise = Normaliser(train.pixels, world.total)
        halves = _halves(contender.halves, train.labels.to(device))
        bf16 = device.type == "cuda"

        def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if halves is not None:
                ordered = numbers[halves[numbers].argsort(stable=True)]
                numbers = torch.empty_like(numbers)
                numbers[by_sub_batch(len(numbers)).to(device)] = ordered
            images = train.taken(numbers, device)
            return training_inputs(images.pixels, plan.augmentation, normalise, draw), images.labels

        def judged_batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            images = judged.taken(numbers, device)
            return normalise(images.pixels), images.labels

        def evaluate() -> float:
            if contender.optimizer == "fop" and final and isinstance(optimizer, FOP):
                _note_layers(training, optimizer)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                right, of = count_right(model, len(judged), judged_batch, world.total)
            return right / of

        samples = world.least(len(train))
        training = Training(
            model,
            optimizer,
            plan.schedule,
            batch,
            evaluate,
            samples=samples,
            # In tuning, without what is held out, the full batch is smaller.
            batch_size=min(self.batch_size // world.size, samples),
            epochs=self.epochs,
            shuffle=torch.Generator().manual_seed(self.seed),
            bf16=bf16,
            draw=draw,
            mean=lambda loss: world.total(loss).item() / world.size,
        )

        def record(warned: list[str]) -> Record:
            now = training.progress
            return {
                **asdict(self),
                **{"title": plan.title, "label": contender.title, "all_options": options},
                **{"halves": contender.halves, "formula": contender.formula, "bf16": bf16},
                **{"augmentation": asdict(plan.augmentation), "targets": dict(plan.targets)},
                **{"diverged": now.diverged, "curve": now.curve, "layers": now.layers},
                "parameters": sum(p.numel() for p in model.parameters()),
                "evaluated_on": "test" if final else "held-out",
                **{"train_samples": train_samples, "evaluated_samples": judged_samples, "ranks": world.size},
                **{"data": data or plan.tasks[self.task].origin, "warnings": warned},
            }

        return training, record


def _halves(kind: str, labels: Tensor) -> Tensor | None:
    """Return what a batch is ordered by, so that its halves are the wanted ones; None for chance."""
    if kind == "random":
        return None
    if kind == "classes":
        return labels
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)


def _note_layers(training: Training, optimizer: FOP) -> None:
    """Note β, η and ρ of every layer after an epoch."""
    layers, now = optimizer.diagnostics().layers, training.progress
    if now.layers is None:
        now.layers = {"names": list(layers), "epochs": [], **{scalar: [] for scalar in SCALARS}}
    now.layers["epochs"].append(len(now.curve) + 1)
    for scalar in SCALARS:
        now.layers[scalar].append([_rounded(getattr(each, scalar)) for each in layers.values()])


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
