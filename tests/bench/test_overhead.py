"""Time, memory and state of a step: from the command, and of optimizers of the test's own."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from command import Told, invoke
from fop_bench import cli, overhead
from fop_bench.models import mlp
from fop_bench.optimizers import PEERS, Joined, Peer
from fop_bench.overhead import (
    COMPARED,
    MODELS,
    NEVER,
    PLAIN_STEPS,
    UNKNOWN,
    Row,
    Trainer,
    Workload,
    in_turns,
    measure_overhead,
    overhead_table,
    peak_memory,
    prepare,
)

MLP_BYTES = 4 * sum(p.numel() for p in mlp().parameters())
CPU = torch.device("cpu")
SMALL = Workload("mlp", 2, False)


def measured(out: Path, *arguments: str) -> Told:
    fixed = ["--model", "mlp", "--batch", "2", "--no-bf16", "--device", "cpu", "--out", str(out)]
    return invoke("overhead", *fixed, *arguments)


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    out = tmp_path_factory.mktemp("overhead") / "new" / "overhead.jsonl"
    result = measured(out, "--rounds", "2")
    assert result.exit_code == 0, result.output
    for label in ("SGD", "AdamW", "K-FAC", "FOP"):
        assert label in result.output
        assert f"| {label} |" in out.with_suffix(".md").read_text()
    rows = lines(out)
    assert {(each["environment"]["threads"], each["rounds"]) for each in rows} == {(1, 2)}
    assert all(each["workload"] == asdict(SMALL) for each in rows)
    return {each["optimizer"]: each for each in rows}


@pytest.mark.slow
def test_numbers_follow_from_the_timed_steps(results: dict[str, Row]) -> None:
    assert list(results) == [*COMPARED]
    sgd = results["sgd"]["samples"]["plain"]
    for name, each in results.items():
        plain, curvature = each["samples"]["plain"], each["samples"]["curvature"]
        assert len(plain) == 2 * PLAIN_STEPS
        assert len(curvature) == (0 if name in ("sgd", "adamw") else 2)
        assert each["plain_seconds"] == statistics.median(plain)
        assert each["curvature_seconds"] == (sum(curvature) / 2 if curvature else None)
        middles = [[sorted(of[at : at + 3])[1] for at in (0, 3)] for of in (plain, sgd)]
        assert each["ratios_to_sgd"]["plain"] == pytest.approx([a / b for a, b in zip(*middles, strict=True)])
        assert each["ratios_to_sgd"]["curvature"] == pytest.approx(
            [a / b for a, b in zip(curvature, middles[1], strict=False)]
        )
        assert each["class"].endswith({"adamw": "AdamW", "kfac": "KFAC"}.get(name, name.upper()))
    assert results["sgd"]["ratios_to_sgd"]["plain"] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_peak_memory_holds_at_least_the_state_that_must_exist(results: dict[str, Row]) -> None:
    memory = {name: each["memory"] for name, each in results.items()}
    if all(each["plain_bytes"] is None for each in memory.values()):
        pytest.skip("the peak cannot be reset here")
    # Weights and gradients, and one or two moments; the resident set is counted in pages and batches of them.
    assert 2.9 * MLP_BYTES < memory["sgd"]["plain_bytes"] < 10 * MLP_BYTES
    assert 3.9 * MLP_BYTES < memory["adamw"]["plain_bytes"] < 10 * MLP_BYTES
    for name in ("kfac", "fop"):
        assert memory[name]["plain_bytes"] > memory["sgd"]["plain_bytes"]
        assert memory[name]["curvature_bytes"] > memory[name]["plain_bytes"]
    assert memory["sgd"]["curvature_bytes"] is None
    for name, each in results.items():
        known = [value for value in memory[name].values() if value]
        expected = [value / memory["adamw"]["plain_bytes"] for value in known]
        assert each["memory_to_adamw"] == pytest.approx(expected)


@pytest.mark.slow
def test_state_is_what_the_optimizer_holds_beside_weights_and_gradients(results: dict[str, Row]) -> None:
    parameters = 4 * 2 * 3
    sides = [393, 393, 512, 513, 512, 513, 10]  # the first factor of side 785 is two blocks
    assert results["sgd"]["state_bytes"] == MLP_BYTES
    assert results["adamw"]["state_bytes"] == 2 * MLP_BYTES + parameters
    factors = 2 * 4 * sum(side**2 for side in sides)
    for name in ("kfac", "fop"):
        assert results[name]["state_bytes"] == pytest.approx(factors + MLP_BYTES, rel=0.01)


def test_state_is_found_wherever_it_is() -> None:
    model = mlp((4, 2))
    optimizer = Joined(SGD(model.parameters(), lr=0.1, momentum=0.9))
    trainer = Trainer(model, optimizer, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), False)
    trainer.step()
    momentum = 4 * (4 * 2 + 2)
    assert trainer.state_bytes() == momentum
    held = torch.zeros(5)
    vars(optimizer)["mine"] = {"a": [held, (held[:2], torch.zeros(7, dtype=torch.float64))], "b": optimizer}
    vars(model[1])["of a layer"] = torch.zeros(3)
    vars(optimizer)["theirs"] = {"model": model, "gradients": [p.grad for p in model.parameters()]}
    assert trainer.state_bytes() == momentum + 4 * 5 + 8 * 7 + 4 * 3


# --- Optimizers of the test's own, on a clock of their own


class Booking(SGD):
    """Books what its steps would cost: ``plain`` seconds, and ``extra`` for every curvature update."""

    clock = 0.0

    def __init__(
        self, model: nn.Module, lr: float, plain: float = 1.0, extra: float = 0.0, every: int = 1
    ) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.plain, self.extra, self.every, self.taken = plain, extra, every, 0

    def step(self, closure: Any = None) -> Any:
        Booking.clock += self.plain + self.extra * (self.taken % self.every == 0)
        self.taken += 1
        return super().step(closure)


class Failing(Booking):
    """Fails in a step late enough to be one that is timed."""

    failures = 0

    def step(self, closure: Any = None) -> Any:
        if self.taken == 4:
            Failing.failures += 1
            raise ArithmeticError("out of luck")
        return super().step(closure)


def slow(model: nn.Module, lr: float, every: int = 1) -> Booking:
    return Booking(model, lr, 2.0, 8.0, every)


def missing(model: nn.Module, lr: float) -> Any:
    raise ModuleNotFoundError("No module named 'mine'", name="mine")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace SGD and AdamW, add three peers, and leave the memory out."""
    for name in ("sgd", "adamw"):
        monkeypatch.setitem(PEERS, name, replace(PEERS[name], build=Booking))
    monkeypatch.setitem(PEERS, "mine", Peer("Mine", slow, "every"))
    monkeypatch.setitem(PEERS, "failing", Peer("Failing", Failing))
    monkeypatch.setitem(PEERS, "missing", Peer("Missing", missing, install="pip install mine"))
    monkeypatch.setattr(
        overhead, "peak_memory", lambda workload, device, names: dict.fromkeys(names, UNKNOWN)
    )
    monkeypatch.setattr(overhead.time, "process_time", lambda: Booking.clock)


@pytest.mark.usefixtures("clock")
def test_a_peer_is_measured_with_and_without_curvature_updates() -> None:
    (row,) = measure_overhead(SMALL, ["mine"], CPU, rounds=3)
    assert (row["plain_seconds"], row["curvature_seconds"]) == (2.0, 10.0)
    assert row["ratios_to_sgd"] == {"plain": [2.0] * 3, "curvature": [10.0] * 3}
    table = overhead_table([row | {"memory_to_adamw": [1.5, 2.0]}])
    head, _, cells = (line.split(" | ") for line in table.splitlines() if line.startswith("|"))
    shown = dict(zip(head, cells, strict=True))
    assert shown["plain ÷ SGD"] == "2.00 (2.00–2.00)"
    assert shown["every step ÷ SGD"] == "10.00 (10.00–10.00)"
    assert (shown["every 10th"], shown["every 100th"]) == ("2.80", "2.08")
    assert shown["peak ÷ AdamW"] == "1.50 / 2.00"


@pytest.mark.usefixtures("clock")
def test_what_is_missing_or_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    names, before = ("failing", "missing", "mine"), Failing.failures
    told = measured(path, "--rounds", "2", *(f"--optimizer={name}" for name in names))
    assert told.exit_code == 0, told.output
    assert Failing.failures == before + 1, "it is left out of the second round"
    errors = {row["optimizer"]: row.get("error") for row in lines(path)}
    assert errors == {
        "failing": "ArithmeticError: out of luck",
        "missing": "MissingPeerError: Missing cannot be imported (No module named 'mine'): pip install mine",
        "mine": None,
    }
    for text in (path.with_suffix(".md").read_text(), " ".join(told.output.split())):
        assert "Not measured: Failing: ArithmeticError: out of luck" in text
        assert "(No module named 'mine'): pip install mine" in text


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nothing_is_compared_with_a_baseline_that_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, name, Peer(name, Failing))
    with pytest.raises(ValueError, match=r"mlp, batch 2, float32: .* ArithmeticError: out of luck"):
        measure_overhead(SMALL, ["mine"], CPU, rounds=2)


@pytest.mark.usefixtures("clock")
def test_a_record_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.jsonl"
    here = cli.environment(CPU) | {"threads": 1}
    monkeypatch.setattr(cli, "environment", lambda device: here)
    assert measured(path, "--rounds", "1", "--optimizer", "mine", "--optimizer", "missing").exit_code == 0
    before = path.read_bytes()
    monkeypatch.setitem(PEERS, "missing", Peer("Missing", Booking))
    assert measured(path, "--rounds", "1", "--optimizer", "mine", "--optimizer", "missing").exit_code == 0
    assert path.read_bytes().startswith(before)
    rows = lines(path)
    assert [row["optimizer"] for row in rows] == ["mine", "missing", "missing"]
    assert "error" in rows[1]
    assert "error" not in rows[2]
    assert "Not measured" not in path.with_suffix(".md").read_text(), "the newest row counts"
    other = here | {"git": {"commit": "another", "dirty": False}}
    monkeypatch.setattr(cli, "environment", lambda device: other)
    told = measured(path, "--optimizer", "sgd")
    assert told.exit_code == 1
    assert "one table must not mix them" in told.output
    assert lines(path) == rows


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{\n "results": []\n}\n')
    told = measured(path)
    assert (told.exit_code, path.read_text()) == (1, '{\n "results": []\n}\n')
    assert "line 1 is not JSON" in told.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_memory_of_a_peer_that_only_a_script_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "mine", Peer("Mine", slow, "every"))
    monkeypatch.setitem(PEERS, "missing", Peer("Missing", missing))
    monkeypatch.setitem(PEERS, "lambda", Peer("Not importable", lambda model, lr: Booking(model, lr)))
    found = peak_memory(SMALL, CPU, ["lambda", "missing", "mine"])
    assert found["lambda"] == found["missing"] == UNKNOWN
    if found["mine"] == UNKNOWN:
        pytest.skip("the peak cannot be reset here")
    assert 1.9 * MLP_BYTES < found["mine"]["plain_bytes"] < 10 * MLP_BYTES
    assert found["mine"]["curvature_bytes"] > 1.9 * MLP_BYTES


# --- Parts


def test_turns_begin_with_another_every_time() -> None:
    assert list(in_turns("abc", 4)) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


@pytest.mark.slow
def test_a_step_of_the_wrong_kind_is_not_measured() -> None:
    for interval, due in ((NEVER, False), (1, True)):
        trainer = prepare(SMALL, "fop", CPU, interval=interval)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=f"curvature_due={due}, the measurement needs {not due}"):
                trainer.step(curvature=not due)
            trainer.step(curvature=due)


def test_all_optimizers_start_from_the_same_weights_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "step", lambda trainer: None)
    first, *others = [prepare(replace(SMALL, batch_size=3), name, CPU) for name in COMPARED]
    for trainer in others:
        assert torch.equal(trainer.inputs, first.inputs)
        assert torch.equal(trainer.targets, first.targets)
        for mine, theirs in zip(trainer.model.parameters(), first.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_bf16_runs_the_forward_pass_in_bf16() -> None:
    trainer = prepare(Workload("mlp", 3, True), "sgd", CPU)
    seen: list[torch.dtype] = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.step()
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", MODELS)
def test_every_network_takes_its_batch(name: str) -> None:
    build, batch = MODELS[name]
    inputs, targets = batch(2)
    with torch.no_grad():
        assert overhead.class_loss(build()(inputs), targets).shape == ()


def test_tokens_are_predicted_from_those_before_them() -> None:
    model = MODELS["gpt-256"][0]()
    inputs = torch.randint(256, (1, 6))
    changed = inputs.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 256
    with torch.no_grad():
        same = (model(inputs) == model(changed)).all(dim=2)[0]
    assert same.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("option", "wrong", "known"),
    [("--model", "alexnet", "resnet18-16"), ("--optimizer", "adam", "kfac-pytorch")],
)
def test_unknown_names_are_clear_errors(option: str, wrong: str, known: str) -> None:
    result = invoke("overhead", option, wrong)
    assert result.exit_code == 2
    assert wrong in result.output
    assert known in " ".join(invoke("overhead", "--help").output.split())
