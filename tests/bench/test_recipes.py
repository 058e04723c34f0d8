"""The recipes as they stand: what they compare, on which images, and where a record says it was made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from fop import FOP
from fop_bench.environment import environment, git_state
from fop_bench.images import Source
from fop_bench.optimizers import PEERS
from fop_bench.paper import PAPER_TABLES
from fop_bench.recipes import CIFAR10_SMALL as SMALL
from fop_bench.recipes import RECIPES, DigitsTask, ImageTask, recipe

# --- Who is compared


@pytest.mark.parametrize("name", RECIPES)
def test_contenders_of_a_study_have_grids_of_one_size(name: str) -> None:
    for study in RECIPES[name].studies.values():
        assert len({len(list(each.combinations())) for each in study.contenders.values()}) == 1
        assert 0 not in study.seeds, "the tuning seed is no final one"
        assert all(each.optimizer in PEERS for each in study.contenders.values())


def test_batch_sizes_and_targets_are_the_papers() -> None:
    assert set(PAPER_TABLES) <= set(RECIPES), "every table has a recipe"
    comparisons = {name: RECIPES[name].studies["comparison"] for name in PAPER_TABLES}
    assert {name: list(study.epochs) for name, study in comparisons.items()} == {
        "cifar10-resnet18": [2048, 4096, 8192, 16384, 32768, 50000],
        "cifar-lt-resnet32": [128],
    }
    assert {name: RECIPES[name].targets.get("accuracy") for name in PAPER_TABLES} == {
        "cifar10-resnet18": 0.91,
        "cifar-lt-resnet32": None,
    }
    intervals = [comparisons["cifar10-resnet18"].contenders["fop"].options(b) for b in (2048, 8192, 50000)]
    assert [each["curvature_interval"] for each in intervals] == [100, 25, 5]


def test_options_of_the_ablation_are_what_they_say() -> None:
    ablation = {name: each.options(2000) for name, each in SMALL.studies["ablation"].contenders.items()}
    assert ablation["mixing-0.1"]["beta"] == 0.1
    assert ablation["beta-only"]["eta"] == 1.0
    assert ablation["kfac-noclip"]["kl_clip"] is None
    assert {each["curvature_interval"] for each in ablation.values()} == {5}


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'mnist'; known are digits, cifar10-small, "):
        recipe("mnist")


def test_without_a_mixed_in_direction_eta_is_one_so_that_eta_alone_is_kfac() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = FOP(model, lr=0.1, beta=0.0)
    cross_entropy(model(torch.randn(12, 4)), torch.arange(12) % 3).backward()
    optimizer.step()
    assert [layer.eta for layer in optimizer.diagnostics().layers.values()] == [1.0, 1.0]


# --- Images of a task


def test_the_digits_are_scikit_learns_split_without_overlap_and_stratified() -> None:
    raw, loaded = load_digits(), DigitsTask().load(None)
    assert loaded["tuning"][0] is loaded["final"][0]
    parts = (*loaded["tuning"], loaded["final"][1])
    assert [len(part) for part in parts] == [1024, 386, 387]
    found = np.concatenate([np.column_stack([part.labels, part.pixels.flatten(1)]) for part in parts])
    expected = np.column_stack([raw.target, 15 * raw.images.reshape(-1, 64)]).tolist()
    assert sorted(found.tolist()) == sorted(expected)
    for part in parts:
        assert part.pixels.shape[1:] == (8, 8, 1)
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.abs(shares - np.bincount(raw.target) / len(raw.target)).max() < 0.005
    with pytest.raises(ValueError, match="--data is /tmp; the digits come with scikit-learn"):
        DigitsTask().load("/tmp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three classes, of which the green channel is the number."""
    counts = {"ant": 10, "bee": 20, "cow": 1}
    for part in ("train", "test"):
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for at in range(count):
                Image.new("RGB", (32, 32), (0, at, 0)).save(tmp_path / part / name / f"{at:02}.png")
    return tmp_path


def test_final_runs_train_on_what_tuning_holds_out(folder: Path) -> None:
    parts = ImageTask(Source("owner/name")).load(str(folder))
    (tuning, held), (final, test) = parts["tuning"], parts["final"]
    seen = [
        list(zip(e.labels.tolist(), e.pixels[:, 0, 0, 1].tolist(), strict=True))
        for e in (tuning, held, final)
    ]
    # The last tenth of every class, and nothing of a class that has one image.
    assert seen[1] == [(0, 9), (1, 18), (1, 19)]
    assert seen[0] == [(0, n) for n in range(9)] + [(1, n) for n in range(18)] + [(2, 0)]
    assert seen[2] == sorted(seen[0] + seen[1])
    assert len(test) == 31


# --- Where a record was made


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_dirty_flag(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("x = 1\n")
    assert git_state(source) is None, "in no checkout"
    git(tmp_path, "init", "-q")
    assert git_state(source) is None, "not tracked, so not from this checkout"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(source) == {"commit": commit, "dirty": False}
    source.write_text("x = 2\n")
    assert git_state(source) == {"commit": commit, "dirty": True}


def test_environment_says_where_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fop_bench", "demo", "--out", "a folder"])
    where = environment(torch.device("cpu"))
    assert where["command"] == "python -m fop_bench demo --out 'a folder'"
    monkeypatch.setattr(sys, "orig_argv", ["python3.11", "/opt/venv/bin/fop-bench", "run", "digits"])
    assert environment(torch.device("cpu"))["command"] == "fop-bench run digits", "as one types it"
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert where["device"]
    assert {"python", "fop", "git", "date"} <= where.keys()
