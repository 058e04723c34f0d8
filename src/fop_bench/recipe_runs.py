"""The runs of a recipe's study: which there are, and one of them from its description to its record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fop import FOP
from fop_bench.environment import Git
from fop_bench.images import Normaliser
from fop_bench.optimizers import make_peer
from fop_bench.recipes import Parts, recipe
from fop_bench.records import Record, read_runs, refuse_mixture
from fop_bench.runner import Begun, Run, make_runs
from fop_bench.training import Training, count_right

SCALARS = {"beta": "β", "eta": "η", "rho": "ρ", "noise": "ν"}  # what is noted of FOP's layers
TUNING_SEED = 0


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


# --- Which runs


@dataclass
class Selection:
    """Which runs of a recipe's study to make; an empty choice becomes all.

    Raises ValueError for what the recipe does not have.
    """

    recipe: str
    study: str = "comparison"
    tasks: Sequence[str] = ()
    contenders: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        plan = recipe(self.recipe)
        _known("study", [self.study], plan.studies)
        study = plan.studies[self.study]
        self.tasks = _known("task", self.tasks, plan.tasks)
        self.contenders = _known("optimizer", self.contenders, study.contenders)
        self.batch_sizes = _known("batch size", self.batch_sizes, study.epochs)


def _known(what: str, chosen: Sequence[Any], there: Iterable[Any]) -> Sequence[Any]:
    for each in chosen:
        if each not in there:
            raise ValueError(f"unknown {what} {each!r}; known are {', '.join(map(str, there))}")
    return [each for each in there if not chosen or each in chosen]


def make(chosen: Selection, *, data: str | None, out: Path, **how: Any) -> int:
    """Make the runs of a study that ``out``/STUDY.jsonl does not hold yet, as `make_runs` does.

    Raises ValueError for runs that must not be mixed.
    """
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # one folder has one name
    path = out / f"{chosen.study}.jsonl"
    read = partial(_records_of, chosen, path, data)
    return make_runs(path, read, partial(planned, chosen), data=data, **how)


def _records_of(chosen: Selection, path: Path, data: str | None, git: Git) -> list[Record]:
    """Return the file's records of these runs; raises ValueError for any of another commit or data."""
    plan, mine = recipe(chosen.recipe), []
    for record in read_runs(path) if path.exists() else []:
        pairs: list[tuple[str, Any, Any]] = []
        if record["recipe"] == chosen.recipe and record["task"] in chosen.tasks:
            pairs += [("on", record["data"], data or plan.tasks[record["task"]].origin)]
            if record["contender"] in chosen.contenders and record["batch_size"] in chosen.batch_sizes:
                mine.append(record)
        refuse_mixture(path, record["environment"], git, pairs)
    return mine


def planned(chosen: Selection, done: Sequence[Record]) -> tuple[list[Description], int]:
    """Return the runs that can be made now, and the number of all that are not done, later ones included."""
    study, names = recipe(chosen.recipe).studies[chosen.study], [each.name for each in fields(Description)]
    made = {Description(**{name: record[name] for name in names}).key: record for record in done}
    ready: list[Description] = []
    later = 0  # final runs whose options are not known yet
    for size, task in itertools.product(chosen.batch_sizes, chosen.tasks):
        by_contender = []
        for name in chosen.contenders:
            place = chosen.recipe, task, chosen.study, "tuning", name
            grid = study.contenders[name].combinations()
            runs = [Description(*place, each, size, study.epochs[size], TUNING_SEED) for each in grid]
            tuned = [made[run.key] for run in runs if run.key in made]
            if len(tuned) < len(runs):
                later += len(study.seeds)
            else:
                best = replace(runs[0], phase="final", options=best_options(tuned))
                runs += [replace(best, seed=seed) for seed in study.seeds]
            by_contender.append(runs)
        # Contenders take turns, so that a slow hour slows all of them.
        turns = itertools.chain(*itertools.zip_longest(*by_contender))
        ready += [run for run in turns if run is not None and run.key not in made]
    return ready, len(ready) + later


def best_options(tuning: Sequence[Record]) -> Mapping[str, Any]:
    """Choose by the mean accuracy over the epochs; if all runs diverged, the first options are taken."""

    def score(run: Record) -> float:
        return -1.0 if run["diverged"] else fmean(epoch["accuracy"] for epoch in run["curve"])

    return dict(max(tuning, key=score)["options"])
