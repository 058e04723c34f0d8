"""Several ranks on this machine, and the cost model that predicts more of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessException

import command
from command import Told
from failing_rank import fail_on_rank_1
from fop_bench import scale
from fop_bench.cost_model import (
    Architecture,
    LayerSize,
    Method,
    architecture_of,
    bandwidth,
    embedding,
    factor_bytes,
    linear,
    llama,
    plan_for,
    predict,
    predicted_tables,
    predictions,
    published,
    traffic,
)
from fop_bench.models import ViT, mlp, resnet18
from fop_bench.overhead import PLAIN_STEPS
from fop_bench.world import run_ranks

MLP = 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
SIDES = [785, 512, 513, 512, 513, 10]


def invoke(*arguments: str) -> Told:
    return command.invoke("scale", *arguments)


# --- measured on this machine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale") / "new"
    options = ["--model", "mlp", "--batch", "2", "--rounds", "1", "--out", str(out)]
    # 2 is measured once.
    result = invoke("--ranks", "1", "--ranks", "2", "--ranks", "2", *options)
    assert result.exit_code == 0, result.output
    for title in ("Time of a step", "Bytes that a rank sends", "Factors and inverses"):
        assert title in result.output
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    content = json.loads((folder / "scale.json").read_text())
    assert content["environment"]["threads"] == 1
    assert content["protocol"]["workload"] == {"model": "mlp", "batch_size": 2, "bf16": False}
    return {(each["ranks"], each["optimizer"]): each for each in content["results"]}


def test_the_record_is_complete(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    names = [(1, "sgd"), (1, "kfac"), (1, "fop")]
    names += [(2, "sgd"), (2, "kfac"), (2, "fop-compatible"), (2, "fop-lean")]
    assert list(results) == names
    for (ranks, name), each in results.items():
        assert len(each["samples"]) == len(each["plain_seconds"]) == len(each["factor_bytes"]) == ranks
        for samples in each["samples"]:
            assert len(samples["plain"]["seconds"]) == PLAIN_STEPS
            assert len(samples["curvature"]["seconds"]) == (name != "sgd")
        assert (each["curvature_seconds"] is None) == (name == "sgd")


def test_times_follow_from_the_samples(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    sgd = max(sorted(each["plain"]["seconds"])[1] for each in results[2, "sgd"]["samples"])
    lean = results[2, "fop-lean"]
    plain = max(sorted(each["plain"]["seconds"])[1] for each in lean["samples"])
    curvature = max(each["curvature"]["seconds"][0] for each in lean["samples"])
    assert lean["amortised_seconds"] == pytest.approx((99 * plain + curvature) / 100)
    assert lean["ratio_to_sgd"] == pytest.approx(lean["amortised_seconds"] / sgd)


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


# --- processes ---------------------------------------------------------------------------------------------

PATIENCE = 600.0


@pytest.mark.timeout(3 * PATIENCE)
def test_a_failing_rank_ends_all_and_is_named() -> None:
    with pytest.raises(ProcessException, match=r"(?s)Process 1 terminated.*ValueError: no such luck"):
        run_ranks(fail_on_rank_1, 2, 2 * PATIENCE)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "0 is less than 1"),
        (["--ranks", "two"], "invalid int value: 'two'"),
        (["--model", "alexnet"], "invalid choice: 'alexnet'"),
    ],
)
def test_bad_options(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_a_failure_is_a_message_not_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **how: Any) -> None:
        raise ProcessException("no luck", 1, 77)

    monkeypatch.setattr(scale, "measure_scale", fail)
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 1
    assert "Error: rank 1 failed: no luck" in result.output


def test_predictions_are_written(tmp_path: Path) -> None:
    result = invoke("--predict", "--ranks", "8", "--ranks", "48", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "GPT, 70 billion parameters" in result.output
    content = json.loads((tmp_path / "prediction.json").read_text())
    assert content["assumptions"]["inside"] == 450e9
    assert [row["ranks"] for row in content["results"]["ResNet-50"]] == [8, 48]
    assert (tmp_path / "prediction.md").read_text() == predicted_tables(predictions((8, 48)))


def test_the_documented_tables_are_those_of_the_command() -> None:
    documented = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert predicted_tables(predictions()) in documented.read_text()


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
    update = 4 * (GRADIENTS + 3 * 9) * share
    gradients = {
        "kfac": 0.0,
        "compatible": 4 * (GRADIENTS + 3 * 128) * share,
        "lean": 4 * (GRADIENTS + 3) * share if ranks % 2 == 0 else 4 * (2 * 28 + 3 + 3) * share,
        "fsdp": 4 * (GRADIENTS + 3 * 128) * share,
    }[method]
    if method == "fsdp":
        update = 4 * GRADIENTS / ranks * share + 4 * 3 * 9 * share
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


def test_the_rest_is_that_of_the_fullest_rank() -> None:
    factors, inversions = [4 + 9, 4 + 9, 2 * (25 + 1)], [8 + 27, 4 + 27, 2 * (125 + 1)]
    one = predict(TINY, 1, ["lean"])
    assert (one["owners"], one["factor_bytes"], one["ratios"]) == (1, 8 * sum(factors), {"lean": None})
    assert one["inversion_seconds"] == pytest.approx(sum(inversions) / (0.15 * 67e12))
    products = 3 * (6 * 2 * 5 + 12 * (1 + 6) + 10 * 2 * 6)
    assert one["product_seconds"] == pytest.approx(products / (0.5 * 495e12))
    plan = plan_for(LAYERS, 5)
    assert sorted(factor_bytes(LAYERS, plan)) == [0, 0, *(8 * each for each in sorted(factors))]
    many = predict(TINY, 5, ["lean"])
    assert (many["owners"], many["factor_bytes"]) == (3, 8 * 52)
    assert many["inversion_seconds"] == pytest.approx(252 / (0.15 * 67e12))


def test_times_follow_from_the_stated_rates() -> None:
    assert (bandwidth(8), bandwidth(16)) == (450e9, 400e9)
    row = predict(TINY, 16, ["lean"])
    sent = traffic(TINY, 16, "lean").amortised()
    assert row["baseline_bytes"] == traffic(TINY, 16, "sgd").wrapper
    assert row["ratios"]["lean"] == sent / row["baseline_bytes"]
    assert row["extra_seconds"]["lean"] == pytest.approx((sent - row["baseline_bytes"]) / 400e9)


def test_curvature_falls_until_one_layer_is_all_that_a_rank_has() -> None:
    for title, rows in predictions((1, 2, 4, 8, 1024)).items():
        bytes_of = [row["factor_bytes"] for row in rows]
        largest = {each.title: each for each in published()}[title].layers
        floor = 8 * max(layer.factor_elements for layer in largest)
        for ranks, held in zip((1, 2, 4, 8), bytes_of, strict=False):
            assert held <= max(1.15 * bytes_of[0] / ranks, 1.001 * floor)
        assert bytes_of[-1] == floor


def test_lean_meets_the_budget_and_compatible_does_not() -> None:
    """Of docs/scaling.md: bytes per step at most 1.10 of plain DistributedDataParallel."""
    for architecture in published()[:2]:
        for ranks in (2, 8, 1024):
            ratios = predict(architecture, ranks, ["kfac", "compatible", "lean"])["ratios"]
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
