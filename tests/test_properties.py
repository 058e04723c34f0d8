"""Every line of "What follows" in the paper's facts, on random Kronecker blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from fop.algebra import (
    Curvature,
    DiagonalBlock,
    Direction,
    KroneckerBlock,
    average_and_difference,
    damping_split,
    fop_direction,
    inner,
    kfac_direction,
    mixing_coefficient,
    orthogonal_component,
    step_scale,
)

# Derandomized: a run today and a run tomorrow see the same examples.
thorough = settings(derandomize=True, deadline=None, max_examples=40, database=None)

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

    def direction(self, **options: Any) -> Direction:
        return fop_direction(self.block, *average_and_difference(self.g1, self.g2), **options)

    @property
    def average(self) -> Tensor:
        return average_and_difference(self.g1, self.g2)[0]

    @property
    def perpendicular(self) -> Tensor:
        Ga, Gd = average_and_difference(self.g1, self.g2)
        return orthogonal_component(Ga, Gd, self.block.fisher(Ga))

    def kfac(self, **options: Any) -> Direction:
        return kfac_direction(self.block, self.average, **options)

    def with_gradients(self, g1: Tensor, g2: Tensor) -> Problem:
        return Problem(self.block, self.F, self.F_hat, g1, g2)


def random_psd(groups: int, size: int, rank: int, scale: float) -> Tensor:
    X = torch.randn(groups, size, rank, dtype=torch.float64)
    return scale * (X @ X.mT) / rank


# Factors that are kept as their diagonals, and the Fisher of single elements as norms have it.
FORMS = ["dense", "A", "G", "both", "elements"]


@st.composite
def problems(draw: st.DrawFn, *, smallest: int = 1) -> Problem:
    """Blocks of full and of low rank, well and badly scaled, with noise from far below to far above Ga."""
    groups, out, in_ = (draw(st.integers(smallest, top)) for top in (3, 5, 6))
    rank_A, rank_G = draw(st.integers(1, 2 * in_)), draw(st.integers(1, 2 * out))
    scale_A, scale_G = 10.0 ** draw(st.integers(-4, 4)), 10.0 ** draw(st.integers(-6, 2))
    # Relative to F, so that cond(F̂) stays below about 1e7 and float64 keeps nine digits.
    damping = scale_A * scale_G * 10.0 ** draw(st.integers(-6, 1))
    noise = 10.0 ** draw(st.integers(-3, 3))
    form = draw(st.sampled_from(FORMS))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    A, G = random_psd(groups, in_, rank_A, scale_A), random_psd(groups, out, rank_G, scale_G)
    if form == "elements":
        F = scale_A * scale_G * torch.randn(groups, out, in_, dtype=torch.float64).square()
        F_hat = F + damping
        block: Curvature = DiagonalBlock(F, 1 / F_hat)
        dense = [reference.vec(each).diag() for each in (F, F_hat)]
    else:
        A = A.diagonal(dim1=1, dim2=2) if form in ("A", "both") else A
        G = G.diagonal(dim1=1, dim2=2) if form in ("G", "both") else G
        block = KroneckerBlock(A, G, *inverses(A, G, damping))
        A, G = reference.full(A), reference.full(G)
        dense = [reference.dense_fisher(A, G), reference.dense_damped_fisher(A, G, damping)]
    g = torch.randn(groups, out, in_, dtype=torch.float64)
    g1 = g + noise * torch.randn_like(g)
    g2 = g + noise * torch.randn_like(g)
    return Problem(block, *dense, g1, g2)


def inverses(A: Tensor, G: Tensor, damping: float) -> Iterator[Tensor]:
    """Not by damped_inverses: a fault there must not hide in both sides of a comparison."""
    for factor, shift in zip((A, G), damping_split(A, G, damping), strict=True):
        if factor.dim() == 2:
            yield 1 / (factor + shift[:, None])
        else:
            yield torch.linalg.inv(factor + shift[:, None, None] * torch.eye(factor.shape[-1]).double())


def close(value: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> bool:
    """Norm-wise: one small entry of a vector may carry the rounding of the large ones."""
    expected = torch.as_tensor(expected, dtype=value.dtype)
    return bool((value - expected).norm() <= tolerance * torch.maximum(value.norm(), expected.norm()))


def same(one: Direction, other: Direction) -> bool:
    """Update and scalars bit for bit, but for ρ and β, which may name a zero differently."""
    return torch.equal(one.update, other.update) and torch.equal(one.alignment, other.alignment)


# --- the lines of "What follows" -------------------------------------------------------------------


@thorough
@given(problems())
def test_rho_is_a_fraction(problem: Problem) -> None:
    rho = problem.direction().rho
    assert -1e-12 <= rho <= 1 + 1e-12


@thorough
@given(problems())
def test_eta_follows_from_rho(problem: Problem) -> None:
    d = problem.direction()
    assert close(d.eta, (1 + d.rho) / (1 + 3 * d.rho))
    assert 0.5 - 1e-12 <= d.eta <= 1 + 1e-12


@thorough
@given(problems(smallest=2))
def test_rho_is_what_the_paper_defines(problem: Problem) -> None:
    Ga, perp, block = problem.average, problem.perpendicular, problem.block
    B = inner(Ga, block.solve(Ga))
    D = inner(Ga, block.solve(perp))
    E = inner(perp, block.solve(perp))
    d = problem.direction()
    assert close(d.rho, D**2 / (E * B))
    assert close(d.beta, D / E)


@thorough
@given(problems())
def test_swapping_the_gradients_changes_nothing(problem: Problem) -> None:
    d, swapped = problem.direction(), problem.with_gradients(problem.g2, problem.g1).direction()
    # Only signs change: Gd, s and with them G⊥, D and β* turn round, which is exact.
    assert same(d, swapped)
    assert torch.equal(d.beta, -swapped.beta)
    assert torch.equal(d.eta, swapped.eta)
    assert torch.equal(d.rho, swapped.rho)


@thorough
@given(problems(), st.sampled_from([None, 0.1, 2.0]), st.sampled_from([None, 1.0]))
def test_equal_gradients_give_the_kfac_step(problem: Problem, beta: float | None, eta: float | None) -> None:
    equal = problem.with_gradients(problem.g1, problem.g1.clone())
    d = equal.direction(beta=beta, eta=eta)
    assert same(d, equal.kfac())
    assert d.eta == 1
    assert d.rho == 0


@thorough
@given(problems(), st.sampled_from([-3.0, -0.5, 0.0, 1 / 3, 0.7, 10.0]))
def test_a_multiple_of_the_other_gradient_gives_the_kfac_step(problem: Problem, factor: float) -> None:
    # Gd - s·Ga is pure rounding here, which must not be taken for a direction.
    multiple = problem.with_gradients(problem.g1, factor * problem.g1)
    d = multiple.direction()
    assert same(d, multiple.kfac())
    assert d.rho == 0


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
    Ga, Gd = average_and_difference(g1, factor * g1)
    assert close(fop_direction(block, Ga, Gd).update, block.solve(Ga), 64 * torch.finfo(dtype).eps)


@thorough
@given(problems())
def test_no_disagreement_orthogonal_to_the_average(problem: Problem) -> None:
    Ga = problem.average
    for difference in (torch.zeros_like(Ga), Ga, -2 * Ga):
        assert torch.equal(fop_direction(problem.block, Ga, difference).update, problem.kfac().update)


@thorough
@given(problems())
def test_opposite_gradients_do_not_move(problem: Problem) -> None:
    # Ga = 0: every ratio is 0/0, and the K-FAC step is 0.
    d = problem.with_gradients(problem.g1, -problem.g1).direction()
    assert torch.equal(d.update, torch.zeros_like(d.update))
    assert all(torch.isfinite(scalar) for scalar in (d.alignment, d.beta, d.eta, d.rho))


@thorough
@given(problems(), st.sampled_from(SCALES))
def test_scaling_the_gradients_scales_the_update(problem: Problem, c: float) -> None:
    d, scaled = problem.direction(), problem.with_gradients(c * problem.g1, c * problem.g2).direction()
    assert close(scaled.update, c * d.update)
    assert close(scaled.alignment, c * c * d.alignment)
    assert close(scaled.eta, d.eta)
    assert (scaled.rho - d.rho).abs() <= 1e-9


@thorough
@given(problems(), st.sampled_from(SCALES))
def test_scaling_by_a_power_of_two_is_exact(problem: Problem, c: float) -> None:
    # Nothing may compare with a constant: then a power of two passes through every operation unrounded.
    c = 2.0 ** torch.tensor(c).log2().round().item()
    d, scaled = problem.direction(), problem.with_gradients(c * problem.g1, c * problem.g2).direction()
    assert torch.equal(scaled.update, c * d.update)
    assert torch.equal(scaled.beta, d.beta)
    assert torch.equal(scaled.rho, d.rho)


@thorough
@given(problems())
def test_perpendicular_is_fisher_orthogonal_to_the_average(problem: Problem) -> None:
    Ga, Gd = average_and_difference(problem.g1, problem.g2)
    F_Ga = problem.block.fisher(Ga)
    perp = orthogonal_component(Ga, Gd, F_Ga)
    product = inner(Ga, problem.block.fisher(perp))
    assert product.abs() <= 1e-11 * F_Ga.norm() * (perp.norm() + Gd.norm())


@thorough
@given(problems())
def test_perpendicular_differs_by_a_multiple_of_the_average(problem: Problem) -> None:
    Ga, Gd = average_and_difference(problem.g1, problem.g2)
    rest = Gd - orthogonal_component(Ga, Gd, problem.block.fisher(Ga))
    # Parallel vectors meet Cauchy-Schwarz with equality.
    assert (rest - inner(rest, Ga) / inner(Ga, Ga) * Ga).norm() <= 1e-9 * (rest.norm() + Gd.norm())


@thorough
@given(problems(), st.sampled_from([None, 0.0, 0.1, 5.0]), st.sampled_from([None, 1.0, 0.3]))
def test_alignment_is_the_product_of_update_and_average(
    problem: Problem, beta: float | None, eta: float | None
) -> None:
    d = problem.direction(beta=beta, eta=eta)
    product = inner(d.update, problem.average)
    assert (d.alignment - product).abs() <= 1e-9 * d.update.norm() * problem.average.norm()


@thorough
@given(problems(), st.sampled_from([None, 0.0, 0.01, 0.1, 5.0]))
def test_eta_equals_its_printed_formula(problem: Problem, beta: float | None) -> None:
    """The closed form in B, D and E against (6), (17) and (18) with Gc written out."""
    d = problem.direction(beta=beta)
    Gc = problem.average + d.beta * problem.perpendicular
    natural = problem.block.solve(Gc)
    numerator, denominator = inner(problem.average, natural), inner(Gc, natural)
    # Near cancellation of Ga by β·G⊥ (fixed β) only digits relative to the terms are left.
    assume(denominator > 1e-6 * (inner(problem.average, problem.block.solve(problem.average))))
    assert close(d.eta, numerator / denominator, 1e-7)
    assert close(d.update, d.eta * natural, 1e-7)


@thorough
@given(
    problems(smallest=2),
    st.sampled_from(["adaptive", 0.0, 0.1, 2.0]),
    st.sampled_from(["adaptive", 1.0, 0.5]),
)
def test_direction_equals_the_dense_oracle(problem: Problem, beta: Any, eta: Any) -> None:
    Ga, Gd = average_and_difference(problem.g1, problem.g2)
    expected = reference.correct(problem.F, problem.F_hat, reference.vec(Ga), reference.vec(Gd), beta, eta)
    options = {"beta": beta, "eta": eta}
    d = problem.direction(**{k: None if v == "adaptive" else v for k, v in options.items()})
    assert close(d.update, reference.unvec(expected.direction, like=Ga), 1e-7)
    assert close(d.beta, expected.beta, 1e-7)
    assert close(d.eta, expected.eta, 1e-7)
    assert close(d.rho, expected.rho, 1e-7)


@thorough
@given(problems(smallest=2), st.floats(0, 10), st.floats(0.01, 2))
def test_fixed_coefficients_are_used_as_given(problem: Problem, beta: float, eta: float) -> None:
    d = problem.direction(beta=beta, eta=eta)
    Gc = problem.average + beta * problem.perpendicular
    assert close(d.update, eta * problem.block.solve(Gc), 1e-8)
    assert d.beta == beta
    assert d.eta == eta
    # ρ tells about the gradients, whatever coefficient is used.
    assert torch.equal(d.rho, problem.direction().rho)


@thorough
@given(problems())
def test_fixed_beta_zero_and_eta_one_are_kfac(problem: Problem) -> None:
    assert same(problem.direction(beta=0.0, eta=1.0), problem.kfac())
    assert same(problem.direction(beta=0.0), problem.kfac())


@thorough
@given(problems(), st.sampled_from([0.1, 0.5, 3.0]))
def test_kfac_takes_a_fixed_eta(problem: Problem, eta: float) -> None:
    plain, scaled = problem.kfac(), problem.kfac(eta=eta)
    assert close(plain.update, problem.block.solve(problem.average), 0.0)
    assert close(scaled.update, eta * plain.update)
    assert close(scaled.alignment, inner(scaled.update, problem.average))
    assert (plain.eta, plain.beta, scaled.eta) == (1, 0, eta)


@thorough
@given(problems())
def test_beta_is_a_projection(problem: Problem) -> None:
    """β* = D/E leaves Ga - β*·G⊥ at a right angle to G⊥ in the metric of F̂⁻¹."""
    perp = problem.perpendicular
    d = problem.direction()
    residual = problem.average - d.beta * perp
    product = inner(residual, problem.block.solve(perp))
    bound = problem.block.solve(perp).norm() * (problem.average.norm() + d.beta.abs() * perp.norm())
    assert product.abs() <= 1e-9 * bound


@pytest.mark.parametrize("broken", ["g1", "g2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_passed_on(broken: str, value: float) -> None:
    """The optimizer refuses a step by the alignment, so no guard on the way may swallow a NaN."""
    torch.manual_seed(0)
    eye = torch.eye(3, dtype=torch.float64)[None]
    gradients = {name: torch.randn(1, 3, 3, dtype=torch.float64) for name in ("g1", "g2")}
    gradients[broken][0, 1, 2] = value
    block = KroneckerBlock(eye, eye, eye, eye)
    d = fop_direction(block, *average_and_difference(gradients["g1"], gradients["g2"]))
    assert not torch.isfinite(d.alignment)


def test_a_bad_difference_alone_is_passed_on() -> None:
    # Halves that overflow can leave their sum finite.
    eye = torch.eye(3, dtype=torch.float64)[None]
    difference = torch.zeros(1, 3, 3, dtype=torch.float64)
    difference[0, 1, 2] = float("nan")
    d = fop_direction(KroneckerBlock(eye, eye, eye, eye), torch.ones_like(difference), difference)
    assert not torch.isfinite(d.alignment)


def test_average_and_difference_by_hand() -> None:
    # β* would hide a factor in Gd; a fixed β would not.
    Ga, Gd = average_and_difference(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[1.0, 5.0]]]))
    assert Ga.tolist() == [[[2.0, 3.0]]]
    assert Gd.tolist() == [[[2.0, -4.0]]]


def test_scalars_by_hand() -> None:
    B, D, E = (torch.tensor(v, dtype=torch.float64) for v in (4.0, 1.0, 0.5))
    zero = torch.zeros_like(B)
    beta = mixing_coefficient(D, E)
    assert beta == 2
    # (4 + 2·1) / (4 + 2·2·1 + 4·0.5) = 6/10; ρ = 1/2 gives (1 + ½)/(1 + 3/2) = 0.6 too.
    assert close(step_scale(B, D, E, beta), 0.6)
    assert mixing_coefficient(zero, zero) == 0
    assert step_scale(zero, zero, zero, zero) == 1
