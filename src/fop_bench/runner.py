"""Makes runs in any number of sittings, one JSON line a run; and which runs a recipe's study has."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import fop
from fop_bench.environment import Git, git_state, this_command
from fop_bench.execution import Description, Run, Sitting, execute
from fop_bench.recipes import recipe
from fop_bench.records import Record, append, locked, read_runs, refuse_mixture

TUNING_SEED = 0
# glibc gives the pages of large tensors back to the kernel and asks for new ones, which takes up to half of
# the time of a large step on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}

# Told how many runs are done, how many are planned, and what starts next.
OnRun = Callable[[int, int, str], None]


# Given the records of a file, the runs that can be made now, and the number of all that are not done.
Planned = Callable[[Sequence[Record]], tuple[Sequence[Run], int]]


def make_runs(
    path: Path,
    read: Callable[[Git], list[Record]],
    planned: Planned,
    *,
    data: str | None,
    device: torch.device,
    jobs: int,
    minutes: float,
    on_run: OnRun = lambda done, planned, title: None,
) -> int:
    """Make the planned runs that a file does not hold yet; return how many are left.

    ``read`` gives the file's records that matter, given the commit, and raises ValueError for those that must
    not be added to. After ``minutes`` every run stops where it is; calling again goes on from there. Raises
    BlockingIOError if another process writes into the file's folder.
    """
    unfinished, deadline = path.parent / "unfinished", time.monotonic() + 60 * minutes
    with locked(path), _workers(jobs) as submit:
        git = git_state(Path(fop.__file__))
        done, sitting = read(git), Sitting(data, unfinished, deadline, this_command(), git)
        failure: Exception | None = None
        running: dict[Future[Record | None], Run] = {}
        while True:
            ready, left = planned(done)
            todo = [run for run in ready if run not in running.values()] if failure is None else []
            while todo and len(running) < jobs and time.monotonic() < deadline:
                run = todo.pop(0)
                on_run(len(done), len(done) + left, run.title)
                running[submit(execute, run, sitting, device)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    record = future.result()
                except Exception as error:  # raised once the other runs are in the file
                    failure = failure or error
                    continue
                if record is not None:
                    append(path, record)
                    run.saved(unfinished).unlink(missing_ok=True)
                    done.append(record)
                    on_run(len(done), len(done) + planned(done)[1], run.title)
        if failure is not None:
            raise failure
        return left


# --- Workers


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Future[Record | None]]]:
    """Yield a `submit`: to processes of their own, or, for one job, to this one."""
    if jobs == 1:
        yield _at_once
        return
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)  # read by the C library when a worker starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        yield pool.submit


def _at_once(function: Callable[..., Record | None], *arguments: Any) -> Future[Record | None]:
    future: Future[Record | None] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # raised by `result`, as a worker's would be
        future.set_exception(error)
    return future


def _end_with_parent() -> None:
    """Make this worker end when the process that started it is killed, which tells its workers nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    thread = threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True)
    thread.start()


# --- The runs of a study


@dataclass
class Selection:
    """Which runs of a recipe's study to make; an empty choice becomes all.

    Raises ValueError for what the recipe does not have.
    """

    recipe: str
    study: str = "comparison"
    tasks: Sequence[str] = ()
    contenders: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()

    def __post_init__(self) -> None:
        plan = recipe(self.recipe)
        _known("study", [self.study], plan.studies)
        study = plan.studies[self.study]
        self.tasks = _known("task", self.tasks, plan.tasks)
        self.contenders = _known("optimizer", self.contenders, study.contenders)
        self.batch_sizes = _known("batch size", self.batch_sizes, study.epochs)


def _known(what: str, chosen: Sequence[Any], there: Iterable[Any]) -> Sequence[Any]:
    for each in chosen:
        if each not in there:
            raise ValueError(f"unknown {what} {each!r}; known are {', '.join(map(str, there))}")
    return [each for each in there if not chosen or each in chosen]


def make(chosen: Selection, *, data: str | None, out: Path, **how: Any) -> int:
    """Make the runs of a study that ``out``/STUDY.jsonl does not hold yet, as `make_runs` does.

    Raises ValueError for runs that must not be mixed.
    """
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # one folder has one name
    path = out / f"{chosen.study}.jsonl"
    read = partial(_records_of, chosen, path, data)
    return make_runs(path, read, partial(planned, chosen), data=data, **how)


def _records_of(chosen: Selection, path: Path, data: str | None, git: Git) -> list[Record]:
    """Return the file's records of these runs; raises ValueError for any of another commit or data."""
    plan, mine = recipe(chosen.recipe), []
    for record in read_runs(path) if path.exists() else []:
        pairs: list[tuple[str, Any, Any]] = []
        if record["recipe"] == chosen.recipe and record["task"] in chosen.tasks:
            pairs += [("on", record["data"], data or plan.tasks[record["task"]].origin)]
            if record["contender"] in chosen.contenders and record["batch_size"] in chosen.batch_sizes:
                mine.append(record)
        refuse_mixture(path, record["environment"], git, pairs)
    return mine


def planned(chosen: Selection, done: Sequence[Record]) -> tuple[list[Description], int]:
    """Return the runs that can be made now, and the number of all that are not done, later ones included."""
    study, names = recipe(chosen.recipe).studies[chosen.study], [each.name for each in fields(Description)]
    made = {Description(**{name: record[name] for name in names}).key: record for record in done}
    ready: list[Description] = []
    later = 0  # final runs whose options are not known yet
    for size, task in itertools.product(chosen.batch_sizes, chosen.tasks):
        by_contender = []
        for name in chosen.contenders:
            place = chosen.recipe, task, chosen.study, "tuning", name
            grid = study.contenders[name].combinations()
            runs = [Description(*place, each, size, study.epochs[size], TUNING_SEED) for each in grid]
            tuned = [made[run.key] for run in runs if run.key in made]
            if len(tuned) < len(runs):
                later += len(study.seeds)
            else:
                best = replace(runs[0], phase="final", options=best_options(tuned))
                runs += [replace(best, seed=seed) for seed in study.seeds]
            by_contender.append(runs)
        # Contenders take turns, so that a slow hour slows all of them.
        turns = itertools.chain(*itertools.zip_longest(*by_contender))
        ready += [run for run in turns if run is not None and run.key not in made]
    return ready, len(ready) + later


def best_options(tuning: Sequence[Record]) -> Mapping[str, Any]:
    """Choose by the mean accuracy over the epochs; if all runs diverged, the first options are taken."""

    def score(run: Record) -> float:
        return -1.0 if run["diverged"] else fmean(epoch["accuracy"] for epoch in run["curve"])

    return dict(max(tuning, key=score)["options"])
