"""The demo's runs, table and picture, from the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import invoke
from fop_bench.recipes import DIGITS
from fop_bench.records import Record, read_runs
from fop_bench.study import studies, who_is_ahead

NAMES = ("sgd", "adamw", "kfac", "fop")


def test_the_demo_tunes_trains_reports_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Smaller batches take more steps, and show no more.
    short = replace(DIGITS.studies["demo"], epochs={512: 2, 1024: 2}, seeds=(1, 2))
    monkeypatch.setitem(DIGITS.studies, "demo", short)
    out = tmp_path / "new folder"
    for _ in range(2):
        result = invoke("demo", "--device", "cpu", "--out", str(out))
        assert result.exit_code == 0, result.output
    runs = read_runs(out)
    for batch in (512, 1024):
        for name in NAMES:
            of = [run for run in runs if (run["batch_size"], run["contender"]) == (batch, name)]
            tuning = [run for run in of if run["phase"] == "tuning"]
            grid = DIGITS.studies["demo"].contenders[name].grid["lr"]
            assert [run["options"]["lr"] for run in tuning] == list(grid)
            assert sorted(run["seed"] for run in of if run["phase"] == "final") == [1, 2]
    assert len(runs) == 2 * 4 * (4 + 2)
    for label in ("SGD", "AdamW", "K-FAC", "FOP"):
        assert label in result.output
        assert f"| 1024 | {label} |" in (out / "README.md").read_text()
    assert "At batch 512: " in result.output
    assert "UNEQUAL" not in (out / "README.md").read_text()
    picture = np.asarray(Image.open(out / "digits-digits-demo-curves.png").convert("RGB"))
    assert f"The picture of it: {out / 'digits-digits-demo-curves.png'}" in result.output
    assert f"the noise ν of FOP's layers: {out / 'digits-digits-demo-layers.png'}" in result.output
    assert (out / "digits-digits-demo-layers.png").is_file()
    fop_orange = np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(picture.astype(int) - fop_orange).max(axis=2) < 3).any()


def run(name: str, size: int, seed: int, accuracies: list[float]) -> Record:
    """A final run whose epochs take as many seconds as the batch has samples."""
    curve = [
        {"epoch": at, "seconds": 0.0, "processor_seconds": at * size, "accuracy": each, "train_loss": 1.0}
        for at, each in enumerate(accuracies, 1)
    ]
    row = {"recipe": "digits", "task": "digits", "study": "demo", "phase": "final", "seed": seed}
    row |= {
        "contender": name,
        "label": name.upper(),
        "batch_size": size,
        "epochs": len(curve),
        "curve": curve,
    }
    row |= {"diverged": False, "options": {"lr": 0.1}, "targets": {"accuracy": 0.9}}
    return row | {"environment": {"processor": "cpu"}}


def test_words_say_who_is_ahead() -> None:
    runs = [run("sgd", 64, seed, [0.5, 0.95]) for seed in (1, 2)]
    runs += [run("fop", 64, seed, [0.92, 0.93]) for seed in (1, 2)]
    runs += [run("sgd", 512, 1, [0.95]), run("sgd", 512, 2, [0.8]), run("fop", 512, 1, [0.8, 0.8, 0.94])]
    [study] = studies(runs)
    small, large = who_is_ahead(study).splitlines()
    ahead = "fewest epochs FOP (1); fewest seconds FOP (64); highest final accuracy SGD (95.0%)"
    assert small == f"At batch 64: {ahead}."
    assert large.startswith("At batch 512: fewest epochs FOP (3); fewest seconds FOP (1.54e+03);")


def test_the_demo_is_three_seeds_at_three_batch_sizes() -> None:
    study = DIGITS.studies["demo"]
    assert len(study.seeds) == 3
    assert list(study.epochs) == [64, 512, 1024]
    assert tuple(study.contenders) == NAMES


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_unusable_device_is_a_clear_error(device: str, tmp_path: Path) -> None:
    result = invoke("demo", "--device", device, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert repr(device) in result.output
    assert not (tmp_path / "out").exists()
