"""Several ranks on this machine: what is measured, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessException

import command
from command import Told
from failing_rank import fail_on_rank_1
from fop_bench import scale
from fop_bench.overhead import PLAIN_STEPS
from fop_bench.scale import PREDICTED, predict, predicted_table

# Every measurement starts processes of its own.
pytestmark = pytest.mark.slow

MLP = 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
SIDES = [393, 393, 512, 513, 512, 513, 10]  # the first factor of side 785 is two blocks


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
    for title in ("Time of a step", "Bytes that a rank sends", "factors MB"):
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


def test_bytes_are_those_of_the_sizes(results: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Of each message: an element has 4 bytes, and of two ranks each sends half of what is exchanged."""
    # 13 numbers go with the update of each of the three layers; a triangle is sent as ⌈d/2⌉ rows of d + 1.
    updates, factors = 4 * (MLP + 3 * 13) / 2, 4 * sum((side + 1) // 2 * (side + 1) for side in SIDES) / 2
    # Numbers of samples and rows in float64, and what became of each layer.
    control = 2 * (8 * 3 * 2 + 4 * 3) / 2
    # With each gradient a sketch of 127 numbers and whether there is a pair, or how many ranks use the layer.
    compatible, lean = (4 * (MLP + 3 * numbers) / 2 for numbers in (127 + 1, 1))
    gradients = {"kfac": {}, "fop-compatible": {"gradients": compatible}, "fop-lean": {"gradients": lean}}
    for name, of_pair in gradients.items():
        sent, plain = results[2, name]["traffic"], {"updates": updates} | of_pair
        assert sent["plain"] == pytest.approx(plain, rel=1e-9)
        curvature = plain | {"curvature factors": factors, "control": control}
        assert sent["curvature"] == pytest.approx(curvature, rel=1e-9)
        assert sent["wrapper"] == (0 if name == "fop-lean" else 4 * MLP)
    assert results[2, "sgd"]["traffic"] == {"wrapper": 4 * MLP, "plain": {}, "curvature": {}}
    assert all((each["amortised_bytes"] == 0) == (ranks == 1) for (ranks, _), each in results.items())


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
        assert sum(each["factor_bytes"]) == whole
        assert max(each["factor_bytes"]) < 0.6 * whole
    assert results[2, "sgd"]["factor_bytes"] == [0, 0]


# --- predicted ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(results: dict[tuple[int, str], dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    rows = predict([each for (ranks, _), each in results.items() if ranks == 1], (1, 2, 3, 1024), 50e9)
    return {(row["ranks"], row["optimizer"]): row for row in rows}


def test_a_prediction_for_one_rank_is_what_was_measured(
    results: dict[tuple[int, str], dict[str, Any]], predicted: dict[tuple[int, str], dict[str, Any]]
) -> None:
    for name in ("sgd", "kfac", "fop"):
        measured, here = results[1, name], predicted[1, name]
        for kind in ("plain", "curvature"):
            if measured[f"{kind}_seconds"]:
                assert here["seconds"][kind] == pytest.approx(2 * measured[f"{kind}_seconds"])
                assert here["bytes"][kind] == 0
        assert here["factor_bytes"] == measured["factor_bytes"][0]
    assert results[1, "kfac"]["factor_bytes"][0] > 0


def test_predicted_bytes_and_memory_are_those_that_two_ranks_counted(
    results: dict[tuple[int, str], dict[str, Any]], predicted: dict[tuple[int, str], dict[str, Any]]
) -> None:
    for name in ("sgd", "kfac", "fop-compatible", "fop-lean"):
        counted, here = results[2, name], predicted[2, name]
        assert here["traffic"]["wrapper"] == counted["traffic"]["wrapper"]
        for kind in ("plain", "curvature"):
            assert here["traffic"][kind] == pytest.approx(counted["traffic"][kind], rel=1e-9)
        assert here["factor_bytes"] == max(counted["factor_bytes"])


def test_a_prediction_divides_what_owners_do(
    results: dict[tuple[int, str], dict[str, Any]], predicted: dict[tuple[int, str], dict[str, Any]]
) -> None:
    sgd, fop = (results[1, name]["plain_seconds"][0] for name in ("sgd", "fop"))
    # Three products with the factors of each layer: 2·out·in·side, the first A in two blocks.
    sizes = [(512, 785, 512 + 393), (512, 513, 512 + 513), (10, 513, 10 + 513)]
    work = [out * columns * sides for out, columns, sides in sizes]
    here = predicted[1024, "fop-lean"]
    sent = 4 * (MLP + 3 * 13 + MLP + 3) * 1023 / 1024
    assert here["owners"] == 3 and here["bytes"]["plain"] == pytest.approx(sent)
    times = sgd + (fop - sgd) * max(work) / sum(work) + sent / 50e9, fop + sent / 50e9
    assert here["seconds"]["plain"] == pytest.approx(times)
    # An odd number of ranks has no two sides: Ga and Gd both travel.
    odd = predicted[3, "fop-lean"]["traffic"]["plain"]["gradients"]
    assert odd == pytest.approx(4 * (2 * MLP + 3 * 2) * 2 / 3)


def test_predictions_are_written(tmp_path: Path) -> None:
    options = ["--model", "mlp", "--batch", "2", "--rounds", "1", "--bandwidth", "10"]
    result = invoke("--predict", "--ranks", "8", "--ranks", "48", *options, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "nobody has checked it against a cluster" in result.output
    content = json.loads((tmp_path / "prediction.json").read_text())
    assert content["bandwidth"] == 10e9 and content["environment"]["command"]
    assert [row["ranks"] for row in content["results"]] == 4 * [8] + 4 * [48]
    assert content["results"] == predict(content["measured"], (8, 48), 10e9)
    assert (tmp_path / "prediction.md").read_text() == predicted_table(content["results"], 10e9)
    assert PREDICTED[0] == 1 and PREDICTED[-1] == 1024 and len(PREDICTED) == 11


# --- processes ---------------------------------------------------------------------------------------------

PATIENCE = 600.0


@pytest.mark.timeout(3 * PATIENCE)
def test_a_failing_rank_ends_all_and_is_named() -> None:
    with pytest.raises(ProcessException, match=r"(?s)Process 1 terminated.*ValueError: no such luck"):
        scale.run_ranks(fail_on_rank_1, 2, 2 * PATIENCE)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "0 is not a whole number above 0"),
        (["--ranks", "two"], "two is not a whole number above 0"),
        (["--model", "alexnet"], "invalid choice: 'alexnet'"),
    ],
)
def test_bad_options(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "measure_scale", None)
    (tmp_path / "file").write_text("")
    for how in ((), ("--predict",)):
        told = invoke(*how, "--out", str(tmp_path / "file"))
        assert told.exit_code == 1 and f"Error: cannot write into {tmp_path / 'file'}: " in told.output


def test_a_failure_is_a_message_not_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **how: Any) -> None:
        raise ProcessException("no luck", 1, 77)

    monkeypatch.setattr(scale, "measure_scale", fail)
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 1
    assert "Error: rank 1 failed: no luck" in result.output
