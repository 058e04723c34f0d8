"""Reading lines of `fop-bench run`, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from fop_bench.records import of_one_commit, read_runs
from fop_bench.study_report import write_report
from study_records import ONE, OTHER, line, write


@pytest.mark.parametrize("broken", ['{"recipe": ', '{"recipe": NaN}', '{"label": "\udcc3'])
@pytest.mark.parametrize("rest", ["", "\n{}\n"])
def test_a_broken_line_is_an_error(tmp_path: Path, broken: str, rest: str) -> None:
    content = json.dumps(line("fop", [0.5])) + "\n" + broken + rest
    (tmp_path / "a.jsonl").write_text(content, errors="surrogateescape")  # cut inside a character
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is .*delete that line"):
        read_runs(tmp_path)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    run = line("fop", [0.5])
    del run["seed"], run["targets"]
    with pytest.raises(ValueError, match="line 1 has no seed, targets"):
        read_runs(write(tmp_path / "a.jsonl", [run]))
    run = line("fop", [0.5])
    del run["environment"]["git"]
    with pytest.raises(ValueError, match=r"no environment\.git"):
        read_runs(write(tmp_path / "a.jsonl", [run]))
    with pytest.raises(ValueError, match=r"no environment\.device"):
        read_runs(write(tmp_path / "a.jsonl", [run | {"environment": None}]))


@pytest.mark.parametrize("text", ["5", "null", "[]", '"recipe"'])
def test_a_line_that_is_no_record_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"line 1 has no recipe, title.*no line of this version"):
        read_runs(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    for act in (read_runs, write_report):
        with pytest.raises(ValueError, match=rf"no runs in {tmp_path}; make some with fop-bench run"):
            act(tmp_path)


def test_commits_are_not_mixed(tmp_path: Path) -> None:
    old = [line("fop", [0.5, 0.6], seed=seed) for seed in (1, 2)]
    new = [line("fop", [0.5, 0.6], git={"commit": OTHER, "dirty": True})]
    alone = [line("fop", [0.5], study="elsewhere", git=None)]
    several = rf"small, task images, study comparison .*{ONE} \(2\), {OTHER} \(1\)"
    with pytest.raises(ValueError, match=several):
        of_one_commit(old + new + alone)
    write(tmp_path / "comparison.jsonl", new + alone)
    text = write_report(tmp_path).read_text()
    assert f"`{OTHER}` **with uncommitted changes**" in text
    assert "in no checkout" in text


def test_the_same_run_twice_is_an_error() -> None:
    run = line("fop", [0.5])
    with pytest.raises(ValueError, match=r"there more than once.*contender fop.*seed 1"):
        of_one_commit([run, copy.deepcopy(run)])
    assert len(of_one_commit([run, {**run, "contender": "kfac"}, {**run, "seed": 2}])) == 3
