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
EPOCH_KEYS = ("epoch", "seconds", "processor_seconds", "train_loss", "accuracy")
LAYER_KEYS = ("names", "epochs", "beta", "eta", "rho")
ENVIRONMENT_KEYS = ("device", "processor", "torch", "python", "fop", "git", "threads", "date", "command")

# What two lines must differ in to be two runs.
IDENTITY = ("recipe", "task", "study", "phase", "contender", "options", "batch_size", "seed", "halves")
NO_COMMIT = "none"
SHORTEST_PREFIX = 7


def read_runs(path: Path, *, whole: bool = False) -> list[Run]:
    """Read the runs of a folder's JSON lines, or of one file; a last line that was cut off is left out.

    That is a warning: the run that was writing it was killed, and the line is no run. With ``whole`` it is an
    error, as for any other line.

    Raises:
        ValueError: no runs, a broken line that is not the last, a line without the keys that a report needs.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    runs = [run for file in files for run in _read_file(file, whole)]
    if not runs:
        raise ValueError(f"no runs in {path}; make some with fop-bench run")
    return runs


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
    if not isinstance(run, dict):
        raise ValueError(f"{where} is no run but a {type(run).__name__}; delete that line")
    missing = [key for key in KEYS if key not in run]
    if not missing:
        parts: list[tuple[str, Any, Sequence[str]]]
        parts = [("environment", run["environment"], ENVIRONMENT_KEYS)]
        parts += [("curve", epoch, EPOCH_KEYS) for epoch in run["curve"][:1]]
        parts += [("layers", run["layers"], LAYER_KEYS)] if run["layers"] is not None else []
        missing = [f"{name}.{key}" for name, part, keys in parts for key in keys if key not in part]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; it is no line of this version's fop-bench run"
        )
    if not run["curve"] and not run["diverged"]:
        raise ValueError(f"{where} has an empty curve, though its run did not diverge; delete that line")


def commit_of(run: Run) -> str:
    """Return the commit that a run was made by, or `NO_COMMIT` if its code was in no checkout."""
    git = run["environment"]["git"]
    return NO_COMMIT if git is None else str(git["commit"])


def of_one_commit(runs: Sequence[Run], commit: str | None = None) -> list[Run]:
    """Leave out what no report may mix: in a study with several commits, all but the chosen one's runs.

    ``commit`` is the first characters of the chosen one, or `NO_COMMIT`. A study of one commit is kept whole.

    Raises:
        ValueError: a study has runs of several commits and none is chosen, or the chosen one is unknown or
            ambiguous; a run is there twice.
    """
    known = Counter(commit_of(run) for run in runs)
    chosen = None if commit is None else _resolve(commit, known)
    studies: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        studies[run["recipe"], run["task"], run["study"]].append(run)
    kept: list[Run] = []
    for (recipe, task, study), lines in studies.items():
        counts = Counter(commit_of(run) for run in lines)
        if len(counts) > 1 and (chosen is None or chosen not in counts):
            raise ValueError(
                f"the runs of {recipe}, task {task}, study {study} are of several commits: {_list(counts)}; "
                "choose one by --commit"
            )
        kept += [run for run in lines if len(counts) == 1 or commit_of(run) == chosen]
    identities = Counter(", ".join(f"{key} {run[key]}" for key in IDENTITY) for run in kept)
    if twice := [identity for identity, count in identities.items() if count > 1]:
        raise ValueError(
            f"{len(twice)} run{'s are' if len(twice) > 1 else ' is'} there more than once; "
            "delete all lines but one of: " + "; ".join(twice)
        )
    return kept


def _resolve(prefix: str, known: Counter[str]) -> str:
    found = [each for each in known if each.startswith(prefix)]
    if len(prefix) < SHORTEST_PREFIX and prefix != NO_COMMIT:
        raise ValueError(f"commit {prefix!r} is too short; give at least {SHORTEST_PREFIX} characters")
    if len(found) != 1:
        problem = "matches several" if found else "is not known"
        raise ValueError(f"commit {prefix!r} {problem}; the runs are of {_list(known)}")
    return found[0]


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{commit} ({count} run{'s' * (count > 1)})" for commit, count in sorted(counts.items()))


def of_defaults(run: Run) -> Run:
    """Return what the report of the defaults shows of a run; lines of version 0.1 are that already."""
    if "curve" not in run:
        return run
    full = run["batch_size"] >= run["train_samples"]
    last = {} if run["diverged"] else run["curve"][-1]
    return {
        "task": f"{run['task']}, {'full batch' if full else 'batch ' + str(run['batch_size'])}",
        "optimizer": run["contender"],
        **{key: run[key] for key in ("options", "seed", "diverged", "warnings")},
        **{key: last.get(key) for key in ("accuracy", "train_loss", "seconds")},
        "environment": {key: run["environment"][key] for key in ("device", "torch", "fop", "git", "threads")},
    }
