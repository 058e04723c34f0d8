"""The runs of a study stop anywhere, or are killed anywhere, and go on, to the bit."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_study
from fop_bench import runner, training
from fop_bench.optimizers import PEERS, Peer
from fop_bench.recipe_runs import Description
from fop_bench.records import Record
from tiny_study import (
    CONTENDERS,
    STEPS,
    Clock,
    final_of,
    finished,
    go,
    identity,
    lines,
    made_known,
    result,
    sat,
    seconds_as_steps,
    tiny_recipe,  # noqa: F401 - for every test here
)

PATIENCE = 600  # seconds until a test gives a process up


class Ticks:
    """A time that each look at it moves on by one; it may end in an interrupt."""

    def __init__(self, kill_at: float = math.inf) -> None:
        self.now, self.kill_at = 0, kill_at

    def monotonic(self) -> float:
        self.now += 1
        if self.now == self.kill_at:
            raise KeyboardInterrupt
        return self.now


def ticking(monkeypatch: pytest.MonkeyPatch, kill_at: float = math.inf) -> None:
    monkeypatch.setattr(runner, "time", Ticks(kill_at))


# The first look is before the first step, the next ones are before each of them.
ONE_STEP = 3


def in_sittings(described: Description, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, int]:
    """Make a run with a stop after every step, each sitting in a process that knows nothing of the last."""
    for sitting in range(1, 100):
        torch.manual_seed(1000 + sitting)
        ticking(monkeypatch)
        if (record := sat(described, folder, ONE_STEP)) is not None:
            return record, sitting
        assert len(list(folder.glob("*.pt"))) == 1
    raise AssertionError("the run does not end")


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "tiny") for name in CONTENDERS), ("sgd", "tiny-plateau")]
)
def test_a_run_with_a_stop_after_every_step_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipe: str
) -> None:
    described = final_of(name, recipe)
    expected = finished(described, tmp_path / "a")
    assert not expected["diverged"]
    assert expected["curve"][0]["train_loss"] != expected["curve"][2]["train_loss"]
    got, sittings = in_sittings(described, tmp_path / "b", monkeypatch)
    assert sittings == 3 * STEPS
    assert result(got) == result(expected)
    assert (expected["layers"] is None) == (CONTENDERS[name].optimizer != "fop")


@pytest.mark.parametrize("kill_at", [2, 3, 5, 8])
def test_a_killed_run_goes_on_from_what_was_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    expected = finished(final_of("fop"), tmp_path / "a")
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_SAVES", 1)
    saved = tmp_path / "b"
    ticking(monkeypatch, kill_at)
    with pytest.raises(KeyboardInterrupt):
        sat(final_of("fop"), saved)
    assert saved.exists() == (kill_at > 2)
    ticking(monkeypatch)
    steps = Clock.now
    assert result(finished(final_of("fop"), saved)) == result(expected)
    assert Clock.now - steps == 3 * STEPS - max(0, kill_at - 3), "no step is made twice but the last"


def test_a_file_that_is_no_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    assert sat(final_of("sgd"), tmp_path, ONE_STEP) is None
    (saved,) = tmp_path.glob("*.pt")
    saved.write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"{saved} is not a saved run .*delete it to start that run again"):
        sat(final_of("sgd"), tmp_path)
    assert saved.read_bytes() == b"broken"


# --- Seconds and warnings

SECONDS = [float(STEPS), 2.0 * STEPS, 3.0 * STEPS]


def seconds(record: Record) -> list[float]:
    return [epoch["seconds"] for epoch in record["curve"]]


def test_seconds_are_those_of_all_sittings_without_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def slow_save(state: Any, path: Path) -> None:
        Clock.now += 1000.0
        save(state, path)

    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    assert seconds(finished(final_of("sgd"), tmp_path / "a")) == SECONDS
    assert seconds(in_sittings(final_of("sgd"), tmp_path / "b", monkeypatch)[0]) == SECONDS
    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch)
    assert seconds(finished(final_of("sgd"), tmp_path / "c")) == SECONDS


def test_a_killed_run_keeps_the_seconds_of_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch, kill_at=4)
    with pytest.raises(KeyboardInterrupt):
        sat(final_of("sgd"), tmp_path / "b")
    ticking(monkeypatch)
    assert Clock.now == 2
    # The second step is made before the state with it is saved.
    assert seconds(finished(final_of("sgd"), tmp_path / "b")) == SECONDS


def test_warnings_of_all_sittings_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = PEERS["sgd"].build

    def noisy(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizer = build(model, **options)

        def warn(*ignored: Any) -> None:
            if Clock.now == 1:
                warnings.warn("in the first step", UserWarning, stacklevel=1)

        optimizer.register_step_pre_hook(warn)
        return optimizer

    monkeypatch.setitem(PEERS, "sgd", Peer("SGD", noisy))
    expected = finished(final_of("sgd"), tmp_path / "a")["warnings"]
    assert "UserWarning: in the first step" in expected
    Clock.now = 0.0
    record, _ = in_sittings(final_of("sgd"), tmp_path / "b", monkeypatch)
    assert set(record["warnings"]) >= set(expected)


# --- The whole study


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Record]]:
    """Give the runs of a study that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    with made_known():
        assert go(out) == 0
    yield lines(out / "comparison.jsonl")


def complete(out: Path, expected: list[Record]) -> None:
    """See that a study is what it would be had nothing happened."""
    records = lines(out / "comparison.jsonl")
    by_identity = {identity(record): result(record) for record in records}
    assert len(by_identity) == len(records) == len(expected) == 10
    assert by_identity == {identity(record): result(record) for record in expected}


@pytest.mark.slow
@pytest.mark.parametrize("sitting", [1, 7, 10])
def test_minutes_end_a_sitting_anywhere_and_the_next_goes_on(
    tmp_path: Path, whole: list[Record], sitting: int
) -> None:
    steps, left, sittings = 10 * 2 * STEPS, math.inf, 0
    with seconds_as_steps():
        while left:
            before, had = Clock.now, left
            left = go(tmp_path, minutes=sitting / 60)
            sittings += 1
            assert Clock.now - before == sitting or left == 0
            assert left <= had
    assert Clock.now == steps, "no step is made twice"
    assert sittings == math.ceil(steps / sitting)
    assert [result(record) for record in lines(tmp_path / "comparison.jsonl")] == list(map(result, whole))
    assert not list((tmp_path / "unfinished").glob("*"))


def test_no_run_starts_when_the_time_is_over(tmp_path: Path) -> None:
    assert go(tmp_path, minutes=-1.0) == 10
    assert Clock.now == 0
    assert not list(tmp_path.iterdir())


# --- Killed


# Where a process kills itself: at the call of what, and before, half way through or after it.
PLACES = {
    "in a step": (Clock, "forward", "before"),
    "in a state": (torch, "save", "half"),
    "before a state gets its name": (Path, "replace", "before"),
    "before a line": (runner, "append", "before"),
    "in the file of lines": (Path, "write_text", "half"),
    "behind a line": (runner, "append", "after"),
}


def killed(out: Path, place: str, due: int) -> None:
    """Make runs in a process that gets no further than to a place, reached for the ``due``-th time."""
    owner, name, when = PLACES[place]
    call, calls = getattr(owner, name), itertools.count(1)

    def last(*given: Any, **how: Any) -> Any:
        if next(calls) != due:
            return call(*given, **how)
        paths = [each for each in given if isinstance(each, Path)]
        before = [path.stat().st_size if path.exists() else 0 for path in paths]
        if when != "before":
            call(*given, **how)
        if when == "half":
            os.truncate(paths[0], (before[0] + paths[0].stat().st_size) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    child = os.fork()
    if child == 0:
        try:
            runner.SECONDS_BETWEEN_SAVES = 0.0
            setattr(owner, name, last)
            go(out)
        finally:
            os._exit(0)  # was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_place_loses_nothing(tmp_path: Path, whole: list[Record], place: str) -> None:
    before = b""
    for due in (1, 3, 2):
        killed(tmp_path, place, due)
        path = tmp_path / "comparison.jsonl"
        now = path.read_bytes() if path.exists() else b""
        # What was a line stays, in its place, and there is no half of one.
        assert now.startswith(before)
        assert now.endswith(b"\n") or not now
        before = now
    assert go(tmp_path) == 0
    complete(tmp_path, whole)


def alive(mark: str) -> set[int]:
    """Give the living processes that have a mark in their environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is of someone else
            if mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


# One start alone: it imports everything three times, in the command and in both of its workers.
@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_killed_command_leaves_no_worker_and_nothing_is_lost(tmp_path: Path, whole: list[Record]) -> None:
    mark = uuid.uuid4().hex
    path, log = tmp_path / "comparison.jsonl", tmp_path / "log"
    asked = ["run", "tiny", "--task", "random", "--batch", "8", "--jobs", "2", "--device", "cpu"]
    with log.open("wb") as output:
        parent = subprocess.Popen(
            [sys.executable, tiny_study.__file__, *asked, "--out", str(tmp_path)],
            env={**os.environ, "FOP_TEST": mark},
            stdout=output,
            stderr=output,
        )
    try:

        def due() -> bool:
            three = path.exists() and path.read_bytes().count(b"\n") >= 3
            return parent.poll() is not None or (three and any((tmp_path / "unfinished").glob("*.pt")))

        wait_until(due, "three runs are made, and others are under way")
        workers = alive(mark) - {parent.pid}
        assert len(workers) >= 2, log.read_text()
        with pytest.raises(BlockingIOError, match="another fop-bench is writing"):
            go(tmp_path)
    finally:
        parent.kill()
    assert parent.wait() == -signal.SIGKILL, log.read_text()
    wait_until(lambda: not alive(mark), "the workers of a killed process end")
    before = path.read_bytes()
    assert "tiny_study.py run tiny" in json.loads(before.splitlines()[0])["environment"]["command"]
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) in (1, 2), "runs that were under way"
    assert go(tmp_path) == 0
    assert path.read_bytes().startswith(before)
    complete(tmp_path, whole)
