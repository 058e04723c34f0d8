"""The runs of a study: which, in what order, and what their records hold."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fop
from fop_bench import recipe_runs, runner
from fop_bench.environment import git_state
from fop_bench.optimizers import PEERS, Peer
from fop_bench.recipe_runs import Description, Selection, best_options, planned
from fop_bench.recipes import RECIPES, Study
from fop_bench.records import ENVIRONMENT_KEYS, KEYS, Record, read_runs
from tiny_study import (
    CONTENDERS,
    HELD_OUT,
    TEST,
    TINY,
    TRAIN,
    accuracies,
    faked,
    final_of,
    finished,
    go,
    identity,
    lines,
    network,
    result,
    tiny_recipe,  # noqa: F401 - for every test here
)

# --- Which runs, and in what order


@pytest.mark.parametrize(
    ("recipe", "study"),
    [(name, study) for name, plan in [*RECIPES.items(), ("tiny", TINY)] for study in plan.studies],
)
def test_every_contender_is_given_the_same_number_of_runs(recipe: str, study: str) -> None:
    chosen = Selection(recipe, study)
    ready, left = planned(chosen, [])
    plan = RECIPES[recipe].studies[study]
    counts = Counter((run.phase, run.task, run.batch_size, run.contender) for run in ready)
    groups = len(chosen.tasks) * len(plan.epochs) * len(plan.contenders)
    assert len(counts) == groups, "every contender at every batch size, in one phase"
    assert {phase for phase, *_ in counts} == {"tuning"}
    assert left == len(ready) + groups * len(plan.seeds)
    assert all(run.epochs == plan.epochs[run.batch_size] for run in ready)
    assert {run.seed for run in ready} == {0}
    assert len(set(counts.values())) == 1
    assert 0 not in plan.seeds, "the tuning seed is no final one"


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
    assert go(tmp_path) == 0
    tuning = [record for record in lines(tmp_path / "comparison.jsonl") if record["phase"] == "tuning"]
    absent = [record for record in tuning if record["contender"] == "sgd"][missing]
    chosen = replace(Selection("tiny", "comparison", ("random",)), batch_sizes=(8,))
    ready, left = planned(chosen, [record for record in tuning if record is not absent])
    assert Counter((run.contender, run.phase) for run in ready) == {("sgd", "tuning"): 1, ("fop", "final"): 2}
    assert left == 1 + 2 + 2
    assert next(run.options for run in ready if run.contender == "sgd") == absent["options"]
    # Runs of another batch size are no help.
    twelve = replace(chosen, batch_sizes=(12,))
    assert {run.phase for run in planned(twelve, tuning)[0]} == {"tuning"}


def test_contenders_take_turns_and_every_batch_size_has_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {8: 0.01, 12: 0.3}
    # A diverged run loses even against one that is never right.
    faked(monkeypatch, lambda run: [0.0] if run.options["lr"] == best[run.batch_size] else None)
    assert go(tmp_path, batch_sizes=()) == 0
    records = lines(tmp_path / "comparison.jsonl")
    assert [record["contender"] for record in records] == ["sgd", "fop"] * 10
    assert [record["batch_size"] for record in records] == [8] * 10 + [12] * 10
    finals = [(each["batch_size"], each["options"]["lr"]) for each in records if each["phase"] == "final"]
    assert Counter(finals) == {(8, 0.01): 4, (12, 0.3): 4}


def test_where_every_tuning_run_diverged_the_first_options_show_it() -> None:
    def run(lr: float, accuracy: float, diverged: bool = True) -> Record:
        # A run that diverges late has a curve.
        return {"options": {"lr": lr}, "diverged": diverged, "curve": [{"accuracy": accuracy}]}

    assert best_options([run(0.1, 0.1), run(0.9, 0.9)]) == {"lr": 0.1}
    assert best_options([run(0.1, 0.1), run(0.9, 0.9), run(0.5, 0.0, diverged=False)]) == {"lr": 0.5}


def test_a_selection_can_be_widened_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    path = tmp_path / "comparison.jsonl"
    assert go(tmp_path, contenders=("fop",), batch_sizes=(12,)) == 0
    first = lines(path)
    assert {(record["contender"], record["batch_size"]) for record in first} == {("fop", 12)}
    assert go(tmp_path, batch_sizes=()) == 0
    assert lines(path)[:5] == first
    assert len({identity(record) for record in lines(path)}) == len(lines(path)) == 20
    text = path.read_text()
    assert go(tmp_path, batch_sizes=()) == 0
    assert path.read_text() == text, "there is nothing left to do"


def test_progress_counts_all_runs_of_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    told: list[tuple[int, int, str]] = []
    go(tmp_path, on_run=lambda *each: told.append(each))
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
    assert go(tmp_path) == 0
    path = tmp_path / "comparison.jsonl"
    records = lines(path)
    assert read_runs(tmp_path) == read_runs(path) == records
    for record in records:
        assert set(KEYS) <= record.keys()
        assert set(ENVIRONMENT_KEYS) <= record["environment"].keys()
        assert [epoch["epoch"] for epoch in record["curve"]] == [1, 2]
        for epoch in record["curve"]:
            assert epoch.keys() == {"epoch", "seconds", "processor_seconds", "train_loss", "accuracy"}
            assert 0 <= epoch["accuracy"] <= 1
            assert 0 < epoch["train_loss"] < 10
        assert 0 < record["curve"][0]["seconds"] < record["curve"][1]["seconds"]
        final = record["phase"] == "final"
        expected = {
            "recipe": "tiny",
            "study": "comparison",
            "label": {"sgd": "SGD", "fop": "FOP"}[record["contender"]],
            "train_samples": TRAIN,
            "parameters": sum(p.numel() for p in network(3).parameters()),
            "evaluated_on": "test" if final else "held-out",
            "evaluated_samples": TEST if final else HELD_OUT,
            "targets": {"accuracy": 0.5},
            "augmentation": {"flip": True, "shift": 1},
        }
        assert expected.items() <= record.items()
        assert record["all_options"].items() >= record["options"].items()
        where = {"threads": 1, "processor": "cpu", "git": git_state(Path(fop.__file__))}
        assert where.items() <= record["environment"].items()
        layers = record["layers"]
        if not final or record["contender"] == "sgd":
            assert layers is None
            continue
        assert layers.keys() == {"names", "epochs", "beta", "eta", "rho", "noise"}
        assert layers["names"] == ["1", "6", "8"]
        assert layers["epochs"] == [1, 2]
        for scalar in ("beta", "eta", "rho", "noise"):
            assert [len(epoch) for epoch in layers[scalar]] == [3, 3]
        for scalar in ("rho", "noise"):
            assert all(0 <= share <= 1 for epoch in layers[scalar] for share in epoch)
    assert not list((tmp_path / "unfinished").glob("*"))


@pytest.mark.parametrize("name", dict.fromkeys(each.optimizer for each in CONTENDERS.values()))
@pytest.mark.parametrize("lr", [1e3, 1e15, 1e30])
def test_divergence_is_reported_in_strict_json(tmp_path: Path, name: str, lr: float) -> None:
    contender = replace(CONTENDERS[name], fixed={"kl_clip": None} if name in ("kfac", "fop") else {})
    RECIPES["tiny"] = replace(TINY, studies={"all": Study({name: contender}, {8: 6}, seeds=(1,))})
    record = finished(final_of(name, options={"lr": lr}, epochs=6), tmp_path)
    assert record["diverged"] == (len(record["curve"]) < 6)
    if name == "sgd" and lr > 1e3:
        assert record["diverged"]
    runner.append(tmp_path / "all.jsonl", record)
    assert read_runs(tmp_path) == lines(tmp_path / "all.jsonl") == [json.loads(json.dumps(record))]


def test_a_layer_without_a_finite_scalar_is_noted_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(fop.FOP):
        def diagnostics(self) -> Any:
            told = super().diagnostics()
            return replace(told, layers={n: replace(d, rho=math.nan) for n, d in told.layers.items()})

    monkeypatch.setitem(PEERS, "fop", Peer("FOP", Broken))
    monkeypatch.setattr(recipe_runs, "FOP", Broken)
    assert finished(final_of("fop"), tmp_path)["layers"]["rho"] == [[None] * 3] * 3


def test_tuning_holds_out_what_finals_train_on(tmp_path: Path) -> None:
    """The task's own held-out images are joined for the final run, whose batch is then all of them."""
    assert go(tmp_path, "large", tasks=("joined",)) == 0
    tuning, final = lines(tmp_path / "large.jsonl")
    assert (tuning["train_samples"], tuning["evaluated_samples"]) == (TRAIN, HELD_OUT)
    assert (final["train_samples"], final["evaluated_samples"]) == (TRAIN + HELD_OUT, TEST)
    assert tuning["batch_size"] == final["batch_size"] == TRAIN + HELD_OUT


def test_a_batch_larger_than_the_data_is_refused_before_any_run_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"batch.*{TRAIN + HELD_OUT}.*{TRAIN}"):
        go(tmp_path, "large", tasks=("random",))
    assert not list(tmp_path.iterdir())


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    first = finished(final_of("sgd"), tmp_path)
    torch.manual_seed(1234)
    assert result(first) == result(finished(final_of("sgd"), tmp_path))
    other = finished(final_of("sgd", seed=5), tmp_path)
    assert result(first)["curve"] != result(other)["curve"]
