"""Lines of `fop-bench run`: reading them, and which of them belong into one report."""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
NO_COMMIT = "none"


def read_runs(path: Path, *, whole: bool = False) -> list[Run]:
    """Read the runs of a folder's JSON lines, or of one file; a last line that was cut off is left out.

    That is a warning: the run that was writing it was killed. With ``whole`` it is an error. Raises
    ValueError for no runs, any other broken line, or a line without the keys that a report needs.
    """
    files = [path] if path.is_file() else record_files(path)
    runs = [run for file in files for run in _read_file(file, whole)]
    if not runs:
        raise ValueError(f"no runs in {path}; make some with fop-bench run")
    return runs


def record_files(folder: Path) -> list[Path]:
    """Return the files of JSON lines in a folder; hidden ones and links to nothing are none."""
    return sorted(path for path in folder.glob("[!.]*.jsonl") if path.is_file())


def _read_file(path: Path, whole: bool) -> Iterator[Run]:
    # Bytes: a line that was cut off may end inside a character.
    lines = [(at, line) for at, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            run = json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            if number == lines[-1][0] and not whole:
                notice = f"{where}, the last one, is not JSON: its run was killed; left out"
                warnings.warn(notice, stacklevel=3)
                return
            raise ValueError(f"{where} is not JSON ({error}); delete that line, or mend it") from error
        _check(run, where)
        yield run


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _check(run: Any, where: str) -> None:
    missing = [key for key in KEYS if key not in run]
    missing = missing or [f"environment.{key}" for key in ENVIRONMENT_KEYS if key not in run["environment"]]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; it is no line of this version's fop-bench run"
        )


def commit_of(run: Run) -> str:
    """Return the commit that a run was made by, or `NO_COMMIT` if its code was in no checkout."""
    git = run["environment"]["git"]
    return NO_COMMIT if git is None else str(git["commit"])


def of_one_commit(runs: Sequence[Run]) -> Sequence[Run]:
    """Return the runs; raises ValueError if a study has runs of several commits, or a run is there twice."""
    studies: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        studies["{recipe}, task {task}, study {study}".format(**run)][commit_of(run)] += 1
    for study, counts in studies.items():
        if len(counts) > 1:
            each = ", ".join(f"{commit} ({count})" for commit, count in sorted(counts.items()))
            raise ValueError(
                f"the runs of {study} are of several commits: {each}; give the runs of each a folder"
            )
    identities = Counter(", ".join(f"{key} {run[key]}" for key in IDENTITY) for run in runs)
    if twice := [identity for identity, count in identities.items() if count > 1]:
        raise ValueError(
            f"runs that are there more than once; delete all lines but one of: {'; '.join(twice)}"
        )
    return runs
