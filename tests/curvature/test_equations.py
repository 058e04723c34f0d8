"""What follows from the paper's equations, on random blocks and through the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from fop import FOP, KFAC
from internals import (
    Curvature,
    DiagonalBlock,
    Direction,
    KroneckerBlock,
    damping_split,
    fop_direction,
    kfac_direction,
    mean_eigenvalue,
)
from models import weights
from reference import joined, split

# Derandomized: a run today and a run tomorrow see the same examples. They are small: nothing to shrink.
thorough = settings(derandomize=True, deadline=None, max_examples=40, database=None, phases=[Phase.generate])
# Few, as they build and train models.
brief = settings(thorough, max_examples=10)
SCALES = [1e-8, 1e-3, 0.5, 3.0, 1e8]


# --- random blocks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A block, F and F̂ as matrices for `reference.vec`, and two gradients (groups, ., .); all float64."""

    block: Curvature
    F: Tensor
    F_hat: Tensor
    g1: Tensor
    g2: Tensor

    @property
    def average(self) -> Tensor:
        return (self.g1 + self.g2) / 2

    def direction(self, g1: Tensor | None = None, g2: Tensor | None = None, **options: Any) -> Direction:
        """Of the problem's gradients, or of others on its block."""
        g1, g2 = (own if g is None else g for g, own in ((g1, self.g1), (g2, self.g2)))
        return fop_direction(self.block, (g1 + g2) / 2, g1 - g2, **options)

    def kfac(self, average: Tensor | None = None, **options: Any) -> Direction:
        return kfac_direction(self.block, self.average if average is None else average, **options)


def random_psd(groups: int, size: int, rank: int, scale: float) -> Tensor:
    X = torch.randn(groups, size, rank, dtype=torch.float64)
    return scale * (X @ X.mT) / rank


@st.composite
def problems(draw: st.DrawFn, *, smallest: int = 1) -> Problem:
    """Blocks of full and of low rank, well and badly scaled, with noise from far below to far above Ga."""
    groups, out, in_ = (draw(st.integers(smallest, top)) for top in (3, 5, 6))
    rank_A, rank_G = draw(st.integers(1, 2 * in_)), draw(st.integers(1, 2 * out))
    scale_A, scale_G = 10.0 ** draw(st.integers(-4, 4)), 10.0 ** draw(st.integers(-6, 2))
    # Relative to F, so that cond(F̂) stays below about 1e7 and float64 keeps nine digits.
    damping = scale_A * scale_G * 10.0 ** draw(st.integers(-6, 1))
    noise = 10.0 ** draw(st.integers(-3, 3))
    # Factors that are kept as their diagonals, and the Fisher of single elements as norms have it.
    form = draw(st.sampled_from(["dense", "A", "G", "AG", "elements"]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    A, G = random_psd(groups, in_, rank_A, scale_A), random_psd(groups, out, rank_G, scale_G)
    if form == "elements":
        F = scale_A * scale_G * torch.randn(groups, out, in_, dtype=torch.float64).square()
        F_hat = F + damping
        block: Curvature = DiagonalBlock(F, 1 / F_hat)
        dense = [reference.vec(each).diag() for each in (F, F_hat)]
    else:
        A = A.diagonal(dim1=1, dim2=2) if form in ("A", "AG") else A
        G = G.diagonal(dim1=1, dim2=2) if form in ("G", "AG") else G
        block = KroneckerBlock(A, G, *inverses(A, G, damping))
        A, G = reference.full(A), reference.full(G)
        dense = [reference.dense_fisher(A, G), reference.dense_damped_fisher(A, G, damping)]
    g = torch.randn(groups, out, in_, dtype=torch.float64)
    return Problem(block, *dense, *(g + noise * torch.randn_like(g) for _ in range(2)))


def inverses(A: Tensor, G: Tensor, damping: float) -> Iterator[Tensor]:
    """Not by damped_inverses: a fault there must not hide in both sides of a comparison."""
    for factor, shift in zip(
        (A, G), damping_split(mean_eigenvalue(A), mean_eigenvalue(G), damping), strict=True
    ):
        if factor.dim() == 2:
            yield 1 / (factor + shift[:, None])
        else:
            yield torch.linalg.inv(factor + shift[:, None, None] * torch.eye(factor.shape[-1]).double())


def inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum()


def close(value: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> bool:
    """Norm-wise: one small entry of a vector may carry the rounding of the large ones."""
    expected = torch.as_tensor(expected, dtype=value.dtype)
    return bool((value - expected).norm() <= tolerance * torch.maximum(value.norm(), expected.norm()))


def same(one: Direction, other: Direction) -> bool:
    """Update and scalars bit for bit, but for ρ and β, which may name a zero differently."""
    return torch.equal(one.update, other.update) and torch.equal(one.alignment, other.alignment)


# --- one block -------------------------------------------------------------------------------------


@thorough
@given(
    problems(smallest=2),
    st.sampled_from(["adaptive", 0.0, 0.1, 2.0, 10.0]),
    st.sampled_from(["adaptive", 1.0, 0.5, 0.01]),
)
def test_direction_equals_the_dense_oracle(problem: Problem, beta: Any, eta: Any) -> None:
    """ρ tells about the gradients, whatever coefficients are used."""
    vectors = (reference.vec(each) for each in (problem.average, problem.g1 - problem.g2))
    expected = reference.correct(problem.F, problem.F_hat, *vectors, beta, eta)
    fixed = {key: value for key, value in (("beta", beta), ("eta", eta)) if value != "adaptive"}
    d = problem.direction(**fixed)
    assert close(d.update, reference.unvec(expected.direction, like=d.update), 1e-7)
    for key in ("beta", "eta", "rho"):
        assert close(getattr(d, key), getattr(expected, key), 1e-7)
    assert all(getattr(d, key) == value for key, value in fixed.items())


@thorough
@given(problems(), st.sampled_from([None, 0.0, 0.1, 5.0]), st.sampled_from([None, 1.0, 0.3]))
def test_scalars_follow_from_each_other(problem: Problem, beta: float | None, eta: float | None) -> None:
    d, mixed = problem.direction(), problem.direction(beta=beta, eta=eta)
    assert -1e-12 <= d.rho <= 1 + 1e-12
    assert close(d.eta, (1 + d.rho) / (1 + 3 * d.rho))
    assert 0.5 - 1e-12 <= d.eta <= 1 + 1e-12
    product = inner(mixed.update, problem.average)
    assert (mixed.alignment - product).abs() <= 1e-9 * mixed.update.norm() * problem.average.norm()


@thorough
@given(problems())
def test_beta_is_a_projection(problem: Problem) -> None:
    """Ga - β*·G⊥ is at a right angle to G⊥ in the metric of F̂⁻¹, and G⊥ to Ga in that of F."""
    Ga, Gd = problem.average, problem.g1 - problem.g2
    F_Ga = problem.block.fisher(Ga)
    s = inner(Gd, F_Ga) / inner(Ga, F_Ga)
    perp = Gd - s * Ga
    assert inner(Ga, problem.block.fisher(perp)).abs() <= 1e-11 * F_Ga.norm() * (perp.norm() + Gd.norm())
    d, solved = problem.direction(), problem.block.solve(perp)
    bound = solved.norm() * (Ga.norm() + d.beta.abs() * perp.norm())
    assert inner(Ga - d.beta * perp, solved).abs() <= 1e-9 * bound


@thorough
@given(problems())
def test_swapping_the_gradients_changes_nothing(problem: Problem) -> None:
    d, swapped = problem.direction(), problem.direction(problem.g2, problem.g1)
    # Only signs change: Gd, s and with them G⊥, D and β* turn round, which is exact.
    assert same(d, swapped)
    for key, sign in (("beta", -1), ("eta", 1), ("rho", 1)):
        assert torch.equal(getattr(d, key), sign * getattr(swapped, key))


@thorough
@given(problems(), st.sampled_from([-3.0, -0.5, 0.0, 1 / 3, 0.7, 10.0]), st.sampled_from([None, 0.1, 2.0]))
def test_a_multiple_of_the_other_gradient_gives_the_kfac_step(
    problem: Problem, factor: float, beta: float | None
) -> None:
    """Gd - s·Ga is pure rounding here, which must not be taken for a direction."""
    for second in (factor * problem.g1, problem.g1.clone()):
        d = problem.direction(problem.g1, second, beta=beta)
        assert same(d, problem.kfac((problem.g1 + second) / 2))
        assert (d.eta, d.rho) == (1, 0)
    for difference in (0 * problem.average, problem.average, -2 * problem.average):
        d = fop_direction(problem.block, problem.average, difference)
        assert torch.equal(d.update, problem.kfac().update)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [-1.7, 1 / 3, 0.7])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_multiple_outside_the_range_of_the_curvature_gives_the_kfac_step(
    rank: int, factor: float, dtype: torch.dtype
) -> None:
    """Where F·Ga is nearly at a right angle to Ga, s carries far more rounding than its terms show."""
    size = 64
    torch.manual_seed(0)
    X = torch.randn(1, size, rank, dtype=dtype)
    A, G = X @ X.mT / size, torch.eye(size, dtype=dtype)[None]
    A_inv = torch.linalg.inv(A + 1e-2 * torch.eye(size, dtype=dtype))
    block = KroneckerBlock(A, G, A_inv, G)
    g1 = torch.randn(1, size, size, dtype=dtype)
    span = torch.linalg.qr(X[0])[0]
    g1 -= 0.999 * (g1 @ span) @ span.mT
    Ga, Gd = (g1 + factor * g1) / 2, g1 - factor * g1
    assert close(fop_direction(block, Ga, Gd).update, block.solve(Ga), 64 * torch.finfo(dtype).eps)


@thorough
@given(problems())
def test_opposite_gradients_do_not_move(problem: Problem) -> None:
    """Ga = 0: every ratio is 0/0, and the K-FAC step is 0."""
    d = problem.direction(problem.g1, -problem.g1)
    assert torch.equal(d.update, torch.zeros_like(d.update))
    assert all(torch.isfinite(scalar) for scalar in (d.alignment, d.beta, d.eta, d.rho))


@thorough
@given(problems(), st.sampled_from(SCALES))
def test_scaling_the_gradients_scales_the_update(problem: Problem, c: float) -> None:
    d, scaled = problem.direction(), problem.direction(c * problem.g1, c * problem.g2)
    assert close(scaled.update, c * d.update)
    assert close(scaled.alignment, c * c * d.alignment)
    assert close(scaled.eta, d.eta)
    assert (scaled.rho - d.rho).abs() <= 1e-9
    # Nothing may compare with a constant: then a power of two passes through every operation unrounded.
    c = 2.0 ** torch.tensor(c).log2().round().item()
    scaled = problem.direction(c * problem.g1, c * problem.g2)
    assert torch.equal(scaled.update, c * d.update)
    assert (scaled.beta, scaled.rho) == (d.beta, d.rho)


@thorough
@given(problems(), st.sampled_from([0.1, 0.5, 3.0]))
def test_kfac(problem: Problem, eta: float) -> None:
    """Also what FOP is with β = 0; a fixed η stays."""
    plain, scaled = problem.kfac(), problem.kfac(eta=eta)
    assert close(plain.update, problem.block.solve(problem.average), 0.0)
    assert close(scaled.update, eta * plain.update)
    assert close(scaled.alignment, inner(scaled.update, problem.average))
    assert (plain.eta, plain.beta, scaled.eta) == (1, 0, eta)
    assert same(problem.direction(beta=0.0, eta=1.0), plain)
    assert same(problem.direction(beta=0.0), plain)


@pytest.mark.parametrize("broken", ["average", "difference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_passed_on(broken: str, value: float) -> None:
    """The optimizer refuses a step by the alignment; halves that overflow can leave their sum finite."""
    torch.manual_seed(0)
    eye = torch.eye(3, dtype=torch.float64)[None]
    given = {name: torch.randn(1, 3, 3, dtype=torch.float64) for name in ("average", "difference")}
    given[broken][0, 1, 2] = value
    d = fop_direction(KroneckerBlock(eye, eye, eye, eye), given["average"], given["difference"])
    assert not torch.isfinite(d.alignment)


# --- through the optimizer ---------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]
MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), 3),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2, bias=False)
        ),
        (2, 3, 3),
        2,
    ),
}
# No KL clip: it is no part of the equations, and not homogeneous in the loss.
OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.1,
    "damping": 1e-2,
    "kl_clip": None,
    "momentum": 0.9,
}
drawn = given(st.sampled_from(sorted(MODELS)), st.integers(2, 6), st.integers(0, 1000))


def batches(model: str, samples: int, count: int, seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    shapes = (MODELS[model][1], (MODELS[model][2],))
    return [tuple(torch.randn(samples, *shape).double() for shape in shapes) for _ in range(count)]  # type: ignore[misc]


def trained(
    model: str, data: list[Batch], make: type[FOP] = FOP, loss_scale: float = 1.0, **options: Any
) -> tuple[dict[str, Tensor], FOP]:
    """Weights after a step on each batch, from always the same start."""
    torch.manual_seed(7)
    net = MODELS[model][0]().double()
    optimizer = make(net, **{**OPTIONS, **options})
    for x, y in data:
        optimizer.zero_grad()
        (loss_scale * reference.half_squared_error(net(x), y)).backward()
        optimizer.step()
    return weights(net), optimizer


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of any entry."""
    return max((one[name] - other[name]).abs().max().item() for name in one)


@brief
@drawn
def test_order_of_the_samples(model: str, half: int, seed: int) -> None:
    """Sub-batches swapped or shuffled within: the same run. Mixed across: another one."""
    data = batches(model, 2 * half, 3, seed)
    first, second = map(torch.tensor, split(2 * half))
    swapped = joined(second, first)
    shuffled = joined(first[torch.randperm(half)], second[torch.randperm(half)])
    crossed = joined(*torch.cat([first, second]).view(half, 2).T)
    plain, optimizer = trained(model, data)
    for order, is_same in ((swapped, True), (shuffled, True), (crossed, False)):
        other, _ = trained(model, [(x[order], y[order]) for x, y in data])
        assert distance(plain, other) <= 1e-12 if is_same else distance(plain, other) > 1e-6
    layers = optimizer.diagnostics().layers
    assert len(layers) == 2
    for layer in layers.values():
        assert 0 < layer.rho <= 1 + 1e-12
        assert layer.eta == pytest.approx((1 + layer.rho) / (1 + 3 * layer.rho), rel=1e-9)
        assert 0.5 - 1e-12 <= layer.eta < 1


@brief
@drawn
def test_equal_halves_and_single_samples_are_kfac(model: str, half: int, seed: int) -> None:
    data = [(joined(x, x), joined(y, y)) for x, y in batches(model, half, 3, seed)]
    (one, optimizer), (other, _) = trained(model, data), trained(model, data, KFAC)
    assert distance(one, other) <= 1e-12
    assert {layer.rho for layer in optimizer.diagnostics().layers.values()} == {0.0}
    data = batches(model, 1, 3, seed)
    assert distance(trained(model, data)[0], trained(model, data, KFAC)[0]) == 0


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 9), st.sampled_from(SCALES), st.integers(0, 1000))
def test_scaling_the_loss(model: str, samples: int, c: float, seed: int) -> None:
    """Loss times c: gradients grow by c and G by c², so damping times c² must divide the step by c."""
    data = batches(model, samples, 1, seed)
    (start, _), (one, _) = trained(model, []), trained(model, data)
    scaled, _ = trained(model, data, loss_scale=c, damping=OPTIONS["damping"] * c * c, lr=OPTIONS["lr"] * c)
    for name, w0 in start.items():
        # A weight after the step has digits relative to itself, not to the update.
        assert (scaled[name] - one[name]).norm() <= 1e-10 * ((one[name] - w0).norm() + w0.norm())
        assert (one[name] - w0).norm() > 1e-4 * w0.norm()
