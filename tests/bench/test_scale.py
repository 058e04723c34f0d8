"""Several ranks on this machine, and the cost model that predicts more of them."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result

from failing_rank import fail_on_rank_1
from fop_bench import cli, scale
from fop_bench.architectures import Architecture, architecture_of, embedding, linear, llama, published
from fop_bench.cli import main
from fop_bench.cost_model import H100, LayerSize, Method, burden, factor_bytes, plan_for, predict, traffic
from fop_bench.models import ViT, mlp, resnet18
from fop_bench.scale import Samples, gloo_reduce_bytes, noting_reduces, transport
from fop_bench.scale_report import predicted_markdown, predictions
from fop_bench.scale_trace import Overlap, overlap
from fop_bench.workloads import PLAIN_STEPS
from fop_bench.world import run_ranks

MLP = 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
SIDES = [785, 512, 513, 512, 513, 10]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["scale", *arguments])


# --- measured on this machine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale") / "new"
    options = ["--model", "mlp", "--batch", "2", "--rounds", "1", "--trace", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.os, "cpu_count", lambda: 1)
        # 2 is measured once.
        result = invoke("--ranks", "1", "--ranks", "2", "--ranks", "2", *options)
    assert result.exit_code == 0, result.output
    for title in ("Time of a step", "Bytes that a rank sends", "Factors and inverses", "Reduces behind"):
        assert title in result.output
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    content = json.loads((folder / "scale.json").read_text())
    assert content["environment"]["threads"] == 1
    assert content["protocol"]["workload"] == {"model": "mlp", "batch_size": 2, "bf16": False}
    return {(each["ranks"], each["optimizer"]): each for each in content["results"]}


def test_the_record_is_complete(folder: Path, results: dict[tuple[int, str], dict[str, Any]]) -> None:
    names = [(1, "sgd"), (1, "kfac"), (1, "fop")]
    names += [(2, "sgd"), (2, "kfac"), (2, "fop-compatible"), (2, "fop-lean")]
    assert list(results) == names
    for (ranks, name), each in results.items():
        assert len(each["samples"]) == len(each["plain_seconds"]) == len(each["factor_bytes"]) == ranks
        for samples in each["samples"]:
            assert len(samples["plain"]["seconds"]) == PLAIN_STEPS
            assert len(samples["curvature"]["seconds"]) == (name != "sgd")
        assert (each["inversion_seconds"] is None) == (each["curvature_seconds"] is None) == (name == "sgd")
    readme = (folder / "README.md").read_text()
    assert "1 cores for up to 2 ranks: the times of more ranks than cores say little" in readme
    for expected in ("## Time of a step", "| 2 | FOP lean |", "## Environment", "## Reduces behind"):
        assert expected in readme


def test_times_follow_from_the_samples(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    sgd = max(sorted(each["plain"]["seconds"])[1] for each in results[2, "sgd"]["samples"])
    lean = results[2, "fop-lean"]
    plain = max(sorted(each["plain"]["seconds"])[1] for each in lean["samples"])
    curvature = max(each["curvature"]["seconds"][0] for each in lean["samples"])
    assert lean["amortised_seconds"] == pytest.approx((99 * plain + curvature) / 100)
    assert lean["ratio_to_sgd"] == pytest.approx(lean["amortised_seconds"] / sgd)
    assert all(seconds > 0 for seconds in lean["inversion_seconds"])


def test_predicted_bytes_are_those_that_were_counted(
    results: dict[tuple[int, str], dict[str, Any]],
) -> None:
    for (ranks, name), each in results.items():
        for step in ("plain", "curvature"):
            assert each["traffic"][step] == pytest.approx(each["predicted"][step], rel=1e-9)
        assert each["amortised_bytes"] == pytest.approx(each["predicted_bytes"], rel=1e-9)
        assert (each["amortised_bytes"] == 0) == (ranks == 1), name


def test_bytes_over_those_of_plain_ddp(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    """From the number of parameters alone; what is small beside it is left out."""
    factors = sum(side * (side + 1) / 2 for side in SIDES)
    ddp, once = 2 * MLP, MLP
    for name, expected in [
        ("sgd", ddp),
        ("kfac", ddp + once + factors / 100),
        ("fop-compatible", ddp + 2 * once + factors / 100),
        ("fop-lean", 2 * once + factors / 100),
    ]:
        each = results[2, name]
        assert each["ratio_to_ddp"] == pytest.approx(expected / ddp, rel=1e-3)
        assert each["amortised_bytes"] == pytest.approx(4 * expected / 2, rel=1e-3)
    assert results[1, "fop"]["ratio_to_ddp"] is None


def test_ranks_share_the_curvature(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    whole = 2 * 4 * sum(side**2 for side in SIDES)
    assert results[1, "fop"]["factor_bytes"] == results[1, "kfac"]["factor_bytes"] == [whole]
    for name in ("kfac", "fop-compatible", "fop-lean"):
        each = results[2, name]
        assert each["factor_bytes"] == each["predicted_factor_bytes"]
        assert sum(each["factor_bytes"]) == whole
        assert max(each["factor_bytes"]) < 0.6 * whole
    assert results[2, "sgd"]["factor_bytes"] == [0, 0]


def test_the_operating_system_counts_the_same(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    assert results[1, "fop"]["transport"]["missing"] == "one rank sends nothing"
    for name in ("sgd", "kfac", "fop-compatible", "fop-lean"):
        transport = results[2, name]["transport"]
        if transport["plain"] is None:
            assert "cannot be read" in transport["missing"]
            continue
        for step in ("plain", *(["curvature"] if name != "sgd" else [])):
            over = transport[step]["ratio"] / transport[step]["expected"]
            # Other programs may send something meanwhile, and only add.
            assert 0.995 < over < 1.2, (name, step)
    curvature = results[2, "kfac"]["transport"]["curvature"]
    if curvature is not None:
        # DDP and updates once, gloo's reduce of the factors 1 + 1/2 times.
        factors = sum(side * (side + 1) / 2 for side in SIDES)
        assert curvature["expected"] == pytest.approx(1 + factors / 2 / (3 * MLP + factors), rel=1e-3)


def test_bytes_of_gloo() -> None:
    """As counted by Linux: 1.5, 2.0 and 2.25 times n(W-1)/W for 1, 8 and 16 MiB on two ranks."""
    for mebibytes, ranks, times in [(1, 2, 1.5), (8, 2, 2.0), (16, 2, 2.25), (8, 4, 1.25), (16, 4, 1.418)]:
        size = mebibytes * 2**20
        assert gloo_reduce_bytes(size, ranks) == pytest.approx(times * size * (ranks - 1) / ranks, rel=1e-3)
    assert gloo_reduce_bytes(2**20, 1) == 0


def test_reduces_are_noted_and_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(dist, "reduce", lambda tensor, dst, group=None, async_op=False: done.append(dst))
    before = dist.reduce
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    with noting_reduces() as noted:
        dist.reduce(torch.zeros(100), 3, async_op=True)
    assert done == [3]
    assert noted == [pytest.approx(400 * 3 / 4 / 4)]
    assert dist.reduce is before


def test_traces_show_the_curvature_step(folder: Path, results: dict[tuple[int, str], dict[str, Any]]) -> None:
    assert sorted(path.name for path in folder.glob("trace*")) == [
        "trace-2-fop-compatible.json.gz",
        "trace-2-fop-lean.json.gz",
        "trace-2-kfac.json.gz",
    ]
    with gzip.open(folder / "trace-2-kfac.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {"backward", "fop::inversion", "gloo:reduce"} <= set(names)
    measured = results[2, "kfac"]["samples"][0]["profiled"]["overlap"]
    assert measured["reduces"] == measured["started_inside"] == 2
    assert 0 < measured["seconds_inside"] <= measured["seconds"]


def test_without_the_counter_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "COUNTER", Path("/no/such/counter"))
    counted = traffic(architecture_of(mlp(), "mlp"), 2, "lean")
    told = transport(counted, [Samples(), Samples()])
    assert told.plain is told.curvature is None
    assert told.missing is not None
    assert "/no/such/counter" in told.missing


def test_overlap_is_measured_in_time_not_in_sums() -> None:
    backward = (10.0, 20.0)
    assert overlap([], backward) is None
    # 8-12 joins 11-14 to 6 s, 4 of them inside; 19-23 has 1 inside; 25-26 none.
    spans = [(19.0, 23.0), (8.0, 12.0), (25.0, 26.0), (11.0, 14.0)]
    assert overlap(spans, backward) == Overlap(4, 2, 11.0, 5.0)


# --- processes ---------------------------------------------------------------------------------------------

PATIENCE = 600.0


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(
    ("function", "ranks", "arguments", "message"),
    [
        (fail_on_rank_1, 2, (2 * PATIENCE,), r"(?s)rank 1 of 2 failed.*ValueError: no such luck"),
        (sys.exit, 1, (3,), r"(?s)rank 0 of 1 failed.*exit code 3"),
    ],
)
def test_a_failing_rank_ends_all_and_is_named(
    function: Any, ranks: int, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_ranks(function, ranks, *arguments, seconds=PATIENCE)


def test_a_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"1 processes did not end in 0\.1 s; give them more time"):
        run_ranks(time.sleep, 1, 2 * PATIENCE, seconds=0.1)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "0 is not in the range x>=1"),
        (["--ranks", "two"], "'two' is not a valid integer"),
        (["--model", "alexnet"], "'alexnet' is not one of"),
        (["--minutes", "0"], "0.0 is not in the range x>0"),
    ],
)
def test_bad_options(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [RuntimeError("rank 1 of 2 failed: no luck"), TimeoutError("no luck")])
def test_a_failure_is_a_message_not_a_traceback(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "measure_scale", fail)
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"Error: {error}" in result.output


def test_predictions_are_written(tmp_path: Path) -> None:
    result = invoke("--predict", "--ranks", "8", "--ranks", "48", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "GPT, 70 billion parameters" in result.output
    content = json.loads((tmp_path / "prediction.json").read_text())
    assert content["assumptions"]["inside"] == 450e9
    assert [row["ranks"] for row in content["results"]["ResNet-50"]] == [8, 48]
    assert (tmp_path / "prediction.md").read_text() == predicted_markdown(predictions((8, 48)))


def test_the_documented_tables_are_those_of_the_command() -> None:
    documented = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert predicted_markdown(predictions()) in documented.read_text()


# --- the cost model against hand formulas ------------------------------------------------------------------

# 6 + 12 + 10 entries of gradients; sides 2, 3 | 4 diagonal, 3 | 5, 1 in two groups.
LAYERS = [LayerSize("a", 1, 3, 2), LayerSize("b", 1, 3, 4, diagonal_A=True), LayerSize("c", 2, 1, 5)]
TINY = Architecture("tiny", LAYERS, other_elements=7, buffer_bytes=16)
GRADIENTS = 6 + 12 + 10
# A triangle travels as ⌈d/2⌉ rows of d + 1.
TRIANGLES = (1 * 3 + 2 * 4) + (4 + 2 * 4) + 2 * (3 * 6 + 1 * 2)


def test_plain_ddp_sends_every_gradient_twice() -> None:
    sent = traffic(TINY, 4, "sgd")
    assert (sent.plain, sent.curvature) == ({}, {})
    assert sent.wrapper == sent.amortised() == (2 * 4 * (GRADIENTS + 7) + 16) * 3 / 4


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["kfac", "compatible", "lean", "fsdp"])
def test_bytes_of_each_method(method: Method, ranks: int) -> None:
    sent = traffic(TINY, ranks, method)
    share = (ranks - 1) / ranks
    update = 4 * (GRADIENTS + 3 * 7) * share
    gradients = {
        "kfac": 0.0,
        "compatible": 4 * (GRADIENTS + 3 * 128) * share,
        "lean": 4 * (GRADIENTS + 3) * share if ranks % 2 == 0 else 4 * (2 * 28 + 3 + 3) * share,
        "fsdp": 4 * (GRADIENTS + 3 * 128) * share,
    }[method]
    if method == "fsdp":
        update = 4 * GRADIENTS / ranks * share + 4 * 3 * 7 * share
        assert sent.plain["gradient shards"] == pytest.approx(4 * GRADIENTS / ranks * share)
    assert sent.plain["updates"] == pytest.approx(update)
    assert sent.plain.get("gradients", 0.0) == pytest.approx(gradients)
    assert sent.curvature["curvature factors"] == pytest.approx(4 * TRIANGLES * share)
    assert sent.curvature["control"] == pytest.approx(2 * share * (8 * (2 + 2 + 3) + 4 * 3))
    assert sent.plain.items() <= sent.curvature.items()
    wrapper = {"lean": 2 * 4 * 7 + 16, "fsdp": (2 + 2 + 4) * (GRADIENTS + 7)}
    assert sent.wrapper == pytest.approx(wrapper.get(method, 2 * 4 * (GRADIENTS + 7) + 16) * share)
    plain, curvature = sum(sent.plain.values()), sum(sent.curvature.values())
    assert sent.amortised(10) == pytest.approx(sent.wrapper + plain + (curvature - plain) / 10)


def test_burden_is_that_of_the_fullest_rank() -> None:
    factors, inversions = [4 + 9, 4 + 9, 2 * (25 + 1)], [8 + 27, 4 + 27, 2 * (125 + 1)]
    one = burden(LAYERS, plan_for(LAYERS, 1))
    assert (one.owners, one.factor_bytes, one.inversion_flops) == (1, 8 * sum(factors), sum(inversions))
    assert one.product_flops == 3 * (6 * 2 * 5 + 12 * (1 + 6) + 10 * 2 * 6)
    plan = plan_for(LAYERS, 5)
    assert sorted(factor_bytes(LAYERS, plan)) == [0, 0, *(8 * each for each in sorted(factors))]
    many = burden(LAYERS, plan)
    assert (many.owners, many.factor_bytes, many.inversion_flops) == (3, 8 * 52, 252)


def test_times_follow_from_the_stated_rates() -> None:
    assert (H100.bandwidth(8), H100.bandwidth(16)) == (450e9, 400e9)
    row = predict(TINY, 16, ["lean"])
    sent = traffic(TINY, 16, "lean").amortised()
    assert row.baseline_bytes == traffic(TINY, 16, "sgd").wrapper
    assert row.ratios["lean"] == sent / row.baseline_bytes
    assert row.extra_seconds["lean"] == pytest.approx((sent - row.baseline_bytes) / 400e9)
    assert row.inversion_seconds == pytest.approx(252 / (0.15 * 67e12))
    assert predict(TINY, 1, ["lean"]).ratios == {"lean": None}


def test_curvature_falls_until_one_layer_is_all_that_a_rank_has() -> None:
    for title, rows in predictions((1, 2, 4, 8, 1024)).items():
        bytes_of = [row.burden.factor_bytes for row in rows]
        largest = {each.title: each for each in published()}[title].layers
        floor = 8 * max(layer.factor_elements for layer in largest)
        for ranks, held in zip((1, 2, 4, 8), bytes_of, strict=False):
            assert held <= max(1.15 * bytes_of[0] / ranks, 1.001 * floor)
        assert bytes_of[-1] == floor


def test_lean_meets_the_budget_and_compatible_does_not() -> None:
    """Of docs/scaling.md: bytes per step at most 1.10 of plain DistributedDataParallel."""
    for architecture in published()[:2]:
        for ranks in (2, 8, 1024):
            ratios = predict(architecture, ranks, ["kfac", "compatible", "lean"]).ratios
            assert ratios["lean"] is not None
            assert ratios["lean"] < 1.02
            assert ratios["kfac"] == pytest.approx(1.5, abs=0.02)
            assert ratios["compatible"] == pytest.approx(2.0, abs=0.02)


# --- architectures -----------------------------------------------------------------------------------------


def test_published_numbers_of_parameters() -> None:
    elements = {each.title: each.elements for each in published()}
    assert elements["ResNet-50"] == 25_557_032
    # Llama 3 70B, whose shapes these are.
    assert elements["GPT, 70 billion parameters"] == 70_553_706_496


def test_sides_above_the_limit_are_diagonal() -> None:
    layers = {layer.name: layer for layer in llama(1, 8192, 1024, 28672, 128256)}
    diagonals = {name: (layer.diagonal_A, layer.diagonal_G) for name, layer in layers.items()}
    assert diagonals == {
        "embedding": (True, False),
        "blocks.0.qkv": (False, True),
        "blocks.0.proj": (False, False),
        "blocks.0.gate": (False, True),
        "blocks.0.up": (False, True),
        "blocks.0.down": (True, False),
        "head": (False, True),
    }
    assert linear("x", 3, 8192).in_dim == 8193
    assert not linear("x", 3, 8192).diagonal_A
    assert embedding("x", 50, 3).factor_elements == 50 + 9


def test_sizes_of_modules() -> None:
    found = architecture_of(mlp(), "mlp")
    assert [(layer.in_dim, layer.out_dim) for layer in found.layers] == [(785, 512), (513, 512), (513, 10)]
    assert (found.elements, found.other_elements, found.buffer_bytes) == (MLP, 0, 0)
    resnet = architecture_of(resnet18(), "resnet18")
    # Of BatchNorm weight and bias, running mean and variance, and the number of batches.
    channels = 64 * 5 + 128 * 5 + 256 * 5 + 512 * 5
    assert resnet.elements == 11_173_962
    assert resnet.other_elements == 2 * channels
    assert resnet.buffer_bytes == 2 * 4 * channels + 8 * 20
    vit = ViT(dim=24, depth=1)
    assert architecture_of(vit, "vit").elements == sum(param.numel() for param in vit.parameters())
    (grouped,) = architecture_of(torch.nn.Conv2d(4, 6, (2, 3), groups=2), "conv").layers
    assert (grouped.groups, grouped.out_dim, grouped.in_dim) == (2, 3, 13)
