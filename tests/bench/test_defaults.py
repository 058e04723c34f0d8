"""The command `fop-bench defaults`: what it runs, its table from rows, and lines of earlier versions."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command import Told, invoke
from fop import FOP
from fop_bench.defaults import CANDIDATES, defaults_table, sides
from fop_bench.race import make_racer, side_of
from fop_bench.race_tasks import TASKS
from fop_bench.records import write_text

CPU, TASK = torch.device("cpu"), "digits-cnn"


def test_candidates_are_other_values_of_options() -> None:
    default = FOP(nn.Linear(2, 2)).defaults
    for name, values in CANDIDATES.items():
        assert name in inspect.signature(FOP).parameters
        assert default[name] not in values and len({*map(str, values)}) == len(values)
        for value in values:
            given = side_of("fop-default", TASK, {name: value}, keep_norm=True, bf16=False)["options"]
            made = make_racer("fop-default", nn.Linear(2, 2), None, 1.0, given)
            assert made.param_groups[0][name] == value
            others = {key for key in default if made.param_groups[0][key] != default[key]}
            assert others == {name}


def row(options: dict[str, Any], value: float | None, seed: int, **changes: Any) -> dict[str, Any]:
    side = side_of("fop-default", TASK, options, keep_norm=True, bf16=False)
    return {
        **side,
        "seed": seed,
        "diverged": value is None,
        "value": value,
        "processor_seconds": 2.0,
        **changes,
    }


def test_table_marks_the_default_and_counts_what_diverged() -> None:
    rows = [row({}, 90, 0), row({}, 92, 1), row({"damping": 1.0}, 80, 0), row({"damping": 1.0}, None, 1)]
    rows += [row({"sub_batches": 4}, 95, 0), row({"damping": 1.0}, 10, 0, source="another")]
    own, other = defaults_table(rows).split("source another.")
    first, second = own.split("## sub_batches: digits-cnn")
    assert first.startswith(f"## damping: {TASK}\n")
    assert "| **adaptive** (default) | 2 | 0 | 91.00 ± 1.41 | 2 |\n| 1.0 | 1 | 1 | 80.00 | 2 |" in first
    assert "| **2** (default) | 2 | 0 | 91.00 ± 1.41 | 2 |\n| 4 | 1 | 0 | 95.00 | 2 |" in second
    assert "(default)" not in other and "| 1.0 | 1 | 0 | 10.00 | 2 |" in other


def test_lines_of_earlier_versions_are_laid_out(tmp_path: Path) -> None:
    """As commit b0cff6b wrote them: accuracies as shares, grids of several options, other optimizers too."""
    where = {"device": "A processor", "torch": "2", "fop": "0", "git": {"commit": "1" * 40}, "threads": 1}
    old = [
        {
            "task": "digits-mlp",
            "optimizer": name,
            "options": options,
            "seed": seed,
            "diverged": accuracy is None,
        }
        | {"accuracy": accuracy, "train_loss": 0.1, "seconds": 1.0, "warnings": [], "environment": where}
        for name, options, seed, accuracy in [
            ("fop", {"lr": 0.1, "kl_clip": None}, 0, 0.5),
            ("fop", {"lr": 0.1, "kl_clip": None}, 1, 0.6),
            ("sgd", {"lr": 0.3}, 0, None),
        ]
    ]
    path = write_text(tmp_path / "clip.jsonl", "".join(json.dumps(each) + "\n" for each in old))
    told = invoke("defaults", "--table", "--out", str(path))
    assert told.exit_code == 0, told.output
    table = path.with_suffix(".md").read_text()
    assert "| lr, kl_clip |" in table and "| fop: 0.1, None | 2 | 0 | 55.00 ± 7.07 | – |" in table
    assert "| sgd: 0.3 | 0 | 1 | – | – |" in table
    # New runs are not added to them.
    assert "no line of this version's fop-bench" in invoke("defaults", "--out", str(path)).output


def measured(out: Path, *arguments: str) -> Told:
    return invoke("defaults", "--task", TASK, "--option", "curvature_interval", "--out", str(out), *arguments)


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, TASK, replace(TASKS[TASK], batch_size=16, steps=2))
    out = tmp_path / "defaults.jsonl"
    told = measured(out, "--seeds", "1")
    assert told.exit_code == 0 and "all is done" in told.output
    lines = out.read_text().splitlines()
    options = [json.loads(line)["options"].get("curvature_interval") for line in lines]
    assert options == [None, *CANDIDATES["curvature_interval"]]
    out.write_text("\n".join(lines[:-1]) + "\n")
    assert "1 optimizers are not done" in measured(out, "--seeds", "1", "--table").output
    assert measured(out, "--seeds", "1").exit_code == 0
    again = out.read_text().splitlines()
    assert again[:-1] == lines[:-1] and len(again) == len(lines)
    assert json.loads(again[-1])["value"] == json.loads(lines[-1])["value"]
    assert "| **1** (default) | 1 |" in out.with_suffix(".md").read_text()


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    told = invoke("defaults", "--option", "dampening", "--out", str(tmp_path / "new" / "d.jsonl"))
    assert told.exit_code == 2 and "invalid choice: 'dampening' (choose from" in told.output
    assert len(sides(["eta"], [TASK], CPU)) == 2 and not (tmp_path / "new").exists()
