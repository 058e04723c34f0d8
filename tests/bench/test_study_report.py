"""The report of `fop-bench run`: what it computes, says and draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fop_bench.paper import PAPER_TABLES, paper_page
from fop_bench.plots import STYLES, layered_runs, speed_up_reference, styles
from fop_bench.study import (
    Study,
    comparison_table,
    fop_table,
    reached,
    studies,
    tuning_table,
    unfair,
)
from fop_bench.study_report import write_report
from study_records import line, noisy_runs, write

Runs = list[dict[str, Any]]


def study_of(runs: Runs) -> Study:
    (study,) = studies(runs)
    return study


def by_name(table: str | None, *names: str) -> dict[tuple[str, ...], list[str]]:
    """Rows of a table by their cells under some of its headings."""
    assert table is not None
    head, _, *body = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
    return {tuple(row[head.index(name)] for name in names): row for row in body}


def spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def at_epochs(name: str, *epochs: int, start: int = 1) -> Runs:
    """One run for each number: its accuracy reaches the target in that epoch."""
    return [line(name, [0.1] * (n - 1) + [0.5], seed=seed) for seed, n in enumerate(epochs, start=start)]


# --- numbers ---------------------------------------------------------------------------------------


def test_several_options_or_targets_cannot_be_one_row() -> None:
    runs = [line("fop", [0.5], seed=1), line("fop", [0.5], seed=2, options={"lr": 0.3})]
    with pytest.raises(ValueError, match=r"fop at batch 100 .*lr=0\.1; lr=0\.3"):
        study_of(runs).groups()
    with pytest.raises(ValueError, match="different targets"):
        studies([line("fop", [0.5]), line("fop", [0.5], seed=2, targets={"accuracy": 0.6})])


def test_maps_of_earlier_versions_have_a_row_a_combination(tmp_path: Path) -> None:
    runs = [
        line("kfac", [0.1, accuracy], seed=seed, study="map", options={"lr": lr, "damping": damping})
        for lr, damping, seed, accuracy in [(0.1, 1e-3, 1, 0.4), (0.1, 1e-3, 2, 0.6), (0.3, 1e-3, 1, 0.7)]
    ]
    shown = comparison_table(study_of(runs))
    two, one = (by_name(shown, "options")[f"lr={lr}, damping=0.001",] for lr in (0.1, 0.3))
    assert [*two[3:8], *two[11:]] == [
        *("2", "0", "1 of 2", "2.0", "2.00", "**50.00 ± 14.14**", "50.00 ± 14.14", "1.5000 ± 0.1414")
    ]
    assert [*one[3:6], *one[11:]] == ["1", "0", "1 of 1", "70.00", "70.00", "1.3000"]
    assert study_of(runs).is_map and not study_of(runs[:2]).is_map
    chosen = line("kfac", [0.1], seed=0, study="map", phase="tuning", options={"lr": 0.1, "damping": 1e-3})
    assert not study_of([*runs, chosen]).is_map
    write(tmp_path / "map.jsonl", runs)
    assert f"none is chosen.\n\n{shown}" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(("processor", "second"), [("cpu", 1.0), ("cuda", 2.0)])
def test_comparison_numbers(processor: str, second: float) -> None:
    curves = [[0.2, 0.5, 0.61, 0.6], [0.2, 0.3, 0.55, 0.4], [0.2, 0.3, 0.4, 0.45]]
    runs = [line("fop", curve, seed=seed, processor=processor) for seed, curve in enumerate(curves, start=1)]
    # Reached the target, and diverged afterwards: counts as diverged alone.
    runs.append(line("fop", [0.9, 0.95], seed=4, diverged=True, processor=processor))
    (row,) = by_name(comparison_table(study_of(runs)), "optimizer").values()
    assert row[:5] == ["100", "FOP", "lr=0.1", "4", "1"]
    # 0.5 is reached at epochs 2 and 3; the loss 2 - 0.7 never.
    assert row[5:11] == ["2 of 4", spread([2, 3], 1), spread([2 * second, 3 * second], 2), "0 of 4", "–", "–"]
    assert row[11:] == [
        f"**{spread([60, 40, 45], 2)}**",
        spread([61, 55, 45], 2),
        spread([1.4, 1.6, 1.55], 4),
    ]


@pytest.mark.parametrize(
    ("kind", "target", "epoch"),
    [("accuracy", 0.5, 2), ("train_loss", 1.5, 2), ("accuracy", 0.61, None), ("train_loss", 1.39, None)],
)
def test_target_is_reached_at_equality(kind: str, target: float, epoch: int | None) -> None:
    run = line("fop", [0.4, 0.5, 0.6])
    found, seconds = reached(run, kind, target)
    assert (found, seconds) == (epoch, epoch) if epoch else np.isnan([found, seconds]).all()
    assert np.isnan(reached(run | {"diverged": True}, kind, target)).all()


def test_the_best_is_bold_if_every_seed_reached_it() -> None:
    runs = at_epochs("fop", 3, 4) + at_epochs("kfac", 3, 4) + at_epochs("sgd", 9, 10)
    runs += [line("adamw", [0.5 if n == 1 else 0.1] * 2, seed=n) for n in (1, 2)]
    found = by_name(comparison_table(study_of(runs)), "optimizer")
    for name, cells in [("FOP", ["2 of 2", "**3.5 ± 0.7**"]), ("SGD", ["2 of 2", "9.5 ± 0.7"])]:
        assert found[name,][5:7] == cells
    assert found["K-FAC",][6:8] == ["**3.5 ± 0.7**", "**3.50 ± 0.71**"]
    assert found["AdamW",][5:7] == ["1 of 2", "1.0"]
    single = comparison_table(study_of([run for run in runs if run["seed"] == 1]))
    assert "**" not in single


def test_fop_against_the_others() -> None:
    runs = at_epochs("fop", 2, 4) + at_epochs("sgd", 6, 8) + at_epochs("adamw", 3, 4)
    runs += [line("kfac", curve, seed=n) for n, curve in ((1, [0.5]), (2, [0.1]), (3, [0.1]))]
    found = by_name(fop_table(study_of(runs)), "against")
    # 7 epochs over 3; each has a standard deviation of √2.
    error = 7 / 3 * np.sqrt((np.sqrt(2) / 7) ** 2 + (np.sqrt(2) / 3) ** 2)
    assert found["SGD",][2:4] == [f"2.33 ± {error:.2f}, ahead"] * 2
    assert found["AdamW",][2].endswith(", within the spread")
    assert found["K-FAC",][2] == "– (FOP 2 of 2, it 1 of 3)"
    assert found["SGD",][4] == "– (FOP 0 of 2, it 0 of 2)"
    # All end at 0.5 but two runs of K-FAC.
    assert [row[6] for row in found.values()] == ["within the spread"] * 2 + ["ahead"]
    # Nothing is claimed from single runs.
    (single,) = by_name(fop_table(study_of(at_epochs("fop", 2) + at_epochs("sgd", 6))), "against").values()
    assert single[2:] == ["3.00 (single runs)"] * 2 + ["– (FOP 0 of 1, it 0 of 1)"] * 2 + ["–"]
    assert fop_table(study_of(at_epochs("sgd", 6, 8))) is None


def test_tuning_shows_every_run_and_the_choice() -> None:
    def tuned(lr: float, *accuracies: float, **changes: Any) -> dict[str, Any]:
        return line("fop", list(accuracies), phase="tuning", seed=0, options={"lr": lr}, **changes)

    tuning = [tuned(0.1, 0.2, 0.4), tuned(0.3, 0.2, 0.6), tuned(1.0, diverged=True)]
    study = study_of([*tuning, line("fop", [0.2, 0.5], options={"lr": 0.3})])
    found = by_name(tuning_table(study), "options")
    assert found["lr=0.1",][4:] == ["30.00", "40.00", "no", ""]
    assert found["lr=0.3",][4:] == ["40.00", "60.00", "no", "chosen"]
    assert found["lr=1",][4:] == ["–", "–", "yes", ""]
    assert unfair(study) == []


def test_what_is_unequal_is_said() -> None:
    even = noisy_runs()
    assert unfair(study_of(even)) == []
    less = [r for r in even if (r["contender"], r["phase"], r["options"]["lr"]) != ("sgd", "tuning", 0.1)]
    tuning = [each for each in unfair(study_of(less)) if each.startswith("UNEQUAL TUNING")]
    assert tuning[0] == "UNEQUAL TUNING: tuning runs at batch 100: SGD 1, AdamW 2, K-FAC 2, FOP 2."
    fewer = [r for r in even if (r["contender"], r["seed"], r["batch_size"]) != ("fop", 3, 400)]
    assert unfair(study_of(fewer)) == [
        "UNEQUAL SEEDS: seeds of the final runs at batch 400: SGD 1/2/3, AdamW 1/2/3, K-FAC 1/2/3, FOP 1/2."
    ]
    longer = [*even, line("lamb", [0.5] * 9, targets=even[0]["targets"])]
    assert any(each.startswith("UNEQUAL EPOCHS: epochs at batch 100") for each in unfair(study_of(longer)))
    elsewhere = [line("fop", [0.5]), line("fop", [0.5], seed=2, device="Another", threads=4)]
    said = " ".join(unfair(study_of(elsewhere)))
    assert "SEVERAL DEVICES: A processor, Another" in said
    assert "SEVERAL THREADS" in said


# --- the paper -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "batch", "ratio"), [("kfac", 2048, 1.24), ("fop", 2048, 1.28), ("fop", 4096, 1.32)]
)
def test_paper_numbers_give_its_times_of_an_epoch(contender: str, batch: int, ratio: float) -> None:
    cells = PAPER_TABLES["cifar10-resnet18"].cells

    def per_epoch(name: str) -> float:
        epochs, time = cells.loc[batch, name].split(" / ")
        return float(time) / int(epochs)

    assert round(per_epoch(contender) / per_epoch("sgd"), 2) == ratio


def test_paper_page_without_a_record() -> None:
    page = paper_page([])
    cells = re.findall(r"paper ([^|]*) · not run yet", page)
    assert len(cells) == sum(table.cells.size for table in PAPER_TABLES.values()) == 24 + 12
    assert cells.count("–") == 10
    assert "ours" not in page.partition("## Table 1")[2]


def test_ours_stands_beside_the_paper(tmp_path: Path) -> None:
    # The recipe's own target is another; the cell is about the paper's.
    resnet = {"recipe": "cifar10-resnet18", "batch_size": 4096, "processor": "cuda"}
    runs = [line("fop", [0.6] * n + [0.92, 0.9], seed=n, **resnet) for n in (88, 98)]
    runs += [line("kfac", [0.6, end], seed=seed, **resnet) for seed, end in ((1, 0.92), (2, 0.7))]
    runs += [line("adamw", [0.6], **resnet), line("adamw", [], seed=2, diverged=True, **resnet)]
    runs += [line("fop", [0.95], study="ablation", **{**resnet, "batch_size": 2048})]
    tail = {"recipe": "cifar-lt-resnet32", "task": "CIFAR-100-LT 50"}
    runs += [line("sgd", [0.3, end], seed=seed, **tail) for seed, end in ((1, 0.44), (2, 0.46))]
    write(tmp_path / "runs.jsonl", runs)
    page = paper_page([tmp_path])
    assert f"paper 22 / 181.9 · ours {spread([89, 99], 1)} / {spread([2 * 89, 2 * 99], 1)} (n=2)" in page
    assert "paper 34 / 270.5 · ours 2.0 / 4.0 (reached by 1 of 2)" in page
    assert "paper 73 / 454.0 · ours not reached (0 of 2, 1 diverged)" in page
    assert "paper 29 / 475.2 · not run yet" in page
    assert f"paper 56.22 · ours {spread([56, 54], 2)} (n=2)" in page


# --- plots and the whole ---------------------------------------------------------------------------


def test_styles_tell_contenders_apart() -> None:
    names = ["fop", "kfac", *(f"variant-{number}" for number in range(7))]
    assert len({str(look) for look in styles(names).values()}) == len(names)
    assert len({look["color"] for look in STYLES.values()}) == len(STYLES) == 8


def test_speed_up_is_over_sgd_unless_it_fails() -> None:
    runs = noisy_runs()
    assert speed_up_reference(study_of(runs)) == (100, "kfac")  # SGD does not reach the loss
    for run in runs:
        run["targets"] = {"accuracy": 0.5}
    assert speed_up_reference(study_of(runs)) == (100, "sgd")
    assert speed_up_reference(study_of([run for run in runs if run["batch_size"] == 100])) is None


def test_layers_of_the_outer_batch_sizes_and_the_first_seed() -> None:
    found = layered_runs(study_of(noisy_runs()[::-1]))
    assert [(run["batch_size"], run["seed"]) for run in found] == [(100, 1), (400, 1)]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([line("fop", [0.4], phase="tuning", seed=0)], "No final run yet."),
        ([line("fop", [], seed=seed, diverged=True) for seed in (1, 2)], "2 runs, 2 diverged"),
        ([line("fop", [0.4], targets={}, batch_size=size) for size in (1, 2)], "Curves"),
    ],
)
def test_little_is_reported_too(runs: Runs, said: str, tmp_path: Path) -> None:
    write(tmp_path / "runs.jsonl", runs)
    assert said in write_report(tmp_path).read_text()


@pytest.mark.slow
def test_whole_report(tmp_path: Path) -> None:
    runs = noisy_runs()
    runs[0]["warnings"] = ["a | b\nc"]
    write(tmp_path / "comparison.jsonl", runs)
    path = write_report(tmp_path)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    assert f"{len(runs)} runs, 0 diverged. Data: images on the hub" in text
    assert "fop-bench run small" in text
    assert "Tuning runs of an optimizer at a batch size: 2." in text
    assert "UNEQUAL" not in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    # Every table is one: as many cells in a row as in its head.
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    again = {picture: (tmp_path / picture).read_bytes() for picture in pictures}
    assert write_report(tmp_path).read_text() == text
    assert again == {picture: (tmp_path / picture).read_bytes() for picture in pictures}
