"""`fop-bench report` in a clone: page and pictures follow from the records, whatever these have in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command import invoke

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "records"
Row = dict[str, Any]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone without records."""
    (tmp_path / "docs/assets").mkdir(parents=True)
    for file in ("README.md", "docs/results.md", "tools/race_results.py", "tools/report_page.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first(path: str, **parts: Any) -> Row:
    """The first committed line that has these parts."""
    rows = map(json.loads, (RECORDS / path).read_text().splitlines())
    return next(row for row in rows if all(row[key] == value for key, value in parts.items()))


def write(path: Path, *rows: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(clone: Path) -> str:
    told = invoke("report")
    assert told.exit_code == 0, told.output
    text = (clone / "docs/report.md").read_text()
    for picture in [part.split(")")[0] for part in text.split("](assets/")[1:]]:
        assert (clone / "docs/assets" / picture).stat().st_size > 5000
    return text


def rows_of(text: str, title: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    table = text.partition(f"# {title}\n")[2].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def test_values_of_the_newest_runs(clone: Path) -> None:
    sgd = first("race/race.jsonl", task="digits-cnn", optimizer="sgd")
    fop = first("race/race.jsonl", task="digits-cnn", optimizer="fop-default")
    old = [fop | {"seed": seed, "value": 10.0 + seed, "source": "old"} for seed in (0, 1)]
    new = [fop | {"seed": seed, "value": 90.0 + seed, "source": "new"} for seed in (0, 1, 2)]
    lost = {"diverged": True, "value": None, "last_loss": None, "processor_seconds": None}
    variant = fop | {"optimizer": "fop", "variant": "fop, damping=1", "rate": 0.2, "value": 99.0}
    searched = [sgd | {"rate": rate, "seed": 0, "value": value} for rate, value in ((0.1, 50.0), (0.2, 40.0))]
    path = clone / "records/race/race.jsonl"
    write(path, *searched, *old, *new, variant, new[0] | {"seed": 3} | lost)
    (clone / "records/overhead-x").mkdir()
    text = made(clone)
    assert [row[:6] for row in rows_of(text, "digits-cnn")] == [
        ["fop-default", "default", "–", "4", "1", "91.00 ± 1.00"],
        ["sgd", "0.1", "2, at the edge", "1", "0", "50.00"],
    ]
    assert "| 50.00 |" in (clone / "records/race/race.md").read_text()
    assert "| CNN, full batch, % ↑ | 50.0 (n = 1) |" in (clone / "docs/results.md").read_text()
    assert sgd["environment"]["git"]["commit"] in text and sgd["environment"]["command"] in text
    # Nobody may have ended.
    write(path, *(row | lost for row in new))
    assert rows_of(made(clone), "digits-cnn")[0][3:6] == ["3", "3", "–"]
    # A task that comes later.
    other = first("race/race.jsonl", task="digits-lstm", optimizer="sgd")
    write(path, other, *new)
    assert [line for line in made(clone).splitlines() if line.startswith("### ")] == [
        "### digits-cnn",
        "### digits-lstm",
    ]


def test_steps_to_a_target(clone: Path) -> None:
    row = first("race/race.jsonl", task="cifar-500", optimizer="fop-default", seed=2)
    assert "curve" not in row
    row["task"] = "cifar-half-500"
    runs = [
        row | {"seed": seed, "curve": [[10, 30.0, 1.0], [30, reached, 9.0]]}
        for seed, reached in ((0, 60.0), (1, 61.0))
    ]
    muon = row | {"optimizer": "muon", "variant": "muon", "rate": 0.1, "seed": 0, "curve": [[10, 59.0, 1.0]]}
    write(clone / "records/race/race.jsonl", *runs, muon)
    text = made(clone)
    assert [line for line in text.splitlines() if line.startswith("### ")][1:] == [
        "### Steps to a target by batch size"
    ]
    assert {each[0]: each[7] for each in rows_of(text, "cifar-half-500")} == {
        "fop-default": "30, 9 s",
        "muon": "–",
    }
    assert "| CIFAR-10, 5,000" not in (clone / "README.md").read_text()


def test_cost_of_a_step_by_record(clone: Path) -> None:
    write(clone / "records/race/race.jsonl", first("race/race.jsonl", task="digits-cnn"))
    kfac = first("overhead-peers/before.jsonl", optimizer="kfac", rounds=2)
    later = kfac | {"environment": kfac["environment"] | {"date": "2099-01-01T00:00:00"}, "rounds": 5}
    gone = {key: kfac[key] for key in ("workload", "label", "rounds", "environment", "samples")}
    write(
        clone / "records/overhead-a/overhead.jsonl",
        kfac,
        gone | {"optimizer": "x", "label": "X", "error": "no X"},
    )
    write(clone / "records/overhead-b/overhead.jsonl", later)
    text = made(clone)
    headings = [line for line in text.splitlines() if line.startswith("### records")]
    assert headings == ["### records/overhead-b", "### records/overhead-a"]
    title = "mlp-3072, batch 1024, float32"
    assert rows_of(text, title)[0][:4] == ["K-FAC", "427.96", "2.74 (2.32–3.16)", "17.61 (15.78–19.44)"]
    assert "Rounds: 5." in text and "Not measured: X: no X" in text


def test_outside_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = invoke("report")
    assert told.exit_code == 1 and "name folders with JSON lines, or go to a clone" in told.output


def test_a_page_that_the_records_do_not_give_is_found(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    for folder in ("docs", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png", "*.ipynb"))
    shutil.copytree(RECORDS / "overhead-peers", tmp_path / "records/overhead-peers")
    shutil.copytree(RECORDS / "race", tmp_path / "records/race")
    page = tmp_path / "docs/report.md"
    page.write_text(page.read_text().replace("do not edit", "edit"))
    told = invoke("verify-records", str(tmp_path / "records/overhead-peers"))
    assert "  --- docs/report.md\n" in told.output
    assert "  @@ -4 +4 @@\n  -`records/overhead-*` alone; edit.\n" in told.output
