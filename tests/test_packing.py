"""What travels between ranks: packed matrices, and sketches that tell a scaling from other changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fop.distributed import pack_symmetric, packed_shape, scale_between, sketch, unpack_symmetric

TOLERANCE = 1e-2


def symmetric(groups: int, d: int, seed: int = 0) -> torch.Tensor:
    M = torch.randn(groups, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return M + M.mT


@given(st.integers(1, 3), st.integers(1, 12))
def test_what_was_packed_comes_back_bit_for_bit(groups: int, d: int) -> None:
    M = symmetric(groups, d)
    packed = pack_symmetric(M)
    assert tuple(packed.shape) == packed_shape((groups, d, d))
    assert torch.equal(unpack_symmetric(packed, d), M)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 513])
def test_packed_is_a_triangle(d: int) -> None:
    # An odd side repeats half a row.
    size = torch.Size(packed_shape((2, d, d))).numel()
    assert size - 2 * d * (d + 1) // 2 == (d % 2) * 2 * (d + 1) // 2


def test_sums_of_packed_matrices_are_packed_sums() -> None:
    M, N = symmetric(2, 9, 1), symmetric(2, 9, 2)
    assert torch.equal(unpack_symmetric(pack_symmetric(M) + pack_symmetric(N), 9), M + N)


def test_diagonals_stay_as_they_are() -> None:
    diagonal = torch.randn(3, 5)
    assert pack_symmetric(diagonal) is diagonal
    assert unpack_symmetric(diagonal, 5) is diagonal
    assert packed_shape((3, 5)) == (3, 5)


@pytest.mark.parametrize("shape", [(1, 3, 2), (1, 40, 33), (2, 10, 127), (1, 1, 1)])
def test_sketch_adds_up_every_127th_element(shape: tuple[int, ...]) -> None:
    V = torch.randn(shape, dtype=torch.float64)
    flat = V.flatten().tolist()
    expected = [sum(flat[start::127]) for start in range(127)]
    torch.testing.assert_close(sketch(V), torch.tensor(expected, dtype=torch.float64))


def test_a_scaling_is_told_from_other_changes() -> None:
    generator = torch.Generator().manual_seed(3)
    V = torch.randn(1, 30, 40, generator=generator)
    for factor in (1.0, 0.03, 1 / 65536):
        scale, same = scale_between(sketch(V), sketch(V * factor), TOLERANCE)
        assert bool(same)
        assert float(scale) == pytest.approx(factor, rel=1e-4)
    changed = {
        "clipped elements": V.clamp(-1, 1),
        "noise": V + 0.1 * torch.randn(V.shape, generator=generator),
        "one row": torch.cat([V[:, :1] * 3, V[:, 1:]], dim=1),
        "another order": V.flip(2),
        "other signs": V.abs(),
        "not finite": V / torch.zeros(()),
    }
    for what, after in changed.items():
        assert not bool(scale_between(sketch(V), sketch(after), TOLERANCE)[1]), what


def test_zero_gradients_have_no_scale() -> None:
    zero = torch.zeros(127)
    scale, same = scale_between(zero, zero, TOLERANCE)
    assert float(scale) == 0.0
    assert bool(same)
    assert not bool(scale_between(zero, torch.ones(127), TOLERANCE)[1])
