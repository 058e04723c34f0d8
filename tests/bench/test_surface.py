"""The loss surface: steps and losses of a quadratic against the equations, and the command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from command import Told, invoke
from fop import FOP
from fop_bench.plots import ARROWS, plot_surface
from fop_bench.surface import (
    PARTS,
    STEPS,
    Point,
    axes,
    filter_normalised,
    picture_of,
    single_step,
    surface_table,
)
from reference.equations import correct, dense_damped_fisher, dense_fisher, split, unvec, vec

ROOT = Path(__file__).parents[2]
OPTIONS = {"step_length": "paper", "lr": 0.1, "damping": 1e-2, "momentum": 0.9}


def squares(outputs: Tensor, targets: Tensor, **how: str) -> Tensor:
    return mse_loss(outputs, targets, **how).sum(-1)


def point_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Point:
    """A few steps with momentum, weights and curvature not new any more."""
    optimizer = FOP(model, **OPTIONS)
    for _ in range(4):
        optimizer.zero_grad()
        squares(model(inputs), targets, reduction="none").mean().backward()
        optimizer.step()
    return Point(model, optimizer.state_dict(), OPTIONS, inputs, targets, squares)


@pytest.fixture(scope="module")
def quadratic() -> Point:
    """One linear layer and squared errors, in float64: the loss is a quadratic of the weight (3, 4)."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(16, 4).double(), torch.randn(16, 3).double()
    return point_of(nn.Linear(4, 3, bias=False).double(), inputs, targets)


def exact_loss(point: Point, step: Tensor) -> dict[str, float]:
    """The losses of the whole batch and of its halves once the weight has moved."""
    weight = next(point.model.parameters()).detach() + step.view(3, 4)
    rests = (point.inputs @ weight.T - point.targets).square().sum(1)
    parts = [list(range(16)), *split(16)]
    return {name: float(rests[part].mean()) for name, part in zip(PARTS, parts, strict=True)}


def exact_steps(point: Point) -> dict[str, Tensor]:
    """The paper's steps, from the factors that the optimizer had and gradients written out."""
    weight = next(point.model.parameters()).detach()
    A, G = (point.state["state"][0][key] for key in ("A", "G"))
    F, F_hat = dense_fisher(A, G), dense_damped_fisher(A, G, OPTIONS["damping"])
    gradients = []
    for part in split(16):
        rests = point.inputs[part] @ weight.T - point.targets[part]
        gradients.append(vec((2 * rests.T @ point.inputs[part] / len(part))[None]))
    g1, g2 = gradients
    kfac = {"first": g1, "second": g2, "average": (g1 + g2) / 2}
    steps = {name: torch.linalg.solve(F_hat, g) for name, g in kfac.items()}
    steps["fop"] = correct(F, F_hat, (g1 + g2) / 2, g1 - g2, "adaptive", "adaptive").direction
    steps["fop_rows"] = steps["fop"]  # samples do not mind each other
    return {name: -OPTIONS["lr"] * unvec(step, weight[None]).reshape(-1) for name, step in steps.items()}


@pytest.mark.parametrize("name", STEPS)
def test_steps_from_a_point_are_the_equations(quadratic: Point, name: str) -> None:
    exact = exact_steps(quadratic)
    found = single_step(quadratic, name)[0]
    torch.testing.assert_close(found, exact[name], rtol=1e-9, atol=1e-12)
    others = [each for key, each in exact.items() if not torch.equal(each, exact[name])]
    assert all(float((found - other).norm()) > 1e-3 * float(found.norm()) for other in others)


def test_losses_around_a_point_are_those_of_the_quadratic(quadratic: Point) -> None:
    before = {key: value.clone() for key, value in quadratic.model.state_dict().items()}
    picture, exact = picture_of(quadratic, 5), exact_steps(quadratic)
    assert all(torch.equal(value, before[key]) for key, value in quadratic.model.state_dict().items())

    def close(step: Tensor) -> object:
        return pytest.approx(exact_loss(quadratic, step), rel=1e-5)

    assert picture["origin"] == close(torch.zeros(12))
    # Every filter of a direction gets the length of the weight's; the second axis is across the first.
    lengths = next(quadratic.model.parameters()).detach().norm(dim=1, keepdim=True)
    u, v = (each.view(3, 4) for each in (exact["average"], exact["first"] - exact["second"]))
    u, v = ((each / each.norm(dim=1, keepdim=True) * lengths).reshape(-1) for each in (u, v))
    v = v - (u @ v) / (u @ u) * u
    v = v * u.norm() / v.norm()
    for name, step in exact.items():
        shown = picture["steps"][name]
        plane = torch.stack([u, v], dim=1)
        place = torch.linalg.lstsq(plane, step[:, None]).solution.flatten()
        assert [shown["x"], shown["y"]] == pytest.approx(place.tolist(), rel=1e-6)
        assert shown["share_in_plane"] == pytest.approx(float((plane @ place).norm() / step.norm()))
        assert shown["losses_at_end"] == close(step)
        assert picture["x"][0] < shown["x"] < picture["x"][-1]
        assert picture["y"][0] < shown["y"] < picture["y"][-1]
    assert picture["x"][-1] - picture["x"][0] == pytest.approx(picture["y"][-1] - picture["y"][0])
    for row, y in enumerate(picture["y"]):
        for column, x in enumerate(picture["x"]):
            here = {part: picture["losses"][part][row][column] for part in PARTS}
            assert here == close(x * u + y * v)


def test_a_dead_filter_stays_and_parallel_steps_span_no_plane() -> None:
    weights, direction = [torch.ones(2, 2), torch.full((3,), 2.0)], torch.tensor([0.0, 0, 3, 4, 1, 0, 0])
    scaled = filter_normalised(direction.double(), weights)
    assert scaled.tolist() == pytest.approx([0, 0, 0.6 * 2**0.5, 0.8 * 2**0.5, 12**0.5, 0, 0])
    with pytest.raises(ValueError, match="span no plane"):
        axes(weights, direction.double(), 2 * direction.double())


def network(norm: bool) -> nn.Module:
    middle = [nn.BatchNorm2d(4), nn.ReLU()] if norm else [nn.Tanh()]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.mark.parametrize("norm", [True, False])
def test_the_two_pairs_of_fop_differ_by_batch_norm_alone(norm: bool) -> None:
    torch.manual_seed(0)
    point = point_of(network(norm).double(), torch.randn(24, 3, 6, 6).double(), torch.randn(24, 3).double())
    (losses, _), (rows, optimizer) = (single_step(point, name) for name in ("fop", "fop_rows"))
    assert (float((losses - rows).norm()) < 1e-6 * float(rows.norm())) is not norm
    # Neither curvature nor what AdamW takes has moved.
    for key, entries in optimizer.state_dict()["state"].items():
        for factor in {"A", "G", "A_inv", "G_inv"} & {*entries}:
            assert torch.equal(entries[factor], point.state["state"][key][factor])
    of_norm = rows[4 * 27 + 4 :][:8]
    assert not of_norm.any() if norm else of_norm.any()


# --- The command


def invoked(tmp_path: Path, *arguments: str) -> Told:
    fixed = ["--batch", "512", "--epochs", "1", "--grid", "3", "--device", "cpu", "--out"]
    return invoke("surface", "digits", *fixed, str(tmp_path / "out"), *arguments)


@pytest.mark.slow
def test_command_writes_a_record_and_draws_the_same_picture_from_it(tmp_path: Path) -> None:
    told = invoked(tmp_path, "--seed", "5")
    assert told.exit_code == 0, told.output
    assert "after FOP on the pair" in told.output
    path = tmp_path / "out" / "surface.json"
    record, picture = json.loads(path.read_text()), path.with_suffix(".png").read_bytes()
    given = {"recipe": "digits", "batch_size": 512, "epochs": 1, "points": 3, "seed": 5, "lr": 0.1}
    assert given.items() <= record.items()
    assert record["environment"]["command"] and len(record["curve"]) == 1
    assert all(np.array(record["losses"][part]).shape == (3, 3) for part in PARTS)
    path.with_suffix(".png").unlink()
    assert invoke("surface", str(path)).exit_code == 0
    assert path.with_suffix(".png").read_bytes() == picture
    for other in ("{}", "[]"):
        path.write_text(other)
        assert "surface.json is no record of fop-bench surface" in invoke("surface", str(path)).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "7"), "batch size 7 has no halves"),
        (("--batch", "5000"), "batch size 5000 is larger than the 1024 training images"),
        (("--grid", "1"), "--grid 1 is no plane; give 2 or more"),
        (("--lr", "1e30"), "--lr"),
    ],
)
def test_errors_say_what_is_allowed(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    told = invoked(tmp_path, *arguments)
    assert told.exit_code == 1 and words in told.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lr-0.1", "lr-0.3"])
def test_records_of_earlier_versions_are_drawn(name: str, tmp_path: Path) -> None:
    record = json.loads((ROOT / "records" / "surface" / f"{name}.json").read_text())
    assert record["steps"].keys() == STEPS.keys() == ARROWS.keys()
    plot_surface(record, tmp_path / "new.png")
    assert Image.open(tmp_path / "new.png").size[0] > 1000
    assert f"| after FOP on the pair g1, g2 | {record['steps']['fop']['losses_at_end']['whole']:.4f} |" in (
        surface_table(record)
    )


def test_what_is_not_finite_is_left_out(quadratic: Point, tmp_path: Path) -> None:
    words = {"title": "t", "batch_size": 16, "epochs": 1, "lr": 0.1, "damping": 1e-3, "seed": 1}
    picture = picture_of(quadratic, 3) | words
    picture["losses"]["whole"][0][0] = picture["steps"]["first"]["losses_at_end"]["whole"] = None
    plot_surface(picture, tmp_path / "s.png")
    assert "| not finite |" in surface_table(picture)
    picture["losses"]["whole"] = [[None] * 3] * 3
    with pytest.raises(ValueError, match="not finite anywhere"):
        plot_surface(picture, tmp_path / "s.png")
    broken = Point(nn.Linear(4, 3), {}, {}, torch.full((2, 4), math.inf), torch.zeros(2, 3), squares)
    assert not any(loss.isfinite() for loss in broken.losses(broken.model).values())
