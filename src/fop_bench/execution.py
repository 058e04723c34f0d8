"""One run of a recipe: from its description to its record, with stops in between."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fop import FOP
from fop_bench.augmentation import Normaliser, augment, cut_out
from fop_bench.environment import environment
from fop_bench.formulas import FORMULAS
from fop_bench.images import Images
from fop_bench.optimizers import BUILDERS
from fop_bench.recipes import recipe
from fop_bench.recipes.recipe import Contender, Parts, Recipe
from fop_bench.training import Training, messages, share_right

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0


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
        options = ", ".join(f"{key} {value:g}" for key, value in self.options.items())
        return f"{self.study} · {self.task} · {self.batch_size} · {self.contender} · {options} · {self.phase}"


@cache
def parts_of(recipe_name: str, task: str, data: str | None) -> Parts:
    """Load a task's images, once a process."""
    parts: Parts = recipe(recipe_name).tasks[task].load(data)
    return parts


def execute(
    description: Description,
    data: str | None,
    device: torch.device,
    saved: Path,
    deadline: float,
    command: str,
) -> dict[str, Any] | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end.

    Args:
        description: which run.
        data: folder or hub name; None for the recipe's own.
        device: where.
        saved: file for the state in between; deleted with the record in hand.
        deadline: by `time.monotonic`, the same clock in all processes of a machine.
        command: what repeats it.
    """
    plan = recipe(description.recipe)
    study = plan.studies[description.study]
    contender = study.contenders[description.contender]
    parts = parts_of(description.recipe, description.task, data)
    train = parts.training(final=description.final).to(device)
    judged = (parts.test if description.final else parts.held_out).to(device)
    with warnings.catch_warnings(record=True) as caught, FORMULAS[contender.formula]():
        warnings.simplefilter("always")
        run = _Run(plan, contender, description, train, judged, device)
        if saved.exists():
            run.load(saved)
        last = time.monotonic()

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            if now >= deadline:
                return True
            if now - last >= SECONDS_BETWEEN_SAVES:
                run.save(saved)
                last = now
            return False

        if not run.training.run(stop):
            run.save(saved)
            return None
    return {
        **run.record(),
        "train_samples": len(train),
        "evaluated_samples": len(judged),
        "warnings": messages(caught),
        "data": data or _origin(plan, description.task),
        "environment": {**_where(device), "date": _today(), "command": command},
    }


@cache
def _where(device: torch.device) -> dict[str, Any]:
    return {**environment(device), "processor": device.type}


def _today() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _origin(plan: Recipe, task: str) -> str:
    source = getattr(plan.tasks[task], "source", None)
    return "scikit-learn" if source is None else str(source.hub)


class _Run:
    """A training of a recipe, with what its record needs."""

    def __init__(
        self,
        plan: Recipe,
        contender: Contender,
        description: Description,
        train: Images,
        judged: Images,
        device: torch.device,
    ) -> None:
        self.plan, self.contender, self.description = plan, contender, description
        torch.manual_seed(description.seed)
        self.draw = torch.Generator(device).manual_seed(description.seed)
        model: nn.Module = plan.model(len(train.classes)).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        options = {**contender.options(description.batch_size), **description.options}
        self.optimizer = BUILDERS[contender.optimizer][1](model, **options)
        self.options = options
        self.layers: dict[str, Any] | None = None
        batch_size = min(description.batch_size, len(train))
        steps = len(train) // batch_size * description.epochs
        normalise = Normaliser(train.pixels)
        ranks = _halves(contender.halves, train.labels)
        bf16 = plan.bf16 and device.type == "cuda"

        def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if ranks is not None:
                numbers = numbers[ranks[numbers].argsort(stable=True)]
            pixels = augment(train.pixels[numbers], plan.augmentation, self.draw)
            return cut_out(normalise(pixels), plan.augmentation.cutout, self.draw), train.labels[numbers]

        def evaluate() -> float:
            self._note_layers()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return share_right(
                    model, len(judged), lambda of: (normalise(judged.pixels[of]), judged.labels[of])
                )

        self.training = Training(
            model,
            self.optimizer,
            plan.schedule(self.optimizer, steps),
            batch,
            evaluate,
            samples=len(train),
            batch_size=batch_size,
            epochs=description.epochs,
            seed=description.seed,
            bf16=bf16,
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

    def save(self, path: Path) -> None:
        """Write the state such that a kill in between leaves the old one."""
        state = {"training": self.training.state_dict(), "draw": self.draw.get_state(), "layers": self.layers}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a state; raises ValueError for a file that is none."""
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is not a saved run ({error}); delete it to start that run again"
            ) from error
        self.training.load_state_dict(state["training"])
        self.draw.set_state(state["draw"])
        self.layers = state["layers"]


def _halves(kind: str, labels: Tensor) -> Tensor | None:
    """Give what a batch is ordered by, so that its halves are the wanted ones; None for chance."""
    if kind == "random":
        return None
    if kind == "classes":
        return labels
    draw = torch.Generator().manual_seed(0)
    return torch.randperm(len(labels), generator=draw).to(labels.device)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
