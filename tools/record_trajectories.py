"""Writes what the trainings of tests/trajectories.py give with the current `fop` to tests/data/.

Trainings without a record are added, records without a training deleted; the others stay, with the commit of
their version. To be run from one that is known to be right: tests/test_trajectories.py compares later ones.

    python tools/record_trajectories.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import fop

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from trajectories import TRAININGS, result_of  # noqa: E402


def commit() -> str:
    """The commit of the `fop` that is imported, with "-dirty" after it where files are changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(fop.__file__).parent
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def recorded(name: str) -> dict[str, object]:
    """Train; the parameters are one vector."""
    print(name, flush=True)
    parameters = torch.cat([value.flatten() for value in result_of(name).values()])
    return {"command": "python tools/record_trajectories.py", "commit": commit(), "parameters": parameters}


def main() -> None:
    """Record what has no record."""
    torch.set_num_threads(1)
    path = TESTS / "data" / "trajectories.pt"
    old = torch.load(path) if path.exists() else {}
    torch.save({name: old.get(name) or recorded(name) for name in TRAININGS}, path)


if __name__ == "__main__":
    main()
