"""Statistics from rows drawn at random: unbiased for every kind of layer, and the optimizer's own draws."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fop import FOP
from internals import FactorSums, Layer, LayerOptions, PackedLayer, RowSampler, describe, sampling
from reference.cases import Conv1D

DRAWS = 1000
REDUCE = {"weight_sharing": "reduce"}
IMAGES, ROWS, LINES = (5, 4, 7, 6), (6, 5, 4), (5, 4, 11)


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(sampling, "MIN_ROWS", 3)


KINDS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "linear": (nn.Linear(4, 3), ROWS, {}),
    "linear samples": (nn.Linear(4, 3), (40, 4), {}),
    "linear no bias": (nn.Linear(4, 3, bias=False), ROWS, {}),
    "linear reduce": (nn.Linear(4, 3), (20, 3, 4), REDUCE),
    "linear diagonal": (nn.Linear(4, 3), ROWS, {"max_factor_dim": 3}),
    "linear blocks": (nn.Linear(4, 3), ROWS, {"block_dim": 2}),
    "transformers conv1d": (Conv1D(3, 4), ROWS, {}),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2, dilation=2), LINES, {}),
    "conv2d": (nn.Conv2d(4, 3, 3), IMAGES, {}),
    "conv2d stride padding": (nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 2)), IMAGES, {}),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), IMAGES, {}),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2), IMAGES, {}),
    "conv2d one side padded": (nn.Conv2d(4, 3, 3, padding=(0, 1)), IMAGES, {}),
    "conv2d same": (nn.Conv2d(4, 3, (2, 4), padding="same"), IMAGES, {}),
    "conv2d reflect": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGES, {}),
    "conv2d replicate": (nn.Conv2d(4, 3, 3, padding=2, padding_mode="replicate"), IMAGES, {}),
    "conv2d circular": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGES, {}),
    "conv2d reduce": (nn.Conv2d(4, 3, 3), (20, 4, 4, 4), REDUCE),
    "conv2d many samples": (nn.Conv2d(4, 3, 3), (60, 4, 4, 4), {}),
    "conv2d blocks": (nn.Conv2d(4, 3, 3), IMAGES, {"block_dim": 15}),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)), (4, 2, 3, 4, 4), {}),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), LINES, {}),
    "transposed 2d": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), IMAGES, {}),
    "transposed 2d dilation": (nn.ConvTranspose2d(4, 3, 2, dilation=2, padding=1), IMAGES, {}),
    "embedding": (nn.Embedding(7, 3), (12, 5), {}),
    "embedding padding": (nn.Embedding(7, 3, padding_idx=1), (12, 5), {}),
}  # fmt: skip

Estimator = Callable[[RowSampler | None], FactorSums]


def layer_of(module: nn.Module, options: dict[str, Any]) -> Layer:
    described = describe(module, LayerOptions())
    assert isinstance(described, list)
    return described[0].build(getattr(module, "bias", None) is not None, LayerOptions(**options))


def estimator(name: str) -> Estimator:
    """The sums of a layer over a batch that is given; in patches of images the place matters."""
    if name.startswith("attention"):
        first, count = (0, 3) if name == "attention self" else (1, 2)
        x, b = torch.randn(6, 5, 4), torch.randn(6, 5, 4 * count)
        packed = PackedLayer(4, bias=True, options=LayerOptions(), first=first, count=count)
        return lambda sampler: packed.factor_sums(x.double(), b.double(), sampler)
    module, shape, options = KINDS[name]
    if isinstance(module, nn.Embedding):
        x = torch.randint(7, shape)
    else:
        x = torch.randn(shape, dtype=torch.float64).cumsum(-1)
    module = module.double()
    b = torch.randn_like(module(x)).cumsum(-1)
    layer = layer_of(module, options)
    return lambda sampler: layer.factor_sums(x, b, sampler)


def bias_of(draw: Callable[[int], FactorSums], exact: FactorSums) -> list[float]:
    """How many standard errors the mean of the estimates of A and of G is away from the exact sums."""
    found = []
    for side in ("a", "g"):
        right = getattr(exact, side)
        drawn = torch.stack([getattr(draw(i), side) for i in range(DRAWS)])
        error = (drawn.var(0).sum() / DRAWS).sqrt()
        difference = (drawn.mean(0) - right).norm()
        found.append(float(difference / error) if error > 0 else float(difference / right.norm() * 1e10))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, "attention self", "attention other"])
def test_sampled_sums_are_unbiased(name: str) -> None:
    """Within three standard errors; N and the number of rows are those of the whole batch."""
    estimate = estimator(name)
    exact = estimate(None)
    sampler = RowSampler(1, name, torch.device("cpu"))
    assert max(bias_of(lambda _: estimate(sampler), exact)) < 3
    once = estimate(sampler)
    assert once.samples == exact.samples
    assert torch.equal(torch.as_tensor(once.rows), torch.as_tensor(exact.rows))
    # Rows were left out.
    assert (once.g - exact.g).norm() > 1e-3 * exact.g.norm()


def test_a_sampler_that_prefers_a_corner_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stride over positions does, which sees one column of every image."""

    def corner(self: RowSampler, rows: int, dim: int, share: float = 1.0) -> Tensor:
        return torch.randint(5, (12,)) * (rows // 5)

    monkeypatch.setattr(RowSampler, "draw", corner)
    estimate = estimator("conv2d")
    layer = RowSampler(1, "", torch.device("cpu"))
    assert min(bias_of(lambda _: estimate(layer), estimate(None))) > 3


@pytest.mark.parametrize(("rows", "wanted"), [(100, 7), (101, 100), (2**40, 5), (7, 3)])
def test_every_row_is_equally_likely_and_draws_are_spread(rows: int, wanted: int) -> None:
    sampler = RowSampler(wanted, "", torch.device("cpu"))
    for _ in range(200):
        drawn = sampler.draw(rows, 1)
        assert drawn is not None and len(drawn) == wanted
        # One from each stretch of equal length.
        assert torch.equal((drawn.double() + 0.5) // (rows / wanted), torch.arange(wanted).double()) or (
            rows % wanted and ((drawn.diff() >= 0).all() and drawn[0] >= 0 and drawn[-1] < rows)
        )
    if rows < 1000:
        many = torch.stack([sampler.draw(rows, 1) for _ in range(4000)])
        counts = torch.bincount(many.flatten(), minlength=rows) / 4000
        # Binomial at most: five standard errors.
        share = wanted / rows
        assert (counts - share).abs().max() < 5 * (share / 4000) ** 0.5


def test_few_rows_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = RowSampler(2, "", torch.device("cpu"))
    assert sampler.draw(20, 10) is None and sampler.draw(3, 1) is None
    assert sampler.draw(21, 10) is not None
    monkeypatch.setattr(sampling, "MIN_ROWS", 50)
    assert sampler.draw(50, 10) is None


# --- in the optimizer ------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 4)).double()


def train(model: nn.Module, optimizer: FOP, steps: range, passes: int = 1) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for _ in range(passes):
            x = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=generator)
            y = torch.randint(4, (8,), generator=generator)
            (cross_entropy(model(x), y) / passes).backward()
        optimizer.step()


def factors(optimizer: FOP) -> list[Tensor]:
    return [state[key] for state in optimizer.state.values() for key in ("A", "G") if key in state]


def test_training_draws_rows_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    found = {}
    for rows in (1, 2, None):
        model = network()
        torch.set_rng_state(before)
        optimizer = FOP(model, statistics_rows=rows, curvature_interval=1)
        train(model, optimizer, range(2))
        assert torch.equal(torch.get_rng_state(), before)
        found[rows] = factors(optimizer)
    for one, two, exact in zip(*found.values(), strict=True):
        errors = [float((each - exact).norm() / exact.norm()) for each in (one, two)]
        assert 0 < errors[0] < 1 and errors[1] < 1
    assert any(not torch.equal(one, two) for one, two in zip(found[1], found[2], strict=True))


def test_draws_go_on_after_a_resume_and_differ_between_steps_and_passes() -> None:
    model = network()
    optimizer = FOP(model, statistics_rows=1, curvature_interval=1)
    train(model, optimizer, range(3), passes=2)
    saved, weights = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, range(3, 6), passes=2)

    again = network()
    again.load_state_dict(weights)
    resumed = FOP(again, statistics_rows=1, curvature_interval=1)
    resumed.load_state_dict(saved)
    train(again, resumed, range(3, 6), passes=2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)

    keys = [("0", step, rank) for step in (0, 1) for rank in (0, 1)]
    samplers = [RowSampler(1, f"{name} {step} {rank}", torch.device("cpu")) for name, step, rank in keys]
    draws = [sampler.draw(10**9, 4) for sampler in samplers for _ in range(2)]
    assert len({tuple(drawn.tolist()) for drawn in draws if drawn is not None}) == 8


def test_a_gradient_that_is_not_finite_enters_no_average_though_no_row_shows_it() -> None:
    """A NaN in one position of one image: the rows that were drawn may all be finite."""
    model = network()
    optimizer = FOP(model, statistics_rows=1, curvature_interval=1)
    train(model, optimizer, range(1))
    before = [each.clone() for each in factors(optimizer)]
    x, y = torch.randn(8, 2, 5, 5, dtype=torch.float64), torch.randint(4, (8,))
    optimizer.zero_grad()
    hidden = model[0](x)
    place = tuple(torch.tensor(index) for index in (3, 1, 4, 2))
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    hidden.register_hook(lambda b: b.index_put(place, nan))
    cross_entropy(model[1:](hidden), y).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    # The layer after it has finite gradients.
    for one, other in zip(factors(optimizer)[:2], before[:2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [0, -3, 1.5, True, "all"])
def test_statistics_rows_are_checked(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"statistics_rows=.* 1 or more, or None for all"):
        FOP(network(), statistics_rows=bad)
