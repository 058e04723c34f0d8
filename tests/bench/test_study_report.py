"""The report of `fop-bench run`: what it computes, says and draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fop_bench.paper import PAPER_TABLES
from fop_bench.paper_report import paper_page
from fop_bench.study_groups import Target, compare, pooled_std, studies
from fop_bench.study_maps import map_sentence, map_table, maps
from fop_bench.study_plots import STYLES, layered_runs, speed_up_reference, styles
from fop_bench.study_report import write_report
from fop_bench.study_tables import comparison_table, ratio_table, tuning_table, unfair
from fop_bench.study_words import in_words
from fop_bench.summary import Statistic, statistic
from study_records import line, map_runs, noisy_runs, write


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def by_name(table: str, *names: str) -> dict[tuple[str, ...], list[str]]:
    """Rows of a table by their cells under some of its headings."""
    head, _, *body = rows(table)
    return {tuple(row[head.index(name)] for name in names): row for row in body}


# --- numbers ---------------------------------------------------------------------------------------


def test_several_options_or_targets_cannot_be_one_row() -> None:
    runs = [line("fop", [0.5], seed=1), line("fop", [0.5], seed=2, options={"lr": 0.3})]
    with pytest.raises(ValueError, match=r"fop at batch 100 .*lr=0\.1; lr=0\.3"):
        studies(runs)[0].groups()
    with pytest.raises(ValueError, match="different targets"):
        studies([line("fop", [0.5]), line("fop", [0.5], seed=2, targets={"accuracy": 0.6})])


def spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


@pytest.mark.parametrize(("processor", "second"), [("cpu", 1.0), ("cuda", 2.0)])
def test_comparison_numbers(processor: str, second: float) -> None:
    curves = [[0.2, 0.5, 0.61, 0.6], [0.2, 0.3, 0.55, 0.4], [0.2, 0.3, 0.4, 0.45]]
    runs = [line("fop", curve, seed=seed, processor=processor) for seed, curve in enumerate(curves, start=1)]
    # Reached the target, and diverged afterwards: counts as diverged alone.
    runs.append(line("fop", [0.9, 0.95], seed=4, diverged=True, processor=processor))
    (row,) = by_name(comparison_table(studies(runs)[0]), "optimizer").values()
    assert row[:5] == ["100", "FOP", "lr=0.1", "4", "1"]
    # 0.5 is reached at epochs 2 and 3; the loss 2 - 0.7 never.
    assert row[5:11] == ["2 of 4", spread([2, 3], 1), spread([2 * second, 3 * second], 2), "0 of 4", "–", "–"]
    assert row[11] == spread([60, 40, 45], 2)
    assert row[12] == spread([61, 55, 45], 2)
    assert row[13] == spread([1.4, 1.6, 1.55], 4)


def test_ratios_only_where_both_reached_with_every_seed() -> None:
    runs = [line("fop", [0.1] * n + [0.5], seed=n) for n in (1, 3)]
    runs += [line("sgd", [0.1] * n + [0.5], seed=n) for n in (5, 7)]
    runs += [line("kfac", curve, seed=n) for n, curve in ((1, [0.5]), (3, [0.1]))]
    table = ratio_table(studies(runs)[0])
    assert table is not None
    found = by_name(table, "target", "against")
    # 7 epochs over 3; each has a standard deviation of √2.
    error = 7 / 3 * np.sqrt((np.sqrt(2) / 7) ** 2 + (np.sqrt(2) / 3) ** 2)
    assert found["accuracy ≥ 50 %", "SGD"][3:] == [f"2.33 ± {error:.2f}"] * 2
    assert found["accuracy ≥ 50 %", "K-FAC"][3] == "– (reached: FOP 2 of 2, it 1 of 2)"
    assert found["loss ≤ 1.3", "SGD"][3] == "– (reached: FOP 0 of 2, it 0 of 2)"
    assert ratio_table(studies(runs[2:])[0]) is None


def test_tuning_shows_every_run_and_the_choice() -> None:
    tuned = [
        line("fop", [0.2, a], phase="tuning", seed=0, options={"lr": lr})
        for lr, a in ((0.1, 0.4), (0.3, 0.6))
    ]
    lost = line("fop", [], phase="tuning", seed=0, options={"lr": 1.0}, diverged=True)
    study = studies([*tuned, lost, line("fop", [0.2, 0.5], options={"lr": 0.3})])[0]
    found = by_name(tuning_table(study), "options")
    assert found["lr=0.1",][4:] == ["30.00", "40.00", "no", ""]
    assert found["lr=0.3",][4:] == ["40.00", "60.00", "no", "chosen"]
    assert found["lr=1",][4:] == ["–", "–", "yes", ""]
    assert unfair(study) == []
    wrong = studies([*tuned, lost, line("fop", [0.2, 0.5], options={"lr": 0.1})])[0]
    assert unfair(wrong) == ["NOT THE BEST OF ITS TUNING: the final runs of FOP at batch 100 have lr=0.1."]


def test_what_is_unequal_is_said() -> None:
    even = noisy_runs()
    assert unfair(studies(even)[0]) == []
    less = [r for r in even if (r["contender"], r["phase"], r["options"]["lr"]) != ("sgd", "tuning", 0.1)]
    tuning = [each for each in unfair(studies(less)[0]) if each.startswith("UNEQUAL TUNING")]
    assert tuning[0] == "UNEQUAL TUNING: tuning runs at batch 100: SGD 1, AdamW 2, K-FAC 2, FOP 2."
    fewer = [r for r in even if (r["contender"], r["seed"], r["batch_size"]) != ("fop", 3, 400)]
    assert unfair(studies(fewer)[0]) == [
        "UNEQUAL SEEDS: seeds of the final runs at batch 400: SGD 1/2/3, AdamW 1/2/3, K-FAC 1/2/3, FOP 1/2."
    ]
    longer = [*even, line("lamb", [0.5] * 9, targets=even[0]["targets"])]
    assert any(each.startswith("UNEQUAL EPOCHS: epochs at batch 100") for each in unfair(studies(longer)[0]))
    elsewhere = [line("fop", [0.5]), line("fop", [0.5], seed=2, device="Another", threads=4)]
    said = " ".join(unfair(studies(elsewhere)[0]))
    assert "SEVERAL DEVICES: A processor, Another" in said
    assert "SEVERAL THREADS" in said


def test_target_is_reached_at_equality() -> None:
    run = line("fop", [0.4, 0.5, 0.6])
    for target, epoch in ((Target("accuracy", 0.5), 2), (Target("train_loss", 1.5), 2)):
        hit = target.first(run)
        assert hit is not None
        assert hit["epoch"] == epoch
    assert Target("accuracy", 0.61).first(run) is None


# --- words -----------------------------------------------------------------------------------------


def test_pooled_spread_decides() -> None:
    one, two = [1.0, 2.0, 4.0], [3.0, 5.0]
    pooled = np.sqrt((np.var(one, ddof=1) * 2 + np.var(two, ddof=1)) / 3)
    a, b = statistic(one), statistic(two)
    assert a is not None
    assert b is not None
    assert pooled_std(a, b) == pytest.approx(pooled)
    assert compare(a, Statistic(a.mean + 0.99 * pooled, b.std, 2), low=True) == "within the spread of"
    assert compare(a, Statistic(a.mean + 1.01 * pooled, b.std, 2), low=True) == "ahead of"
    assert compare(a, Statistic(a.mean + 1.01 * pooled, b.std, 2), low=False) == "behind"
    assert compare(a, Statistic(9.0, None, 1), low=True) is None
    assert compare(None, b, low=True) is None


def test_words() -> None:
    ends = {"fop": (3, 4), "kfac": (3, 5), "sgd": (9, 10)}
    runs = [
        line(name, [0.1] * (n - 1) + [0.5], seed=seed)
        for name, numbers in ends.items()
        for seed, n in enumerate(numbers, start=1)
    ]
    runs += [line("adamw", [0.1] * 2 + [end], seed=seed) for seed, end in ((1, 0.5), (2, 0.4))]
    text = "\n".join(in_words(studies(runs)[0]))
    assert "- accuracy ≥ 50 %: fewest epochs FOP (3.5 ± 0.7); fewest seconds FOP (3.50 ± 0.71)." in text
    assert "In epochs FOP is ahead of SGD; within the spread of K-FAC." in text
    assert "Reached by fewer than all runs: AdamW 1 of 2." in text
    assert "- loss ≤ 1.3: no optimizer reached it with every one of at least two seeds." in text
    assert "FOP 0 of 2, SGD 0 of 2" in text
    single = "\n".join(in_words(studies([run for run in runs if run["seed"] == 1])[0]))
    claims = re.findall("ahead of|fewest|highest", single.partition("Batch")[2])
    assert claims == []
    assert "In epochs FOP is not compared (fewer than two runs) with SGD, AdamW and K-FAC." in single
    assert "Reached by fewer than all runs: FOP 0 of 1, SGD 0 of 1, AdamW 0 of 1, K-FAC 0 of 1." in single


# --- maps ------------------------------------------------------------------------------------------


def test_map() -> None:
    with_clip, without = maps(studies(map_runs())[0], 100)
    assert (with_clip.title, without.title) == ("with KL clip", "without KL clip")
    cells = {damping: cell for (_, damping), cell in with_clip.cells.items()}
    assert cells[1e-3].difference() == pytest.approx(10.0)
    assert cells[1e-3].loss_ratio() == pytest.approx(np.log2(1.49 / 1.39))
    assert cells[1e-5].difference() is None
    assert cells[1e-5].lost == "K-FAC 1 of 2"
    found = by_name(map_table(with_clip), "damping")
    error = 100 * np.sqrt(2 * np.var([0.6, 0.62], ddof=1) / 2)
    assert found["0.001",][5] == f"+10.00 ± {error:.2f}"
    assert found["0.0001",][5].startswith("-1.00 ± ")
    assert found["1e-05",][3:6] == ["40.00 (1 of 2 diverged)", "50.00", "–"]
    assert map_sentence(with_clip) == (
        "With KL clip: of 3 points 2 can be compared; FOP ends higher than K-FAC by more than the spread "
        "(pooled standard deviation over the seeds) in 1, K-FAC higher than FOP in 0, within it in 1. "
        "Points with a diverged run: 1 of K-FAC, 0 of FOP."
    )


def test_a_map_of_single_runs_claims_nothing() -> None:
    grid = maps(studies([run for run in map_runs() if run["seed"] == 1])[0], 100)[0]
    assert "with single runs, which say nothing of the spread, in 2, lower in 1, equal in 0" in map_sentence(
        grid
    )
    assert "by more than" not in map_sentence(grid)


def test_a_map_without_damping_is_an_error() -> None:
    with pytest.raises(ValueError, match="'damping' in its options"):
        maps(studies([line("fop", [0.5], study="map")])[0], 100)


# --- the paper -------------------------------------------------------------------------------------


def test_paper_numbers_give_what_is_derived_from_them() -> None:
    def per_epoch(recipe: str, contender: str, column: int) -> float:
        table = PAPER_TABLES[recipe]
        value = table.values[contender][table.columns.index(column)]
        assert isinstance(value, tuple)
        return value[1] / value[0]

    cifar, imagenet = "cifar10-resnet18", "imagenet1k-resnet50"
    derived = [(cifar, "kfac", 2048, 1.24), (cifar, "fop", 2048, 1.28), (cifar, "fop", 4096, 1.32)]
    for recipe, name, batch, ratio in [*derived, (imagenet, "fop", 1024, 1.15)]:
        assert round(per_epoch(recipe, name, batch) / per_epoch(recipe, "sgd", batch), 2) == ratio
    for table in PAPER_TABLES.values():
        assert {len(values) for values in table.values.values()} == {len(table.columns)}


def test_paper_page_without_a_record() -> None:
    page = paper_page([])
    cells = re.findall(r"paper ([^|]*) · not run yet", page)
    assert len(cells) == sum(len(v) for table in PAPER_TABLES.values() for v in table.values.values())
    assert cells.count("–") == 10 + 3 + 12
    assert "ours" not in page.partition("## Table 1")[2]


def test_ours_stands_beside_the_paper(tmp_path: Path) -> None:
    # The recipe's own target is another; the cell is about the paper's.
    vit = {"recipe": "imagenet100-t2tvit", "batch_size": 1024, "processor": "cuda"}
    runs = [line("fop", [0.6] * n + [0.81, 0.8], seed=n, **vit) for n in (88, 98)]
    runs += [line("kfac", [0.6, end], seed=seed, **vit) for seed, end in ((1, 0.81), (2, 0.7))]
    runs += [line("adamw", [0.6], **vit), line("adamw", [], seed=2, diverged=True, **vit)]
    runs += [line("fop", [0.9], study="ablation", **{**vit, "batch_size": 512})]
    tail = {"recipe": "cifar-lt-resnet32", "task": "CIFAR-100-LT 50"}
    runs += [line("sgd", [0.3, end], seed=seed, **tail) for seed, end in ((1, 0.44), (2, 0.46))]
    write(tmp_path / "runs.jsonl", runs)
    page = paper_page([tmp_path])
    times = [2 * 89 / 60, 2 * 99 / 60]
    assert f"paper 41 / 67.3 · ours {spread([89, 99], 1)} / {spread(times, 1)} (n=2)" in page
    assert "paper 49 / 76.7 · ours 2.0 / 0.1 (reached by 1 of 2)" in page
    assert "paper – · ours not reached (0 of 2, 1 diverged)" in page
    assert "paper 44 / 158.9 · not run yet" in page
    assert f"paper 56.22 · ours {spread([56, 54], 2)} (n=2)" in page


# --- plots and the whole ---------------------------------------------------------------------------


def test_styles_tell_contenders_apart() -> None:
    names = ["fop", "kfac", *(f"variant-{number}" for number in range(7))]
    assert len(set(styles(names).values())) == len(names)
    assert len({color for color, _ in STYLES.values()}) == len(STYLES) == 8


def test_speed_up_is_over_sgd_unless_it_fails() -> None:
    runs = noisy_runs()
    reference = speed_up_reference(studies(runs)[0])
    assert reference is not None
    assert (reference.contender, reference.batch_size) == ("kfac", 100)  # SGD does not reach the loss
    for run in runs:
        run["targets"] = {"accuracy": 0.5}
    reference = speed_up_reference(studies(runs)[0])
    assert reference is not None
    assert reference.contender == "sgd"
    assert speed_up_reference(studies([run for run in runs if run["batch_size"] == 100])[0]) is None


def test_layers_of_the_outer_batch_sizes_and_the_first_seed() -> None:
    found = layered_runs(studies(noisy_runs()[::-1])[0])
    assert [(run["batch_size"], run["seed"]) for run in found] == [(100, 1), (400, 1)]


def test_whole_report(tmp_path: Path) -> None:
    runs = noisy_runs()
    runs[0]["warnings"] = ["a | b\nc"]
    write(tmp_path / "comparison.jsonl", runs)
    write(tmp_path / "map.jsonl", map_runs())
    path = write_report(tmp_path)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    assert f"{len(runs) + 12 * 2} runs, 2 diverged. Data: images on the hub" in text
    assert "fop-bench run small" in text
    assert "Tuning runs: 2 for every optimizer at every batch size." in text
    assert "UNEQUAL" not in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 4
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    # Every table is one: as many cells in a row as in its head.
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    again = {picture: (tmp_path / picture).read_bytes() for picture in pictures}
    assert write_report(tmp_path).read_text() == text
    assert again == {picture: (tmp_path / picture).read_bytes() for picture in pictures}
