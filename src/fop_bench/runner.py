"""Makes runs in any number of sittings, one JSON line a run: `fop-bench run`'s, and those of the race."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch

import fop
from fop_bench.environment import Git, commit_title, git_state, machine, this_command
from fop_bench.records import Record, append, locked, replacing
from fop_bench.training import Training, messages

# A killed run loses no more than this.
SECONDS_BETWEEN_SAVES = 30.0
# glibc gives the pages of large tensors back to the kernel and asks for new ones, which takes up to half of
# the time of a large step on a CPU.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
# Told how many runs are done, how many are planned, and what starts next.
OnRun = Callable[[int, int, str], None]
# A training, and what makes a record of it at its end, given the warnings.
Begun = tuple[Training, Callable[[list[str]], Record]]


@dataclass(frozen=True)
class Sitting:
    """What the runs of one command have in common."""

    data: str | None  # folder or hub name; None for the run's own
    folder: Path  # for the states of unfinished runs
    deadline: float  # by `time.monotonic`, the same clock in all processes of a machine
    command: str  # what repeats it
    git: Git  # the commit that it began with


# What a run goes on with as it began, and how an error names it.
NAMED: dict[str, Callable[[Any], str]] = {
    "git": commit_title,
    "data": lambda data: f"data {data}" if data else "its own data",
    "processor": str,
}


class Run:
    """One run, as the runner makes it; its fields tell it from all others."""

    of_one_commit = True  # whether it goes on only at the commit that it began with

    @property
    def title(self) -> str:
        """What a progress bar shows."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """The same for two runs only if they are the same run."""
        return json.dumps(vars(self), sort_keys=True)

    def saved(self, folder: Path) -> Path:
        """Return where its state is, in a folder."""
        return folder / f"{hashlib.sha256(self.key.encode()).hexdigest()[:16]}.pt"

    def begin(self, data: str | None, device: torch.device) -> Begun:
        """Load data, build network and optimizer; raises ValueError for a batch that cannot be."""
        raise NotImplementedError


def execute(run: Run, sitting: Sitting, device: torch.device) -> Record | None:
    """Make a run, or go on with it, and return its record; None if the time was over before the end."""
    torch.set_num_threads(1)
    # A run that goes on must not differ from one that did not stop: sums need a fixed order.
    torch.backends.cudnn.benchmark = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training, record = run.begin(sitting.data, device)
        saved, git = run.saved(sitting.folder), sitting.git if run.of_one_commit else None
        begun = {"git": git, "data": sitting.data, "processor": device.type}
        earlier = _resume(training, saved, begun)
        last = time.monotonic()

        def warned() -> list[str]:
            return list(dict.fromkeys(earlier + messages(caught)))

        def stop() -> bool:
            nonlocal last
            now = time.monotonic()
            over = now >= sitting.deadline
            if over or now - last >= SECONDS_BETWEEN_SAVES:
                training.stop_clock()  # the time that this takes does not count
                state = {"training": training.state_dict(), **begun, "warnings": warned()}
                with replacing(saved) as unfinished:
                    torch.save(state, unfinished)
                training.start_clock()
                last = now
            return over

        if not training.run(stop):
            return None
        where = machine(device) | {"command": sitting.command, "git": sitting.git}
        return record(warned()) | {"environment": where}


def _resume(training: Training, saved: Path, begun: dict[str, Any]) -> list[str]:
    """Go on from the saved state, if there is one, and return the warnings up to there.

    ``begun`` says at which commit, on which data and processor this would be.
    """
    if not saved.exists():
        return []
    try:
        state = torch.load(saved, weights_only=True)
        earlier = begun | {key: state[key] for key in begun if key == "git" or key in state}
        if earlier == begun:
            training.load_state_dict(state["training"])
            return state["warnings"]
    except Exception as error:
        message = f"{saved} is not a saved run ({error}); delete it to start that run again"
        raise ValueError(message) from error
    theirs, ours = (
        ", ".join(name(of[key]) for key, name in NAMED.items() if earlier[key] != begun[key])
        for of in (earlier, begun)
    )
    raise ValueError(
        f"{saved} is half a run of {theirs}, and this is {ours}; go on as it began, or delete the file to "
        "start that run again"
    )


# --- Many runs

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
