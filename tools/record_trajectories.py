"""Writes what the trainings of tests/trajectories.py give with the current `fop` to tests/data/.

To be run from a version that is known to be right; tests/test_trajectories.py compares later ones with it.

    python tools/record_trajectories.py                 # all, about five minutes on two cores
    python tools/record_trajectories.py --only 'mlp*'   # adds to the record, or replaces in it
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import torch

import fop

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import trajectories  # noqa: E402


def source_tree() -> str:
    """The hash that git has for the directory of `fop` as it lies there, changes included."""
    folder = Path(fop.__file__).parent
    changes = subprocess.run(
        ["git", "status", "--porcelain", "."], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    tree = subprocess.run(
        ["git", "rev-parse", "HEAD:./"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    return tree.strip() + (" with changes" if changes else "")


def main() -> None:
    """Record what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="*", help="pattern of the names to record; the others stay")
    parser.add_argument("--folder", type=Path, default=TESTS / "data", help="where to write")
    arguments = parser.parse_args()
    json_path, tensor_path = (arguments.folder / f"trajectories.{end}" for end in ("json", "pt"))
    results, parameters = {}, {}
    if arguments.only != "*":
        record = json.loads(json_path.read_text())
        if record["fingerprint"] != trajectories.fingerprint():
            parser.error("the record is of another machine; record all trainings")
        results, parameters = record["results"], torch.load(tensor_path)
    for name in fnmatch.filter(trajectories.TRAININGS, arguments.only):
        for dtype in trajectories.TRAININGS[name].dtypes:
            result = trajectories.result_of(name, dtype)
            results[f"{name}/{dtype}"] = {"every": result.every, "final": result.final}
            parameters[f"{name}/{dtype}"] = result.parameters
            print(name, dtype, result.every[-1], flush=True)
    head = {
        "command": "python tools/record_trajectories.py",
        "source": source_tree(),
        "fingerprint": trajectories.fingerprint(),
    }
    order = [f"{name}/{dtype}" for name, each in trajectories.TRAININGS.items() for dtype in each.dtypes]
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in order if key in results)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "results": {{\n{rows}\n}}\n}}\n')
    torch.save({key: parameters[key] for key in order if key in parameters}, tensor_path)


if __name__ == "__main__":
    main()
