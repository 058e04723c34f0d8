"""The demo's runs, table and picture, from the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fop_bench.cli import main
from fop_bench.optimizers import BUILDERS
from fop_bench.recipes import DIGITS

NAMES = ("sgd", "adamw", "kfac", "fop")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Give what the command printed, what it wrote, and where."""
    out = tmp_path_factory.mktemp("demo") / "new folder"
    asked = ["demo", "--quick", "--device", "cpu", "--out", str(out)]
    # Smaller batches take more steps, and show no more.
    quick = replace(DIGITS.studies["demo-quick"], epochs={256: 1, 512: 2, 1024: 2})
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(DIGITS.studies, "demo-quick", quick)
        result = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, json.loads((out / "demo.json").read_text()), out


def test_the_search_is_complete_and_fair(demo: tuple[str, Any, Path]) -> None:
    protocol, results = demo[1]["protocol"], demo[1]["results"]
    assert protocol["quick"] is True
    assert protocol["tuning_seed"] not in protocol["seeds"]
    assert demo[1]["environment"]["device"]
    pairs = [(entry["batch_size"], entry["optimizer"]) for entry in results]
    assert pairs == [(batch, name) for batch in (256, 512, 1024) for name in NAMES]
    for entry in results:
        grid = DIGITS.studies["demo"].contenders[entry["optimizer"]].grid["lr"]
        assert [run["learning_rate"] for run in entry["tuning"]] == list(grid) == sorted(set(grid))
        assert len(grid) == 4
        assert {run["seed"] for run in entry["tuning"]} == {protocol["tuning_seed"]}
        assert [run["seed"] for run in entry["runs"]] == protocol["seeds"]
        assert {run["learning_rate"] for run in entry["runs"]} == {entry["learning_rate"]}
        for run in entry["tuning"] + entry["runs"]:
            assert run["diverged"] or len(run["curve"]) == protocol["epochs"][str(entry["batch_size"])]
            seconds = [epoch["seconds"] for epoch in run["curve"]]
            assert seconds == sorted(seconds)
            assert all(second > 0 for second in seconds)
        means = {
            run["learning_rate"]: np.mean([epoch["accuracy"] for epoch in run["curve"]])
            for run in entry["tuning"]
            if not run["diverged"]
        }
        assert means[entry["learning_rate"]] == pytest.approx(max(means.values()))


def recomputed(runs: list[Any], target: float) -> dict[str, Any]:
    """Count and average again, by other means than the package's."""
    alive = [run["curve"] for run in runs if not run["diverged"]]
    hits = []
    for curve in alive:
        above = np.flatnonzero(np.array([epoch["accuracy"] for epoch in curve]) >= target)
        if above.size:
            hits.append(curve[above[0]])

    def pair(values: list[float]) -> tuple[float, float | None] | None:
        return (np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None) if values else None

    return {
        "runs": len(runs),
        "diverged": len(runs) - len(alive),
        "reached": len(hits),
        "epochs": pair([hit["epoch"] for hit in hits]),
        "seconds": pair([hit["seconds"] for hit in hits]),
        "final_accuracy": pair([curve[-1]["accuracy"] for curve in alive]),
    }


def text(pair: Any, digits: int, scale: float = 1.0) -> str:
    if pair is None:
        return "–"
    mean, std = pair
    return f"{mean * scale:.{digits}f}" + ("" if std is None else f" ± {std * scale:.{digits}f}")


def test_summary_and_table_follow_from_the_curves(demo: tuple[str, Any, Path]) -> None:
    output, content, _ = demo
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line
    ]
    for row, entry in zip(rows, content["results"], strict=True):
        expected = recomputed(entry["runs"], content["protocol"]["target_accuracy"])
        for key, value in expected.items():
            stored = entry["summary"][key]
            if isinstance(value, tuple):
                assert stored["mean"] == pytest.approx(value[0])
                assert stored["std"] == (None if value[1] is None else pytest.approx(value[1]))
            else:
                assert stored == value
        assert row == [
            str(entry["batch_size"]),
            BUILDERS[entry["optimizer"]][0],
            f"{entry['learning_rate']:g}",
            f"{expected['reached']} of {expected['runs']}",
            text(expected["epochs"], 1),
            text(expected["seconds"], 2),
            text(expected["final_accuracy"], 2, 100.0),
            str(expected["diverged"]),
        ]


def test_picture_is_drawn(demo: tuple[str, Any, Path]) -> None:
    picture = np.asarray(Image.open(demo[2] / "demo.png").convert("RGB"))
    assert picture.shape[1] > 1000
    fop_orange = np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(picture.astype(int) - fop_orange).max(axis=2) < 3).any()


def test_full_demo_is_three_seeds_and_the_same_grids() -> None:
    full, quick = DIGITS.studies["demo"], DIGITS.studies["demo-quick"]
    assert len(full.seeds) == 3
    assert list(full.epochs) == list(quick.epochs) == [64, 512, 1024]
    assert full.contenders == quick.contenders
    assert tuple(full.contenders) == NAMES


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_unusable_device_is_a_clear_error(device: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--device", device, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert repr(device) in result.output
    assert not (tmp_path / "out").exists()
