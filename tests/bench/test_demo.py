import json
import statistics

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fop_bench.cli import main
from fop_bench.demo import FULL, QUICK, best_learning_rate
from fop_bench.optimizers import CONTENDERS, contender
from fop_bench.training import Epoch, Run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new folder"
    result = CliRunner().invoke(
        main, ["demo", "--quick", "--device", "cpu", "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output, json.loads((out / "demo.json").read_text()), out


def test_every_optimizer_runs_at_every_batch_size(demo):
    _, content, _ = demo
    pairs = [(entry["batch_size"], entry["optimizer"]) for entry in content["results"]]
    assert pairs == [(batch, name) for batch in (64, 512, 1024) for name in ("sgd", "adamw", "kfac", "fop")]


def test_search_is_fair(demo):
    _, content, _ = demo
    protocol = content["protocol"]
    assert protocol["tuning_seed"] not in protocol["seeds"]
    for entry in content["results"]:
        epochs = protocol["epochs"][str(entry["batch_size"])]
        assert [run["learning_rate"] for run in entry["tuning"]] == list(
            contender(entry["optimizer"]).learning_rates
        )
        assert {run["seed"] for run in entry["tuning"]} == {protocol["tuning_seed"]}
        assert [run["seed"] for run in entry["runs"]] == protocol["seeds"]
        assert {run["learning_rate"] for run in entry["runs"]} == {entry["learning_rate"]}
        for run in entry["tuning"] + entry["runs"]:
            assert run["diverged"] or len(run["curve"]) == epochs


def test_chosen_rate_has_the_best_validation_curve(demo):
    for entry in demo[1]["results"]:
        scores = {
            run["learning_rate"]: np.mean([epoch["accuracy"] for epoch in run["curve"]])
            for run in entry["tuning"]
            if not run["diverged"]
        }
        assert scores[entry["learning_rate"]] == pytest.approx(max(scores.values()))


def recomputed(runs, target):
    """Count and average again, by other means than the package's."""
    alive = [run for run in runs if not run["diverged"]]
    hits = []
    for run in alive:
        above = np.flatnonzero(np.array([epoch["accuracy"] for epoch in run["curve"]]) >= target)
        if above.size:
            hits.append(run["curve"][above[0]])

    def pair(values):
        if not values:
            return None
        return np.mean(values), (np.std(values, ddof=1) if len(values) > 1 else None)

    return {
        "runs": len(runs),
        "diverged": len(runs) - len(alive),
        "reached": len(hits),
        "epochs": pair([hit["epoch"] for hit in hits]),
        "seconds": pair([hit["seconds"] for hit in hits]),
        "final_accuracy": pair([run["curve"][-1]["accuracy"] for run in alive]),
    }


def text(pair, digits, scale=1.0):
    if pair is None:
        return "–"
    mean, std = pair
    return f"{mean * scale:.{digits}f}" + ("" if std is None else f" ± {std * scale:.{digits}f}")


def test_summary_and_table_follow_from_the_curves(demo):
    output, content, _ = demo
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line
    ]
    assert len(rows) == len(content["results"])
    for row, entry in zip(rows, content["results"], strict=True):
        expected = recomputed(entry["runs"], content["protocol"]["target_accuracy"])
        for key, value in expected.items():
            stored = entry["summary"][key]
            if isinstance(value, tuple):
                assert stored["mean"] == pytest.approx(value[0])
                assert stored["std"] == (None if value[1] is None else pytest.approx(value[1]))
            else:
                assert stored == value
        assert row == [
            str(entry["batch_size"]),
            contender(entry["optimizer"]).label,
            f"{entry['learning_rate']:g}",
            f"{expected['reached']} of {expected['runs']}",
            text(expected["epochs"], 1),
            text(expected["seconds"], 2),
            text(expected["final_accuracy"], 2, 100.0),
            str(expected["diverged"]),
        ]


def test_times_grow_and_environment_is_named(demo):
    _, content, _ = demo
    for entry in content["results"]:
        for run in entry["runs"]:
            seconds = [epoch["seconds"] for epoch in run["curve"]]
            assert seconds == sorted(seconds)
            assert all(second > 0 for second in seconds)
    assert content["environment"]["device"]
    assert content["protocol"]["quick"] is True


def test_picture_is_drawn(demo):
    picture = np.asarray(Image.open(demo[2] / "demo.png").convert("RGB"))
    assert picture.shape[1] > 1000
    fop_orange = np.array([0xD5, 0x5E, 0x00])
    assert (np.abs(picture.astype(int) - fop_orange).max(axis=2) < 3).any()


def test_full_demo_is_three_seeds_and_the_same_batch_sizes():
    assert len(FULL.seeds) == 3
    assert FULL.epochs.keys() == QUICK.epochs.keys()
    assert FULL.total_runs() == 3 * (4 * 4 + 4 * 3)


def test_grids_have_equal_size():
    assert {len(each.learning_rates) for each in CONTENDERS.values()} == {4}
    for each in CONTENDERS.values():
        assert list(each.learning_rates) == sorted(set(each.learning_rates))


def test_unknown_optimizer_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lamb'.*sgd, adamw, kfac, fop"):
        contender("lamb")


def tuned(rate, *accuracies, diverged=False):
    return Run(rate, 0, [Epoch(1, 1.0, 1.0, accuracy) for accuracy in accuracies], diverged, [])


def test_a_diverged_run_never_wins():
    assert best_learning_rate([tuned(0.1, 0.3), tuned(1.0, 0.9, diverged=True)]) == 0.1
    assert best_learning_rate([tuned(1.0, diverged=True), tuned(0.1, diverged=True)]) == 0.1
    assert best_learning_rate([tuned(0.1, 0.2, 0.9), tuned(0.3, 0.7, 0.8)]) == 0.3
    assert statistics.fmean([0.7, 0.8]) > statistics.fmean([0.2, 0.9])


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_unusable_device_is_a_clear_error(device, tmp_path):
    result = CliRunner().invoke(main, ["demo", "--device", device, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert repr(device) in result.output
    assert not (tmp_path / "out").exists()
