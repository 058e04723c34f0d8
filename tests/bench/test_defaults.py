"""The measurement of the defaults: its data, its resuming and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fop_bench import cifar, defaults
from fop_bench.cifar import cifar_subset
from fop_bench.cli import main
from fop_bench.defaults import STUDIES, TASKS, measure, run_one
from fop_bench.defaults_report import read_runs, write_report

TASK = "digits-mlp, batch 64"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes with four images each, of which three are used."""
    monkeypatch.setattr(cifar, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(cifar, "VALIDATION_PER_CLASS", 1)
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(4):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    return tmp_path


def test_cifar_subset(folder: Path) -> None:
    train, validation = cifar_subset(folder)
    assert train.targets.tolist() == [0, 0, 1, 1]
    assert validation.targets.tolist() == [0, 1]
    assert train.inputs.shape == (4, 3, 16, 16)
    pixels = np.stack(
        [np.asarray(Image.open(folder / "train" / c / f"{i}.png")) for c in ("cat", "dog") for i in (0, 1)]
    )
    pooled = pixels.reshape(4, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    expected = (pooled - pooled.mean((0, 1, 2))) / pooled.std((0, 1, 2), ddof=1)
    np.testing.assert_allclose(train.inputs.permute(0, 2, 3, 1).numpy(), expected, atol=1e-4)


def test_missing_images_are_an_error(folder: Path) -> None:
    for path in (folder / "train" / "dog").glob("[23].png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"dog holds 2 images; 3 are needed"):
        cifar_subset(folder)
    with pytest.raises(FileNotFoundError, match="train/<class>"):
        cifar_subset(folder / "train" / "cat")


def test_a_run_repeats_itself() -> None:
    run = {"optimizer": "kfac", "options": {"lr": 0.1}, "seed": 3}
    one, two = (run_one(TASK, run, "cpu", None) for _ in range(2))
    assert one["accuracy"] == two["accuracy"]
    assert one["train_loss"] == two["train_loss"]
    assert one["accuracy"] > 0.8
    assert not one["diverged"]


def test_measure_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"optimizer": "sgd", "options": {"lr": lr}, "seed": 0} for lr in (0.1, 0.3)]
    monkeypatch.setitem(STUDIES, "tiny", runs)
    out = tmp_path / "tiny.jsonl"

    def go(minutes: float) -> int:
        return measure("tiny", [TASK], device="cpu", folder=None, out=out, jobs=1, minutes=minutes)

    assert go(0.0) == 2
    assert go(5.0) == 0
    first = out.read_text()
    assert [line["options"]["lr"] for line in read_runs(out)] == [0.1, 0.3]
    assert go(5.0) == 0
    assert out.read_text() == first


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
    text = write_report(tmp_path).read_text()
    assert "4 runs on 2 tasks, 1 diverged" in text
    # lr 0.1 is best on a and 30 points short on b; lr 1 diverged on a, 90 points short.
    assert "| lr=0.1 | 15.00 | 30.00 | 0.00 | 30.00 |" in text
    assert "| lr=1.0 | 45.00 | 90.00 | 90.00 | 0.00 |" in text


def test_comparison_shows_every_rate(tmp_path: Path) -> None:
    runs = [_line(0.1, "a", 0.9, 1), _line(0.1, "a", 0.8, 2), _line(1.0, "a", None, 1)]
    (tmp_path / "comparison.jsonl").write_text("\n".join(map(json.dumps, runs)))
    text = write_report(tmp_path).read_text()
    assert "| fop | 0.1 | 2 | 0 | 85.00 ± 7.07 | 0.1000 ± 0.0000 |" in text
    assert "| fop | 1 | 1 | 1 | 0.00 | – |" in text


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trust.jsonl"
    path.write_text('{"task": "a"}\n{"task": ')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_runs(path)


def test_command_line(tmp_path: Path) -> None:
    asked = ["defaults", "trust", "--tasks", "nothing", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert "matches none of" in result.output
    assert "cifar" not in [task.data for name, task in TASKS.items() if name.startswith("digits")]


def test_every_optimizer_of_the_comparison_has_as_many_runs() -> None:
    counts = dict.fromkeys(defaults.OPTIMIZERS, 0)
    for run in STUDIES["comparison"]:
        counts[run["optimizer"]] += 1
    assert len(set(counts.values())) == 1
    assert torch.tensor(list(counts.values())).min() > 0
