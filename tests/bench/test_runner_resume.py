"""The runs of a study stop anywhere and go on, to the bit."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fop_bench import execution, training
from fop_bench.execution import Description, execute
from fop_bench.optimizers import BUILDERS
from fop_bench.runner import Record
from tiny_study import (
    CONTENDERS,
    STEPS,
    WORLD,
    Clock,
    final_of,
    finished,
    go,
    lines,
    result,
    seconds_as_steps,
    tiny_recipe,  # noqa: F401 - for every test here
)


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
    monkeypatch.setattr(execution, "time", Ticks(kill_at))


# The first look is before the first step, the next ones are before each of them.
ONE_STEP = 3


def in_sittings(described: Description, saved: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, int]:
    """Make a run with a stop after every step, each sitting in a process that knows nothing of the last."""
    for sitting in range(1, 100):
        torch.manual_seed(1000 + sitting)
        ticking(monkeypatch)
        if (record := execute(described, None, WORLD, saved, ONE_STEP, "")) is not None:
            return record, sitting
        assert saved.exists()
    raise AssertionError("the run does not end")


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "tiny") for name in CONTENDERS), ("sgd", "tiny-plateau")]
)
def test_a_run_with_a_stop_after_every_step_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, recipe: str
) -> None:
    described = final_of(name, recipe)
    expected = finished(described, tmp_path / "a.pt")
    assert not expected["diverged"]
    assert expected["curve"][0]["train_loss"] != expected["curve"][2]["train_loss"]
    got, sittings = in_sittings(described, tmp_path / "b.pt", monkeypatch)
    assert sittings == 3 * STEPS
    assert result(got) == result(expected)
    assert (expected["layers"] is None) == (CONTENDERS[name].optimizer != "fop")


@pytest.mark.parametrize("kill_at", [2, 3, 5, 8])
def test_a_killed_run_goes_on_from_what_was_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    expected = finished(final_of("fop"), tmp_path / "a.pt")
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    saved = tmp_path / "b.pt"
    ticking(monkeypatch, kill_at)
    with pytest.raises(KeyboardInterrupt):
        execute(final_of("fop"), None, WORLD, saved, math.inf, "")
    assert saved.exists() == (kill_at > 2)
    ticking(monkeypatch)
    steps = Clock.now
    assert result(finished(final_of("fop"), saved)) == result(expected)
    assert Clock.now - steps == 3 * STEPS - max(0, kill_at - 3), "no step is made twice but the last"


def test_a_kill_while_saving_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finished(final_of("sgd"), tmp_path / "a.pt")
    saved = tmp_path / "b.pt"
    ticking(monkeypatch)
    assert execute(final_of("sgd"), None, WORLD, saved, ONE_STEP, "") is None
    before = saved.read_bytes()

    def cut_short(state: Any, path: Path) -> None:
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", cut_short)
        ticking(patched)
        with pytest.raises(KeyboardInterrupt):
            execute(final_of("sgd"), None, WORLD, saved, ONE_STEP, "")
    assert saved.read_bytes() == before
    ticking(monkeypatch)
    assert result(finished(final_of("sgd"), saved)) == result(expected)


def test_a_file_that_is_no_state_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "b.pt"
    saved.write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"{saved} is not a saved run .*delete it to start that run again"):
        execute(final_of("sgd"), None, WORLD, saved, math.inf, "")
    assert saved.read_bytes() == b"broken"


SECONDS = [float(STEPS), 2.0 * STEPS, 3.0 * STEPS]


def seconds(record: Record) -> list[float]:
    return [epoch["seconds"] for epoch in record["curve"]]


def test_seconds_are_those_of_all_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    assert seconds(finished(final_of("sgd"), tmp_path / "a.pt")) == SECONDS
    assert seconds(in_sittings(final_of("sgd"), tmp_path / "b.pt", monkeypatch)[0]) == SECONDS


def test_a_killed_run_keeps_the_seconds_of_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch, kill_at=4)
    with pytest.raises(KeyboardInterrupt):
        execute(final_of("sgd"), None, WORLD, tmp_path / "b.pt", math.inf, "")
    ticking(monkeypatch)
    assert Clock.now == 2
    # The second step is made before the state with it is saved.
    assert seconds(finished(final_of("sgd"), tmp_path / "b.pt")) == SECONDS


def test_seconds_leave_saving_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def slow_save(state: Any, path: Path) -> None:
        Clock.now += 1000.0
        save(state, path)

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(training, "_now", lambda device: Clock.now)
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_SAVES", 1)
    ticking(monkeypatch)
    assert seconds(finished(final_of("sgd"), tmp_path / "a.pt")) == SECONDS


def test_warnings_of_all_sittings_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = BUILDERS["sgd"][1]

    def noisy(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        optimizer = build(model, **options)
        steps = iter(range(100))

        def warn(*ignored: Any) -> None:
            if next(steps) == 0 and Clock.now == 1:
                warnings.warn("in the first step", UserWarning, stacklevel=1)

        optimizer.register_step_pre_hook(warn)
        return optimizer

    monkeypatch.setitem(BUILDERS, "sgd", ("SGD", noisy))
    expected = finished(final_of("sgd"), tmp_path / "a.pt")["warnings"]
    assert "UserWarning: in the first step" in expected
    Clock.now = 0.0
    record, _ = in_sittings(final_of("sgd"), tmp_path / "b.pt", monkeypatch)
    assert set(record["warnings"]) >= set(expected)


@pytest.mark.parametrize("sitting", [1, 7, 10])
def test_minutes_end_a_sitting_anywhere_and_the_next_goes_on(tmp_path: Path, sitting: int) -> None:
    assert go(tmp_path / "whole", "comparison", batch_sizes=(8,)) == 0
    expected = lines(tmp_path / "whole" / "comparison.jsonl")
    steps = 10 * 2 * STEPS
    left, sittings = math.inf, 0
    Clock.now = 0.0
    with seconds_as_steps():
        while left:
            before, had = Clock.now, left
            left = go(tmp_path / "slices", batch_sizes=(8,), minutes=sitting / 60)
            sittings += 1
            assert Clock.now - before == sitting or left == 0
            assert left <= had
    assert Clock.now == steps, "no step is made twice"
    assert sittings == math.ceil(steps / sitting) + (steps % sitting == 0 and left != 0)
    got = lines(tmp_path / "slices" / "comparison.jsonl")
    assert [result(record) for record in got] == [result(record) for record in expected]
    assert not list((tmp_path / "slices" / "unfinished").glob("*"))


def test_no_run_starts_when_the_time_is_over(tmp_path: Path) -> None:
    assert go(tmp_path, minutes=-1.0) == 20
    assert Clock.now == 0
    assert (tmp_path / "comparison.jsonl").read_bytes() == b""
