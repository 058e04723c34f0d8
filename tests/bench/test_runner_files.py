"""Files of runs that others wrote to, and errors of `fop-bench run`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import command
from fop_bench import environment, runner
from fop_bench.recipes import RECIPES
from fop_bench.records import Record
from tiny_study import (
    COMMIT,
    STEPS,
    Clock,
    accuracies,
    faked,
    go,
    lines,
    seconds_as_steps,
    tiny_recipe,  # noqa: F401 - for every test here
)

OTHER = {"commit": "fedcba9876543210", "dirty": False}


def invoke(out: Path, *arguments: str, recipe: str = "tiny") -> Any:
    asked = [recipe, "--task", "random", "--jobs", "1", "--device", "cpu", "--out", str(out), *arguments]
    return command.invoke("run", *asked)


def started(out: Path, data: str | None = None) -> Path:
    """Make the first two runs of a study."""
    with seconds_as_steps():
        assert go(out, data=data, minutes=4 * STEPS / 60) == 8
    path = out / "comparison.jsonl"
    assert len(lines(path)) == 2
    return path


def content_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- A file that others wrote to


@pytest.mark.parametrize("at", [0, 1])
def test_a_line_that_is_broken_is_an_error_and_nothing_is_written(tmp_path: Path, at: int) -> None:
    path = started(tmp_path)
    content = path.read_bytes().splitlines(keepends=True)
    content[at] = b"\0\0\0\n"
    path.write_bytes(b"".join(content))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path}, line {at + 1} is not JSON"):
        go(tmp_path)
    assert path.read_bytes() == before


def test_a_second_process_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, accuracies)
    path = tmp_path / "comparison.jsonl"
    refused = []

    def second(done: int, planned: int, title: str) -> None:
        before = content_of(tmp_path)
        with pytest.raises(BlockingIOError, match=rf"another fop-bench is writing {path}; wait for it, or"):
            go(tmp_path)
        told = invoke(tmp_path)
        assert told.exit_code == 1
        assert f"Error: another fop-bench is writing {path}" in told.output
        assert content_of(tmp_path) == before
        refused.append(title)

    assert go(tmp_path, on_run=second) == 0
    assert len(refused) == 20
    assert go(tmp_path, batch_sizes=()) == 0, "afterwards the file is free"


@pytest.mark.parametrize(
    ("git", "data", "written", "message"),
    [
        (OTHER, None, {}, "of commit 0123456789, and this is commit fedcba9876:"),
        (
            {**COMMIT, "dirty": True},
            None,
            {},
            "of commit 0123456789, and this is commit 0123456789 with uncommitted changes:",
        ),
        (None, None, {}, "of commit 0123456789, and this is an installed package:"),
        (COMMIT, None, {"data": "some/images"}, "on some/images, and this is random numbers:"),
        (COMMIT, "other/images", {}, "on random numbers, and this is other/images:"),
        (COMMIT, None, {"environment": {"fop": "0.0.1", "git": COMMIT}}, "of fop 0.0.1, and this is"),
    ],
)
def test_runs_of_other_code_or_data_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: Any, data: str | None, written: Any, message: str
) -> None:
    path = started(tmp_path)
    changed = [
        {**record, **written, "environment": {**record["environment"], **written.get("environment", {})}}
        for record in lines(path)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in changed))
    before = content_of(tmp_path)
    monkeypatch.setattr(runner, "git_state", lambda source: git)
    with pytest.raises(ValueError, match=f"{path} holds runs {message} .*another --out"):
        go(tmp_path, data=data)
    told = invoke(tmp_path, *([] if data is None else ["--data", data]))
    assert told.exit_code == 1
    assert f"holds runs {message}" in " ".join(told.output.split())
    assert content_of(tmp_path) == before


def test_on_the_same_data_it_goes_on(tmp_path: Path) -> None:
    started(tmp_path, "some/images")
    assert go(tmp_path, data="some/images") == 0
    assert {record["data"] for record in lines(tmp_path / "comparison.jsonl")} == {"some/images"}


def test_an_unfinished_run_of_another_commit_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seconds_as_steps():
        assert go(tmp_path, minutes=1 / 60) == 10
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) == 1
    assert not (tmp_path / "comparison.jsonl").exists()
    monkeypatch.setattr(runner, "git_state", lambda source: OTHER)
    with pytest.raises(ValueError, match=r"unfinished.*commit 0123456789.*commit fedcba9876"):
        go(tmp_path)


def test_an_unfinished_run_on_other_data_does_not_go_on(tmp_path: Path) -> None:
    with seconds_as_steps():
        go(tmp_path, minutes=1 / 60)
    [saved] = (tmp_path / "unfinished").glob("*.pt")
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=f"{saved} is half a run of its own data, and this is data other/im"):
        go(tmp_path, data="other/images")
    assert saved.read_bytes() == before
    assert go(tmp_path) == 0


def test_an_unfinished_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    with seconds_as_steps():
        go(tmp_path, minutes=1 / 60)
    [saved] = (tmp_path / "unfinished").glob("*.pt")
    state = torch.load(saved, weights_only=True)
    torch.save({key: state[key] for key in ("training", "git", "warnings")}, saved)
    with seconds_as_steps():
        go(tmp_path, minutes=(2 * STEPS - 1) / 60)
    assert len(lines(tmp_path / "comparison.jsonl")) == 1, "it did not begin anew"


@pytest.mark.parametrize("state", [{"git": COMMIT, "training": {}}, {"training": 1}, [1], "text"])
def test_what_is_no_saved_run_is_named(tmp_path: Path, state: Any) -> None:
    with seconds_as_steps():
        go(tmp_path, minutes=1 / 60)
    [saved] = (tmp_path / "unfinished").glob("*.pt")
    torch.save(state, saved)
    with pytest.raises(ValueError, match=f"{saved} is not a saved run .*delete it to start that run again"):
        go(tmp_path)


def test_records_name_the_commit_that_the_command_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [COMMIT]
    for module in (runner, environment):
        monkeypatch.setattr(module, "git_state", lambda source: now[0])

    def commit_something(done: int, planned: int, title: str) -> None:
        now[0] = OTHER

    go(tmp_path, contenders=("sgd",), on_run=commit_something)
    records = lines(tmp_path / "comparison.jsonl")
    assert [record["environment"]["git"] for record in records] == [COMMIT] * 5


# --- The command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--study", "x"), 1, "unknown study 'x'; known are comparison, all, large"),
        (("--task", "x"), 1, "unknown task 'x'; known are random, joined"),
        (("--optimizer", "adam"), 1, "unknown optimizer 'adam'; known are sgd, fop"),
        (("--batch", "7"), 1, "unknown batch size 7; known are 8, 12"),
        (("--minutes", "0"), 2, "argument --minutes: 0 is not a finite number above 0"),
        *(
            (("--minutes", wrong), 2, f"argument --minutes: {wrong} is not a finite")
            for wrong in ("-1", "nan", "inf")
        ),
        (("--minutes", "x"), 2, "argument --minutes: x is not a finite number above 0"),
        (("--jobs", "1.5"), 2, "argument --jobs: 1.5 is not a whole number above 0"),
        (("--device", "toaster"), 2, "argument --device: 'toaster' is neither cpu nor cuda nor cuda:N"),
        (("--device", "meta"), 2, "argument --device: 'meta' is neither cpu nor cuda nor cuda:N"),
        (("--device", "cuda:99"), 2, "argument --device: 'cuda:99' cannot be used here"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    told = invoke(tmp_path / "out", *arguments)
    assert told.exit_code == code
    assert f"rror: {message}" in told.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    told = invoke(tmp_path / "out", recipe="huge")
    assert told.exit_code == 1
    assert f"Error: unknown recipe 'huge'; known are {', '.join(RECIPES)}" in told.output
    assert "cifar10-small" in told.output


def test_the_command_says_what_is_left_and_goes_on(tmp_path: Path) -> None:
    asked = ("--batch", "8", "--optimizer", "sgd")
    with seconds_as_steps():
        told = invoke(tmp_path, *asked, "--minutes", str(3 * STEPS / 60))
        assert (told.exit_code, Clock.now) == (0, 3 * STEPS)
    path = tmp_path / "comparison.jsonl"
    assert f"{path}: 4 runs left; the same command goes on" in told.output
    assert len(lines(path)) == 1
    told = invoke(tmp_path, *asked)
    assert told.exit_code == 0
    assert f"{path}: all that was asked for is there" in told.output
    assert len(lines(path)) == 5


def pool_of(monkeypatch: pytest.MonkeyPatch, submit: Callable[..., Future[Record | None]]) -> None:
    """Put another pool of workers in place."""

    @contextmanager
    def workers(jobs: int) -> Iterator[Callable[..., Future[Record | None]]]:
        yield submit

    monkeypatch.setattr(runner, "_workers", workers)


def failed(error: Exception) -> Future[Record | None]:
    future: Future[Record | None] = Future()
    future.set_exception(error)
    return future


def test_an_interrupt_is_a_message_and_the_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = started(tmp_path)
    before = path.read_bytes()

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "execute", interrupted)
    told = invoke(tmp_path)
    assert told.exit_code == 1 and "Interrupted; no finished run is lost" in told.output
    assert path.read_bytes() == before


def test_the_death_of_a_worker_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_of(monkeypatch, lambda *arguments: failed(BrokenProcessPool("terminated abruptly")))
    told = invoke(tmp_path)
    assert told.exit_code == 1
    assert "Error: " in told.output
    assert "--jobs" in told.output


def test_a_run_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    timers: list[threading.Timer] = []

    def submit(function: Callable[..., Record], *arguments: Any) -> Future[Record | None]:
        if len(timers) == 0:
            timers.append(threading.Timer(0.0, lambda: None))
            return failed(ValueError("images/1.png cannot be decoded"))
        future: Future[Record | None] = Future()
        timers.append(threading.Timer(0.2, lambda: future.set_result(function(*arguments))))
        timers[-1].start()
        return future

    pool_of(monkeypatch, submit)
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded"):
        go(tmp_path, jobs=2)
    for timer in timers[1:]:
        timer.join()
    assert len(lines(tmp_path / "comparison.jsonl")) == len(timers) - 1 > 0
