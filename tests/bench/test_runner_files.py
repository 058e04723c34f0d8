"""Files of runs that others wrote to, and errors of `fop-bench run`."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fop_bench import environment as environment_module
from fop_bench import execution, runner
from fop_bench.recipes import RECIPES
from fop_bench.run_cli import run as command
from fop_bench.runner import Record
from fop_bench.world import World
from tiny_study import (
    COMMIT,
    STEPS,
    Clock,
    RandomImages,
    accuracies,
    faked,
    go,
    identity,
    lines,
    result,
    seconds_as_steps,
    tiny_recipe,  # noqa: F401 - for every test here
)

# --- A file that others wrote to


def started(out: Path, data: str | None = None) -> Path:
    """Make the first runs of a study."""
    with seconds_as_steps():
        assert go(out, data=data, batch_sizes=(8,), minutes=4 * STEPS / 60) == 8
    path = out / "comparison.jsonl"
    assert len(lines(path)) == 2
    return path


@pytest.mark.parametrize("kept", [1, 200, -1])
def test_a_line_that_was_cut_off_is_put_aside_and_its_run_made_again(tmp_path: Path, kept: int) -> None:
    path = started(tmp_path)
    first, second = path.read_bytes().splitlines(keepends=True)
    cut = second[:kept]  # -1: all but the end of the line
    path.write_bytes(first + cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert go(tmp_path, batch_sizes=(8,)) == 0
    assert (tmp_path / "comparison.cut-off").read_bytes() == cut + b"\n"
    records = lines(path)
    assert len({identity(record) for record in records}) == len(records) == 10
    assert path.read_bytes().startswith(first)
    assert result(records[1]) == result(json.loads(second))
    assert "cut-off" not in "".join(file.name for file in tmp_path.glob("*.jsonl"))


def test_lines_that_are_put_aside_do_not_replace_each_other(tmp_path: Path) -> None:
    path = started(tmp_path)
    for cut in (b'{"first', b'{"second'):
        with path.open("ab") as file:
            file.write(cut)
        go(tmp_path, batch_sizes=(8,), minutes=-1.0)
    assert (tmp_path / "comparison.cut-off").read_bytes() == b'{"first\n{"second\n'


def test_a_first_line_that_was_cut_off_leaves_nothing_done(tmp_path: Path) -> None:
    (tmp_path / "comparison.jsonl").write_bytes('{"label": "é'.encode()[:-1])
    assert go(tmp_path, batch_sizes=(8,)) == 0
    assert len(lines(tmp_path / "comparison.jsonl")) == 10


@pytest.mark.parametrize("at", [0, 1])
def test_a_whole_line_that_is_broken_is_an_error_and_nothing_is_written(tmp_path: Path, at: int) -> None:
    path = started(tmp_path)
    content = path.read_bytes().splitlines(keepends=True)
    content[at] = b"\0\0\0\n"
    path.write_bytes(b"".join(content))
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=rf"{path}, line {at + 1} is not JSON"):
            go(tmp_path, batch_sizes=(8,))
    assert path.read_bytes() == before


def test_a_second_process_in_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, accuracies)
    path = tmp_path / "comparison.jsonl"
    refused = 0

    def second(done: int, planned: int, title: str) -> None:
        nonlocal refused
        before = path.read_bytes()
        with pytest.raises(BlockingIOError, match=rf"another fop-bench is writing {path}; wait for it, or"):
            go(tmp_path)
        told = invoke(tmp_path)
        assert told.exit_code == 1
        assert f"Error: another fop-bench is writing {path}" in told.output
        assert path.read_bytes() == before
        refused += 1

    assert go(tmp_path, on_run=second, batch_sizes=(8,)) == 0
    assert refused == 20
    assert go(tmp_path) == 0, "afterwards the file is free"


OTHER = {"commit": "fedcba9876543210", "dirty": False}


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (OTHER, "this is commit fedcba9876:"),
        ({**COMMIT, "dirty": True}, "this is commit 0123456789 with uncommitted changes:"),
        (None, "this is an installed package:"),
    ],
)
def test_runs_of_another_commit_are_not_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Any, words: str
) -> None:
    path = started(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(runner, "git_state", lambda source: here)
    with pytest.raises(ValueError, match=f"holds 2 runs of commit 0123456789, and {words}.*another --out"):
        go(tmp_path)
    told = invoke(tmp_path)
    assert told.exit_code == 1
    assert "commit 0123456789" in told.output
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("first", "then"), [(None, "other/images"), ("some/images", None), ("some/images", "other/images")]
)
def test_runs_on_other_data_are_not_mixed_with_new_ones(
    tmp_path: Path, first: str | None, then: str | None
) -> None:
    origins = [data or RandomImages.origin for data in (first, then)]
    path = started(tmp_path, first)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {record["data"] for record in lines(path)} == {origins[0]}
    with pytest.raises(ValueError, match=f"{path} holds runs on {origins[0]}, and this is {origins[1]}: "):
        go(tmp_path, data=then)
    told = invoke(tmp_path, *([] if then is None else ["--data", then]))
    assert told.exit_code == 1
    assert f"holds runs on {origins[0]}, and this is {origins[1]}" in " ".join(told.output.split())
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert go(tmp_path, data=first, batch_sizes=(8,)) == 0, "on the same data it goes on"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "digits"}, "holds runs of digits; give another --out for tiny"),
        ({"ranks": 4}, "holds runs on 4 ranks, and this is on 1; give another --out"),
    ],
)
def test_runs_of_another_recipe_or_number_of_ranks_are_not_mixed_with_new_ones(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = started(tmp_path)
    path.write_text("".join(json.dumps({**record, **changed}) + "\n" for record in lines(path)))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        go(tmp_path)
    assert path.read_bytes() == before


def test_an_unfinished_run_of_another_commit_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seconds_as_steps():
        assert go(tmp_path, batch_sizes=(8,), minutes=1 / 60) == 10
    assert len(list((tmp_path / "unfinished").glob("*.pt"))) == 1
    execution._where.cache_clear()
    monkeypatch.setattr(runner, "git_state", lambda source: OTHER)
    monkeypatch.setattr(environment_module, "git_state", lambda source: OTHER)
    with pytest.raises(ValueError, match=r"unfinished.*commit 0123456789.*commit fedcba9876"):
        go(tmp_path, batch_sizes=(8,))


def test_records_name_the_commit_that_the_command_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [COMMIT]
    monkeypatch.setattr(runner, "git_state", lambda source: now[0])
    monkeypatch.setattr(environment_module, "git_state", lambda source: now[0])

    def commit_something(done: int, planned: int, title: str) -> None:
        now[0] = OTHER

    go(tmp_path, batch_sizes=(8,), contenders=("sgd",), on_run=commit_something)
    records = lines(tmp_path / "comparison.jsonl")
    assert [record["environment"]["git"] for record in records] == [COMMIT] * 5


# --- Errors


def invoke(out: Path, *arguments: str, recipe: str = "tiny") -> Any:
    asked = [recipe, "--task", "random", "--jobs", "1", "--device", "cpu", "--out", str(out), *arguments]
    return CliRunner().invoke(command, asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--study", "x"), "unknown study 'x' of tiny; known are comparison, all, map, large"),
        (("--task", "x"), "unknown task 'x'; known are random, joined"),
        (("--optimizer", "adam"), "unknown optimizer 'adam'; known are sgd, fop"),
        (("--batch", "7"), "unknown batch size 7; known are 8, 12"),
    ],
)
def test_unknown_names_list_the_known_ones(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    told = invoke(tmp_path / "out", *arguments)
    assert told.exit_code == 1
    assert f"Error: {message}" in told.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    told = invoke(tmp_path / "out", recipe="huge")
    assert told.exit_code == 1
    assert f"Error: unknown recipe 'huge'; known are {', '.join(RECIPES)}" in told.output
    assert "cifar10-small" in told.output


@pytest.mark.parametrize("minutes", ["0", "-1", "x"])
def test_minutes_must_be_a_time(tmp_path: Path, minutes: str) -> None:
    assert invoke(tmp_path / "out", "--minutes", minutes).exit_code == 2
    assert not (tmp_path / "out").exists()


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
    def workers(jobs: int, *world: World) -> Iterator[Callable[..., Future[Record | None]]]:
        yield submit

    monkeypatch.setattr(runner, "_workers", workers)


def test_the_death_of_a_worker_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*arguments: Any) -> Future[Record | None]:
        future: Future[Record | None] = Future()
        future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
        return future

    pool_of(monkeypatch, submit)
    told = invoke(tmp_path)
    assert told.exit_code == 1
    assert "Error: " in told.output
    assert "--jobs" in told.output


def test_a_run_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, accuracies)
    timers = []

    def submit(function: Callable[..., Record], *arguments: Any) -> Future[Record | None]:
        future: Future[Record | None] = Future()
        if not timers:
            future.set_exception(ValueError("images/1.png cannot be decoded"))
            timers.append(None)
        else:
            timers.append(threading.Timer(0.2, lambda: future.set_result(function(*arguments))))
            timers[-1].start()
        return future

    pool_of(monkeypatch, submit)
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded"):
        go(tmp_path, jobs=2)
    for timer in timers[1:]:
        timer.join()
    assert len(lines(tmp_path / "comparison.jsonl")) == len(timers) - 1 > 0
