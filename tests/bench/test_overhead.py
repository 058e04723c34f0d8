import json
import statistics
import sys

import pytest
import torch
from click.testing import CliRunner
from torch.optim import SGD

from fop_bench import overhead
from fop_bench.cli import main
from fop_bench.memory import PeakMemory
from fop_bench.models import ViT, digits_cnn, mlp, resnet18
from fop_bench.optimizers import CONTENDERS, DefaultContender
from fop_bench.workloads import MODELS, NEVER, Workload, expect_curvature, prepare

MLP_BYTES = 4 * sum(p.numel() for p in mlp().parameters())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("overhead") / "new" / "overhead.json"
    arguments = ["--model", "mlp", "--batch", "2", "--no-bf16", "--rounds", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, ["overhead", *arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for label in ("SGD", "AdamW", "K-FAC", "FOP"):
        assert label in result.output
    content = json.loads(out.read_text())
    assert content["environment"]["threads"] == torch.get_num_threads()
    return {each["optimizer"]: each for each in content["results"]}


def test_ratios_follow_from_the_timed_steps(results):
    assert list(results) == ["sgd", "adamw", "kfac", "fop"]
    sgd = statistics.median(results["sgd"]["samples"]["plain"])
    for each in results.values():
        plain = sorted(each["samples"]["plain"])
        assert len(plain) == 2 * overhead.PLAIN_STEPS
        median = (plain[2] + plain[3]) / 2
        assert each["plain_seconds"] == pytest.approx(median)
        assert each["plain_ratio_to_sgd"] == pytest.approx(median / sgd)
        if each["interval"] is not None:
            extra = sum(each["samples"]["curvature"]) / 2 - median
            assert each["curvature_seconds"] == pytest.approx(median + extra)
            median += extra / each["interval"]
        assert each["amortised_seconds"] == pytest.approx(median)
        assert each["ratio_to_sgd"] == pytest.approx(median / sgd)
    assert results["sgd"]["ratio_to_sgd"] == 1.0


def test_only_second_order_optimizers_have_curvature_steps(results):
    for name in ("sgd", "adamw"):
        assert results[name]["interval"] is None
        assert results[name]["curvature_seconds"] is None
        assert results[name]["samples"]["curvature"] == []
    for name in ("kfac", "fop"):
        assert 1 <= results[name]["interval"] < NEVER
        assert len(results[name]["samples"]["curvature"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from /proc")
def test_peak_memory_holds_at_least_the_state_that_must_exist(results):
    memory = {name: each["memory"] for name, each in results.items()}
    if all(each["plain_bytes"] is None for each in memory.values()):
        pytest.skip(memory["sgd"]["missing"])
    # Weights and gradients, and one or two moments; the resident set is counted in pages and batches of them.
    assert 2.9 * MLP_BYTES < memory["sgd"]["plain_bytes"] < 10 * MLP_BYTES
    assert 3.9 * MLP_BYTES < memory["adamw"]["plain_bytes"] < 10 * MLP_BYTES
    for name in ("kfac", "fop"):
        assert memory[name]["plain_bytes"] > memory["sgd"]["plain_bytes"]
        assert memory[name]["curvature_bytes"] > memory[name]["plain_bytes"]
    assert memory["sgd"]["curvature_bytes"] is None
    assert memory["sgd"]["missing"]


class FakeFOP(SGD):
    """Books what its steps would cost on a clock of its own."""

    def __init__(self, model, lr, clock, plain, curvature):
        super().__init__(model.parameters(), lr=lr)
        self.param_groups[0]["curvature_interval"] = 5
        self.curvature_due = True
        self.clock, self.cost = clock, {False: plain, True: curvature}

    def request_curvature(self):
        self.curvature_due = True

    def step(self, closure=None):
        self.clock[0] += self.cost[self.curvature_due]
        self.curvature_due = False
        return super().step(closure)


def test_plain_and_curvature_steps_are_booked_apart_and_amortised(monkeypatch):
    clock = [0.0]

    class FakeSGD(SGD):
        def step(self, closure=None):
            clock[0] += 1.0
            return super().step(closure)

    for name in CONTENDERS:
        monkeypatch.setitem(
            CONTENDERS,
            name,
            DefaultContender(name, lambda model, lr: FakeSGD(model.parameters(), lr=lr), (0.1,)),
        )
    monkeypatch.setitem(
        CONTENDERS,
        "fop",
        DefaultContender("FOP", lambda model, lr: FakeFOP(model, lr, clock, 2.0, 10.0), (0.1,)),
    )
    none = dict.fromkeys(CONTENDERS, PeakMemory(None, None, "not measured"))
    monkeypatch.setattr(overhead, "peak_memory", lambda workload, device: none)
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    measured = overhead.measure_overhead(Workload("mlp", 2, False), torch.device("cpu"), rounds=3)
    by_name = {each.optimizer: each for each in measured}
    fop = by_name["fop"]
    assert (fop.plain_seconds, fop.curvature_seconds, fop.interval) == (2.0, 10.0, 5)
    assert fop.amortised_seconds == pytest.approx((4 * 2.0 + 10.0) / 5)
    assert fop.ratio_to_sgd == pytest.approx(3.6)
    assert fop.plain_ratio_to_sgd == pytest.approx(2.0)
    assert by_name["adamw"].ratio_to_sgd == 1.0


def test_a_step_of_the_wrong_kind_is_not_measured():
    optimizer = FakeFOP(mlp((4, 2)), 0.1, [0.0], 1.0, 2.0)
    expect_curvature(optimizer, due=True)
    with pytest.raises(RuntimeError, match="curvature_due=True, the measurement needs False"):
        expect_curvature(optimizer, due=False)


def test_all_optimizers_start_from_the_same_weights_and_batch():
    trainers = [prepare(Workload("mlp", 3, False), name, torch.device("cpu")) for name in CONTENDERS]
    for trainer in trainers[1:]:
        assert torch.equal(trainer.inputs, trainers[0].inputs)
        assert torch.equal(trainer.targets, trainers[0].targets)
        for mine, first in zip(trainer.model.parameters(), trainers[0].model.parameters(), strict=True):
            assert torch.equal(mine, first)


def test_bf16_runs_the_forward_pass_in_bf16():
    trainer = prepare(Workload("mlp", 3, True), "sgd", torch.device("cpu"))
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.step()
    assert seen == [torch.bfloat16]


def test_unknown_model_and_bad_batch_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'alexnet'.*resnet18, vit, mlp"):
        Workload("alexnet", 2, False)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Workload("mlp", 0, False)
    result = CliRunner().invoke(main, ["overhead", "--model", "alexnet", "--out", str(tmp_path / "o.json")])
    assert result.exit_code == 2
    assert "alexnet" in result.output
    assert "resnet18" in result.output


def test_models_have_their_published_sizes():
    counts = {name: sum(p.numel() for p in build().parameters()) for name, (build, _) in MODELS.items()}
    assert counts["resnet18"] == 11_173_962
    assert counts["mlp"] == 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
    assert 2.6e6 < counts["vit"] < 2.8e6
    assert digits_cnn()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    for model in (resnet18(classes=7), ViT(dim=24, depth=1, classes=7)):
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
