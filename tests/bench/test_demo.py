"""The demo's runs, table and picture, from the command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import invoke
from fop_bench.recipes import DIGITS
from fop_bench.records import locked, read_runs

NAMES = ("sgd", "adamw", "kfac", "fop")


@pytest.mark.slow
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
    assert re.search(r"^\| 1024 \|.*\*\*", (out / "README.md").read_text(), re.M), "the best are bold"
    assert "UNEQUAL" not in (out / "README.md").read_text()
    picture = np.asarray(Image.open(out / "digits-digits-demo-curves.png").convert("RGB"))
    assert f"The picture of it: {out / 'digits-digits-demo-curves.png'}" in result.output
    assert f"the noise ν of FOP's layers: {out / 'digits-digits-demo-layers.png'}" in result.output
    assert (out / "digits-digits-demo-layers.png").is_file()
    fop_orange = np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(picture.astype(int) - fop_orange).max(axis=2) < 3).any()


def test_the_demo_is_three_seeds_at_three_batch_sizes() -> None:
    study = DIGITS.studies["demo"]
    assert (len(study.seeds), [*study.epochs], tuple(study.contenders)) == (3, [64, 512, 1024], NAMES)
    assert {len([*each.combinations()]) for each in study.contenders.values()} == {4}


def test_a_second_demo_leaves_the_lines_of_the_first(tmp_path: Path) -> None:
    lines = tmp_path / "demo.jsonl"
    lines.write_text("the first\n")
    with locked(lines):
        told = invoke("demo", "--device", "cpu", "--out", str(tmp_path))
    assert told.exit_code == 1 and f"Error: another fop-bench is writing {lines}" in told.output
    assert lines.read_text() == "the first\n"
