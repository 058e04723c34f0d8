"""Every line of "What follows" in the paper's facts, on random Kronecker blocks and through the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from fop import FOP, KFAC
from fop.algebra import (
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
# The optimizer's examples build and train models, so fewer of them.
brief = settings(derandomize=True, deadline=None, max_examples=15, database=None)

SCALES = [1e-8, 1e-3, 0.5, 3.0, 1e8]


# --- random blocks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A block with its dense counterparts' ingredients, and two gradients; all (groups, ., .), float64."""

    block: KroneckerBlock
    damping: float
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
        return Problem(self.block, self.damping, g1, g2)


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
    torch.manual_seed(draw(st.integers(0, 2**16)))
    A, G = random_psd(groups, in_, rank_A, scale_A), random_psd(groups, out, rank_G, scale_G)
    shift_A, shift_G = damping_split(A, G, damping)
    eye_A, eye_G = torch.eye(in_, dtype=torch.float64), torch.eye(out, dtype=torch.float64)
    block = KroneckerBlock(
        A,
        G,
        # Not by damped_inverses: a fault there must not hide in both sides of a comparison.
        torch.linalg.inv(A + shift_A[:, None, None] * eye_A),
        torch.linalg.inv(G + shift_G[:, None, None] * eye_G),
    )
    g = torch.randn(groups, out, in_, dtype=torch.float64)
    g1 = g + noise * torch.randn_like(g)
    g2 = g + noise * torch.randn_like(g)
    return Problem(block, damping, g1, g2)


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
    A, G = problem.block.A, problem.block.G
    Ga, Gd = average_and_difference(problem.g1, problem.g2)
    expected = reference.correct(
        reference.dense_fisher(A, G),
        reference.dense_damped_fisher(A, G, problem.damping),
        reference.vec(Ga),
        reference.vec(Gd),
        beta,
        eta,
    )
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


# --- the same through the optimizer ----------------------------------------------------------------

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 2, bias=False)
    )


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "conv": (convolutional, (2, 3, 3)),
}
# No KL clip: it is no part of the equations, and not homogeneous in the loss.
OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 1e-2, "kl_clip": None, "momentum": 0.9}


def batches(model: str, samples: int, count: int, seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    build, shape = MODELS[model]
    out = build().double()(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    return [
        (
            torch.randn(samples, *shape, dtype=torch.float64),
            torch.randn(samples, out, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def trained(
    model: str, data: list[Batch], make: Callable[..., FOP] = FOP, loss_scale: float = 1.0, **options: Any
) -> tuple[list[Tensor], FOP]:
    """Weights after a step on each batch, from always the same start."""
    torch.manual_seed(7)
    net = MODELS[model][0]().double()
    optimizer = make(net, **{**OPTIONS, **options})
    for x, y in data:
        optimizer.zero_grad()
        (loss_scale * reference.half_squared_error(net(x), y)).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], optimizer


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of any entry."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def swap_halves(batch: Batch) -> Batch:
    x, y = batch
    half = len(x) // 2
    return torch.cat([x[half:], x[:half]]), torch.cat([y[half:], y[:half]])


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 6), st.integers(0, 1000))
def test_optimizer_swapping_the_halves_of_a_batch(model: str, half: int, seed: int) -> None:
    data = batches(model, 2 * half, 3, seed)
    one, _ = trained(model, data)
    other, _ = trained(model, [swap_halves(batch) for batch in data])
    assert distance(one, other) <= 1e-12


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 6), st.integers(0, 1000))
def test_optimizer_shuffling_within_the_halves(model: str, half: int, seed: int) -> None:
    data = batches(model, 2 * half, 2, seed)
    order = torch.cat([torch.randperm(half), half + torch.randperm(half)])
    one, _ = trained(model, data)
    other, _ = trained(model, [(x[order], y[order]) for x, y in data])
    assert distance(one, other) <= 1e-12
    # What the two tests above cannot see: that the halves matter at all.
    crossed = torch.arange(2 * half).reshape(2, half).T.flatten()
    crossed_weights, _ = trained(model, [(x[crossed], y[crossed]) for x, y in data])
    assert distance(one, crossed_weights) > 1e-6


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 6), st.integers(0, 1000))
def test_optimizer_equal_halves_are_kfac(model: str, half: int, seed: int) -> None:
    data = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in batches(model, half, 3, seed)]
    one, optimizer = trained(model, data)
    other, _ = trained(model, data, KFAC)
    assert distance(one, other) <= 1e-12
    assert {layer.rho for layer in optimizer.diagnostics().layers.values()} == {0.0}


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 1000))
def test_optimizer_one_sample_is_kfac_bit_for_bit(model: str, seed: int) -> None:
    data = batches(model, 1, 3, seed)
    one, _ = trained(model, data)
    other, _ = trained(model, data, KFAC)
    assert distance(one, other) == 0


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 9), st.integers(0, 1000))
def test_optimizer_diagnostics_obey_the_bounds(model: str, samples: int, seed: int) -> None:
    _, optimizer = trained(model, batches(model, samples, 3, seed))
    layers = optimizer.diagnostics().layers
    assert len(layers) == 2
    for layer in layers.values():
        assert 0 < layer.rho <= 1 + 1e-12
        assert layer.eta == pytest.approx((1 + layer.rho) / (1 + 3 * layer.rho), rel=1e-9)
        assert 0.5 - 1e-12 <= layer.eta < 1


@brief
@given(st.sampled_from(sorted(MODELS)), st.integers(2, 9), st.sampled_from(SCALES), st.integers(0, 1000))
def test_optimizer_scaling_the_loss(model: str, samples: int, c: float, seed: int) -> None:
    """Loss times c: gradients grow by c and G by c², so damping times c² must divide the step by c."""
    data = batches(model, samples, 1, seed)
    start, _ = trained(model, [])
    one, _ = trained(model, data)
    scaled, _ = trained(model, data, loss_scale=c, damping=OPTIONS["damping"] * c * c, lr=OPTIONS["lr"] * c)
    for w0, w1, w2 in zip(start, one, scaled, strict=True):
        # A weight after the step has digits relative to itself, not to the update.
        assert (w2 - w1).norm() <= 1e-10 * ((w1 - w0).norm() + w0.norm())
        assert (w1 - w0).norm() > 1e-4 * w0.norm()
