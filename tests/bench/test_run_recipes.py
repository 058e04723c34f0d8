"""The recipes as they stand, and that what the documents show of records is made from these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fop import FOP
from fop_bench import study_report
from fop_bench.cli import main
from fop_bench.images import Source
from fop_bench.optimizers import BUILDERS
from fop_bench.paper import PAPER_TABLES, paper_page
from fop_bench.recipes import RECIPES, recipe
from fop_bench.recipes.cifar10_small import RECIPE as SMALL
from fop_bench.recipes.digits import DigitsTask
from fop_bench.recipes.recipe import ImageTask

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "records" / "cifar10-small"


@pytest.mark.parametrize("name", RECIPES)
def test_contenders_of_a_study_have_grids_of_one_size(name: str) -> None:
    for study in RECIPES[name].studies.values():
        assert len({len(list(each.combinations())) for each in study.contenders.values()}) == 1
        assert 0 not in study.seeds, "the tuning seed is no final one"
        assert all(each.optimizer in BUILDERS for each in study.contenders.values())


def test_the_paper_has_a_recipe_for_every_table() -> None:
    assert set(PAPER_TABLES) <= set(RECIPES)


def test_batch_sizes_and_targets_are_the_papers() -> None:
    assert list(RECIPES["cifar10-resnet18"].studies["comparison"].epochs) == [
        2048, 4096, 8192, 16384, 32768, 50000,
    ]  # fmt: skip
    assert list(RECIPES["imagenet100-t2tvit"].studies["comparison"].epochs) == [512, 1024, 2048, 4096]
    assert list(RECIPES["imagenet1k-resnet50"].studies["comparison"].epochs) == [1024, 2048, 4096, 8192]
    targets = {name: each.targets.get("accuracy") for name, each in RECIPES.items() if name in PAPER_TABLES}
    assert targets == {
        "cifar10-resnet18": 0.91,
        "imagenet100-t2tvit": 0.806,
        "imagenet1k-resnet50": 0.759,
        "cifar-lt-resnet32": None,
    }


@pytest.mark.parametrize("optimizer", sorted(BUILDERS))
def test_every_optimizer_steps_the_small_network(optimizer: str) -> None:
    torch.manual_seed(0)
    model = SMALL.model(10)
    before = [p.detach().clone() for p in model.parameters()]
    stepper = BUILDERS[optimizer][1](model, 0.01)
    for _ in range(2):
        stepper.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8))
        loss.backward()
        stepper.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_muon_leaves_the_last_layer_and_vectors_to_adamw() -> None:
    model = SMALL.model(10)
    groups = BUILDERS["muon"][1](model, 0.02, adamw_lr=0.003).param_groups
    names = {p: name for name, p in model.named_parameters()}
    hidden, others = ({names[p] for p in group["params"]} for group in groups)
    assert hidden == {name for name, p in model.named_parameters() if p.ndim == 4}
    assert others == set(names.values()) - hidden
    assert [group["lr"] for group in groups] == [0.02, 0.003]


def test_options_of_the_ablation_are_what_they_say() -> None:
    ablation = SMALL.studies["ablation"].contenders
    assert ablation["mixing-0.1"].options(2000)["beta"] == 0.1
    assert ablation["beta-only"].options(2000)["eta"] == 1.0
    assert ablation["kfac-noclip"].options(2000)["kl_clip"] is None
    assert {each.halves for each in ablation.values()} == {"random", "fixed", "classes"}
    for each in ablation.values():
        assert each.options(2000)["curvature_interval"] == 5
    assert SMALL.studies["formula"].contenders["fresher"].options(2000)["curvature_interval"] == 1
    assert SMALL.studies["formula"].contenders["staler"].options(2000)["curvature_interval"] == 25


def test_without_a_mixed_in_direction_eta_is_one_so_that_eta_alone_is_kfac() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = FOP(model, lr=0.1, beta=0.0)
    torch.nn.functional.cross_entropy(model(torch.randn(12, 4)), torch.arange(12) % 3).backward()
    optimizer.step()
    assert [layer.eta for layer in optimizer.diagnostics().layers.values()] == [1.0, 1.0]


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'mnist'; known are digits, cifar10-small, "):
        recipe("mnist")
    told = CliRunner().invoke(main, ["run", "mnist"])
    assert told.exit_code == 1
    assert "unknown recipe 'mnist'; known are digits" in told.output


def test_digits_come_without_data() -> None:
    with pytest.raises(ValueError, match="--data is /tmp; the digits come with scikit-learn"):
        DigitsTask().load("/tmp")
    shares = [DigitsTask().load(None, rank, 2) for rank in range(2)]
    assert sum(len(share.train) for share in shares) == 1024
    assert shares[0].train.pixels.max() == 240


def test_final_runs_train_on_what_tuning_holds_out_without_a_copy(tmp_path: Path) -> None:
    counts = {"ant": 10, "bee": 20, "cow": 1}
    for part in ("train", "test"):
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for at in range(count):
                image = Image.new("RGB", (32, 32), (len(name), at, counts[name]))
                image.save(tmp_path / part / name / f"{at:02}.png")
    parts = ImageTask(Source("owner/name"), held_out=0.1).load(str(tmp_path))
    seen = {
        key: [
            (int(label), int(pixel))
            for label, pixel in zip(each.labels, each.pixels[:, 0, 0, 1], strict=True)
        ]
        for key, each in (
            ("train", parts.training(final=False)),
            ("held out", parts.judging(final=False)),
            ("final", parts.training(final=True)),
        )
    }
    # The last tenth of every class, and nothing of a class that has one image.
    assert seen["held out"] == [(0, 9), (1, 18), (1, 19)]
    assert seen["train"] == [(0, n) for n in range(9)] + [(1, n) for n in range(18)] + [(2, 0)]
    assert seen["final"] == seen["train"] + seen["held out"]
    assert parts.train.pixels.data_ptr() == parts.training(final=True).pixels.data_ptr()
    assert len(parts.judging(final=True)) == 31
    shares = [ImageTask(Source("owner/name")).load(str(tmp_path), rank, 2) for rank in range(2)]
    assert sum(len(share.training(final=True)) for share in shares) == 31


# --- What is shown is what was measured ---------------------------------------------------------------


def test_the_committed_report_is_made_from_the_committed_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in RECORD.glob("*.jsonl"):
        (tmp_path / file.name).symlink_to(file)
    for name in [each for each in vars(study_report) if each.startswith("plot_")]:
        monkeypatch.setattr(study_report, name, lambda *ignored: True)
    written = study_report.write_report(tmp_path).read_text(encoding="utf-8")
    assert written == (RECORD / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\(([^)]+\.png)\)", written)
    assert pictures
    assert {file.name for file in RECORD.glob("*.png")} == set(pictures)


def test_the_papers_tables_are_made_from_the_committed_lines() -> None:
    shown = (ROOT / "docs" / "paper-tables.md").read_text(encoding="utf-8")
    assert shown == paper_page([RECORD])


def test_the_committed_runs_are_complete_and_of_one_commit() -> None:
    runs: list[dict[str, Any]] = study_report.read_runs(RECORD)
    assert len({run["environment"]["git"]["commit"] for run in runs}) == 1
    assert not any(run["environment"]["git"]["dirty"] for run in runs)
    comparison = [run for run in runs if run["study"] == "comparison" and run["phase"] == "final"]
    cells = {(run["contender"], run["batch_size"], run["seed"]) for run in comparison}
    assert len(cells) == len(comparison) == 4 * 4 * 3


def ends(study: str) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Mean final training loss and accuracy of a study's final runs, in float64, by contender and place."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for line in (RECORD / f"{study}.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if run["phase"] == "final":
            place = (run["options"]["lr"], run["options"]["damping"]) if "map" in study else ()
            last = run["curve"][-1]
            key = (run["contender"], run["batch_size"], *place)
            groups.setdefault(key, []).append((last["train_loss"], last["accuracy"]))
    return {
        key: (fmean(loss for loss, _ in each), fmean(accuracy for _, accuracy in each))
        for key, each in groups.items()
    }


def test_the_boundary_is_where_the_documents_say() -> None:
    with_clip, unstable = [], []
    for study in ("map", "map-full-batch"):
        of = ends(study)
        for name, *place in of:
            if name == "fop":
                with_clip.append(of[("fop", *place)][0] / of[("kfac", *place)][0])
            if name == "fop-noclip" and study == "map-full-batch" and place[1] >= 0.3:
                unstable.append(of[("fop-noclip", *place)][0] / of[("kfac-noclip", *place)][0])
                for each in ("fop", "kfac"):
                    assert of[(each, *place)][1] > of[(f"{each}-noclip", *place)][1] + 0.1
    assert len(with_clip) == 40
    assert min(with_clip) > 1
    assert max(with_clip) < 1.04
    assert len(unstable) == 10
    assert min(unstable) >= 0.885
    assert max(unstable) < 0.985


def test_what_the_documents_say_of_the_comparison_and_its_variants() -> None:
    comparison = ends("comparison")
    losses = {name: comparison[name, 10000][0] for name in ("sgd", "adamw", "kfac", "fop")}
    accuracies = {name: comparison[name, 10000][1] for name in losses}
    assert max(losses["kfac"], losses["fop"]) < 0.75 * min(losses["sgd"], losses["adamw"])
    gap = fmean([accuracies["kfac"], accuracies["fop"]]) - fmean([accuracies["sgd"], accuracies["adamw"]])
    assert round(100 * gap) == 5
    assert max(("sgd", "adamw", "kfac", "fop"), key=lambda name: comparison[name, 500][1]) == "sgd"
    assert comparison["fop", 5000][1] > comparison["kfac", 5000][1]
    assert comparison["fop", 10000][1] < comparison["kfac", 10000][1]
    library = ends("library")
    for name in ("soap", "muon"):
        loss, accuracy = library[name, 10000]
        assert max(losses["kfac"], losses["fop"]) < loss < min(losses["sgd"], losses["adamw"])
        assert (
            max(accuracies["sgd"], accuracies["adamw"])
            < accuracy
            < min(accuracies["kfac"], accuracies["fop"])
        )
    assert library["lamb", 10000][1] < min(accuracies.values())
    ablation = ends("ablation")
    for batch in (2000, 10000):
        assert ablation["beta-only", batch][1] > ablation["fop", batch][1]
        for name in ("mixing-0.1", "mixing-0.01"):
            assert abs(ablation[name, batch][1] - ablation["kfac", batch][1]) < 0.006
        assert abs(ablation["halves-fixed", batch][1] - ablation["fop", batch][1]) < 0.007
    assert ablation["halves-classes", 10000][1] < ablation["fop", 10000][1] - 0.01
    formula = ends("formula")
    assert abs(formula["damped", 2000][1] - formula["fop", 2000][1]) < 0.001
    assert formula["fresher", 2000][0] < formula["fop", 2000][0]
