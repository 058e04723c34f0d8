"""One run of a recipe: from its description to its record, with stops in between."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fop import FOP
from fop_bench.augmentation import Normaliser, training_inputs
from fop_bench.environment import commit_title, environment
from fop_bench.formulas import FORMULAS
from fop_bench.images import Images
from fop_bench.optimizers import BUILDERS
from fop_bench.recipes import recipe
from fop_bench.recipes.recipe import Contender, Parts, Recipe
from fop_bench.training import Training, messages, share_right
from fop_bench.world import World

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
# Larger sets of images stay in the machine's memory, and batches are brought to the GPU.
RESIDENT_BYTES = 8e9


@dataclass(frozen=True)
class Description:
    """All that tells one run from another.

    Attributes:
        recipe: name.
        task: name within the recipe.
        study: name within the recipe.
        phase: "tuning" or "final".
        contender: name within the study.
        options: the chosen values of the contender's grid.
        batch_size: samples of a step.
        epochs: number of passes.
        seed: of weights, order and augmentation.
    """

    recipe: str
    task: str
    study: str
    phase: str
    contender: str
    options: Mapping[str, Any]
    batch_size: int
    epochs: int
    seed: int

    @property
    def final(self) -> bool:
        """Whether the run is judged by the test images."""
        return self.phase == "final"

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        options = ", ".join(f"{key} {_shown(value)}" for key, value in self.options.items())
        return f"{self.study} · {self.task} · {self.batch_size} · {self.contender} · {options} · {self.phase}"


@cache
def parts_of(recipe_name: str, task: str, data: str | None, rank: int, ranks: int) -> Parts:
    """Load a rank's share of a task's images, once a process."""
    return recipe(recipe_name).tasks[task].load(data, rank, ranks)


def execute(
    description: Description,
    data: str | None,
    world: World,
    saved: Path,
    deadline: float,
    command: str,
    git: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end.

    Args:
        description: which run.
        data: folder or hub name; None for the recipe's own.
        world: this process, or all that train together: they share the images and every batch.
        saved: file for the state in between; deleted with the record in hand.
        deadline: by `time.monotonic`, the same clock in all processes of a machine.
        command: what repeats it.
        git: the commit that the command began with.
    """
    plan = recipe(description.recipe)
    study = plan.studies[description.study]
    contender = study.contenders[description.contender]
    parts = parts_of(description.recipe, description.task, data, world.rank, world.size)
    train, judged = parts.training(final=description.final), parts.judging(final=description.final)
    if world.size > 1:
        saved = saved.with_suffix(f".{world.rank}-of-{world.size}.pt")
    with warnings.catch_warnings(record=True) as caught, FORMULAS[contender.formula]():
        warnings.simplefilter("always")
        everything = int(world.total(torch.tensor(len(parts.training(final=True)))))
        run = _Run(plan, contender, description, train, judged, everything, world)
        earlier = run.resume(saved, git)
        last = time.monotonic()

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over, due = world.agree((now >= deadline, now - last >= SECONDS_BETWEEN_SAVES))
            if due and not over:
                run.training.stop_clock()
                run.save(saved, git, earlier + messages(caught))
                run.training.start_clock()
                last = now
            return over

        if not run.training.run(stop):
            run.save(saved, git, earlier + messages(caught))
            return None
    counts = world.total(torch.tensor([len(train), len(judged)])).tolist()
    return {
        **run.record(),
        "train_samples": counts[0],
        "evaluated_samples": counts[1],
        "ranks": world.size,
        "warnings": list(dict.fromkeys(earlier + messages(caught))),
        "data": data or plan.tasks[description.task].origin,
        "environment": {**_where(world.device), "date": _today(), "command": command, "git": git},
    }


@cache
def _where(device: torch.device) -> dict[str, Any]:
    return {**environment(device), "processor": device.type}


def _today() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Run:
    """A training of a recipe, with what its record needs."""

    def __init__(
        self,
        plan: Recipe,
        contender: Contender,
        description: Description,
        train: Images,
        judged: Images,
        everything: int,
        world: World,
    ) -> None:
        self.plan, self.contender, self.description, self.world = plan, contender, description, world
        device = world.device
        if max(train.pixels.numel(), judged.pixels.numel()) <= RESIDENT_BYTES:
            train, judged = train.to(device), judged.to(device)
        torch.manual_seed(description.seed)
        self.draw = torch.Generator(device).manual_seed(description.seed * world.size + world.rank)
        model = plan.model(len(train.classes)).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        model = world.wrap(model)
        options = {**contender.options(description.batch_size), **description.options}
        self.optimizer = BUILDERS[contender.optimizer][1](model, **options)
        self.options = options
        self.layers: dict[str, Any] | None = None
        normalise = Normaliser(train.pixels, world.total)
        order = _halves(contender.halves, train.labels.to(device))
        bf16 = plan.bf16 and device.type == "cuda"

        def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if order is not None:
                numbers = numbers[order[numbers].argsort(stable=True)]
            pixels, labels = _taken(train, numbers, device)
            return training_inputs(pixels, plan.augmentation, normalise, self.draw), labels

        def judged_batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            pixels, labels = _taken(judged, numbers, device)
            return normalise(pixels), labels

        def evaluate() -> float:
            self._note_layers()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return share_right(model, len(judged), judged_batch, world.total)

        self.training = Training(
            model,
            self.optimizer,
            plan.schedule,
            batch,
            evaluate,
            samples=world.least(len(train)),
            batch_size=_share_of(description, len(train), everything, world),
            epochs=description.epochs,
            seed=description.seed,
            bf16=bf16,
            mean=lambda loss: world.total(loss).item() / world.size,
        )

    def _note_layers(self) -> None:
        """Keep β, η and ρ of every layer as they are after the epoch; of FOP's final runs alone."""
        if (
            self.contender.optimizer != "fop"
            or not self.description.final
            or not isinstance(self.optimizer, FOP)
        ):
            return
        layers = self.optimizer.diagnostics().layers
        if self.layers is None:
            self.layers = {"names": list(layers), "epochs": [], "beta": [], "eta": [], "rho": []}
        self.layers["epochs"].append(self.training.progress.epoch)
        for scalar in ("beta", "eta", "rho"):
            self.layers[scalar].append([_rounded(getattr(each, scalar)) for each in layers.values()])

    def record(self) -> dict[str, Any]:
        """Give what is known of the run without its data and machine."""
        now = self.training.progress
        return {
            **asdict(self.description),
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
            "evaluated_on": "test" if self.description.final else "held-out",
        }

    def save(self, path: Path, git: Mapping[str, Any] | None, warned: list[str]) -> None:
        """Write the state such that a kill in between leaves the old one."""
        state = {
            "training": self.training.state_dict(),
            "draw": self.draw.get_state(),
            "layers": self.layers,
            "git": git,
            "warnings": warned,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path, git: Mapping[str, Any] | None) -> list[str]:
        """Go on from the state in a file, if there is one, and return the warnings up to there.

        Raises:
            ValueError: the file is no state, or one of another commit.
        """
        try:
            state = torch.load(path, weights_only=True) if path.exists() else None
        except Exception as error:
            raise ValueError(
                f"{path} is not a saved run ({error}); delete it to start that run again"
            ) from error
        step = None
        if state is not None:
            progress = state["training"]["progress"]
            step = (progress["epoch"], progress["step"])
        # Killed between their saves, ranks would go on from different steps; then all start again.
        ready = step == self.world.agree(step) and step is not None
        everywhere = self.world.total(torch.tensor(int(ready))) == self.world.size
        if state is None or not everywhere:
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


def _taken(images: Images, numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give pixels and labels on a device, from where the images are."""
    numbers = numbers.to(images.labels.device)
    return images.pixels[numbers].to(device), images.labels[numbers].to(device)


def _share_of(description: Description, images: int, everything: int, world: World) -> int:
    """Give this rank's part of the batch; raises ValueError if the batch cannot be had.

    Args:
        description: the run.
        images: number of this rank's training images.
        everything: number of all training images of a final run, so that tuning is not made in vain.
        world: who shares the batch.
    """
    batch_size = description.batch_size
    if batch_size > everything:
        raise ValueError(
            f"batch size {batch_size} is larger than the {everything} training images of "
            f"{description.task}; choose smaller ones with --batch, or give all images with --data"
        )
    if batch_size % world.size:
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {world.size} ranks; start another number"
        )
    # In tuning, without what is held out, the full batch is smaller.
    return min(batch_size // world.size, world.least(images))


def _halves(kind: str, labels: Tensor) -> Tensor | None:
    """Give what a batch is ordered by, so that its halves are the wanted ones; None for chance."""
    if kind == "random":
        return None
    if kind == "classes":
        return labels
    draw = torch.Generator().manual_seed(0)
    return torch.randperm(len(labels), generator=draw).to(labels.device)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
