"""A study whose runs take milliseconds, for the tests of `fop-bench run`.

Run as a program, this file is `fop-bench run` with that recipe.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fop
from fop_bench import environment, recipe_runs, runner
from fop_bench.images import Augmentation, Images
from fop_bench.recipe_runs import Description, Selection, make
from fop_bench.recipes import RECIPES, Contender, Parts, Recipe, Study, by_plateau
from fop_bench.records import ENVIRONMENT_KEYS, KEYS, Record
from fop_bench.runner import Sitting, execute

CPU = torch.device("cpu")
COMMIT = {"commit": "0123456789abcdef", "dirty": False}
TRAIN, HELD_OUT, TEST = 24, 9, 12
STEPS = TRAIN // 8


class RandomImages:
    """Three classes of 8×8 pixels that differ in their mean."""

    origin = "random numbers"

    def __init__(self, joined: bool = False) -> None:
        self.joined = joined

    def load(self, data: str | None) -> Parts:
        draw = torch.Generator().manual_seed(7)

        def images(count: int) -> Images:
            labels = torch.arange(count) % 3
            pixels = torch.randint(0, 150, (count, 8, 8, 3), generator=draw) + 40 * labels.view(-1, 1, 1, 1)
            return Images(pixels.to(torch.uint8), labels, ("a", "b", "c"))

        train, held_out, test = images(TRAIN), images(HELD_OUT), images(TEST)
        if not self.joined:
            return {"tuning": (train, held_out), "final": (train, test)}
        pixels, labels = (torch.cat([getattr(train, k), getattr(held_out, k)]) for k in ("pixels", "labels"))
        return {"tuning": (train, held_out), "final": (Images(pixels, labels, train.classes), test)}


class Clock(nn.Module):
    """Does nothing but to take a second of a time of its own, or so many real ones."""

    now = 0.0
    really = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            Clock.now += 1.0
            time.sleep(Clock.really)
        return x


def network(classes: int) -> nn.Module:
    """Build a network with all that a state must hold: averages, dropout, weights of two and four sides."""
    return nn.Sequential(
        *(Clock(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, classes)),
    )


RATES = {"lr": (0.01, 0.1, 0.3)}
SMALL_RATES = {"lr": (0.001, 0.003, 0.01)}


CONTENDERS = {
    **{name: Contender(name, RATES) for name in ("sgd", "muon")},
    **{name: Contender(name, SMALL_RATES) for name in ("adamw", "soap", "lamb")},
    **{name: Contender(name, RATES, {"curvature_interval": 2}) for name in ("kfac", "fop")},
    "fop-eta": Contender("fop", RATES, {"curvature_interval": 2, "eta": 1.0}, "FOP, η = 1"),
}
TWO = {name: CONTENDERS[name] for name in ("sgd", "fop")}

TINY = Recipe(
    name="tiny",
    title="Random images",
    tasks={"random": RandomImages(), "joined": RandomImages(joined=True)},
    model=network,
    studies={
        "comparison": Study(TWO, {8: 2, 12: 2}, seeds=(1, 2)),
        "all": Study(CONTENDERS, {8: 3}, seeds=(1, 2)),
        "large": Study({"sgd": Contender("sgd", {"lr": (0.1,)})}, {TRAIN + HELD_OUT: 2}, seeds=(1,)),
    },
    targets={"accuracy": 0.5},
    augmentation=Augmentation(flip=True, shift=1),
)
PLATEAU = replace(TINY, name="tiny-plateau", schedule=by_plateau)


@contextmanager
def made_known() -> Iterator[pytest.MonkeyPatch]:
    """Make the recipe known, and tell every record the same commit, whatever is edited meanwhile."""
    with pytest.MonkeyPatch.context() as patched:
        for each in (TINY, PLATEAU):
            patched.setitem(RECIPES, each.name, each)
        for module in (runner, environment):
            patched.setattr(module, "git_state", lambda source: COMMIT)
        patched.setattr(Clock, "now", 0.0)
        recipe_runs.parts_of.cache_clear()
        yield patched
    recipe_runs.parts_of.cache_clear()


@pytest.fixture(autouse=True)
def tiny_recipe() -> Iterator[None]:
    """For every test of a module that imports it."""
    with made_known():
        yield


def go(
    out: Path,
    study: str = "comparison",
    *,
    data: str | None = None,
    minutes: float = 60.0,
    jobs: int = 1,
    on_run: runner.OnRun = lambda done, planned, title: None,
    **chosen: Any,
) -> int:
    """Make the runs of a study of one task; of the comparison, those with batch 8, 10 in all."""
    if study == "comparison":
        chosen = {"batch_sizes": (8,), **chosen}
    selection = Selection("tiny", study, **{"tasks": ("random",), **chosen})
    return make(selection, data=data, device=CPU, out=out, jobs=jobs, minutes=minutes, on_run=on_run)


def lines(path: Path) -> list[Record]:
    """Read a file of whole lines by hand."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def identity(record: Mapping[str, Any]) -> str:
    names = ("task", "phase", "contender", "options", "batch_size", "seed")
    return json.dumps([record[name] for name in names])


def result(record: Record) -> Any:
    """Return all of a record that does not tell the time."""
    curve = [{**epoch, "seconds": 0, "processor_seconds": 0} for epoch in record["curve"]]
    environment = {**record["environment"], "date": "", "command": ""}
    return {**record, "curve": curve, "environment": environment}


def faked(monkeypatch: pytest.MonkeyPatch, curves: Callable[[Description], list[float] | None]) -> None:
    """Put records with given accuracies in place of runs; None for a diverged one."""

    def execute(described: Description, sitting: Sitting, device: torch.device) -> Record:
        accuracies = curves(described)
        fixed = {"seconds": 1.0, "processor_seconds": 1.0, "train_loss": 1.0}
        curve = [
            {"epoch": at, **fixed, "accuracy": each} for at, each in enumerate(accuracies or [], start=1)
        ]
        environment = {**dict.fromkeys(ENVIRONMENT_KEYS), "git": COMMIT, "fop": fop.__version__}
        ends = {"diverged": accuracies is None, "curve": curve, "environment": environment}
        return {
            **dict.fromkeys(KEYS),
            **asdict(described),
            **ends,
            "data": sitting.data or RandomImages.origin,
        }

    monkeypatch.setattr(runner, "execute", execute)


def accuracies(described: Description) -> list[float]:
    """Return a curve that differs from run to run; by its mean another rate is the best than by its end."""
    draw = torch.Generator().manual_seed(sum(identity(asdict(described)).encode()))
    return torch.rand(8, generator=draw).tolist()


def final_of(name: str, recipe: str = "tiny", **changes: Any) -> Description:
    options = next(CONTENDERS[name].combinations()) if name in CONTENDERS else {}
    described = Description(recipe, "random", "all", "final", name, options, 8, 3, seed=4)
    return replace(described, **changes)


def sat(described: Description, folder: Path, deadline: float = math.inf) -> Record | None:
    """Make a run as far as it comes in one sitting, with its state in a folder."""
    return execute(described, Sitting(None, folder, deadline, "", None), CPU)


def finished(described: Description, folder: Path) -> Record:
    record = sat(described, folder)
    assert record is not None
    json.dumps(record, allow_nan=False)
    return record


@contextmanager
def seconds_as_steps() -> Iterator[None]:
    """Let the time of runner and runs be the number of training steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "time", SimpleNamespace(monotonic=lambda: Clock.now))
        yield


def program() -> None:
    """Be `fop-bench run` with the recipe of these tests, slow steps, and a save before each of them."""
    RECIPES["tiny"] = TINY
    runner.git_state = environment.git_state = lambda source: COMMIT
    runner.SECONDS_BETWEEN_SAVES = 0.0
    Clock.really = 0.03
    torch.set_num_threads(1)


# Workers import the program under the second name.
if __name__ in ("__main__", "__mp_main__"):
    program()
if __name__ == "__main__":
    from fop_bench.cli import main

    main()
