"""Files of JSON lines: what a line must hold, which lines may stand together, and how one is added."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fop
from fop_bench.environment import Git, commit_title

Record = dict[str, Any]

KEYS = (
    *("recipe", "title", "task", "study", "phase", "contender", "label", "options", "batch_size", "epochs"),
    *("seed", "targets", "diverged", "curve", "layers", "parameters", "train_samples"),
    *("evaluated_on", "evaluated_samples", "warnings", "data", "environment"),
)
ENVIRONMENT_KEYS = ("device", "processor", "torch", "python", "fop", "git", "threads", "date", "command")
# What two lines must differ in to be two runs.
IDENTITY = ("recipe", "task", "study", "phase", "contender", "options", "batch_size", "seed")

# --- Reading


def read_runs(path: Path) -> list[Record]:
    """Read the runs of a folder's JSON lines, or of one file; ValueError for none, or a broken line."""
    files = [path] if path.is_file() else record_files(path)
    runs = [run for file in files for run in read_lines(file, KEYS)]
    if not runs:
        raise ValueError(f"no runs in {path}; make some with fop-bench run")
    return runs


def record_files(folder: Path) -> list[Path]:
    """Return the files of JSON lines in a folder; hidden ones and links to nothing are none."""
    return sorted(path for path in folder.glob("[!.]*.jsonl") if path.is_file())


def read_lines(file: Path, keys: Sequence[str], command: str = "run") -> list[Record]:
    """Read a command's JSON lines, none if there is no file; ValueError if one is broken or lacks a key."""
    rows = []
    for n, line in enumerate(file.read_bytes().split(b"\n") if file.exists() else (), start=1):
        if line.strip():
            row = loads(line, where := f"{file}, line {n}")
            missing = _missing(row, keys)
            if not missing and "environment" in keys:
                missing = [f"environment.{key}" for key in _missing(row["environment"], ENVIRONMENT_KEYS)]
            if missing:
                what = f"{', '.join(missing)}; it is no line of this version's fop-bench {command}"
                raise ValueError(f"{where} has no {what}")
            rows.append(row)
    return rows


def _missing(part: Any, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if not isinstance(part, dict) or key not in part]


def loads(text: bytes, where: str) -> Any:
    """Parse strict JSON; raises ValueError, which says ``where``, if it is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); delete that line, or mend it") from error


# --- What may stand together


def of_one_commit(runs: Sequence[Record]) -> Sequence[Record]:
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


def refuse_mixture(
    path: Path, there: Mapping[str, Any], git: Git, others: Iterable[tuple[str, Any, Any]] = ()
) -> None:
    """Raise ValueError if a record of a file and what would go there now are of other commits, or ``others``.

    ``there`` is the record's environment; ``others`` say what the two must also have in common.
    """
    # What is installed as a package has no commit, but a version.
    pairs = [("of fop", there["fop"], fop.__version__), ("of", commit_title(there["git"]), commit_title(git))]
    for what, theirs, ours in (*pairs, *others):
        if theirs != ours:
            raise ValueError(
                f"{path} holds runs {what} {theirs}, and this is {ours}: one table must not mix them; "
                "give another --out, or go on with the same commit and --data"
            )


# --- Writing


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing runs into the same folder."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        if not os.access(path.parent, os.W_OK):  # told before the first run, not after it
            os.close(folder)
            raise PermissionError("it is not writable")
    except OSError as error:
        raise OSError(f"cannot write into {path.parent}: {error}; give another --out") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError as error:
            message = f"another fop-bench is writing {path}; wait for it, or give another --out"
            raise BlockingIOError(message) from error
        yield
    finally:
        os.close(folder)


def append(path: Path, record: Record) -> None:
    """Write the file with one more line; whatever happens meanwhile, it is the old one or the new one."""
    lines = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, lines + json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write strict JSON (no NaN); return the file's path."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file; return its path."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which then takes its name; an OSError in between leaves the old file."""
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    # torch.save makes a RuntimeError of a full disk.
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OSError(f"cannot write {path}, which stays as it was: {error}") from error
