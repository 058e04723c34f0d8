"""Makes one run, with stops in between; a run of a recipe, from its description to its record."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fop import FOP
from fop_bench.environment import Git, commit_title, machine
from fop_bench.images import Normaliser
from fop_bench.optimizers import make_peer
from fop_bench.recipes import Parts, recipe
from fop_bench.records import Record, replacing
from fop_bench.training import Training, count_right, messages

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
SCALARS = {"beta": "β", "eta": "η", "rho": "ρ", "noise": "ν"}  # what is noted of FOP's layers
# A training, and what makes a record of it at its end, given the warnings.
Begun = tuple[Training, Callable[[list[str]], Record]]


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
    def key(self) -> str:
        """The same for two runs only if they are the same run."""
        return json.dumps(vars(self), sort_keys=True)

    def saved(self, folder: Path) -> Path:
        """Return where its state is, in a folder."""
        return folder / f"{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.pt"

    def begin(self, data: str | None, device: torch.device) -> Begun:
        """Load data, build network and optimizer; raises ValueError for a batch that cannot be."""
        raise NotImplementedError


def execute(run: Run, sitting: Sitting, device: torch.device) -> Record | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end."""
    torch.set_num_threads(1)
    # A run that goes on must not differ from one that did not stop: sums need a fixed order.
    torch.backends.cudnn.benchmark = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training, record = run.begin(sitting.data, device)
        saved, git = run.saved(sitting.folder), sitting.git if run.of_one_commit else None
        earlier = _resume(training, saved, git)
        last = time.monotonic()

        def warned() -> list[str]:
            return list(dict.fromkeys(earlier + messages(caught)))

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over = now >= sitting.deadline
            if over or now - last >= SECONDS_BETWEEN_SAVES:
                training.stop_clock()  # the time that this takes does not count
                state = {"training": training.state_dict(), "git": git, "warnings": warned()}
                with replacing(saved) as unfinished:
                    torch.save(state, unfinished)
                training.start_clock()
                last = now
            return over

        if not training.run(stop):
            return None
        where = machine(device) | {"command": sitting.command, "git": sitting.git}
        return record(warned()) | {"environment": where}


def _resume(training: Training, saved: Path, git: Git) -> list[str]:
    """Go on from the saved state, if there is one, and return the warnings up to there."""
    if not saved.exists():
        return []
    try:
        state = torch.load(saved, weights_only=True)
    except Exception as error:
        message = f"{saved} is not a saved run ({error}); delete it to start that run again"
        raise ValueError(message) from error
    if state["git"] != git:
        raise ValueError(
            f"{saved} is half a run of {commit_title(state['git'])}, and this is {commit_title(git)}; check "
            "that commit out to go on, or delete the file to start that run again"
        )
    training.load_state_dict(state["training"])
    return state["warnings"]


# --- Runs of recipes


@cache
def parts_of(recipe_name: str, task: str, data: str | None) -> Parts:
    """Load a task's images, once a process."""
    return recipe(recipe_name).tasks[task].load(data)


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

    def begin(self, data: str | None, device: torch.device) -> Begun:
        plan, final = recipe(self.recipe), self.phase == "final"
        contender = plan.studies[self.study].contenders[self.contender]
        parts = parts_of(self.recipe, self.task, data)
        train, judged = (images.to(device) for images in parts[self.phase])
        everything = len(parts["final"][0])
        if self.batch_size > everything:  # asked before the tuning, so that it is not made in vain
            raise ValueError(
                f"batch size {self.batch_size} is larger than the {everything} training images of "
                f"{self.task}; choose smaller ones with --batch, or give all images with --data"
            )
        torch.manual_seed(self.seed)
        draw = torch.Generator(device).manual_seed(self.seed)
        model = plan.model(len(train.classes)).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        options = {**contender.options(self.batch_size), **self.options}
        optimizer = make_peer(contender.optimizer, model, **options)
        normalise = Normaliser(train.pixels)
        batch = partial(normalise.batch, train, what=plan.augmentation, draw=draw)
        bf16 = device.type == "cuda"

        def evaluate() -> float:
            if contender.optimizer == "fop" and final and isinstance(optimizer, FOP):
                _note_layers(training, optimizer)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return count_right(model, len(judged), partial(normalise.batch, judged)) / len(judged)

        training = Training(
            model,
            optimizer,
            plan.schedule,
            batch,
            evaluate,
            samples=len(train),
            # In tuning, without what is held out, the full batch is smaller.
            batch_size=min(self.batch_size, len(train)),
            epochs=self.epochs,
            shuffle=torch.Generator().manual_seed(self.seed),
            bf16=bf16,
            draw=draw,
        )

        def record(warned: list[str]) -> Record:
            now = training.progress
            return {
                **asdict(self),
                **{"title": plan.title, "label": contender.title, "all_options": options, "bf16": bf16},
                **{"augmentation": asdict(plan.augmentation), "targets": dict(plan.targets)},
                **{"diverged": now.diverged, "curve": now.curve, "layers": now.layers},
                "parameters": sum(p.numel() for p in model.parameters()),
                "evaluated_on": "test" if final else "held-out",
                **{"train_samples": len(train), "evaluated_samples": len(judged)},
                **{"data": data or plan.tasks[self.task].origin, "warnings": warned},
            }

        return training, record


def _note_layers(training: Training, optimizer: FOP) -> None:
    """Note `SCALARS` of every layer after an epoch; None for what is not there or not finite."""
    layers, now = optimizer.diagnostics().layers, training.progress
    if now.layers is None:
        now.layers = {"names": list(layers), "epochs": [], **{scalar: [] for scalar in SCALARS}}
    now.layers["epochs"].append(len(now.curve) + 1)
    for scalar in SCALARS:
        values = (getattr(layer, scalar) for layer in layers.values())
        rounded = [None if v is None or not math.isfinite(v) else float(f"{v:.4g}") for v in values]
        now.layers[scalar].append(rounded)
