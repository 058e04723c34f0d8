"""Writes checkpoints with the current `fop`, and the parameters five steps later, to tests/data/checkpoints.

To be run from a version that is known to be right; tests/test_old_checkpoints.py goes on from them with
later ones.

    python tools/record_checkpoints.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from record_trajectories import TESTS, commit

sys.path.insert(0, str(TESTS))

import old_checkpoints
from ranks import run_ranks


def main() -> None:
    """Record all checkpoints."""
    torch.set_num_threads(1)
    old_checkpoints.FOLDER.mkdir(parents=True, exist_ok=True)
    for name, training in old_checkpoints.TRAININGS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            if training.ranks:
                run_ranks(old_checkpoints.save, training.ranks, name, str(path))
            else:
                old_checkpoints.save(0, name, str(path))
            checkpoint = torch.load(path)
        later = {
            how: old_checkpoints.result_of(name, how, checkpoint)
            for which, how in old_checkpoints.WAYS
            if which == name
        }
        record = {**checkpoint, "later": later, "commit": commit()}
        file = old_checkpoints.FOLDER / f"{name}.pt"
        torch.save(record, file)
        print(file, file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
