"""The package's metadata say what the record of `tools/torch_matrix` says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scripts import script

ROOT = Path(__file__).parents[1]


MATRIX = script("torch_matrix")
RESULTS = json.loads((MATRIX.FOLDER / "matrix.json").read_text())
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_version_has_passed_and_is_told_from_others() -> None:
    passed = {MATRIX.key(result)[0] for result in RESULTS if not result["failed"] and result["passed"]}
    assert passed >= set(MATRIX.VERSIONS)
    assert [result for result in RESULTS if result["failed"]] == []
    assert all(re.match("needs torch |.*needs ", why) for result in RESULTS for why in result["skipped"])
    # The newest lacks nothing.
    newest = MATRIX.ordered(RESULTS)[-1]
    assert not any("needs torch" in why for why in newest["skipped"])


def test_the_package_claims_what_has_passed() -> None:
    versions = [list(map(int, part.split("."))) for part in MATRIX.VERSIONS]
    oldest, newest = (f"{major}.{minor}" for major, minor, _ in (min(versions), max(versions)))
    assert f'dependencies = ["torch>={oldest}"]' in PROJECT
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert set(claimed) == {MATRIX.key(result)[1] for result in RESULTS}
    assert f"2.4 to {newest}" in (ROOT / "src/fop/torch_internals.py").read_text()


def test_a_skipped_test_is_counted_with_its_reason() -> None:
    row = {
        "torch": "2.4.1+cpu", "python": "3.11.7", "passed": 3, "failed": 1, "seconds": 1.6,
        "processor_seconds": 1.2, "skipped": {"needs torch 2.5: why": 2},
    }  # fmt: skip
    newer = {**row, "torch": "2.10.0", "skipped": {}}
    lines = MATRIX.table([newer, row]).splitlines()
    assert lines[2] == "| 2.4.1+cpu | 3.11.7 | 3 | 1 | 2 (1) | 2 | 1 |"
    assert lines[3].startswith("| 2.10.0 |") and lines[-1] == "1. needs torch 2.5: why"
