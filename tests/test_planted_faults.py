"""Every fault of tools/faults.toml can still be planted, and there are the tests that are to catch it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from scripts import script

# Of Python 3.11.
tomllib: Any = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]


TOOL = script("plant_faults")
FAULTS = tomllib.loads((ROOT / "tools" / "faults.toml").read_text())["fault"]


def test_every_text_is_in_its_file_once_and_every_test_is_there() -> None:
    TOOL.check(FAULTS, None)


@pytest.mark.parametrize("change", [
    {"text": "no such text"}, {"text": "return"}, {"tests": ["tests/no_such_file.py"]},
    {"tests": ["tests/test_planted_faults.py::test_that_nobody_has_written[1]"]},
    {"also": [{"file": "src/fop/adamw.py", "text": "no such text", "by": ""}]},
], ids=str)  # fmt: skip
def test_a_fault_that_cannot_be_planted_is_named(change: dict[str, Any]) -> None:
    faults = copy.deepcopy(FAULTS[:3])
    faults[1].update(change)
    with pytest.raises(SystemExit, match=faults[1]["name"]):
        TOOL.check(faults, None)
