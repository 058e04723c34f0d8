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
from fop_bench.optimizers import BUILDERS
from fop_bench.recipes import Parts, recipe
from fop_bench.report import replacing
from fop_bench.training import Training, messages, share_right
from fop_bench.world import World

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
# Larger sets of images stay in the machine's memory, and batches are brought to the GPU.
RESIDENT_BYTES = 8e9

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

    def saved(self, run: Description) -> Path:
        """Return where the state of a run is."""
        return self.folder / f"{hashlib.sha256(run.key.encode()).hexdigest()[:16]}.pt"


def execute(described: Description, sitting: Sitting, world: World) -> dict[str, Any] | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end.

    All processes of the world share the images and every batch.
    """
    saved = sitting.saved(described)
    if world.size > 1:
        saved = saved.with_suffix(f".{world.rank}-of-{world.size}.pt")
    contender = recipe(described.recipe).studies[described.study].contenders[described.contender]
    parts = parts_of(described.recipe, described.task, sitting.data, world.rank, world.size)
    with warnings.catch_warnings(record=True) as caught, FORMULAS[contender.formula]():
        warnings.simplefilter("always")
        run = _Run(described, parts, world)
        earlier = run.resume(saved, sitting.git)
        last = time.monotonic()

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over, due = world.agree((now >= sitting.deadline, now - last >= SECONDS_BETWEEN_SAVES))
            if due and not over:
                run.training.stop_clock()
                run.save(saved, sitting.git, earlier + messages(caught))
                run.training.start_clock()
                last = now
            return over

        finished = run.training.run(stop)
        warned = list(dict.fromkeys(earlier + messages(caught)))
        if not finished:
            run.save(saved, sitting.git, warned)
            return None
    where = {**machine(world.device), "command": sitting.command, "git": sitting.git}
    data = sitting.data or run.plan.tasks[described.task].origin
    return {**run.record(), "data": data, "warnings": warned, "environment": where}


@cache
def parts_of(recipe_name: str, task: str, data: str | None, rank: int, ranks: int) -> Parts:
    """Load a rank's share of a task's images, once a process."""
    return recipe(recipe_name).tasks[task].load(data, rank, ranks)


class _Run:
    """A training of a recipe, with what its record needs."""

    def __init__(self, described: Description, parts: Parts, world: World) -> None:
        self.described, self.world = described, world
        self.plan = plan = recipe(described.recipe)
        self.contender = contender = plan.studies[described.study].contenders[described.contender]
        self.final = described.phase == "final"
        train, judged = parts.training(final=self.final), parts.judging(final=self.final)
        self.samples = world.total(torch.tensor([len(train), len(judged)])).tolist()
        # Of a final run, so that tuning is not made in vain.
        everything = int(world.total(torch.tensor(len(parts.training(final=True)))))
        if described.batch_size > everything:
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
        self.draw = torch.Generator(device).manual_seed(described.seed * world.size + world.rank)
        model = world.wrap(plan.network(len(train.classes), device))
        self.options = {**contender.options(described.batch_size), **described.options}
        optimizer = BUILDERS[contender.optimizer][1](model, **self.options)
        self.layers: dict[str, Any] | None = None
        normalise = Normaliser(train.pixels, world.total)
        order = _halves(contender.halves, train.labels.to(device))
        bf16 = plan.bf16 and device.type == "cuda"

        def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if order is not None:
                numbers = numbers[order[numbers].argsort(stable=True)]
            images = train.taken(numbers, device)
            return training_inputs(images.pixels, plan.augmentation, normalise, self.draw), images.labels

        def judged_batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            images = judged.taken(numbers, device)
            return normalise(images.pixels), images.labels

        def evaluate() -> float:
            if contender.optimizer == "fop" and self.final and isinstance(optimizer, FOP):
                self._note_layers(optimizer)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return share_right(model, len(judged), judged_batch, world.total)

        self.training = Training(
            model,
            optimizer,
            plan.schedule,
            batch,
            evaluate,
            samples=world.least(len(train)),
            # In tuning, without what is held out, the full batch is smaller.
            batch_size=min(described.batch_size // world.size, world.least(len(train))),
            epochs=described.epochs,
            seed=described.seed,
            bf16=bf16,
            mean=lambda loss: world.total(loss).item() / world.size,
        )

    def _note_layers(self, optimizer: FOP) -> None:
        """Keep β, η and ρ of every layer after the epoch."""
        layers = optimizer.diagnostics().layers
        if self.layers is None:
            self.layers = {"names": list(layers), "epochs": [], "beta": [], "eta": [], "rho": []}
        self.layers["epochs"].append(self.training.progress.epoch)
        for scalar in ("beta", "eta", "rho"):
            self.layers[scalar].append([_rounded(getattr(each, scalar)) for each in layers.values()])

    def record(self) -> dict[str, Any]:
        """Return what is known of the run without its machine."""
        now = self.training.progress
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
            "curve": [asdict(epoch) for epoch in now.curve],
            "layers": self.layers,
            "parameters": sum(p.numel() for p in self.training.model.parameters()),
            "evaluated_on": "test" if self.final else "held-out",
            "train_samples": self.samples[0],
            "evaluated_samples": self.samples[1],
            "ranks": self.world.size,
        }

    def save(self, path: Path, git: Git, warned: list[str]) -> None:
        """Write the state such that a kill in between leaves the old one."""
        state = {
            "training": self.training.state_dict(),
            "draw": self.draw.get_state(),
            "layers": self.layers,
            "git": git,
            "warnings": warned,
        }
        with replacing(path) as unfinished:
            torch.save(state, unfinished)

    def resume(self, path: Path, git: Git) -> list[str]:
        """Go on from the state in a file, if there is one, and return the warnings up to there.

        Raises ValueError if the file is no state, or one of another commit.
        """
        try:
            state = torch.load(path, weights_only=True) if path.exists() else None
        except Exception as error:
            raise ValueError(
                f"{path} is not a saved run ({error}); delete it to start that run again"
            ) from error
        progress = state and state["training"]["progress"]
        step = progress and (progress["epoch"], progress["step"])
        first = self.world.agree(step)
        # Killed between their saves, ranks would go on from different steps; then all start again.
        ready = step is not None and step == first
        if state is None or int(self.world.total(torch.tensor(int(ready)))) < self.world.size:
            return []
        if state["git"] != git:
            raise ValueError(
                f"{path} is half a run of {commit_title(state['git'])}, and this is {commit_title(git)}; "
                "check that commit out to go on, or delete the file to start that run again"
            )
        self.training.load_state_dict(state["training"])
        self.draw.set_state(state["draw"])
        self.layers = state["layers"]
        warned: list[str] = state["warnings"]
        return warned


def _halves(kind: str, labels: Tensor) -> Tensor | None:
    """Return what a batch is ordered by, so that its halves are the wanted ones; None for chance."""
    if kind == "random":
        return None
    if kind == "classes":
        return labels
    draw = torch.Generator().manual_seed(0)
    return torch.randperm(len(labels), generator=draw).to(labels.device)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
