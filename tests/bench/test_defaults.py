"""The measurement of the defaults: its runs by the command, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import command
from command import Told
from fop_bench import cli, execution
from fop_bench.images import per_class
from fop_bench.recipes import CIFAR10, DEFAULTS, RECIPES, Contender, ImageTask
from fop_bench.study_report import read_defaults, write_defaults


def invoke(out: Path, *asked: str) -> Told:
    fixed = ("--jobs", "1", "--device", "cpu", "--out", str(out))
    return command.invoke("defaults", *asked, *fixed)


def shrink(monkeypatch: pytest.MonkeyPatch, **tasks: ImageTask) -> None:
    """Leave one learning rate, epoch and seed of the study `clip`."""
    for plan in DEFAULTS:
        study = replace(
            plan.studies["clip"],
            contenders={"fop": Contender("fop", {"lr": (0.1,)})},
            epochs=dict.fromkeys((6,) if plan.name in tasks else (64, 1024), 1),
            seeds=(0,),
        )
        monkeypatch.setitem(plan.studies, "clip", study)
        if plan.name in tasks:
            monkeypatch.setitem(RECIPES, plan.name, replace(plan, tasks={"cifar-small": tasks[plan.name]}))


def test_runs_are_made_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(cli, "DEFAULTS", DEFAULTS[:1])
    first = invoke(tmp_path, "clip")
    assert first.exit_code == 0, first.output
    assert f"Wrote {tmp_path}/README.md; 0 runs left" in first.output
    content = (tmp_path / "clip.jsonl").read_bytes()
    runs = read_defaults(tmp_path / "clip.jsonl")
    assert [run["task"] for run in runs] == ["digits-mlp, batch 64", "digits-mlp, full batch"]
    assert {(run["optimizer"], run["seed"], run["diverged"]) for run in runs} == {("fop", 0, False)}
    assert runs[0]["accuracy"] > 0.8
    assert runs[0]["train_loss"] > 0
    assert runs[0]["environment"] == runs[1]["environment"]
    assert json.loads(content.splitlines()[0])["evaluated_on"] == "held-out"
    # The rest of the study goes into the same file.
    monkeypatch.setattr(cli, "DEFAULTS", DEFAULTS)
    assert invoke(tmp_path, "clip").exit_code == 0
    assert (tmp_path / "clip.jsonl").read_bytes().startswith(content)
    assert "6 runs on 6 tasks, 0 diverged" in (tmp_path / "README.md").read_text()


def test_cifar_is_read_from_the_training_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(5):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    task = DEFAULTS[-1].tasks["cifar-small"]
    assert isinstance(task, ImageTask)
    assert (task.source.size, task.source.classes, task.has_test) == (16, 10, False)
    two = replace(CIFAR10, size=16, classes=2)
    small = ImageTask(two, per_class(3), per_class(2, skip=3), has_test=False)
    shrink(monkeypatch, **{"defaults-cifar-small": small})
    monkeypatch.setattr(cli, "DEFAULTS", DEFAULTS[-1:])
    data = ("--data", str(tmp_path))
    told = invoke(tmp_path / "out", "clip", *data)
    assert told.exit_code == 0, told.output
    assert "0 runs left" in told.output
    (run,) = read_defaults(tmp_path / "out" / "clip.jsonl")
    assert run["task"] == "cifar-small, full batch"
    (tmp_path / "train" / "dog" / "4.png").unlink()
    execution.parts_of.cache_clear()
    told = invoke(tmp_path / "other", "clip", *data)
    assert told.exit_code == 1
    assert "class 1 has 4 images; 5 are needed" in told.output


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert invoke(tmp_path, "nothing").exit_code == 2
    told = invoke(tmp_path, "trust", "--data", str(tmp_path / "nowhere"))
    assert told.exit_code == 2
    assert "there is no folder" in told.output


# --- Tables, of lines as version 0.1 wrote them


def _line(lr: float, task: str, accuracy: float | None, seed: int = 0) -> dict[str, Any]:
    return {
        "task": task,
        "optimizer": "fop",
        "options": {"lr": lr},
        "seed": seed,
        "diverged": accuracy is None,
        "accuracy": accuracy,
        "train_loss": None if accuracy is None else 0.1,
        "seconds": None if accuracy is None else 1.0,
        "environment": {"device": "x"},
    }


def test_regret_counts_divergence_as_no_accuracy(tmp_path: Path) -> None:
    runs = [_line(0.1, "a", 0.9), _line(0.1, "b", 0.5), _line(1.0, "a", None), _line(1.0, "b", 0.8)]
    (tmp_path / "trust.jsonl").write_text("\n".join(map(json.dumps, runs)))
    text = write_defaults(tmp_path).read_text()
    assert "4 runs on 2 tasks, 1 diverged" in text
    # lr 0.1 is best on a and 30 points short on b; lr 1 diverged on a, 90 points short.
    assert "| lr=0.1 | 15.00 | 30.00 | 0.00 | 30.00 |" in text
    assert "| lr=1.0 | 45.00 | 90.00 | 90.00 | 0.00 |" in text


def test_comparison_shows_every_rate(tmp_path: Path) -> None:
    runs = [_line(0.1, "a", 0.9, 1), _line(0.1, "a", 0.8, 2), _line(1.0, "a", None, 1)]
    (tmp_path / "comparison.jsonl").write_text("\n".join(map(json.dumps, runs)))
    text = write_defaults(tmp_path).read_text()
    assert "| fop | 0.1 | 2 | 0 | 85.00 ± 7.07 | 0.1000 ± 0.0000 |" in text
    assert "| fop | 1 | 1 | 1 | 0.00 | – |" in text
