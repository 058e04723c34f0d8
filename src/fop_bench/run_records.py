"""Lines of `fop-bench run`: reading them, and which of them belong into one report."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]

KEYS = (
    *("recipe", "title", "task", "study", "phase", "contender", "label", "options", "batch_size", "epochs"),
    *("seed", "halves", "targets", "diverged", "curve", "layers", "parameters", "train_samples"),
    *("evaluated_on", "evaluated_samples", "warnings", "data", "environment"),
)
ENVIRONMENT_KEYS = ("device", "processor", "torch", "python", "fop", "git", "threads", "date", "command")
# What two lines must differ in to be two runs.
IDENTITY = ("recipe", "task", "study", "phase", "contender", "options", "batch_size", "seed", "halves")


def read_runs(path: Path) -> list[Run]:
    """Read the runs of a folder's JSON lines, or of one file; ValueError for none, or a broken line."""
    files = [path] if path.is_file() else record_files(path)
    runs = [run for file in files for run in read_lines(file, KEYS)]
    if not runs:
        raise ValueError(f"no runs in {path}; make some with fop-bench run")
    return runs


def record_files(folder: Path) -> list[Path]:
    """Return the files of JSON lines in a folder; hidden ones and links to nothing are none."""
    return sorted(path for path in folder.glob("[!.]*.jsonl") if path.is_file())


def read_lines(file: Path, keys: Sequence[str], command: str = "run") -> list[Run]:
    """Read the JSON lines of a command; raises ValueError for one that is broken or lacks one of its keys."""
    lines = enumerate(file.read_bytes().split(b"\n"), start=1)
    return [_parsed(line, f"{file}, line {n}", keys, command) for n, line in lines if line.strip()]


def _parsed(line: bytes, where: str, keys: Sequence[str], command: str) -> Run:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        run: Run = json.loads(line, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); delete that line, or mend it") from error
    missing = [key for key in keys if key not in run]
    missing = missing or [f"environment.{key}" for key in ENVIRONMENT_KEYS if key not in run["environment"]]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; it is no line of this version's fop-bench {command}"
        )
    return run


def of_one_commit(runs: Sequence[Run]) -> Sequence[Run]:
    """Return the runs; raises ValueError if a study has runs of several commits, or a run is there twice."""
    studies: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        commit = (run["environment"]["git"] or {"commit": "none"})["commit"]
        studies["{recipe}, task {task}, study {study}".format(**run)][commit] += 1
    for study, counts in studies.items():
        if len(counts) > 1:
            each = ", ".join(f"{commit} ({count})" for commit, count in sorted(counts.items()))
            raise ValueError(
                f"the runs of {study} are of several commits: {each}; give the runs of each a folder"
            )
    identities = Counter(", ".join(f"{key} {run[key]}" for key in IDENTITY) for run in runs)
    if twice := "; ".join(identity for identity, count in identities.items() if count > 1):
        raise ValueError(f"runs that are there more than once; delete all lines but one of: {twice}")
    return runs
