"""Kronecker products, the damping split, damped inverses and their rescue ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from fop.algebra import (
    DiagonalBlock,
    Inversion,
    KroneckerBlock,
    Rung,
    damped_diagonal,
    damped_inverses,
    damping_split,
    kronecker_product,
    mean_eigenvalue,
)


def psd(groups: int, size: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    X = torch.randn(groups, size, rank or 2 * size, dtype=dtype)
    return X @ X.mT / X.shape[-1]


def dense_inverse(M: Tensor, shift: Tensor) -> Tensor:
    eye = torch.eye(M.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(M.double() + shift.double()[:, None, None] * eye)


def assert_close(value: Tensor, expected: Tensor, rtol: float) -> None:
    error = (value.double() - expected.double()).norm() / expected.double().norm()
    assert error <= rtol, f"relative error {error:.2e}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_kronecker_product_is_the_printed_one(groups: int) -> None:
    # Not symmetric, so that a transposed factor is seen.
    A, G = torch.randn(groups, 4, 4).double(), torch.randn(groups, 3, 3).double()
    V = torch.randn(groups, 3, 4).double()
    product = kronecker_product(A, G, V)
    for g in range(groups):
        # reshape(-1) stacks rows, for which G V A is (G ⊗ Aᵀ)·vec(V).
        dense = torch.kron(G[g], A[g].T.contiguous()) @ V[g].reshape(-1)
        assert_close(product[g].reshape(-1), dense, 1e-14)


@pytest.mark.parametrize("groups", [1, 3])
def test_block_uses_undamped_factors_for_fisher_and_inverses_for_solve(groups: int) -> None:
    A, G, V = psd(groups, 4), psd(groups, 3), torch.randn(groups, 3, 4).double()
    shift_A, shift_G = damping_split(A, G, 0.1)
    block = KroneckerBlock(A, G, dense_inverse(A, shift_A), dense_inverse(G, shift_G))
    assert_close(block.fisher(V), G @ V @ A, 1e-14)
    damped_A = A + shift_A[:, None, None] * torch.eye(4)
    damped_G = G + shift_G[:, None, None] * torch.eye(3)
    assert_close(damped_G @ block.solve(V) @ damped_A, V, 1e-12)


@pytest.mark.parametrize("diagonal", ["A", "G", "AG"])
def test_diagonal_factors_stand_for_diagonal_matrices(diagonal: str) -> None:
    V = torch.randn(3, 2, 4).double()
    kept = [
        M.diagonal(dim1=1, dim2=2) if key in diagonal else M
        for key, M in (("A", psd(3, 4)), ("G", psd(3, 2)))
    ]
    dense = [torch.diag_embed(M) if M.dim() == 2 else M for M in kept]
    for factor, matrix in zip(kept, dense, strict=True):
        assert_close(mean_eigenvalue(factor), mean_eigenvalue(matrix), 1e-14)
    shifts = damping_split(*kept, 0.1)
    for shift, expected in zip(shifts, damping_split(*dense, 0.1), strict=True):
        assert_close(shift, expected, 1e-14)
    inverses = [answer.inverse for answer in damped_inverses(kept, shifts) if answer.inverse is not None]
    block = KroneckerBlock(*kept, *inverses)
    assert_close(block.fisher(V), kronecker_product(*dense, V), 1e-14)
    expected = kronecker_product(*(dense_inverse(M, s) for M, s in zip(dense, shifts, strict=True)), V)
    assert_close(block.solve(V), expected, 1e-12)


def test_diagonal_block() -> None:
    F, V = torch.rand(1, 2, 4).double(), torch.randn(1, 2, 4).double()
    block = DiagonalBlock(F, damped_diagonal(F, 0.1))
    assert_close(block.fisher(V), F * V, 1e-15)
    assert_close((F + 0.1) * block.solve(V), V, 1e-14)


def test_element_without_curvature_and_damping_does_not_move() -> None:
    F = torch.tensor([[[4.0, 0.0]]])
    assert damped_diagonal(F, 4.0).tolist() == [[[0.125, 0.25]]]
    assert damped_diagonal(F, 0.0).tolist() == [[[0.25, 0.0]]]


# --- damping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 2.0])
def test_damping_split_follows_pi(damping: float) -> None:
    A, G = 5.0 * psd(2, 6), 0.01 * psd(2, 3)
    shift_A, shift_G = damping_split(A, G, damping)
    for g in range(2):
        pi = ((A[g].trace() / 6) / (G[g].trace() / 3)).sqrt()
        assert_close(shift_A[g], pi * damping**0.5, 1e-14)
        assert_close(shift_G[g], damping**0.5 / pi, 1e-14)
    assert_close(shift_A * shift_G, torch.full((2,), damping, dtype=torch.float64), 1e-14)


def test_damping_split_damps_both_factors_by_the_same_share() -> None:
    A, G = 1e4 * psd(1, 6), 1e-5 * psd(1, 3)
    shift_A, shift_G = damping_split(A, G, 1e-3)
    assert_close(shift_A / (A[0].trace() / 6), shift_G / (G[0].trace() / 3), 1e-12)


@pytest.mark.parametrize("zero", ["A", "G", "both"])
def test_damping_split_without_a_trace(zero: str) -> None:
    A, G = psd(2, 4), psd(2, 3)
    if zero in ("A", "both"):
        A[0] = 0
    if zero in ("G", "both"):
        G[0] = 0
    shift_A, shift_G = damping_split(A, G, 0.04)
    assert shift_A[0] == shift_G[0] == pytest.approx(0.2, rel=1e-15)
    # The other group has a trace and keeps its own π.
    assert_close(shift_A[1] / shift_G[1], (A[1].trace() / 4) / (G[1].trace() / 3), 1e-14)


def test_damping_split_of_zero_damping_is_zero() -> None:
    assert all(
        torch.equal(shift, torch.zeros(2).double()) for shift in damping_split(psd(2, 4), psd(2, 3), 0)
    )


# --- inverses --------------------------------------------------------------------------------------

# One group or several, several of a size, and one size only once.
SHAPES = [(1, 3), (2, 4), (2, 3), (1, 5), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_damped_inverses_in_order(dtype: torch.dtype) -> None:
    factors = [psd(*shape, dtype=dtype) for shape in SHAPES]
    # Every group of every factor has its own shift, so that none can be exchanged unseen.
    shifts = [torch.rand(groups, dtype=dtype) + 0.1 for groups, _ in SHAPES]
    kept = [factor.clone() for factor in factors]
    answers = damped_inverses(factors, shifts)
    assert len(answers) == len(SHAPES)
    for factor, shift, answer in zip(factors, shifts, answers, strict=True):
        assert answer.rung is Rung.NONE
        assert answer.inverse is not None
        assert answer.inverse.dtype == dtype
        assert_close(answer.inverse, dense_inverse(factor, shift), 1e-12 if dtype == torch.float64 else 1e-5)
    assert all(map(torch.equal, factors, kept)), "the factors go on into the EMA and must not change"


def test_dtypes_are_not_mixed() -> None:
    factors = [psd(1, 3), psd(1, 3, dtype=torch.float32)]
    shifts = [torch.ones(1, dtype=torch.float64), torch.ones(1)]
    answers = damped_inverses(factors, shifts)
    for factor, shift, answer in zip(factors, shifts, answers, strict=True):
        assert answer.inverse is not None
        assert answer.inverse.dtype == factor.dtype
        assert_close(answer.inverse, dense_inverse(factor, shift), 1e-6)


def test_nothing_to_invert() -> None:
    assert damped_inverses([], []) == []


@pytest.fixture
def cholesky_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes with which Cholesky has been called."""
    shapes: list[tuple[int, ...]] = []
    genuine = torch.linalg.cholesky_ex

    def counting(M: Tensor, **options: Any) -> Any:
        shapes.append(tuple(M.shape))
        return genuine(M, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    return shapes


def test_same_shapes_are_one_batch(cholesky_shapes: list[tuple[int, ...]]) -> None:
    damped_inverses([psd(*shape) for shape in SHAPES], [torch.ones(g).double() for g, _ in SHAPES])
    assert sorted(cholesky_shapes) == [(1, 5, 5), (2, 4, 4), (4, 3, 3)]


def test_a_model_is_inverted_in_one_batch_a_size(cholesky_shapes: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)), nn.Linear(3, 2))
    optimizer = FOP(model)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    # Of 3×3, four As and four Gs; the last layer has an A with a bias column, and a G of its own size.
    assert sorted(cholesky_shapes) == [(1, 2, 2), (1, 4, 4), (8, 3, 3)]


def test_inverse_does_not_hold_the_batch() -> None:
    factors = [psd(*shape) for shape in SHAPES]
    answers = damped_inverses(factors, [torch.ones(g).double() for g, _ in SHAPES])
    inverses = [answer.inverse for answer in answers if answer.inverse is not None]
    for inverse in inverses:
        assert inverse.untyped_storage().nbytes() == inverse.numel() * inverse.element_size()
    storages = {t.untyped_storage().data_ptr() for t in [*factors, *inverses]}
    assert len(storages) == 2 * len(SHAPES)


# --- the rescue ladder -----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def matrix(*rows: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([rows], dtype=dtype)


def only(M: Tensor, shift: float) -> Inversion:
    (answer,) = damped_inverses([M], [torch.full(M.shape[:1], shift, dtype=M.dtype)])
    return answer


# Two equal features. float32 cannot tell 1 + 1e-9 from 1, and the second pivot is exactly 0.
TWINS = [[1.0, 1.0], [1.0, 1.0]]
# Here the rounding of 21² / 49 makes that pivot negative instead, which LAPACK reports differently.
MULTIPLES = [[49.0, 21.0], [21.0, 9.0]]


def float32_breaks_down(M: Tensor, shift: float) -> bool:
    damped = M + torch.tensor(shift) * torch.eye(M.shape[-1])
    return bool(torch.linalg.cholesky_ex(damped).info.any())


@pytest.mark.parametrize(("rows", "shift"), [(TWINS, 1e-9), (MULTIPLES, 1e-7)])
def test_float32_failing_needs_float64(rows: list[list[float]], shift: float) -> None:
    M = matrix(*rows)
    assert float32_breaks_down(M, shift), "the case does not need the rung"
    answer = only(M, shift)
    assert answer.rung is Rung.FLOAT64
    assert answer.inverse is not None
    assert answer.inverse.dtype == torch.float32
    assert_close(answer.inverse, dense_inverse(M, torch.tensor([shift])), 1e-6)


def test_float64_failing_needs_more_damping_negative_eigenvalue() -> None:
    M = matrix([1.0, 0.0], [0.0, -1e-3])
    answer = only(M, 5e-4)
    assert answer.rung is Rung.DAMPING
    assert answer.inverse is not None
    # The first attempt with more, ten times as much, is enough and must be the one taken.
    assert_close(answer.inverse, dense_inverse(M, torch.tensor([5e-3])), 1e-5)


def test_more_damping_only_as_much_as_needed() -> None:
    M = matrix([1.0, 0.0], [0.0, -1e-2], dtype=torch.float64)
    answer = only(M, 2e-5)
    assert answer.rung is Rung.DAMPING
    assert answer.inverse is not None
    assert_close(answer.inverse, dense_inverse(M, torch.tensor([2e-2], dtype=torch.float64)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [TWINS, [[4.0, 0.0], [0.0, 0.0]]], ids=["twins", "dead input"])
def test_singular_without_damping(rows: list[list[float]], dtype: torch.dtype) -> None:
    M = matrix(*rows, dtype=dtype)
    answer = only(M, 0.0)
    assert answer.rung is Rung.DAMPING
    assert answer.inverse is not None
    assert answer.inverse.dtype == dtype
    # Some damping was put in, small beside the matrix.
    assert torch.isfinite(answer.inverse).all()
    added = torch.linalg.inv(answer.inverse.double()) - M.double()
    assert 0 < added.diagonal(dim1=1, dim2=2).mean() < 1e-3 * M.diagonal(dim1=1, dim2=2).mean()


@pytest.mark.parametrize(
    ("rows", "shift"),
    [
        ([[1.0, NAN], [NAN, 1.0]], 0.1),
        ([[1.0, 0.0], [0.0, NAN]], 0.1),
        ([[INF, 0.0], [0.0, 1.0]], 0.1),
        ([[1.0, 0.0], [0.0, -1e9]], 0.1),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
    ids=["NaN", "NaN on the diagonal", "infinite", "far from definite", "zero without damping"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hopeless_gives_no_inverse(rows: list[list[float]], shift: float, dtype: torch.dtype) -> None:
    assert only(matrix(*rows, dtype=dtype), shift) == Inversion(None, Rung.KEPT)


def test_zero_factor_with_damping_is_no_rescue() -> None:
    answer = only(torch.zeros(1, 2, 2), 0.25)
    assert answer.rung is Rung.NONE
    assert answer.inverse is not None
    assert torch.equal(answer.inverse, 4 * torch.eye(2)[None])


def test_inverse_beyond_float32_takes_more_damping() -> None:
    # 1/1e-39 is infinite in float32 even where the factorization succeeds.
    answer = only(torch.zeros(1, 1, 1), 1e-39)
    assert answer.rung is Rung.DAMPING
    assert answer.inverse is not None
    assert torch.isfinite(answer.inverse).all()


@pytest.mark.parametrize(
    ("diagonal", "shift", "rung"),
    [
        ([4.0, 0.0], 0.25, Rung.NONE),
        ([4.0, 0.0], 0.0, Rung.DAMPING),
        ([1.0, -1e-3], 5e-4, Rung.DAMPING),
        ([1.0, 1e-39], 0.0, Rung.DAMPING),
        ([0.0, 0.0], 0.0, Rung.KEPT),
        ([1.0, NAN], 0.1, Rung.KEPT),
        ([INF, 1.0], 0.1, Rung.KEPT),
        ([1.0, -1e9], 0.1, Rung.KEPT),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rungs_of_a_diagonal(diagonal: list[float], shift: float, rung: Rung, dtype: torch.dtype) -> None:
    M = torch.tensor([diagonal], dtype=dtype)
    if dtype == torch.float64 and 1e-39 in diagonal:
        rung = Rung.NONE
    answer = only(M, shift)
    assert answer.rung is rung
    assert (answer.inverse is None) == (rung is Rung.KEPT)
    if answer.inverse is not None:
        assert answer.inverse.dtype == dtype
        assert answer.inverse.shape == M.shape
        assert (torch.isfinite(answer.inverse) & (answer.inverse > 0)).all()
    if rung is Rung.NONE:
        assert_close(answer.inverse, 1 / (M + shift), 1e-6)  # type: ignore[arg-type]


def test_diagonals_among_matrices_keep_their_order(cholesky_shapes: list[tuple[int, ...]]) -> None:
    factors = [psd(1, 3), psd(2, 3).diagonal(dim1=1, dim2=2), psd(1, 3), psd(1, 3).diagonal(dim1=1, dim2=2)]
    shifts = [torch.rand(len(factor)).double() + 0.1 for factor in factors]
    for factor, shift, answer in zip(factors, shifts, damped_inverses(factors, shifts), strict=True):
        assert answer.inverse is not None
        full, dense = (torch.diag_embed(M) if M.dim() == 2 else M for M in (answer.inverse, factor))
        assert_close(full, dense_inverse(dense, shift), 1e-13)
    assert cholesky_shapes == [(2, 3, 3)]


def test_one_bad_group_spoils_only_its_own_factor() -> None:
    good, bad, hopeless = psd(2, 2, dtype=torch.float32), psd(2, 2, dtype=torch.float32), torch.ones(1, 2, 2)
    bad[1] = matrix(*TWINS)[0]
    hopeless[0, 0, 0] = NAN
    shifts = [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 1e-9]), torch.tensor([0.1])]
    answers = damped_inverses([good, hopeless, bad, good], [shifts[0], shifts[2], shifts[1], shifts[0]])
    assert [a.rung for a in answers] == [Rung.NONE, Rung.KEPT, Rung.FLOAT64, Rung.NONE]
    for index in (0, 3):
        inverse = answers[index].inverse
        assert inverse is not None
        assert_close(inverse, dense_inverse(good, shifts[0]), 1e-5)
        assert inverse.untyped_storage().nbytes() == inverse.numel() * 4
    rescued = answers[2].inverse
    assert rescued is not None
    for g in range(2):
        # Group by group: the inverse of the twins is a billion times the other.
        assert_close(rescued[g], dense_inverse(bad, shifts[1])[g], 1e-5)
