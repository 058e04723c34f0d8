"""Processes of `fop-bench run` that are killed: no finished run is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_study
from fop_bench import environment as environment_module
from fop_bench import execution, runner
from fop_bench.recipes import RECIPES
from fop_bench.runner import Record
from tiny_study import (
    COMMIT,
    TINY,
    Clock,
    go,
    identity,
    lines,
    result,
    tiny_recipe,  # noqa: F401 - for every test here
)


class Places:
    """Where a process kills itself: each function puts the end into a place that is passed ``due`` times."""

    def __init__(self, due: int) -> None:
        self.passed, self.due = 0, due

    def reached(self) -> bool:
        self.passed += 1
        return self.passed == self.due

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_a_step(self) -> None:
        step = Clock.forward

        def forward(module: Clock, x: torch.Tensor) -> torch.Tensor:
            if module.training and self.reached():
                self.end()
            return step(module, x)

        Clock.forward = forward

    def in_a_state(self) -> None:
        save = torch.save

        def half(state: Any, path: Path) -> None:
            save(state, path)
            if self.reached():
                path.write_bytes(path.read_bytes()[:1000])
                self.end()

        torch.save = half

    def before_a_state_gets_its_name(self) -> None:
        replaced = Path.replace

        def late(path: Path, target: Path) -> Path:
            if self.reached():
                self.end()
            return replaced(path, target)

        Path.replace = late

    def before_a_line(self) -> None:
        self._with_line(lambda path, record, append: None)

    def in_a_line(self) -> None:
        def half(path: Path, record: Record, append: Callable[[Path, Record], None]) -> None:
            before = path.stat().st_size
            append(path, record)
            os.truncate(path, (before + path.stat().st_size) // 2)

        self._with_line(half)

    def behind_a_line(self) -> None:
        self._with_line(lambda path, record, append: append(path, record))

    def _with_line(self, last: Callable[[Path, Record, Callable[[Path, Record], None]], None]) -> None:
        append = runner._append

        def appended(path: Path, record: Record) -> None:
            if self.reached():
                last(path, record, append)
                self.end()
            append(path, record)

        runner._append = appended


PLACES = [name for name in vars(Places) if name.startswith(("in_", "before_", "behind_"))]


def killed(out: Path, place: str, due: int) -> None:
    """Make runs in a process that gets no further than to a place."""
    child = os.fork()
    if child == 0:
        try:
            execution.SECONDS_BETWEEN_SAVES = 0.0
            getattr(Places(due), place)()
            go(out, batch_sizes=(8,))
        finally:
            os._exit(0)  # was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def complete(out: Path, expected: list[Record]) -> None:
    """See that a study is what it would be had nothing happened."""
    records = lines(out / "comparison.jsonl")
    by_identity = {identity(record): result(record) for record in records}
    assert len(by_identity) == len(records) == len(expected) == 10
    assert by_identity == {identity(record): result(record) for record in expected}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Record]]:
    """Give the runs of a study that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RECIPES, "tiny", TINY)
        patched.setattr(runner, "git_state", lambda source: COMMIT)
        patched.setattr(environment_module, "git_state", lambda source: COMMIT)
        assert go(out, batch_sizes=(8,)) == 0
        yield lines(out / "comparison.jsonl")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_place_loses_nothing(tmp_path: Path, whole: list[Record], place: str) -> None:
    before = b""
    for due in (1, 3, 2):
        killed(tmp_path, place, due)
        now = (tmp_path / "comparison.jsonl").read_bytes()
        # What was a whole line stays, in its place.
        assert now.startswith(before)
        before = now[: now.rfind(b"\n") + 1]
    cut = now[len(before) :]
    assert bool(cut) == (place == "in_a_line")
    assert go(tmp_path, batch_sizes=(8,)) == 0
    complete(tmp_path, whole)
    aside = tmp_path / "comparison.cut-off"
    if place == "in_a_line":
        assert aside.read_bytes().endswith(cut + b"\n")
        assert aside.read_bytes().count(b"\n") == 3
    else:
        assert not aside.exists()


def alive(mark: str) -> set[int]:
    """Give the living processes that have a mark in their environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is of someone else
            if mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.005)


# One start alone: it imports everything three times, in the command and in both of its workers.
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_worker_and_nothing_is_lost(tmp_path: Path, whole: list[Record]) -> None:
    mark = uuid.uuid4().hex
    path, log = tmp_path / "comparison.jsonl", tmp_path / "log"
    asked = ["tiny", "--task", "random", "--batch", "8", "--jobs", "2", "--device", "cpu"]
    with log.open("wb") as output:
        parent = subprocess.Popen(
            [sys.executable, tiny_study.__file__, *asked, "--out", str(tmp_path)],
            env={**os.environ, "FOP_TEST": mark},
            stdout=output,
            stderr=output,
        )
    try:

        def due() -> bool:
            return parent.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") >= 3)

        wait_until(due, 100, "three runs")
        workers = alive(mark) - {parent.pid}
        assert len(workers) >= 2, log.read_text()
        with pytest.raises(BlockingIOError, match="another fop-bench is writing"):
            go(tmp_path)
    finally:
        parent.kill()
    assert parent.wait() == -signal.SIGKILL, log.read_text()
    wait_until(lambda: not alive(mark), 10, "the workers of a killed process end")
    before = path.read_bytes()
    assert "tiny_study.py tiny" in json.loads(before.splitlines()[0])["environment"]["command"]
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) in (1, 2), "runs that were under way"
    assert go(tmp_path, batch_sizes=(8,)) == 0
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    complete(tmp_path, whole)
