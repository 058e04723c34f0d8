"""What the documents show of records is made from these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fop_bench import plots, study_report
from fop_bench.paper import paper_page

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "records" / "cifar10-small"


def test_the_committed_report_is_made_from_the_committed_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in RECORD.glob("*.jsonl"):
        (tmp_path / file.name).symlink_to(file)
    for name in [each for each in vars(plots) if each.startswith("plot_")]:
        monkeypatch.setattr(plots, name, lambda *ignored: True)
    written = study_report.write_report(tmp_path).read_text(encoding="utf-8")
    assert written == (RECORD / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([^)]+\.png)\)", written)
    assert pictures
    assert {file.name for file in RECORD.glob("*.png")} == set(pictures)


def test_the_papers_tables_are_made_from_the_committed_lines() -> None:
    shown = (ROOT / "docs" / "paper-tables.md").read_text(encoding="utf-8")
    assert shown == paper_page([RECORD])


def test_the_committed_runs_are_complete_and_of_one_commit() -> None:
    runs: list[dict[str, Any]] = study_report.read_runs(RECORD)
    assert len({run["environment"]["git"]["commit"] for run in runs}) == 1
    assert not any(run["environment"]["git"]["dirty"] for run in runs)
    comparison = [run for run in runs if run["study"] == "comparison" and run["phase"] == "final"]
    cells = {(run["contender"], run["batch_size"], run["seed"]) for run in comparison}
    assert len(cells) == len(comparison) == 4 * 4 * 3


def ends(study: str) -> dict[tuple[str, int], tuple[float, float]]:
    """Mean final training loss and accuracy of a study's final runs, by contender and batch size."""
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line in (RECORD / f"{study}.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if run["phase"] == "final":
            last = run["curve"][-1]
            place = run["contender"], run["batch_size"]
            groups.setdefault(place, []).append((last["train_loss"], last["accuracy"]))
    return {
        key: (fmean(loss for loss, _ in each), fmean(accuracy for _, accuracy in each))
        for key, each in groups.items()
    }


def test_what_the_documents_say_of_the_comparison_and_its_variants() -> None:
    comparison = ends("comparison")
    losses = {name: comparison[name, 10000][0] for name in ("sgd", "adamw", "kfac", "fop")}
    accuracies = {name: comparison[name, 10000][1] for name in losses}
    assert max(losses["kfac"], losses["fop"]) < 0.75 * min(losses["sgd"], losses["adamw"])
    for batch in (500, 2000, 5000, 10000):
        of = {name: comparison[name, batch][0] for name in losses}
        assert max(of["kfac"], of["fop"]) < min(of["sgd"], of["adamw"])
    gap = fmean([accuracies["kfac"], accuracies["fop"]]) - fmean([accuracies["sgd"], accuracies["adamw"]])
    assert round(100 * gap) == 5
    assert max(("sgd", "adamw", "kfac", "fop"), key=lambda name: comparison[name, 500][1]) == "sgd"
    assert comparison["fop", 5000][1] > comparison["kfac", 5000][1]
    assert comparison["fop", 10000][1] < comparison["kfac", 10000][1]
    library = ends("library")
    for name in ("soap", "muon"):
        loss, accuracy = library[name, 10000]
        assert max(losses["kfac"], losses["fop"]) < loss < min(losses["sgd"], losses["adamw"])
        assert (
            max(accuracies["sgd"], accuracies["adamw"])
            < accuracy
            < min(accuracies["kfac"], accuracies["fop"])
        )
    assert library["lamb", 10000][1] < min(accuracies.values())
    ablation = ends("ablation")
    for batch in (2000, 10000):
        assert ablation["beta-only", batch][1] > ablation["fop", batch][1]
        for name in ("mixing-0.1", "mixing-0.01"):
            assert abs(ablation[name, batch][1] - ablation["kfac", batch][1]) < 0.006
        assert abs(ablation["halves-fixed", batch][1] - ablation["fop", batch][1]) < 0.007
    assert ablation["halves-classes", 10000][1] < ablation["fop", 10000][1] - 0.01
    formula = ends("formula")
    assert abs(formula["damped", 2000][1] - formula["fop", 2000][1]) < 0.001
    assert formula["fresher", 2000][0] < formula["fop", 2000][0]
