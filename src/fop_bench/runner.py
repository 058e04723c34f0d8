"""Makes the runs of a study, in any number of sittings, one JSON line a run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

import fop
from fop_bench.environment import commit_title, git_state, this_command
from fop_bench.execution import Description, execute
from fop_bench.recipes import recipe
from fop_bench.recipes.recipe import Contender, Recipe, Study
from fop_bench.run_records import read_runs
from fop_bench.world import World

TUNING_SEED = 0
# glibc gives the pages of large tensors back to the kernel and asks for new ones, which takes up to half of
# the time of a large step on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}

Record = dict[str, Any]
# Told how many runs are done, how many are planned, and what starts next.
OnRun = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Selection:
    """Which runs of a recipe's study to make; an empty choice means all."""

    recipe: str
    study: str
    tasks: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()

    def checked(self) -> Selection:
        """Return it with names in full; raises ValueError for what the recipe does not have."""
        plan = recipe(self.recipe)
        if self.study not in plan.studies:
            raise ValueError(
                f"unknown study {self.study!r} of {self.recipe}; known are {', '.join(plan.studies)}"
            )
        study = plan.studies[self.study]
        return Selection(
            self.recipe,
            self.study,
            _known("task", self.tasks, plan.tasks),
            _known("optimizer", self.contenders, study.contenders),
            _known("batch size", self.batch_sizes, study.epochs),
        )


def _known(what: str, chosen: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
    for each in chosen:
        if each not in known:
            raise ValueError(f"unknown {what} {each!r}; known are {', '.join(map(str, known))}")
    return tuple(each for each in known if not chosen or each in chosen)


def planned(chosen: Selection, done: Sequence[Record]) -> tuple[list[Description], int]:
    """Give the runs that can be made now, and the number of all that are not done, later ones included."""
    plan = recipe(chosen.recipe)
    study = plan.studies[chosen.study]
    by_key = {_key(record): record for record in done}
    ready: list[Description] = []
    later = 0
    for batch_size in chosen.batch_sizes:
        for task in chosen.tasks:
            groups = [
                list(_runs(plan, study, chosen, task, batch_size, name, by_key)) for name in chosen.contenders
            ]
            # Contenders take turns, so that a slow hour slows all of them.
            turns = [run for turn in _by_turns(groups) for run in turn]
            ready += [run for run in turns if run is not None and _key(asdict(run)) not in by_key]
            later += sum(run is None for run in turns)
    return ready, len(ready) + later


def _by_turns(groups: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    for turn in range(max(map(len, groups), default=0)):
        yield [group[turn] for group in groups if turn < len(group)]


def _runs(
    plan: Recipe,
    study: Study,
    chosen: Selection,
    task: str,
    batch_size: int,
    name: str,
    done: Mapping[str, Record],
) -> Iterator[Description | None]:
    """Give all runs of a contender at one batch size; None for one whose options are not known yet."""

    def describe(phase: str, options: Mapping[str, Any], seed: int) -> Description:
        epochs = study.epochs[batch_size]
        return Description(plan.name, task, chosen.study, phase, name, options, batch_size, epochs, seed)

    contender: Contender = study.contenders[name]
    combinations = list(contender.combinations())
    if not study.tuned:
        for seed in study.seeds:
            yield from (describe("final", options, seed) for options in combinations)
        return
    tuning = [describe("tuning", options, TUNING_SEED) for options in combinations]
    yield from tuning
    records = [done[key] for run in tuning if (key := _key(asdict(run))) in done]
    for seed in study.seeds:
        yield describe("final", best_options(records), seed) if len(records) == len(tuning) else None


def best_options(tuning: Sequence[Record]) -> Mapping[str, Any]:
    """Choose by the mean held-out accuracy over the epochs, which rewards speed and the end result alike.

    A diverged run loses against every other; if all diverged, the first options are taken.
    """
    alive = [run for run in tuning if not run["diverged"]]
    if not alive:
        return dict(tuning[0]["options"])
    best = max(alive, key=lambda run: statistics.fmean(epoch["accuracy"] for epoch in run["curve"]))
    return dict(best["options"])


def make(
    chosen: Selection,
    *,
    data: str | None,
    world: World,
    out: Path,
    jobs: int,
    minutes: float,
    on_run: OnRun = lambda done, planned, title: None,
) -> int:
    """Make the runs that ``out``/STUDY.jsonl does not hold yet; return how many are left.

    After ``minutes`` every run stops where it is; calling again goes on from there. Killed at any moment,
    it loses no finished run, and half a minute of an unfinished one.

    Raises:
        ValueError: unknown names; runs of another commit in ``out``; a broken line in it.
        BlockingIOError: another process is writing there.
    """
    chosen = chosen.checked()
    deadline = time.monotonic() + 60 * minutes
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # one folder has one name
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{chosen.study}.jsonl"
    with _exclusively(path) if world.rank == 0 else nullcontext():
        # Only the rank that keeps the file knows what is in it; the others follow.
        done = world.agree(_done(path) if world.rank == 0 else [])
        git = world.agree(git_state(Path(fop.__file__)))
        _check_origin(path, done, chosen, here=git, data=data, ranks=world.size)
        done = [record for record in done if _chosen(record, chosen)]
        arguments = (data, str(world.device), out / "unfinished", deadline, this_command(), git)
        failure: Exception | None = None
        with _workers(jobs, world) as submit:
            running: dict[Future[Record | None], Description] = {}
            while True:
                ready, left = planned(chosen, done)
                under_way = {_key(asdict(run)) for run in running.values()}
                todo = [run for run in ready if _key(asdict(run)) not in under_way]
                if failure is not None:
                    todo = []
                while todo and len(running) < jobs and world.agree(time.monotonic() < deadline):
                    next_one = todo.pop(0)
                    on_run(len(done), len(done) + left, next_one.title)
                    running[submit(_work, next_one, *arguments)] = next_one
                if not running:
                    if failure is not None:
                        raise failure
                    return left
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        record = world.agree(future.result())
                    except Exception as error:  # raised once the other runs are in the file
                        failure = failure or error
                        continue
                    if record is not None:
                        if world.rank == 0:
                            _append(path, record)
                            _forget(out / "unfinished", run)
                        done.append(record)
                        on_run(len(done), len(done) + planned(chosen, done)[1], run.title)


def _done(path: Path) -> list[Record]:
    # What a kill cut off is aside already.
    return read_runs(path, whole=True) if path.stat().st_size else []


def _chosen(record: Record, chosen: Selection) -> bool:
    return (
        record["task"] in chosen.tasks
        and record["contender"] in chosen.contenders
        and record["batch_size"] in chosen.batch_sizes
    )


def _work(
    run: Description,
    data: str | None,
    device: str,
    folder: Path,
    deadline: float,
    command: str,
    git: Mapping[str, Any] | None,
    world: World | None = None,
) -> Record | None:
    torch.set_num_threads(1)
    # Convolutions without a fixed order of sums would make a run that goes on differ from one that did not
    # stop.
    torch.backends.cudnn.benchmark = False
    world = world or World(torch.device(device))
    return execute(run, data, world, _saved(folder, run), deadline, command, git)


def _saved(folder: Path, run: Description) -> Path:
    return folder / f"{hashlib.sha256(_key(asdict(run)).encode()).hexdigest()[:16]}.pt"


def _forget(folder: Path, run: Description) -> None:
    for saved in folder.glob(f"{_saved(folder, run).stem}.*"):
        saved.unlink()


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps([record[field.name] for field in fields(Description)], sort_keys=True)


def _append(path: Path, record: Record) -> None:
    """Add one line, and do not return before it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same file, and put what a killed one left of a line aside."""
    import fcntl  # noqa: PLC0415 - where it is missing, the other commands still work

    with path.open("ab") as file:
        try:
            # Ends with the process, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another fop-bench is writing {path}; wait for it, or give another --out"
            ) from error
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            aside = path.with_suffix(".cut-off")
            with aside.open("ab") as kept:
                kept.write(content[whole:] + b"\n")
            file.truncate(whole)
        yield


def _check_origin(
    path: Path,
    done: Sequence[Record],
    chosen: Selection,
    *,
    here: Mapping[str, Any] | None,
    data: str | None,
    ranks: int,
) -> None:
    """Refuse to put runs of another commit, recipe or number of ranks, or on other data, beside others."""
    for record in done:
        # What is installed as a package has no commit, but a version.
        if record["environment"]["fop"] != fop.__version__:
            raise ValueError(
                f"{path} holds runs of fop {record['environment']['fop']}, and this is {fop.__version__}; "
                "give another --out"
            )
    others = [record["environment"]["git"] for record in done if record["environment"]["git"] != here]
    if others:
        raise ValueError(
            f"{path} holds {len(others)} runs of {commit_title(others[0])}, and this is "
            f"{commit_title(here)}: one table must not mix them; give another --out, or check that "
            "commit out to go on"
        )
    for record in done:
        if record["recipe"] != chosen.recipe:
            raise ValueError(
                f"{path} holds runs of {record['recipe']}; give another --out for {chosen.recipe}"
            )
        if record["task"] not in chosen.tasks:
            continue
        origin = data or recipe(chosen.recipe).tasks[record["task"]].origin
        if record["data"] != origin:
            raise ValueError(
                f"{path} holds runs on {record['data']}, and this is {origin}: one table must not mix them; "
                "give another --out, or the same --data"
            )
        if record["ranks"] != ranks:
            raise ValueError(
                f"{path} holds runs on {record['ranks']} ranks, and this is on {ranks}; give another --out"
            )


@contextmanager
def _workers(jobs: int, world: World) -> Iterator[Callable[..., Future[Record | None]]]:
    """Give a `submit`: to processes of their own, or, for one job, to this one."""
    if jobs == 1:
        yield partial(_at_once, world)
        return
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)  # read by the C library when a worker starts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        yield pool.submit


def _at_once(world: World, function: Callable[..., Record | None], *arguments: Any) -> Future[Record | None]:
    future: Future[Record | None] = Future()
    try:
        future.set_result(function(*arguments, world))
    except Exception as error:  # raised by `result`, as a worker's would be
        if world.size > 1:
            raise  # the other ranks wait for this one, until torchrun ends them
        future.set_exception(error)
    return future


def _end_with_parent() -> None:
    """Make this worker end when the process that started it is killed, which tells its workers nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
