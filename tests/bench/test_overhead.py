"""Time and memory of a step, from the command and on a clock of its own."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from command import invoke
from fop_bench import overhead
from fop_bench.models import mlp
from fop_bench.optimizers import BUILDERS
from fop_bench.overhead import COMPARED, NEVER, PLAIN_STEPS, Trainer, Workload, in_turns, prepare

MLP_BYTES = 4 * sum(p.numel() for p in mlp().parameters())
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("overhead") / "new" / "overhead.json"
    arguments = ["--model", "mlp", "--batch", "2", "--no-bf16", "--rounds", "2", "--device", "cpu"]
    result = invoke("overhead", *arguments, "--out", str(out))
    assert result.exit_code == 0, result.output
    for label in ("SGD", "AdamW", "K-FAC", "FOP"):
        assert label in result.output
    content = json.loads(out.read_text())
    assert content["environment"]["threads"] == torch.get_num_threads()
    return {each["optimizer"]: each for each in content["results"]}


def test_ratios_follow_from_the_timed_steps(results: dict[str, Any]) -> None:
    assert list(results) == ["sgd", "adamw", "kfac", "fop"]
    sgd = statistics.median(results["sgd"]["samples"]["plain"])
    for name, each in results.items():
        plain = sorted(each["samples"]["plain"])
        assert len(plain) == 2 * PLAIN_STEPS
        median = (plain[2] + plain[3]) / 2
        assert each["plain_seconds"] == pytest.approx(median)
        assert each["plain_ratio_to_sgd"] == pytest.approx(median / sgd)
        curvature = each["samples"]["curvature"]
        if name in ("sgd", "adamw"):
            assert (each["interval"], each["curvature_seconds"], curvature) == (None, None, [])
        else:
            assert 1 <= each["interval"] < NEVER
            assert len(curvature) == 2
            extra = sum(curvature) / 2 - median
            assert each["curvature_seconds"] == pytest.approx(median + extra)
            median += extra / each["interval"]
        assert each["amortised_seconds"] == pytest.approx(median)
        assert each["ratio_to_sgd"] == pytest.approx(median / sgd)
    assert results["sgd"]["ratio_to_sgd"] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_peak_memory_holds_at_least_the_state_that_must_exist(results: dict[str, Any]) -> None:
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


class Booking(SGD):
    """Books what its steps would cost on a clock of its own."""

    def __init__(self, model: nn.Module, lr: float, clock: list[float], plain: float) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.clock, self.plain = clock, plain

    def step(self, closure: Any = None) -> Any:
        self.clock[0] += self.plain
        return super().step(closure)


class FakeFOP(Booking):
    """Takes eight seconds more for a curvature step, of which one in five steps is."""

    def __init__(self, model: nn.Module, lr: float, clock: list[float], plain: float) -> None:
        super().__init__(model, lr, clock, plain)
        self.param_groups[0]["curvature_interval"] = 5
        self.curvature_due = True

    def request_curvature(self) -> None:
        self.curvature_due = True

    def step(self, closure: Any = None) -> Any:
        self.clock[0] += 8.0 * self.curvature_due
        self.curvature_due = False
        return super().step(closure)


def test_plain_and_curvature_steps_are_booked_apart_and_amortised(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    for name in COMPARED:
        monkeypatch.setitem(BUILDERS, name, (name, lambda model, lr: Booking(model, lr, clock, 1.0)))
    monkeypatch.setitem(BUILDERS, "fop", ("FOP", lambda model, lr: FakeFOP(model, lr, clock, 2.0)))
    none = {name: {"plain_bytes": None, "curvature_bytes": None} for name in COMPARED}
    monkeypatch.setattr(overhead, "peak_memory", lambda workload, device: none)
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    measured = overhead.measure_overhead(Workload("mlp", 2, False), CPU, rounds=3)
    by_name = {each["optimizer"]: each for each in measured}
    fop = by_name["fop"]
    assert (fop["plain_seconds"], fop["curvature_seconds"], fop["interval"]) == (2.0, 10.0, 5)
    assert fop["amortised_seconds"] == pytest.approx((4 * 2.0 + 10.0) / 5)
    assert fop["ratio_to_sgd"] == pytest.approx(3.6)
    assert fop["plain_ratio_to_sgd"] == pytest.approx(2.0)
    assert by_name["adamw"]["ratio_to_sgd"] == 1.0


def test_turns_begin_with_another_every_time() -> None:
    assert list(in_turns("abc", 4)) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_a_step_of_the_wrong_kind_is_not_measured() -> None:
    model = mlp((4, 2))
    inputs, targets = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    trainer = Trainer(model, FakeFOP(model, 0.1, [0.0], 1.0), inputs, targets, False)
    with pytest.raises(RuntimeError, match="curvature_due=True, the measurement needs False"):
        trainer.step(curvature=False)
    trainer.step(curvature=True)
    with pytest.raises(RuntimeError, match="curvature_due=False, the measurement needs True"):
        trainer.step(curvature=True)


def test_all_optimizers_start_from_the_same_weights_and_batch() -> None:
    first, *others = [prepare(Workload("mlp", 3, False), name, CPU) for name in COMPARED]
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


def test_unknown_model_is_a_clear_error(tmp_path: Path) -> None:
    result = invoke("overhead", "--model", "alexnet", "--out", str(tmp_path / "o.json"))
    assert result.exit_code == 2
    assert "alexnet" in result.output
    assert "resnet18" in result.output
