"""Kronecker products, the damping split, damped inverses and their fallback ladder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fop import FOP
from internals import (
    DiagonalBlock,
    Fallback,
    Inversion,
    KroneckerBlock,
    damped_diagonal,
    damped_inverses,
    damping_split,
    kronecker_product,
    mean_eigenvalue,
)
from reference import full

NAN, INF = float("nan"), float("inf")


def psd(groups: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    X = torch.randn(groups, size, 2 * size, dtype=dtype)
    return X @ X.mT / X.shape[-1]


def dense_inverse(M: Tensor, shift: Tensor) -> Tensor:
    eye = torch.eye(M.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(full(M).double() + shift.double()[:, None, None] * eye)


def assert_close(value: Tensor | None, expected: Tensor, rtol: float) -> None:
    assert value is not None
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


@pytest.mark.parametrize("diagonal", ["", "A", "G", "AG"])
@pytest.mark.parametrize("groups", [1, 3])
def test_block_uses_undamped_factors_for_fisher_and_inverses_for_solve(groups: int, diagonal: str) -> None:
    """Diagonal factors stand for diagonal matrices."""
    V = torch.randn(groups, 3, 4).double()
    A, G = (
        M.diagonal(dim1=1, dim2=2) if key in diagonal else M
        for key, M in (("A", psd(groups, 4)), ("G", psd(groups, 3)))
    )
    for factor in (A, G):
        assert_close(mean_eigenvalue(factor), full(factor).diagonal(dim1=1, dim2=2).mean(1), 1e-14)
    shift_A, shift_G = damping_split(mean_eigenvalue(A), mean_eigenvalue(G), 0.1)
    for shift, dense in zip(
        (shift_A, shift_G),
        damping_split(mean_eigenvalue(full(A)), mean_eigenvalue(full(G)), 0.1),
        strict=True,
    ):
        assert_close(shift, dense, 1e-14)
    answers = damped_inverses([A, G], [shift_A, shift_G])
    block = KroneckerBlock(A, G, *(answer.inverse for answer in answers))  # type: ignore[arg-type]
    assert_close(block.fisher(V), full(G) @ V @ full(A), 1e-14)
    damped_A, damped_G = (
        full(M) + shift[:, None, None] * torch.eye(M.shape[-1]) for M, shift in ((A, shift_A), (G, shift_G))
    )
    assert_close(damped_G @ block.solve(V) @ damped_A, V, 1e-12)


def test_diagonal_block() -> None:
    F, V = torch.rand(1, 2, 4).double(), torch.randn(1, 2, 4).double()
    block = DiagonalBlock(F, damped_diagonal(F, 0.1))
    assert_close(block.fisher(V), F * V, 1e-15)
    assert_close((F + 0.1) * block.solve(V), V, 1e-14)


def test_element_without_curvature_and_damping_does_not_move() -> None:
    F = torch.tensor([[[4.0, 0.0]]])
    assert damped_diagonal(F, 4.0).tolist() == [[[0.125, 0.25]]]
    assert damped_diagonal(F, 0.0).tolist() == [[[0.25, 0.0]]]


@pytest.mark.parametrize("forget", [lambda curvature: curvature.drop(), lambda curvature: curvature.load({})])
@pytest.mark.parametrize("kind", [KroneckerBlock, DiagonalBlock])
def test_tensors_that_are_dropped_leave_memory(kind: Any, forget: Callable[[Any], None]) -> None:
    """On several ranks a loaded curvature stays at the weight's owner alone."""
    curvature = kind(*(psd(1, 3) for _ in range(4 if kind is KroneckerBlock else 2)))
    tensors = {value.untyped_storage().data_ptr() for value in curvature.state.values()}
    forget(curvature)
    kept = [value for value in tree_leaves(vars(curvature)) if isinstance(value, Tensor)]
    assert kept and tensors.isdisjoint(value.untyped_storage().data_ptr() for value in kept)


# --- damping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-3, 2.0])
def test_damping_split_follows_pi(damping: float) -> None:
    A, G = 1e4 * psd(2, 6), 1e-5 * psd(2, 3)
    shift_A, shift_G = damping_split(mean_eigenvalue(A), mean_eigenvalue(G), damping)
    for g in range(2):
        a, g_ = A[g].trace() / 6, G[g].trace() / 3
        torch.testing.assert_close(shift_A[g], (a / g_).sqrt() * damping**0.5, rtol=1e-13, atol=0)
        torch.testing.assert_close(shift_G[g], damping**0.5 / (a / g_).sqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("zero", ["A", "G", "AG"])
def test_damping_split_without_a_trace(zero: str) -> None:
    A, G = psd(2, 4), psd(2, 3)
    for key, factor in (("A", A), ("G", G)):
        factor[0] *= key not in zero
    shift_A, shift_G = damping_split(mean_eigenvalue(A), mean_eigenvalue(G), 0.04)
    assert shift_A[0] == shift_G[0] == pytest.approx(0.2, rel=1e-15)
    # The other group has a trace and keeps its own π.
    assert_close(shift_A[1] / shift_G[1], (A[1].trace() / 4) / (G[1].trace() / 3), 1e-14)


# --- inverses --------------------------------------------------------------------------------------

# One group or several, several of a size, and one size only once.
SHAPES = [(1, 3), (2, 4), (2, 3), (1, 5), (1, 3)]


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


@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float32], [torch.float64, torch.float32]])
def test_damped_inverses(dtypes: list[torch.dtype], cholesky_shapes: list[tuple[int, ...]]) -> None:
    """In their order, as one batch a size and dtype; diagonals among them; no inverse holds the batch."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}
    factors = [psd(*shape, dtype=dtype) for shape in SHAPES for dtype in dtypes]
    factors[1:1] = [psd(2, 3).diagonal(dim1=1, dim2=2)]
    # Every group of every factor has its own shift, so that none can be exchanged unseen.
    shifts = [torch.rand(len(factor), dtype=factor.dtype) + 0.1 for factor in factors]
    kept = [factor.clone() for factor in factors]
    answers = damped_inverses(factors, shifts)
    assert len(answers) == len(factors)
    for factor, shift, answer in zip(factors, shifts, answers, strict=True):
        assert answer.fallback is Fallback.NONE and answer.inverse is not None
        assert answer.inverse.dtype == factor.dtype
        assert_close(full(answer.inverse), dense_inverse(factor, shift), tolerance[factor.dtype])
        assert answer.inverse.untyped_storage().nbytes() == answer.inverse.nbytes
    assert all(map(torch.equal, factors, kept)), "the factors go on into the EMA and must not change"
    storages = {t.untyped_storage().data_ptr() for t in [*factors, *(a.inverse for a in answers)]}  # type: ignore[union-attr]
    assert len(storages) == 2 * len(factors)
    assert sorted(cholesky_shapes) == sorted(len(dtypes) * [(1, 5, 5), (2, 4, 4), (4, 3, 3)])


def test_nothing_to_invert() -> None:
    assert damped_inverses([], []) == []


def test_a_model_is_inverted_in_one_batch_a_size(cholesky_shapes: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)), nn.Linear(3, 2))
    optimizer = FOP(model)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    # Of 3×3, four As and four Gs; the last layer has an A with a bias column, and a G of its own size.
    assert sorted(cholesky_shapes) == [(1, 2, 2), (1, 4, 4), (8, 3, 3)]


# --- the fallback ladder ---------------------------------------------------------------------------


def invert(rows: Any, shift: float, dtype: torch.dtype) -> tuple[Tensor, Inversion]:
    M = torch.tensor([rows], dtype=dtype)
    (answer,) = damped_inverses([M], [torch.full((1,), shift, dtype=dtype)])
    if answer.inverse is not None:
        assert answer.inverse.dtype == dtype and answer.inverse.shape == M.shape
        assert torch.isfinite(answer.inverse).all()
    assert (answer.inverse is None) == (answer.fallback is Fallback.KEPT)
    return M, answer


# Two equal features. float32 cannot tell 1 + 1e-9 from 1, and the second pivot is exactly 0.
TWINS = [[1.0, 1.0], [1.0, 1.0]]
# Here the rounding of 21² / 49 makes that pivot negative instead, which LAPACK reports differently.
MULTIPLES = [[49.0, 21.0], [21.0, 9.0]]
f32, f64 = torch.float32, torch.float64
BOTH = (f32, f64)
# Matrix or diagonal, shift, dtypes, the fallback, and the shift that is taken in the end where it is known.
LADDER: dict[str, tuple[Any, float, tuple[torch.dtype, ...], Fallback, float | None]] = {
    "float32 singular": (TWINS, 1e-9, (f32,), Fallback.FLOAT64, 1e-9),
    "float32 negative": (MULTIPLES, 1e-7, (f32,), Fallback.FLOAT64, 1e-7),
    # The first attempt with more, ten times as much, is enough and must be the one taken.
    "negative": ([[1.0, 0.0], [0.0, -1e-3]], 5e-4, BOTH, Fallback.DAMPING, 5e-3),
    "three attempts": ([[1.0, 0.0], [0.0, -1e-2]], 2e-5, (f64,), Fallback.DAMPING, 2e-2),
    "no damping, twins": (TWINS, 0.0, BOTH, Fallback.DAMPING, None),
    "no damping, dead input": ([[4.0, 0.0], [0.0, 0.0]], 0.0, BOTH, Fallback.DAMPING, None),
    "NaN": ([[1.0, NAN], [NAN, 1.0]], 0.1, BOTH, Fallback.KEPT, None),
    "infinite beside the diagonal": ([[1.0, INF], [INF, 1.0]], 0.1, BOTH, Fallback.KEPT, None),
    "NaN on the diagonal": ([[1.0, 0.0], [0.0, NAN]], 0.1, BOTH, Fallback.KEPT, None),
    "infinite": ([[INF, 0.0], [0.0, 1.0]], 0.1, BOTH, Fallback.KEPT, None),
    "far from definite": ([[1.0, 0.0], [0.0, -1e9]], 0.1, BOTH, Fallback.KEPT, None),
    "zero without damping": ([[0.0, 0.0], [0.0, 0.0]], 0.0, BOTH, Fallback.KEPT, None),
    "zero with damping": ([[0.0, 0.0], [0.0, 0.0]], 0.25, BOTH, Fallback.NONE, 0.25),
    # 1/1e-39 is infinite in float32 even where the factorization succeeds.
    "beyond float32": ([[0.0]], 1e-39, (f32,), Fallback.DAMPING, None),
    "diagonal": ([4.0, 0.0], 0.25, BOTH, Fallback.NONE, 0.25),
    "diagonal, dead input": ([4.0, 0.0], 0.0, BOTH, Fallback.DAMPING, None),
    "diagonal, negative": ([1.0, -1e-3], 5e-4, BOTH, Fallback.DAMPING, 5e-3),
    "diagonal beyond float32": ([1.0, 1e-39], 0.0, (f32,), Fallback.DAMPING, None),
    "diagonal within float64": ([1.0, 1e-39], 0.0, (f64,), Fallback.NONE, 0.0),
    "diagonal, zero": ([0.0, 0.0], 0.0, BOTH, Fallback.KEPT, None),
    "diagonal, NaN": ([1.0, NAN], 0.1, BOTH, Fallback.KEPT, None),
    "diagonal, infinite": ([INF, 1.0], 0.1, BOTH, Fallback.KEPT, None),
    "diagonal, far": ([1.0, -1e9], 0.1, BOTH, Fallback.KEPT, None),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, d) for case, (_, _, ds, *_) in LADDER.items() for d in ds]
)
def test_ladder(case: str, dtype: torch.dtype) -> None:
    rows, shift, _, fallback, taken = LADDER[case]
    M, answer = invert(rows, shift, dtype)
    assert answer.fallback is fallback
    if taken is not None:
        expected = dense_inverse(M, torch.tensor([taken], dtype=f64 if dtype == f64 else f32))
        assert_close(full(answer.inverse), expected, 1e-12 if dtype == f64 else 1e-6)  # type: ignore[arg-type]
    elif fallback is Fallback.DAMPING and shift == 0.0 and M.max() > 1e-3 and M.dim() == 3:
        # Some damping was put in, small beside the matrix.
        assert answer.inverse is not None
        added = torch.linalg.inv(answer.inverse.double()) - M.double()
        assert 0 < added.diagonal(dim1=1, dim2=2).mean() < 1e-3 * M.diagonal(dim1=1, dim2=2).mean()


def test_a_block_of_zeros_has_the_inverse_of_its_damping() -> None:
    """Which is relative to the whole factor, and one number for every entry of the diagonal."""
    M, shift = psd(2, 3), torch.rand(2, 3, dtype=f64) + 0.1
    M[1] = 0
    (answer,) = damped_inverses([M], [shift])
    assert answer.fallback is Fallback.NONE
    assert_close(answer.inverse, torch.linalg.inv(M + torch.diag_embed(shift)), 1e-12)


def test_float32_alone_would_fail() -> None:
    for rows, shift in ((TWINS, 1e-9), (MULTIPLES, 1e-7)):
        damped = torch.tensor([rows]) + torch.tensor(shift) * torch.eye(2)
        assert bool(torch.linalg.cholesky_ex(damped).info.any())


def test_one_bad_group_spoils_only_its_own_factor() -> None:
    good, bad, hopeless = psd(2, 2, dtype=f32), psd(2, 2, dtype=f32), torch.ones(1, 2, 2)
    bad[1] = torch.tensor(TWINS)
    hopeless[0, 0, 0] = NAN
    shifts = [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 1e-9]), torch.tensor([0.1])]
    answers = damped_inverses([good, hopeless, bad, good], [shifts[0], shifts[2], shifts[1], shifts[0]])
    assert [a.fallback for a in answers] == [Fallback.NONE, Fallback.KEPT, Fallback.FLOAT64, Fallback.NONE]
    for index in (0, 3):
        inverse = answers[index].inverse
        assert_close(inverse, dense_inverse(good, shifts[0]), 1e-5)
        assert inverse is not None and inverse.untyped_storage().nbytes() == inverse.nbytes
    for g in range(2):
        # Group by group: the inverse of the twins is a billion times the other.
        assert answers[2].inverse is not None
        assert_close(answers[2].inverse[g], dense_inverse(bad, shifts[1])[g], 1e-5)
