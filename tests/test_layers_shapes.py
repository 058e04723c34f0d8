"""Unusual input shapes: without a batch, with many leading dimensions, empty."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from reference.cases import Conv1D


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    assert value.shape == expected.shape
    assert (value - expected).norm() <= rtol * expected.norm(), f"{value} is not {expected}"


def trained(build: Callable[[], nn.Module], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    module = build().double()
    optimizer = FOP(module, lr=0.1, damping=1e-2, **options)
    for x in inputs:
        optimizer.zero_grad()
        module(x).sin().sum().backward()
        optimizer.step()
    rows = optimizer.summary().rows
    assert {row.path for row in rows} == {"FOP"}
    assert not any("no curvature" in row.reason for row in rows)
    return [p.detach().clone() for p in module.parameters()]


class Attention(nn.Module):
    """Self-attention on (L, 4) or on a batch of (N, L, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x)[0]
        return out


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (4, 3, 3)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), (4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2), (4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 2, stride=2), (4, 2, 2)),
    "attention": (Attention, (3, 4)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_equals_a_batch_of_one(name: str) -> None:
    build, shape = UNBATCHED[name]
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    plain, batch = trained(build, inputs), trained(build, [x[None] for x in inputs])
    for p, q in zip(plain, batch, strict=True):
        assert_close(p, q)


def test_leading_dims_of_one_change_nothing() -> None:
    def build() -> nn.Module:
        return nn.Linear(4, 3)

    inputs = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    plain, deep = trained(build, inputs), trained(build, [x[:, None, None] for x in inputs])
    for p, q in zip(plain, deep, strict=True):
        assert_close(p, q)


def test_rows_of_a_sample_may_be_folded_anyhow() -> None:
    def build() -> nn.Module:
        return nn.Linear(4, 3)

    inputs = [torch.randn(6, 2, 3, 5, 4, dtype=torch.float64) for _ in range(3)]
    deep, flat = trained(build, inputs), trained(build, [x.flatten(1, 3) for x in inputs])
    for p, q in zip(deep, flat, strict=True):
        assert_close(p, q)


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), (0, 4)),
    "linear sequence": (lambda: nn.Linear(4, 3), (5, 2, 4), (0, 2, 4)),
    "transformers conv1d": (lambda: Conv1D(3, 4), (5, 2, 4), (0, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2), (5, 4, 3), (0, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 2), (5, 4, 3), (0, 4, 3)),
    "linear without rows": (lambda: nn.Linear(4, 3), (5, 2, 4), (5, 0, 4)),
    "conv": (lambda: nn.Conv2d(4, 3, 2), (5, 4, 3, 3), (0, 4, 3, 3)),
    "conv reflect": (
        lambda: nn.Conv2d(4, 3, 2, padding=1, padding_mode="reflect", bias=False),
        (5, 4, 3, 3),
        (0, 4, 3, 3),
    ),
}


@pytest.mark.parametrize("empty_step", [0, 2])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_a_step_of_nothing(name: str, empty_step: int) -> None:
    """Before there is any curvature, and later, in a step in which curvature is due."""
    build, shape, empty = EMPTY[name]
    module = build()
    optimizer = FOP(module, lr=0.1, momentum=0.0, curvature_interval=1)
    for step in range(4):
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty batch is no reason to warn
            module(torch.randn(empty if step == empty_step else shape)).square().sum().backward()
            optimizer.step()
        for p, old in zip(module.parameters(), before, strict=True):
            assert torch.isfinite(p).all()
            assert torch.equal(p, old) == (step == empty_step)
    A, G = (optimizer.state[module.weight][key] for key in ("A", "G"))
    assert torch.isfinite(A).all()
    assert torch.isfinite(G).all()
    # Nothing came in from the empty batch: the trace of A is the mean of real samples, not pulled to 0.
    assert A.diagonal(dim1=1, dim2=2).sum() > 1


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_leaves_the_curvature(name: str) -> None:
    build, shape, empty = EMPTY[name]
    module = build()
    optimizer = FOP(module, curvature_interval=1)
    for step in range(3):
        before = {k: v.clone() for k, v in optimizer.state[module.weight].items() if isinstance(v, Tensor)}
        optimizer.zero_grad()
        module(torch.randn(empty if step == 2 else shape)).square().sum().backward()
        optimizer.step()
    for key in ("A", "G", "A_inv", "G_inv"):
        assert torch.equal(before[key], optimizer.state[module.weight][key])
