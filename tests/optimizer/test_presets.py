"""Options for a purpose: what they set, and that what is said to be measured is in the records."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from torch import nn

from contract import ours
from fop import FOP, presets
from fop_bench.race import at_best_rate, newest, read
from models import assert_equal, batch, mlp, train_step, weights

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "src/fop/presets.py").read_text(encoding="utf-8")
# Each with the text below it.
FOUND = re.findall(r'^(\w+): dict.*?^"""(.*?)"""$', SOURCE, re.MULTILINE | re.DOTALL)
PRESETS = {name: " ".join(text.split()) for name, text in FOUND}


def test_there_are_three() -> None:
    assert [*PRESETS] == ["paper", "fine_tuning", "large_batch"]


@ours
@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_with_what_it_names(library: type[FOP], name: str) -> None:
    preset: dict[str, Any] = getattr(presets, name)
    before, model = copy.deepcopy(preset), mlp()
    initial, optimizer = weights(model), library(model, **preset)
    train_step(model, optimizer, *batch())
    assert preset == before
    (group,) = optimizer.param_groups
    named = {key: value for key, value in preset.items() if key != "layer_options"}
    assert {key: group[key] for key in named} == named
    assert all(not value.equal(initial[key]) for key, value in weights(model).items())


@ours
def test_paper_is_the_preset_of_that_name(library: type[FOP]) -> None:
    first, second = (nn.Sequential(nn.Linear(600, 3)) for _ in range(2))
    one, other = library.paper(first), library(second, **presets.paper)
    assert {**one.param_groups[0], "params": 0} == {**other.param_groups[0], "params": 0}
    assert one.summary().rows[0].factors == other.summary().rows[0].factors == "(A 601², G 3²)"
    # Its option of all layers is left where another is added.
    added = library.paper(first, layer_options={"0": {"weight_sharing": "reduce"}})
    assert added.summary().rows[0].factors == "(A 601², G 3²)"
    assert [*presets.paper["layer_options"]] == [nn.Module]
    first, second = mlp(), mlp()
    train_step(first, library.paper(first), *batch())
    train_step(second, library(second, **presets.paper), *batch())
    assert_equal(weights(first), weights(second))


def rows_of(start: str, text: str) -> list[list[float]]:
    """The numbers of each row of a table that starts so."""
    return [
        [*map(float, row.split("|"))]
        for row in re.findall(rf"^\| {start} \|([\d .|]+)\|$", text, re.MULTILINE)
    ]


def test_fine_tuning_was_measured() -> None:
    text = (ROOT / "records/fine-tuning/README.md").read_text(encoding="utf-8")
    (rates, again), (images, words) = rows_of("FOP, n = 2", text), rows_of("adamw_lr=0.001", text)
    preset, (default,) = presets.fine_tuning, FOP(mlp()).param_groups
    assert default["lr"] == 10 * preset["lr"]
    at = rates.index(preset["lr"])
    assert rates == again
    assert words[at] == min(words)
    assert images[at] > max(images) - 1
    at_default = rows_of("defaults", text)[-1][rates.index(default["lr"])]
    assert f"{words[at]} nats a byte to {at_default} at {default['lr']}" in PRESETS["fine_tuning"]


def test_large_batch_was_measured() -> None:
    (default,) = FOP(mlp()).param_groups
    assert {key: default[key] for key in presets.large_batch} == presets.large_batch
    sides = newest(read(ROOT / "records/race/race.jsonl"))
    for optimizer, text in (
        (
            "fop-default",
            "{:.1f} % on CIFAR-10 at batch 5,000 in 30 steps, and {:.2f} nats a byte of a small GPT",
        ),
        ("muon", "Muon at its best rate ends at {:.1f} % and {:.2f} nats"),
    ):
        runs = [at_best_rate(sides[task, optimizer])[2] for task in ("cifar-half-5000", "gpt-1024")]
        said = text.format(*(fmean(run["value"] for run in each) for each in runs))
        assert said in PRESETS["large_batch"].replace("\n", " ")
