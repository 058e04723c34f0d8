"""One run of a recipe: from its description to its record, with stops in between."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fop import FOP
from fop_bench.environment import commit_title, machine
from fop_bench.formulas import FORMULAS
from fop_bench.images import Normaliser, training_inputs
from fop_bench.optimizers import make_peer
from fop_bench.recipes import Parts, recipe
from fop_bench.report import replacing
from fop_bench.training import Training, by_sub_batch, messages, share_right
from fop_bench.world import World

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
# Larger sets of images stay in the machine's memory, and batches are brought to the GPU.
RESIDENT_BYTES = 8e9
SCALARS = ("beta", "eta", "rho")

Git = Mapping[str, Any] | None


@dataclass(frozen=True)
class Description:
    """All that tells one run from another."""

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
    def key(self) -> str:
        """The same for two runs only if they are the same run."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """The key as a name of files."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.study} · {self.task} · {self.batch_size} · {self.contender} · {options} · {self.phase}"


@dataclass(frozen=True)
class Sitting:
    """What the runs of one command have in common."""

    data: str | None  # folder or hub name; None for the recipe's own
    folder: Path  # for the states of unfinished runs
    deadline: float  # by `time.monotonic`, the same clock in all processes of a machine
    command: str  # what repeats it
    git: Git  # the commit that it began with


def execute(described: Description, sitting: Sitting, world: World) -> dict[str, Any] | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end.

    All processes of the world share the images and every batch.
    """
    plan = recipe(described.recipe)
    contender = plan.studies[described.study].contenders[described.contender]
    with warnings.catch_warnings(record=True) as caught, FORMULAS[contender.formula]():
        warnings.simplefilter("always")
        run = _Run(described, sitting, world)
        earlier = run.resume()
        last = time.monotonic()

        def warned() -> list[str]:
            return list(dict.fromkeys(earlier + messages(caught)))

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over, due = world.agree((now >= sitting.deadline, now - last >= SECONDS_BETWEEN_SAVES))
            if over or due:
                run.save(warned())
                last = now
            return over

        return run.record(warned()) if run.training.run(stop) else None


@cache
def parts_of(recipe_name: str, task: str, data: str | None, rank: int, ranks: int) -> Parts:
    """Load a rank's share of a task's images, once a process."""
    return recipe(recipe_name).tasks[task].load(data, rank, ranks)


class _Run:
    """A training of a recipe, with what its record needs."""

    def __init__(self, described: Description, sitting: Sitting, world: World) -> None:
        self.described, self.sitting, self.world = described, sitting, world
        rank = "" if world.size == 1 else f".{world.rank}-of-{world.size}"
        self.saved = sitting.folder / f"{described.digest}{rank}.pt"
        self.plan = plan = recipe(described.recipe)
        self.contender = contender = plan.studies[described.study].contenders[described.contender]
        self.final = described.phase == "final"
        parts = parts_of(described.recipe, described.task, sitting.data, world.rank, world.size)
        train, judged = parts[described.phase]
        lengths = torch.tensor([len(train), len(judged), len(parts["final"][0])])
        *self.samples, everything = world.total(lengths).tolist()
        if described.batch_size > everything:  # asked before the tuning, so that it is not made in vain
            raise ValueError(
                f"batch size {described.batch_size} is larger than the {everything} training images of "
                f"{described.task}; choose smaller ones with --batch, or give all images with --data"
            )
        if described.batch_size % world.size:
            raise ValueError(f"batch size {described.batch_size} is not divisible by {world.size} ranks")
        device = world.device
        if max(train.pixels.numel(), judged.pixels.numel()) <= RESIDENT_BYTES:
            train, judged = train.to(device), judged.to(device)
        torch.manual_seed(described.seed)
        draw = torch.Generator(device).manual_seed(described.seed * world.size + world.rank)
        model = world.wrap(plan.network(len(train.classes), device))
        self.options = {**contender.options(described.batch_size), **described.options}
        optimizer = make_peer(contender.optimizer, model, **self.options)
        self.layers: dict[str, Any] | None = None  # β, η and ρ of every layer of FOP after every epoch
        normalise = Normaliser(train.pixels, world.total)
        order = _halves(contender.halves, train.labels.to(device))
        bf16 = plan.bf16 and device.type == "cuda"

        def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if order is not None:
                ordered = numbers[order[numbers].argsort(stable=True)]
                numbers = torch.empty_like(numbers)
                numbers[by_sub_batch(len(numbers)).to(device)] = ordered
            images = train.taken(numbers, device)
            return training_inputs(images.pixels, plan.augmentation, normalise, draw), images.labels

        def judged_batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            images = judged.taken(numbers, device)
            return normalise(images.pixels), images.labels

        def evaluate() -> float:
            if contender.optimizer == "fop" and self.final and isinstance(optimizer, FOP):
                self.note_layers(optimizer)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return share_right(model, len(judged), judged_batch, world.total)

        samples = world.least(len(train))
        self.training = Training(
            model,
            optimizer,
            plan.schedule,
            batch,
            evaluate,
            samples=samples,
            # In tuning, without what is held out, the full batch is smaller.
            batch_size=min(described.batch_size // world.size, samples),
            epochs=described.epochs,
            seed=described.seed,
            bf16=bf16,
            draw=draw,
            mean=lambda loss: world.total(loss).item() / world.size,
        )

    def note_layers(self, optimizer: FOP) -> None:
        layers = optimizer.diagnostics().layers
        if self.layers is None:
            self.layers = {"names": list(layers), "epochs": [], **{scalar: [] for scalar in SCALARS}}
        self.layers["epochs"].append(self.training.progress.epoch)
        for scalar in SCALARS:
            self.layers[scalar].append([_rounded(getattr(each, scalar)) for each in layers.values()])

    def record(self, warned: list[str]) -> dict[str, Any]:
        """Return all that is known of the run."""
        where, now = self.sitting, self.training.progress
        return {
            **asdict(self.described),
            "title": self.plan.title,
            "label": self.contender.title,
            "all_options": self.options,
            "halves": self.contender.halves,
            "formula": self.contender.formula,
            "augmentation": asdict(self.plan.augmentation),
            "bf16": self.training.bf16,
            "targets": dict(self.plan.targets),
            "diverged": now.diverged,
            "curve": now.curve,
            "layers": self.layers,
            "parameters": sum(p.numel() for p in self.training.model.parameters()),
            "evaluated_on": "test" if self.final else "held-out",
            "train_samples": self.samples[0],
            "evaluated_samples": self.samples[1],
            "ranks": self.world.size,
            "data": where.data or self.plan.tasks[self.described.task].origin,
            "warnings": warned,
            "environment": {**machine(self.world.device), "command": where.command, "git": where.git},
        }

    def save(self, warned: list[str]) -> None:
        """Write the state, without counting the time that it takes."""
        self.training.stop_clock()
        state = {"training": self.training.state_dict(), "layers": self.layers}
        with replacing(self.saved) as unfinished:
            torch.save({**state, "git": self.sitting.git, "warnings": warned}, unfinished)
        self.training.start_clock()

    def resume(self) -> list[str]:
        """Go on from the saved state, if there is one, and return the warnings up to there."""
        try:
            state = torch.load(self.saved, weights_only=True) if self.saved.exists() else None
        except Exception as error:
            raise ValueError(
                f"{self.saved} is not a saved run ({error}); delete it to start that run again"
            ) from error
        step = state and [state["training"]["progress"][key] for key in ("epoch", "step")]
        # Killed between their saves, ranks would go on from different steps; then all start again.
        same = step == self.world.agree(step) and state is not None
        if not self.world.least(int(same)) or state is None:
            return []
        if state["git"] != self.sitting.git:
            theirs, ours = (commit_title(git) for git in (state["git"], self.sitting.git))
            raise ValueError(
                f"{self.saved} is half a run of {theirs}, and this is {ours}; check that commit out to go "
                "on, or delete the file to start that run again"
            )
        self.training.load_state_dict(state["training"])
        self.layers = state["layers"]
        warned: list[str] = state["warnings"]
        return warned


def _halves(kind: str, labels: Tensor) -> Tensor | None:
    """Return what a batch is ordered by, so that its halves are the wanted ones; None for chance."""
    if kind == "random":
        return None
    if kind == "classes":
        return labels
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
