"""The loss surface: geometry against numpy, steps against what they must be, and the command end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

import command
from fop import FOP
from fop_bench import surface as module
from fop_bench.images import Source
from fop_bench.plots import ARROWS, plot_surface
from fop_bench.recipes import RECIPES, Contender, ImageTask, Recipe, Study
from fop_bench.surface import PARTS, STEPS, FixedBatch, Plane, Point, picture_of, single_step

SIZE, CLASSES = 6, 3


def network(classes=CLASSES, norm=True, bias=0.0):
    middle = (
        [nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)] if norm else [nn.Tanh(), nn.Flatten()]
    )
    head = nn.Linear(4 * SIZE * SIZE, classes)
    nn.init.constant_(head.bias, bias)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, head)


def without_batch_norm():
    return network(norm=False)


def point_of(build):
    torch.manual_seed(0)
    model = build()
    paper = {"step_length": "paper", "lr": 0.05, "damping": 1e-2}
    options = {**paper, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = FOP(model, **options)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model(BATCH.inputs), BATCH.labels).backward()
        optimizer.step()
    return Point(model, optimizer.state_dict(), options)


def random_batch(samples=24):
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (samples,), generator=draw)
    return FixedBatch(
        torch.randn(samples, 3, SIZE, SIZE, generator=draw) + labels[:, None, None, None], labels
    )


BATCH = random_batch()


@pytest.fixture
def point():
    return point_of(network)


def steps_of(point, *names, **changes):
    return [single_step(point, BATCH, name, **changes)[0] for name in names]


def close(one, other, tolerance=1e-5):
    return float((one - other).norm()) <= tolerance * float(other.norm())


# --- geometry


def row(arrays):
    return np.concatenate([np.asarray(each, dtype=np.float64).reshape(-1) for each in arrays])


def scaled_by_numpy(direction, weight):
    """Every filter of a direction at the length of the weight's; a bias is one filter."""
    if weight.ndim == 1:
        return direction / np.linalg.norm(direction) * np.linalg.norm(weight)
    lengths = [np.linalg.norm(each) for each in direction]
    return np.stack(
        [d / n * np.linalg.norm(w) if n else d for d, n, w in zip(direction, lengths, weight, strict=True)]
    )


def test_plane_of_filter_normalised_directions_and_least_squares():
    draw = np.random.default_rng(0)
    weights = [draw.normal(size=shape) for shape in ((4, 3, 2, 2), (4,), (5, 7))]
    along_u, along_v = ([draw.normal(size=w.shape) for w in weights] for _ in range(2))
    along_u[0][2] = 0  # a dead filter
    u, v = (
        row(scaled_by_numpy(d, w) for d, w in zip(directions, weights, strict=True))
        for directions in (along_u, along_v)
    )
    tensors = [torch.tensor(w) for w in weights]
    found = module.filter_normalised(torch.tensor(row(along_u)), tensors)
    np.testing.assert_allclose(found.numpy(), u, rtol=1e-12)
    plane = Plane(tensors, torch.tensor(row(along_u)), torch.tensor(row(along_v)))
    # The second axis lies in the plane of both, across the first, and is as long.
    v = v - (u @ v) / (u @ u) * u
    v *= np.linalg.norm(u) / np.linalg.norm(v)
    np.testing.assert_allclose(plane.u, u, rtol=1e-12)
    np.testing.assert_allclose(plane.v, v, rtol=1e-10)
    step = draw.normal(size=u.shape) + 3 * u - 2 * v
    axes = np.stack([u, v], axis=1)
    expected = np.linalg.lstsq(axes, step, rcond=None)[0]
    *found, share = plane.place(torch.tensor(step))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert share == pytest.approx(np.linalg.norm(axes @ expected) / np.linalg.norm(step))
    np.testing.assert_allclose(plane.at(*found), axes @ expected, rtol=1e-10)
    assert plane.place(plane.at(0.3, -0.2)) == pytest.approx((0.3, -0.2, 1.0))


@pytest.mark.parametrize(("one", "other"), [(1.0, 0.0), (1.0, 2.0), (0.0, 1.0)])
def test_no_plane_is_an_error(one, other):
    direction = torch.arange(1.0, 5.0).double()
    with pytest.raises(ValueError, match="span no plane"):
        Plane([torch.ones(2, 2)], one * direction, other * direction)


def test_window_is_square_and_holds_all_places_with_a_margin():
    places = [(0.0, 0.0), (3.0, 1.0), (2.0, -1.0)]
    x, y = module.grid(places, 5)
    assert len(x) == len(y) == 5
    assert x[-1] - x[0] == pytest.approx(y[-1] - y[0]) == pytest.approx(3.0 * (1 + 2 * module.MARGIN))
    assert all(x[0] < px < x[-1] and y[0] < py < y[-1] for px, py in places)


# --- steps


def test_step_of_the_whole_batch_is_the_mean_of_the_halves_steps(point):
    first, second, average = steps_of(point, "first", "second", "average")
    assert not close(first, second, 0.1)
    assert close((first + second) / 2, average)


@pytest.mark.parametrize("name", ["fop", "fop_rows"])
def test_fop_without_mixing_and_scaling_is_kfac(point, name):
    (average,) = steps_of(point, "average")
    (plain,) = steps_of(point, name, beta=0.0, eta=1.0)
    full, optimizer = single_step(point, BATCH, name)
    assert close(plain, average)
    assert not close(full, average, 1e-2)
    assert all(each.why_kfac is None and each.beta != 0 for each in optimizer.diagnostics().layers.values())


@pytest.mark.parametrize(("build", "same"), [(network, False), (without_batch_norm, True)])
def test_the_two_pairs_of_fop_differ_by_batch_norm_alone(build, same):
    assert close(*steps_of(point_of(build), "fop", "fop_rows"), 1e-3) is same


def test_fop_step_follows_from_the_steps_of_the_halves():
    """F̂⁻¹·Ga and F̂⁻¹·Gd are known from K-FAC's steps; with fixed β and η FOP's is a sum of them, a layer."""
    point = point_of(without_batch_norm)
    first, second, average = steps_of(point, "first", "second", "average")
    (fop_step,) = steps_of(point, "fop", beta=0.3, eta=0.7)
    ends = np.cumsum([0] + [sum(p.numel() for p in point.model[at].parameters()) for at in (0, 3)])
    for of in map(slice, ends[:-1], ends[1:]):
        axes = np.stack([average[of], (first - second)[of]], axis=1)
        (along, across), rest, *_ = np.linalg.lstsq(axes, fop_step[of].numpy(), rcond=None)
        assert across == pytest.approx(0.7 * 0.3, rel=1e-3)
        assert along != pytest.approx(0.7, rel=1e-3)  # less s·β·η
        assert math.sqrt(rest[0]) < 1e-4 * float(fop_step[of].norm())


@pytest.mark.parametrize("name", STEPS)
def test_step_keeps_curvature_and_the_adamw_path_and_scales_with_the_rate(point, name):
    step, optimizer = single_step(point, BATCH, name)
    norm = slice(*np.cumsum([p.numel() for p in point.model.parameters()])[[1, 3]])
    assert not step[norm].any()  # BatchNorm's gain and offset
    for key, entries in optimizer.state_dict()["state"].items():
        for factor in {"A", "G", "A_inv", "G_inv"} & set(entries):
            assert torch.equal(entries[factor], point.state["state"][key][factor])
    (double,) = steps_of(point, name, lr=0.1)
    assert close(double, 2 * step)


# --- the picture


def test_picture_holds_the_losses_of_the_model_there_and_leaves_the_point_alone(point):
    before = {key: value.clone() for key, value in point.model.state_dict().items()}
    modes = [each.training for each in point.model.modules()]
    state = json.dumps(point.state, default=lambda tensor: tensor.tolist())
    picture = picture_of(point, BATCH, 3)
    assert all(torch.equal(value, before[key]) for key, value in point.model.state_dict().items())
    assert [each.training for each in point.model.modules()] == modes
    assert json.dumps(point.state, default=lambda tensor: tensor.tolist()) == state

    steps = dict(zip(STEPS, steps_of(point, *STEPS), strict=True))
    weights = list(point.model.parameters())
    plane = Plane(weights, steps["average"], steps["first"] - steps["second"])

    def losses_at(vector):
        model = network()
        model.load_state_dict(before)
        model.train()[4].eval()
        nn.utils.vector_to_parameters((module.flat(weights) + vector).float(), model.parameters())
        with torch.no_grad():
            logits = model(BATCH.inputs)
        parts = (slice(None), *BATCH.halves)
        losses = [cross_entropy(logits[of], BATCH.labels[of]).item() for of in parts]
        return pytest.approx(dict(zip(PARTS, losses, strict=True)), rel=1e-4)

    assert picture["origin"] == losses_at(torch.zeros_like(plane.u))
    for name, step in steps.items():
        found = picture["steps"][name]
        assert found["losses_at_end"] == losses_at(step)
        assert picture["x"][0] < found["x"] < picture["x"][-1]
        assert picture["y"][0] < found["y"] < picture["y"][-1]
    corner = {part: picture["losses"][part][0][2] for part in PARTS}
    assert corner == losses_at(plane.at(picture["x"][2], picture["y"][0]))


def test_what_is_not_finite_is_none_and_still_drawn(point, tmp_path):
    picture = picture_of(point, BATCH, 3)
    picture["losses"]["whole"][0][0] = None
    picture["steps"]["first"]["losses_at_end"]["whole"] = None
    words = {"title": "t", "batch_size": 24, "epochs": 1, "lr": 0.1, "damping": 1e-3, "seed": 1}
    plot_surface(picture | words, tmp_path / "new" / "s.png")
    assert (tmp_path / "new" / "s.png").stat().st_size > 10_000
    picture["losses"]["whole"] = [[None] * 3] * 3
    with pytest.raises(ValueError, match="not finite anywhere"):
        plot_surface(picture | words, tmp_path / "s.png")
    with torch.no_grad():
        point.model[5].bias.fill_(math.inf)
    assert set(BATCH.parts(point.model).values()) == {None}
    assert set(ARROWS) == set(STEPS)


# --- the command

CONTENDERS = {
    "sgd": Contender("sgd", {"lr": (0.1,)}),
    "damped": Contender("fop", {}, {"momentum": 0.3}, formula="damped projection"),
    "fop": Contender("fop", {"lr": (0.1,)}, {"curvature_interval": lambda batch: batch}),
}
TINY = Recipe(
    name="tiny",
    title="Tiny images",
    tasks={"images": ImageTask(Source("nobody/none", size=SIZE), held_out=0.25)},
    model=network,
    studies={"comparison": Study(CONTENDERS, {8: 1}, seeds=(1,))},
    targets={"accuracy": 0.5},
)


def test_options_are_those_of_the_recipes_fop():
    assert module._fop_options(TINY, 8) == {"curvature_interval": 8}
    study = Study({"sgd": CONTENDERS["sgd"]}, {8: 1}, seeds=(1,))
    assert module._fop_options(replace(TINY, studies={"comparison": study}), 8) == {}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    monkeypatch.setitem(RECIPES, "diverging", replace(TINY, model=lambda n: network(n, bias=math.inf)))
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for label in range(CLASSES):
            path = tmp_path / "data" / part / f"class{label}"
            path.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(80 * label, 80 * label + 90, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{number}.png")
    return tmp_path


def invoke(folder, *arguments):
    fixed = ("--data", str(folder / "data"), "--device", "cpu", "--out", str(folder / "out"))
    return command.invoke("surface", *arguments, *fixed)


def test_command_writes_the_record_and_the_picture(folder):
    arguments = ("tiny", "--batch", "12", "--epochs", "2", "--grid", "4", "--seed", "5")
    result = invoke(folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "FOP on the pair" in result.output
    record = json.loads((folder / "out" / "surface.json").read_text())
    assert Image.open(folder / "out" / "surface.png").info["dpi"][0] == pytest.approx(150, abs=0.1)
    given = {"recipe": "tiny", "task": "images", "batch_size": 12, "epochs": 2, "points": 4, "seed": 5}
    assert given.items() <= record.items()
    assert record["train_samples"] == 24  # with the images held out for tuning
    assert record["training"]["options"] == {"curvature_interval": 12, "lr": 0.1, "damping": 1e-4}
    assert len(record["training"]["train_loss"]) == 2
    assert record["environment"]["command"]
    assert list(record["steps"]) == list(STEPS)
    assert all(np.array(record["losses"][part]).shape == (4, 4) for part in PARTS)
    # The same command, the same picture, from the record alone.
    picture = (folder / "out" / "surface.png").read_bytes()
    invoke(folder, *arguments)
    again = json.loads((folder / "out" / "surface.json").read_text())
    assert again["losses"] == record["losses"]
    plot_surface(record, folder / "again.png")
    assert (folder / "again.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), ["nonsense", "cifar10-small", "tiny"]),
        (("tiny", "--batch", "26"), ["26", "24"]),
        (("tiny", "--batch", "7"), ["7", "even"]),
        (("diverging", "--batch", "12"), ["diverged in epoch 1", "--lr", "--damping"]),
        (("tiny", "--batch", "12", "--lr", "1e30"), ["no plane", "--lr"]),  # bad updates are refused
    ],
)
def test_errors_say_what_is_allowed(folder, arguments, words):
    result = invoke(folder, *arguments)
    assert result.exit_code in (1, 2)
    assert all(word in result.output for word in words), result.output
    assert not (folder / "out").exists()


def test_missing_images_are_named(folder):
    for path in (folder / "data" / "train").rglob("*.png"):
        path.unlink()
    result = invoke(folder, "tiny", "--batch", "12")
    assert result.exit_code == 1
    assert "no images" in result.output
