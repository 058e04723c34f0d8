"""The runs of a study: which, in what order, and what is left of them after any kind of end.

Run as a program, this file is `fop-bench` with the recipe of these tests.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fop
from fop_bench import environment as environment_module
from fop_bench import execution, runner, training
from fop_bench.augmentation import Augmentation
from fop_bench.environment import git_state
from fop_bench.execution import Description, execute
from fop_bench.images import Images
from fop_bench.optimizers import BUILDERS
from fop_bench.recipes import RECIPES
from fop_bench.recipes.recipe import Contender, Parts, Recipe, Study, by_plateau
from fop_bench.run_cli import run as command
from fop_bench.run_records import ENVIRONMENT_KEYS, EPOCH_KEYS, KEYS, LAYER_KEYS, read_runs
from fop_bench.runner import Record, Selection, best_options, make, planned
from fop_bench.world import World

WORLD = World(torch.device("cpu"))
COMMIT = {"commit": "0123456789abcdef", "dirty": False}
TRAIN, HELD_OUT, TEST = 24, 9, 12
STEPS = TRAIN // 8

# --- A recipe that takes milliseconds


class RandomImages:
    """Three classes of 8×8 pixels that differ in their mean."""

    origin = "random numbers"

    def __init__(self, joined: bool = False) -> None:
        self.joined = joined

    def load(self, data: str | None, rank: int = 0, ranks: int = 1) -> Parts:
        draw = torch.Generator().manual_seed(7)

        def images(count: int) -> Images:
            labels = torch.arange(count) % 3
            pixels = torch.randint(0, 150, (count, 8, 8, 3), generator=draw) + 40 * labels.view(-1, 1, 1, 1)
            return Images(pixels.to(torch.uint8), labels, ("a", "b", "c"))

        return Parts(images(TRAIN), images(HELD_OUT), images(TEST), self.joined)


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
        Clock(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 6),
        nn.ReLU(),
        nn.Linear(6, classes),
    )


RATES = {"lr": (0.01, 0.1, 0.3)}
FREQUENT = {"curvature_interval": 2}
CONTENDERS = {
    "sgd": Contender("sgd", RATES),
    "adamw": Contender("adamw", {"lr": (0.001, 0.003, 0.01)}),
    "kfac": Contender("kfac", RATES, lambda batch_size: FREQUENT),
    "fop": Contender("fop", RATES, lambda batch_size: FREQUENT),
    "muon": Contender("muon", RATES),
    "soap": Contender("soap", {"lr": (0.001, 0.003, 0.01)}),
    "lamb": Contender("lamb", {"lr": (0.001, 0.003, 0.01)}),
    "shampoo": Contender("shampoo", {"lr": (0.001, 0.003, 0.01)}),
    "fop-fixed": Contender("fop", RATES, lambda batch_size: FREQUENT, "FOP, fixed", halves="fixed"),
    "fop-classes": Contender("fop", RATES, lambda batch_size: FREQUENT, "FOP, classes", halves="classes"),
    "fop-damped": Contender("fop", RATES, lambda batch_size: FREQUENT, "F̂", formula="damped projection"),
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
        "map": Study({"sgd": CONTENDERS["sgd"]}, {8: 1}, seeds=(5, 6), tuned=False),
        "large": Study({"sgd": Contender("sgd", {"lr": (0.1,)})}, {TRAIN + HELD_OUT: 2}, seeds=(1,)),
    },
    targets={"accuracy": 0.5},
    augmentation=Augmentation(flip=True, shift=1, cutout=2),
)
PLATEAU = replace(TINY, name="tiny-plateau", schedule=by_plateau)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the recipe known, and tell every record the same commit, whatever is edited meanwhile."""
    for each in (TINY, PLATEAU):
        monkeypatch.setitem(RECIPES, each.name, each)
    monkeypatch.setattr(runner, "git_state", lambda source: COMMIT)
    monkeypatch.setattr(environment_module, "git_state", lambda source: COMMIT)
    monkeypatch.setattr(Clock, "now", 0.0)
    caches = execution.parts_of, execution._where
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def go(out: Path, study: str = "comparison", *, minutes: float = 60.0, jobs: int = 1, **chosen: Any) -> int:
    """Make the runs of a study of one task."""
    on_run = chosen.pop("on_run", lambda done, planned, title: None)
    selection = Selection("tiny", study, **{"tasks": ("random",), **chosen})
    return make(selection, data=None, world=WORLD, out=out, jobs=jobs, minutes=minutes, on_run=on_run)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def lines(path: Path) -> list[Record]:
    """Read a file of whole lines by hand."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def identity(record: Mapping[str, Any]) -> str:
    names = ("task", "phase", "contender", "options", "batch_size", "seed")
    return json.dumps([record[name] for name in names])


def result(record: Record) -> Any:
    """Give all of a record that does not tell the time."""
    curve = [{**epoch, "seconds": 0, "processor_seconds": 0} for epoch in record["curve"]]
    environment = {**record["environment"], "date": "", "command": ""}
    return {**record, "curve": curve, "environment": environment}


# --- Which runs, and in what order


def faked(monkeypatch: pytest.MonkeyPatch, curves: Callable[[Description], list[float] | None]) -> None:
    """Put records with given accuracies in place of runs; None for a diverged one."""

    def execute(description: Description, *others: Any) -> Record:
        accuracies = curves(description)
        curve = [
            {"epoch": at, "seconds": 1.0, "processor_seconds": 1.0, "train_loss": 1.0, "accuracy": accuracy}
            for at, accuracy in enumerate(accuracies or [], start=1)
        ]
        rest = {key: None for key in KEYS if key not in asdict(description)}
        environment = {**dict.fromkeys(ENVIRONMENT_KEYS), "git": COMMIT}
        ends = {"diverged": accuracies is None, "curve": curve, "environment": environment}
        return {**rest, **asdict(description), **ends}

    monkeypatch.setattr(runner, "execute", execute)


def accuracies(description: Description) -> list[float]:
    """Give a curve that differs from run to run; by its mean another rate is the best than by its end."""
    draw = torch.Generator().manual_seed(sum(identity(asdict(description)).encode()))
    return torch.rand(4, generator=draw).tolist()


@pytest.mark.parametrize(
    ("recipe", "study"),
    [(name, study) for name, plan in [*RECIPES.items(), ("tiny", TINY)] for study in plan.studies],
)
def test_every_contender_is_given_the_same_number_of_tuning_runs(recipe: str, study: str) -> None:
    chosen = Selection(recipe, study).checked()
    ready, left = planned(chosen, [])
    plan = RECIPES[recipe].studies[study]
    counts = Counter((run.phase, run.task, run.batch_size, run.contender) for run in ready)
    groups = len(chosen.tasks) * len(plan.epochs) * len(plan.contenders)
    assert len(counts) == groups, "every contender at every batch size, in one phase"
    assert len(set(counts.values())) == 1
    assert {phase for phase, *_ in counts} == {"tuning" if plan.tuned else "final"}
    finals = groups * len(plan.seeds) if plan.tuned else 0
    assert left == len(ready) + finals
    assert all(run.epochs == plan.epochs[run.batch_size] for run in ready)
    if plan.tuned:
        assert {run.seed for run in ready} == {0}
        assert 0 not in plan.seeds


def test_finals_come_after_all_tuning_with_the_best_options_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, accuracies)
    assert go(tmp_path, "all") == 0
    records = lines(tmp_path / "all.jsonl")
    assert len(records) == len(CONTENDERS) * (3 + 2)
    by_end = 0
    for name, contender in CONTENDERS.items():
        of_contender = [record for record in records if record["contender"] == name]
        assert [record["phase"] for record in of_contender] == ["tuning"] * 3 + ["final"] * 2
        tuning, finals = of_contender[:3], of_contender[3:]
        assert [record["options"] for record in tuning] == list(contender.combinations())
        means = [statistics.fmean(epoch["accuracy"] for epoch in record["curve"]) for record in tuning]
        best = tuning[means.index(max(means))]["options"]
        assert [record["options"] for record in finals] == [best, best]
        assert [record["seed"] for record in finals] == [1, 2]
        by_end += best == max(tuning, key=lambda record: record["curve"][-1]["accuracy"])["options"]
    assert by_end < len(CONTENDERS), "the end alone must not decide"


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_no_final_is_ready_while_a_tuning_run_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """Several workers end their runs in any order."""
    faked(monkeypatch, accuracies)
    assert go(tmp_path, batch_sizes=(8,)) == 0
    tuning = [record for record in lines(tmp_path / "comparison.jsonl") if record["phase"] == "tuning"]
    absent = [record for record in tuning if record["contender"] == "sgd"][missing]
    chosen = replace(Selection("tiny", "comparison", ("random",)).checked(), batch_sizes=(8,))
    ready, left = planned(chosen, [record for record in tuning if record is not absent])
    assert Counter((run.contender, run.phase) for run in ready) == {("sgd", "tuning"): 1, ("fop", "final"): 2}
    assert left == 1 + 2 + 2
    assert next(run.options for run in ready if run.contender == "sgd") == absent["options"]
    # Runs of another batch size are no help.
    twelve = replace(chosen, batch_sizes=(12,))
    assert {run.phase for run in planned(twelve, tuning)[0]} == {"tuning"}


def test_contenders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    go(tmp_path)
    records = lines(tmp_path / "comparison.jsonl")
    assert [record["contender"] for record in records] == ["sgd", "fop"] * 10
    assert [record["batch_size"] for record in records] == [8] * 10 + [12] * 10


def test_options_of_one_batch_size_do_not_depend_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {8: 0.01, 12: 0.3}
    faked(monkeypatch, lambda run: [1.0 if run.options["lr"] == best[run.batch_size] else 0.2])
    assert go(tmp_path) == 0
    finals = [record for record in lines(tmp_path / "comparison.jsonl") if record["phase"] == "final"]
    assert Counter((record["batch_size"], record["options"]["lr"]) for record in finals) == {
        (8, 0.01): 4,
        (12, 0.3): 4,
    }


def test_diverged_tuning_runs_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, lambda run: None if run.options["lr"] != 0.3 else [0.0])
    assert go(tmp_path, batch_sizes=(8,), contenders=("sgd",)) == 0
    finals = [record for record in lines(tmp_path / "comparison.jsonl") if record["phase"] == "final"]
    assert [record["options"] for record in finals] == [{"lr": 0.3}] * 2


def test_where_every_tuning_run_diverged_the_first_options_show_it() -> None:
    def diverged(lr: float) -> Record:
        # A run that diverges late has a curve.
        return {"options": {"lr": lr}, "diverged": True, "curve": [{"accuracy": lr}]}

    assert best_options([diverged(0.1), diverged(0.9)]) == {"lr": 0.1}
    alive = {"options": {"lr": 0.5}, "diverged": False, "curve": [{"accuracy": 0.0}]}
    assert best_options([diverged(0.1), diverged(0.9), alive]) == {"lr": 0.5}


def test_a_map_makes_every_combination_with_every_seed(tmp_path: Path) -> None:
    assert go(tmp_path, "map") == 0
    records = lines(tmp_path / "map.jsonl")
    assert {record["phase"] for record in records} == {"final"}
    expected = Counter((lr, seed) for lr in RATES["lr"] for seed in (5, 6))
    assert Counter((record["options"]["lr"], record["seed"]) for record in records) == expected


def test_a_selection_can_be_widened_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    path = tmp_path / "comparison.jsonl"
    assert go(tmp_path, contenders=("fop",), batch_sizes=(12,)) == 0
    first = lines(path)
    assert len(first) == 5
    assert {(record["contender"], record["batch_size"]) for record in first} == {("fop", 12)}
    assert go(tmp_path) == 0
    assert lines(path)[:5] == first
    assert len({identity(record) for record in lines(path)}) == len(lines(path)) == 20
    text = path.read_text()
    assert go(tmp_path) == 0
    assert path.read_text() == text, "there is nothing left to do"


def test_progress_counts_all_runs_of_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    told = []
    go(tmp_path, batch_sizes=(8,), on_run=lambda *each: told.append(each))
    assert {total for _, total, _ in told} == {10}
    assert [done for done, _, _ in told] == [at for done in range(10) for at in (done, done + 1)]
    assert "sgd" in told[0][2]
    assert "tuning" in told[0][2]


@pytest.mark.parametrize("value", [None, "adaptive", (0.9, 0.99), True])
def test_a_grid_may_hold_other_values_than_numbers(value: Any) -> None:
    described = Description("tiny", "random", "all", "tuning", "fop", {"kl_clip": value}, 8, 3, 0)
    assert "kl_clip" in described.title


# --- Records


def test_records_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "git_state", git_state)
    assert go(tmp_path, batch_sizes=(8,)) == 0
    path = tmp_path / "comparison.jsonl"
    records = lines(path)
    assert read_runs(tmp_path) == read_runs(path) == records
    for record in records:
        assert set(KEYS) <= record.keys()
        assert set(ENVIRONMENT_KEYS) <= record["environment"].keys()
        assert [epoch["epoch"] for epoch in record["curve"]] == [1, 2]
        for epoch in record["curve"]:
            assert epoch.keys() == set(EPOCH_KEYS)
            assert 0 <= epoch["accuracy"] <= 1
            assert 0 < epoch["train_loss"] < 10
        assert 0 < record["curve"][0]["seconds"] < record["curve"][1]["seconds"]
        assert record["recipe"] == "tiny"
        assert record["study"] == "comparison"
        assert record["label"] == {"sgd": "SGD", "fop": "FOP"}[record["contender"]]
        assert record["train_samples"] == TRAIN
        assert record["parameters"] == sum(p.numel() for p in network(3).parameters())
        judged = ("test", TEST) if record["phase"] == "final" else ("held-out", HELD_OUT)
        assert (record["evaluated_on"], record["evaluated_samples"]) == judged
        assert record["all_options"].items() >= record["options"].items()
        assert record["targets"] == {"accuracy": 0.5}
        assert record["augmentation"] == {"flip": True, "shift": 1, "cutout": 2}
        assert record["environment"]["threads"] == 1
        assert record["environment"]["processor"] == "cpu"
        described = git_state(Path(fop.__file__))
        assert (record["environment"]["git"] is None) == (described is None)
        if described is not None:
            assert record["environment"]["git"]["commit"] == described["commit"]
    assert not list((tmp_path / "unfinished").glob("*"))


def test_layers_are_noted_for_fop_alone_and_after_every_epoch(tmp_path: Path) -> None:
    assert go(tmp_path, batch_sizes=(8,)) == 0
    for record in lines(tmp_path / "comparison.jsonl"):
        layers = record["layers"]
        if (record["contender"], record["phase"]) != ("fop", "final"):
            assert layers is None
            continue
        assert layers.keys() == set(LAYER_KEYS)
        assert layers["names"] == ["1", "6", "8"]
        assert len(layers["epochs"]) == 2
        for scalar in ("beta", "eta", "rho"):
            assert [len(epoch) for epoch in layers[scalar]] == [3, 3]
        assert all(0 <= rho <= 1 for epoch in layers["rho"] for rho in epoch)


def test_layers_have_the_epoch_of_the_curve(tmp_path: Path) -> None:
    go(tmp_path, batch_sizes=(8,), contenders=("fop",))
    final = lines(tmp_path / "comparison.jsonl")[-1]
    assert final["layers"]["epochs"] == [epoch["epoch"] for epoch in final["curve"]]


def final_of(name: str, recipe: str = "tiny", **changes: Any) -> Description:
    options = next(CONTENDERS[name].combinations()) if name in CONTENDERS else {}
    described = Description(recipe, "random", "all", "final", name, options, 8, 3, seed=4)
    return replace(described, **changes)


def finished(described: Description, saved: Path, deadline: float = math.inf) -> Record:
    record = execute(described, None, WORLD, saved, deadline, "")
    assert record is not None
    json.dumps(record, allow_nan=False)
    return record


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("lr", [1e3, 1e15, 1e30])
def test_divergence_is_reported_in_strict_json(tmp_path: Path, name: str, lr: float) -> None:
    contender = Contender(
        name, RATES, lambda batch_size: {"kl_clip": None} if name in ("kfac", "fop") else {}
    )
    RECIPES["tiny"] = replace(TINY, studies={"all": Study({name: contender}, {8: 6}, seeds=(1,))})
    record = finished(final_of(name, options={"lr": lr}, epochs=6), tmp_path / "a.pt")
    assert record["diverged"] == (len(record["curve"]) < 6)
    if name == "sgd" and lr > 1e3:
        assert record["diverged"]
    runner._append(tmp_path / "all.jsonl", record)
    assert read_runs(tmp_path) == lines(tmp_path / "all.jsonl") == [json.loads(json.dumps(record))]


def test_a_layer_without_a_finite_scalar_is_noted_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(fop.FOP):
        def diagnostics(self) -> Any:
            told = super().diagnostics()
            return replace(told, layers={n: replace(d, rho=math.nan) for n, d in told.layers.items()})

    monkeypatch.setitem(BUILDERS, "fop", ("FOP", lambda model, **options: Broken(model, **options)))
    monkeypatch.setattr(execution, "FOP", Broken)
    assert finished(final_of("fop"), tmp_path / "a.pt")["layers"]["rho"] == [[None] * 3] * 3


def test_tuning_holds_out_what_finals_train_on(tmp_path: Path) -> None:
    """The task's own held-out images are joined for the final run, whose batch is then all of them."""
    assert go(tmp_path, "large", tasks=("joined",)) == 0
    tuning, final = lines(tmp_path / "large.jsonl")
    assert (tuning["train_samples"], tuning["evaluated_samples"]) == (TRAIN, HELD_OUT)
    assert (final["train_samples"], final["evaluated_samples"]) == (TRAIN + HELD_OUT, TEST)
    assert tuning["batch_size"] == final["batch_size"] == TRAIN + HELD_OUT


def test_a_batch_larger_than_the_data_is_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"batch.*{TRAIN + HELD_OUT}.*{TRAIN}"):
        go(tmp_path, "large", tasks=("random",))
    assert not (tmp_path / "large.jsonl").read_text()


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    first = finished(final_of("sgd"), tmp_path / "a.pt")
    torch.manual_seed(1234)
    assert result(first) == result(finished(final_of("sgd"), tmp_path / "a.pt"))
    other = finished(final_of("sgd", seed=5), tmp_path / "a.pt")
    assert result(first)["curve"] != result(other)["curve"]


# --- Stopping and going on


class Ticks:
    """A time that each look at it moves on by one; it may end in an interrupt."""

    def __init__(self, kill_at: float = math.inf) -> None:
        self.now, self.kill_at = 0, kill_at

    def monotonic(self) -> float:
        self.now += 1
        if self.now == self.kill_at:
            raise KeyboardInterrupt
        return self.now


def ticking(monkeypatch: pytest.MonkeyPatch, kill_at: float = math.inf) -> None:
    monkeypatch.setattr(execution, "time", Ticks(kill_at))


# The first look is before the first step, the next ones are before each of them.
ONE_STEP = 3


def in_sittings(described: Description, saved: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, int]:
    """Make a run with a stop after every step, each sitting in a process that knows nothing of the last."""
    for sitting in range(1, 100):
        torch.manual_seed(1000 + sitting)
        ticking(monkeypatch)
        if (record := execute(described, None, WORLD, saved, ONE_STEP, "")) is not None:
            return record, sitting
        assert saved.exists()
    raise AssertionError("the run does not end")


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "tiny") for name in CONTENDERS), ("sgd", "tiny-plateau")]
)
def test_a_run_with_a_stop_after_every_step_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipe: str
) -> None:
    described = final_of(name, recipe)
    expected = finished(described, tmp_path / "a.pt")
    assert not expected["diverged"]
    assert expected["curve"][0]["train_loss"] != expected["curve"][2]["train_loss"]
    got, sittings = in_sittings(described, tmp_path / "b.pt", monkeypatch)
    assert sittings == 3 * STEPS
    assert result(got) == result(expected)
    assert (expected["layers"] is None) == (CONTENDERS[name].optimizer != "fop")


@pytest.mark.parametrize("kill_at", [2, 3, 5, 8])
def test_a_killed_run_goes_on_from_what_was_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    expected = finished(final_of("fop"), tmp_path / "a.pt")
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    saved = tmp_path / "b.pt"
    ticking(monkeypatch, kill_at)
    with pytest.raises(KeyboardInterrupt):
        execute(final_of("fop"), None, WORLD, saved, math.inf, "")
    assert saved.exists() == (kill_at > 2)
    ticking(monkeypatch)
    steps = Clock.now
    assert result(finished(final_of("fop"), saved)) == result(expected)
    assert Clock.now - steps == 3 * STEPS - max(0, kill_at - 3), "no step is made twice but the last"


def test_a_kill_while_saving_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finished(final_of("sgd"), tmp_path / "a.pt")
    saved = tmp_path / "b.pt"
    ticking(monkeypatch)
    assert execute(final_of("sgd"), None, WORLD, saved, ONE_STEP, "") is None
    before = saved.read_bytes()

    def cut_short(state: Any, path: Path) -> None:
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut_short)
        ticking(patched)
        with pytest.raises(KeyboardInterrupt):
            execute(final_of("sgd"), None, WORLD, saved, ONE_STEP, "")
    assert saved.read_bytes() == before
    ticking(monkeypatch)
    assert result(finished(final_of("sgd"), saved)) == result(expected)


def test_a_file_that_is_no_state_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "b.pt"
    saved.write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"{saved} is not a saved run .*delete it to start that run again"):
        execute(final_of("sgd"), None, WORLD, saved, math.inf, "")
    assert saved.read_bytes() == b"broken"


SECONDS = [float(STEPS), 2.0 * STEPS, 3.0 * STEPS]


def seconds(record: Record) -> list[float]:
    return [epoch["seconds"] for epoch in record["curve"]]


def test_seconds_are_those_of_all_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    assert seconds(finished(final_of("sgd"), tmp_path / "a.pt")) == SECONDS
    assert seconds(in_sittings(final_of("sgd"), tmp_path / "b.pt", monkeypatch)[0]) == SECONDS


def test_a_killed_run_keeps_the_seconds_of_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch, kill_at=4)
    with pytest.raises(KeyboardInterrupt):
        execute(final_of("sgd"), None, WORLD, tmp_path / "b.pt", math.inf, "")
    ticking(monkeypatch)
    assert Clock.now == 2
    # The second step is made before the state with it is saved.
    assert seconds(finished(final_of("sgd"), tmp_path / "b.pt")) == SECONDS


def test_seconds_leave_saving_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def slow_save(state: Any, path: Path) -> None:
        Clock.now += 1000.0
        save(state, path)

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch)
    assert seconds(finished(final_of("sgd"), tmp_path / "a.pt")) == SECONDS


def test_warnings_of_all_sittings_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = BUILDERS["sgd"][1]

    def noisy(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizer = build(model, **options)
        steps = iter(range(100))

        def warn(*ignored: Any) -> None:
            if next(steps) == 0 and Clock.now == 1:
                warnings.warn("in the first step", UserWarning, stacklevel=1)

        optimizer.register_step_pre_hook(warn)
        return optimizer

    monkeypatch.setitem(BUILDERS, "sgd", ("SGD", noisy))
    expected = finished(final_of("sgd"), tmp_path / "a.pt")["warnings"]
    assert "UserWarning: in the first step" in expected
    Clock.now = 0.0
    record, _ = in_sittings(final_of("sgd"), tmp_path / "b.pt", monkeypatch)
    assert set(record["warnings"]) >= set(expected)


@contextmanager
def seconds_as_steps() -> Iterator[None]:
    """Let the time of runner and runs be the number of training steps."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (runner, execution):
            patched.setattr(module, "time", SimpleNamespace(monotonic=lambda: Clock.now))
        yield


@pytest.mark.parametrize("sitting", [1, 7, 10])
def test_minutes_end_a_sitting_anywhere_and_the_next_goes_on(tmp_path: Path, sitting: int) -> None:
    assert go(tmp_path / "whole", "comparison", batch_sizes=(8,)) == 0
    expected = lines(tmp_path / "whole" / "comparison.jsonl")
    steps = 10 * 2 * STEPS
    left, sittings = math.inf, 0
    Clock.now = 0.0
    with seconds_as_steps():
        while left:
            before, had = Clock.now, left
            left = go(tmp_path / "slices", batch_sizes=(8,), minutes=sitting / 60)
            sittings += 1
            assert Clock.now - before == sitting or left == 0
            assert left <= had
    assert Clock.now == steps, "no step is made twice"
    assert sittings == math.ceil(steps / sitting) + (steps % sitting == 0 and left != 0)
    got = lines(tmp_path / "slices" / "comparison.jsonl")
    assert [result(record) for record in got] == [result(record) for record in expected]
    assert not list((tmp_path / "slices" / "unfinished").glob("*"))


def test_no_run_starts_when_the_time_is_over(tmp_path: Path) -> None:
    assert go(tmp_path, minutes=-1.0) == 20
    assert Clock.now == 0
    assert (tmp_path / "comparison.jsonl").read_bytes() == b""


# --- A file that others wrote to


def started(out: Path) -> Path:
    """Make the first runs of a study."""
    with seconds_as_steps():
        assert go(out, batch_sizes=(8,), minutes=4 * STEPS / 60) == 8
    path = out / "comparison.jsonl"
    assert len(lines(path)) == 2
    return path


@pytest.mark.parametrize("kept", [1, 200, -1])
def test_a_line_that_was_cut_off_is_put_aside_and_its_run_made_again(tmp_path: Path, kept: int) -> None:
    path = started(tmp_path)
    first, second = path.read_bytes().splitlines(keepends=True)
    cut = second[:kept]  # -1: all but the end of the line
    path.write_bytes(first + cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert go(tmp_path, batch_sizes=(8,)) == 0
    assert (tmp_path / "comparison.cut-off").read_bytes() == cut + b"\n"
    records = lines(path)
    assert len({identity(record) for record in records}) == len(records) == 10
    assert path.read_bytes().startswith(first)
    assert result(records[1]) == result(json.loads(second))
    assert "cut-off" not in "".join(file.name for file in tmp_path.glob("*.jsonl"))


def test_lines_that_are_put_aside_do_not_replace_each_other(tmp_path: Path) -> None:
    path = started(tmp_path)
    for cut in (b'{"first', b'{"second'):
        with path.open("ab") as file:
            file.write(cut)
        go(tmp_path, batch_sizes=(8,), minutes=-1.0)
    assert (tmp_path / "comparison.cut-off").read_bytes() == b'{"first\n{"second\n'


def test_a_first_line_that_was_cut_off_leaves_nothing_done(tmp_path: Path) -> None:
    (tmp_path / "comparison.jsonl").write_bytes('{"label": "é'.encode()[:-1])
    assert go(tmp_path, batch_sizes=(8,)) == 0
    assert len(lines(tmp_path / "comparison.jsonl")) == 10


@pytest.mark.parametrize("at", [0, 1])
def test_a_whole_line_that_is_broken_is_an_error_and_nothing_is_written(tmp_path: Path, at: int) -> None:
    path = started(tmp_path)
    content = path.read_bytes().splitlines(keepends=True)
    content[at] = b"\0\0\0\n"
    path.write_bytes(b"".join(content))
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=rf"{path}, line {at + 1} is not JSON"):
            go(tmp_path, batch_sizes=(8,))
    assert path.read_bytes() == before


def test_a_second_process_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, accuracies)
    path = tmp_path / "comparison.jsonl"
    refused = 0

    def second(done: int, planned: int, title: str) -> None:
        nonlocal refused
        before = path.read_bytes()
        with pytest.raises(BlockingIOError, match=rf"another fop-bench is writing {path}; wait for it, or"):
            go(tmp_path)
        told = invoke(tmp_path)
        assert told.exit_code == 1
        assert f"Error: another fop-bench is writing {path}" in told.output
        assert path.read_bytes() == before
        refused += 1

    assert go(tmp_path, on_run=second, batch_sizes=(8,)) == 0
    assert refused == 20
    assert go(tmp_path) == 0, "afterwards the file is free"


OTHER = {"commit": "fedcba9876543210", "dirty": False}


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (OTHER, "this is commit fedcba9876:"),
        ({**COMMIT, "dirty": True}, "this is commit 0123456789 with uncommitted changes:"),
        (None, "this is an installed package:"),
    ],
)
def test_runs_of_another_commit_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Any, words: str
) -> None:
    path = started(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(runner, "git_state", lambda source: here)
    with pytest.raises(ValueError, match=f"holds 2 runs of commit 0123456789, and {words}.*another --out"):
        go(tmp_path)
    told = invoke(tmp_path)
    assert told.exit_code == 1
    assert "commit 0123456789" in told.output
    assert path.read_bytes() == before


def test_an_unfinished_run_of_another_commit_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seconds_as_steps():
        assert go(tmp_path, batch_sizes=(8,), minutes=1 / 60) == 10
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) == 1
    execution._where.cache_clear()
    monkeypatch.setattr(runner, "git_state", lambda source: OTHER)
    monkeypatch.setattr(environment_module, "git_state", lambda source: OTHER)
    with pytest.raises(ValueError, match=r"unfinished.*commit 0123456789.*commit fedcba9876"):
        go(tmp_path, batch_sizes=(8,))


def test_records_name_the_commit_that_the_command_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [COMMIT]
    monkeypatch.setattr(runner, "git_state", lambda source: now[0])
    monkeypatch.setattr(environment_module, "git_state", lambda source: now[0])

    def commit_something(done: int, planned: int, title: str) -> None:
        now[0] = OTHER

    go(tmp_path, batch_sizes=(8,), contenders=("sgd",), on_run=commit_something)
    records = lines(tmp_path / "comparison.jsonl")
    assert [record["environment"]["git"] for record in records] == [COMMIT] * 5


# --- Errors


def invoke(out: Path, *arguments: str, recipe: str = "tiny") -> Any:
    asked = [recipe, "--task", "random", "--jobs", "1", "--device", "cpu", "--out", str(out), *arguments]
    return CliRunner().invoke(command, asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--study", "x"), "unknown study 'x' of tiny; known are comparison, all, map, large"),
        (("--task", "x"), "unknown task 'x'; known are random, joined"),
        (("--optimizer", "adam"), "unknown optimizer 'adam'; known are sgd, fop"),
        (("--batch", "7"), "unknown batch size 7; known are 8, 12"),
    ],
)
def test_unknown_names_list_the_known_ones(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    told = invoke(tmp_path / "out", *arguments)
    assert told.exit_code == 1
    assert f"Error: {message}" in told.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    told = invoke(tmp_path / "out", recipe="huge")
    assert told.exit_code == 1
    assert f"Error: unknown recipe 'huge'; known are {', '.join(RECIPES)}" in told.output
    assert "cifar10-small" in told.output


@pytest.mark.parametrize("minutes", ["0", "-1", "x"])
def test_minutes_must_be_a_time(tmp_path: Path, minutes: str) -> None:
    assert invoke(tmp_path / "out", "--minutes", minutes).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_left_and_goes_on(tmp_path: Path) -> None:
    asked = ("--batch", "8", "--optimizer", "sgd")
    with seconds_as_steps():
        told = invoke(tmp_path, *asked, "--minutes", str(3 * STEPS / 60))
        assert (told.exit_code, Clock.now) == (0, 3 * STEPS)
    path = tmp_path / "comparison.jsonl"
    assert f"{path}: 4 runs left; the same command goes on" in told.output
    assert len(lines(path)) == 1
    told = invoke(tmp_path, *asked)
    assert told.exit_code == 0
    assert f"{path}: complete" in told.output
    assert len(lines(path)) == 5


def pool_of(monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Future[Record | None]]) -> None:
    """Put another pool of workers in place."""

    @contextmanager
    def workers(jobs: int, *world: World) -> Iterator[Callable[..., Future[Record | None]]]:
        yield submit

    monkeypatch.setattr(runner, "_workers", workers)


def test_the_death_of_a_worker_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*arguments: Any) -> Future[Record | None]:
        future: Future[Record | None] = Future()
        future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return future

    pool_of(monkeypatch, submit)
    told = invoke(tmp_path)
    assert told.exit_code == 1
    assert "Error: " in told.output
    assert "--jobs" in told.output


def test_a_run_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    timers = []

    def submit(function: Callable[..., Record], *arguments: Any) -> Future[Record | None]:
        future: Future[Record | None] = Future()
        if not timers:
            future.set_exception(ValueError("images/1.png cannot be decoded"))
            timers.append(None)
        else:
            timers.append(threading.Timer(0.2, lambda: future.set_result(function(*arguments))))
            timers[-1].start()
        return future

    pool_of(monkeypatch, submit)
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded"):
        go(tmp_path, jobs=2)
    for timer in timers[1:]:
        timer.join()
    assert len(lines(tmp_path / "comparison.jsonl")) == len(timers) - 1 > 0


# --- Real processes that are killed


class Places:
    """Where a process kills itself: each function puts the end into a place that is passed ``due`` times."""

    def __init__(self, due: int) -> None:
        self.passed, self.due = 0, due

    def reached(self) -> bool:
        self.passed += 1
        return self.passed == self.due

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_a_step(self) -> None:
        step = Clock.forward

        def forward(module: Clock, x: torch.Tensor) -> torch.Tensor:
            if module.training and self.reached():
                self.end()
            return step(module, x)

        Clock.forward = forward

    def in_a_state(self) -> None:
        save = torch.save

        def half(state: Any, path: Path) -> None:
            save(state, path)
            if self.reached():
                path.write_bytes(path.read_bytes()[:1000])
                self.end()

        torch.save = half

    def before_a_state_gets_its_name(self) -> None:
        replaced = Path.replace

        def late(path: Path, target: Path) -> Path:
            if self.reached():
                self.end()
            return replaced(path, target)

        Path.replace = late

    def before_a_line(self) -> None:
        self._with_line(lambda path, record, append: None)

    def in_a_line(self) -> None:
        def half(path: Path, record: Record, append: Callable[[Path, Record], None]) -> None:
            before = path.stat().st_size
            append(path, record)
            os.truncate(path, (before + path.stat().st_size) // 2)

        self._with_line(half)

    def behind_a_line(self) -> None:
        self._with_line(lambda path, record, append: append(path, record))

    def _with_line(self, last: Callable[[Path, Record, Callable[[Path, Record], None]], None]) -> None:
        append = runner._append

        def appended(path: Path, record: Record) -> None:
            if self.reached():
                last(path, record, append)
                self.end()
            append(path, record)

        runner._append = appended


PLACES = [name for name in vars(Places) if name.startswith(("in_", "before_", "behind_"))]


def killed(out: Path, place: str, due: int) -> None:
    """Make runs in a process that gets no further than to a place."""
    child = os.fork()
    if child == 0:
        try:
            execution.SECONDS_BETWEEN_SAVES = 0.0
            getattr(Places(due), place)()
            go(out, batch_sizes=(8,))
        finally:
            os._exit(0)  # was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def complete(out: Path, expected: list[Record]) -> None:
    """See that a study is what it would be had nothing happened."""
    records = lines(out / "comparison.jsonl")
    by_identity = {identity(record): result(record) for record in records}
    assert len(by_identity) == len(records) == len(expected) == 10
    assert by_identity == {identity(record): result(record) for record in expected}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Record]]:
    """Give the runs of a study that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RECIPES, "tiny", TINY)
        patched.setattr(runner, "git_state", lambda source: COMMIT)
        patched.setattr(environment_module, "git_state", lambda source: COMMIT)
        assert go(out, batch_sizes=(8,)) == 0
        yield lines(out / "comparison.jsonl")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_place_loses_nothing(tmp_path: Path, whole: list[Record], place: str) -> None:
    before = b""
    for due in (1, 3, 2):
        killed(tmp_path, place, due)
        now = (tmp_path / "comparison.jsonl").read_bytes()
        # What was a whole line stays, in its place.
        assert now.startswith(before)
        before = now[: now.rfind(b"\n") + 1]
    cut = now[len(before) :]
    assert bool(cut) == (place == "in_a_line")
    assert go(tmp_path, batch_sizes=(8,)) == 0
    complete(tmp_path, whole)
    aside = tmp_path / "comparison.cut-off"
    if place == "in_a_line":
        assert aside.read_bytes().endswith(cut + b"\n")
        assert aside.read_bytes().count(b"\n") == 3
    else:
        assert not aside.exists()


def program() -> None:
    """Be `fop-bench run` with the recipe of these tests, slow steps, and a save before each of them."""
    RECIPES["tiny"] = TINY
    runner.git_state = environment_module.git_state = lambda source: COMMIT
    execution.SECONDS_BETWEEN_SAVES = 0.0
    Clock.really = 0.03
    torch.set_num_threads(1)


def alive(mark: str) -> set[int]:
    """Give the living processes that have a mark in their environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is of someone else
            if mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.005)


# One start alone: it imports everything three times, in the command and in both of its workers.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_worker_and_nothing_is_lost(tmp_path: Path, whole: list[Record]) -> None:
    mark = uuid.uuid4().hex
    path, log = tmp_path / "comparison.jsonl", tmp_path / "log"
    asked = ["tiny", "--task", "random", "--batch", "8", "--jobs", "2", "--device", "cpu"]
    with log.open("wb") as output:
        parent = subprocess.Popen(
            [sys.executable, __file__, *asked, "--out", str(tmp_path)],
            env={**os.environ, "FOP_TEST": mark},
            stdout=output,
            stderr=output,
        )
    try:

        def due() -> bool:
            return parent.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") >= 3)

        wait_until(due, 100, "three runs")
        workers = alive(mark) - {parent.pid}
        assert len(workers) >= 2, log.read_text()
        with pytest.raises(BlockingIOError, match="another fop-bench is writing"):
            go(tmp_path)
    finally:
        parent.kill()
    assert parent.wait() == -signal.SIGKILL, log.read_text()
    wait_until(lambda: not alive(mark), 10, "the workers of a killed process end")
    before = path.read_bytes()
    assert "test_runner.py tiny" in json.loads(before.splitlines()[0])["environment"]["command"]
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) in (1, 2), "runs that were under way"
    assert go(tmp_path, batch_sizes=(8,)) == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    complete(tmp_path, whole)


# Workers import the program under the second name.
if __name__ in ("__main__", "__mp_main__"):
    program()
if __name__ == "__main__":
    command()
