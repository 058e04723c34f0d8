"""The demo's runs, table and picture, from the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import invoke
from fop_bench.recipes import DIGITS
from fop_bench.records import read_runs

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
    assert "**" in (out / "README.md").read_text(), "the best are bold"
    assert "UNEQUAL" not in (out / "README.md").read_text()
    picture = np.asarray(Image.open(out / "digits-digits-demo-curves.png").convert("RGB"))
    assert f"The picture of it: {out / 'digits-digits-demo-curves.png'}" in result.output
    assert f"the noise ν of FOP's layers: {out / 'digits-digits-demo-layers.png'}" in result.output
    assert (out / "digits-digits-demo-layers.png").is_file()
    fop_orange = np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(picture.astype(int) - fop_orange).max(axis=2) < 3).any()
