"""What the tests take from behind the public API: when a name moves inside `fop`, only this file changes."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fop.capture import functions, recorder, sub_batches
from fop.capture.batch import Batch
from fop.capture.sub_batches import sub_batch_runs
from fop.correction import Metric, SubBatchGradients, combine
from fop.correction import Metric as Curvature
from fop.curvature import Damping, refresh
from fop.curvature.diagonal import DiagonalCurvature
from fop.curvature.inversion import Fallback, Inversion, damped_inverses, mean_eigenvalue
from fop.curvature.kronecker import KroneckerCurvature, damping_split, kronecker_product
from fop.layers import FactorSums, Layer, LayerOptions, PackedLayer, RowSampler, conv, describe, sampling
from fop.layers.conv import ConvLayer
from fop.layers.linear import LinearLayer
from fop.report import Refusals
from fop.step_size import scale_updates
from fop.transfer import Transfer


@contextlib.contextmanager
def as_when_recorded() -> Iterator[None]:
    """Do as the versions did that recorded trajectories and checkpoints.

    Batches are split in K pieces one after the other, the second gradient is computed beside autograd's, all
    rows count in the statistics, and the interval between curvature updates grows by one in five steps.
    """

    def observe(self: Any, layer: Layer, x: Tensor, output: Tensor, batch: Batch, _: Any = None) -> None:
        observed(self, layer, x, output, batch)

    observed = recorder.Recorder.observe

    def ends(samples: int, count: int) -> list[int]:
        return [samples * k // count for k in range(count + 1)]

    def sizes(samples: int, count: int) -> list[int]:
        return torch.tensor(ends(samples, count)).diff().tolist()  # type: ignore[no-any-return]

    def runs(samples: int, count: int, rows: int) -> list[list[slice]]:
        return [[slice(rows * start, rows * end)] for start, end in pairwise(ends(samples, count))]

    with (
        mock.patch.object(sub_batches, "sub_batch_sizes", sizes),
        mock.patch.object(recorder, "sub_batch_runs", runs),
        mock.patch.object(recorder.Recorder, "observe", observe),
        mock.patch.object(refresh, "GROWTH", 5),
        mock.patch.object(sampling, "MIN_ROWS", 2**62),
    ):
        yield


def curvature_of(kind: type[Any], shapes: tuple[tuple[int, ...], ...], state: dict[str, Tensor]) -> Any:
    """The library's curvature over these tensors, without a layer."""
    sides = shapes[0][0], shapes[-1][-1], shapes[0][-1]
    layer = SimpleNamespace(
        swapped=False, factor_shapes=shapes, bias=False, groups=sides[0], matrix_shape=sides
    )
    curvature = kind(layer, [layer], {})
    curvature.load(state)
    return curvature


def KroneckerBlock(A: Tensor, G: Tensor, A_inv: Tensor, G_inv: Tensor) -> KroneckerCurvature:  # noqa: N802
    """A Kronecker curvature with these factors and inverses."""
    shapes = tuple(A.shape), tuple(G.shape)
    state = {"A": A, "G": G, "A_inv": A_inv, "G_inv": G_inv}
    return curvature_of(KroneckerCurvature, shapes, state)  # type: ignore[no-any-return]


def DiagonalBlock(F: Tensor, F_inv: Tensor) -> DiagonalCurvature:  # noqa: N802
    """A diagonal curvature with this diagonal and inverse."""
    return curvature_of(DiagonalCurvature, (tuple(F.shape),), {"A": F, "A_inv": F_inv})  # type: ignore[no-any-return]


def damped_diagonal(F: Tensor, damping: float) -> Tensor:
    """The inverse that a diagonal curvature computes."""
    curvature = DiagonalBlock(F, F)
    assert curvature.store([], Damping(damping, relative=False))
    return curvature.state["A_inv"]  # type: ignore[no-any-return]


class Direction(NamedTuple):
    """Direction and step scale of one weight together: η·F̂⁻¹·Gc, and the scalars of the equations, 0-dim."""

    update: Tensor
    alignment: Tensor
    squared_norm: Tensor
    beta: Tensor
    eta: Tensor
    rho: Tensor
    noise: Tensor | None


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """The sum of element-wise products."""
    return (X * Y).sum()


def direction(
    metric: Metric, gradients: SubBatchGradients, *, beta: float | None = None, eta: float | None = 1.0
) -> Direction:
    """The update of one weight, (3) to (18) without the learning rate."""
    found = combine([metric], [gradients], beta=beta)
    (update,), alignment, scale = scale_updates(found, eta, bool(gradients.contrasts))
    scalars = (each[0] for each in (alignment, found.squared_norm, found.beta, scale, found.rho))
    return Direction(update, *scalars, None if found.noise is None else found.noise[0])


def fop_direction(
    curvature: Curvature,
    average: Tensor,
    difference: Tensor,
    *,
    beta: float | None = None,
    eta: float | None = None,
) -> Direction:
    """The update of two sub-batches."""
    gradients = SubBatchGradients(average, (difference,), torch.tensor(True))
    return direction(curvature, gradients, beta=beta, eta=eta)


def kfac_direction(curvature: Curvature, average: Tensor, *, eta: float | None = None) -> Direction:
    """K-FAC's update."""
    return direction(curvature, SubBatchGradients(average), eta=eta)


__all__ = [
    "Batch",
    "ConvLayer",
    "Curvature",
    "DiagonalBlock",
    "Direction",
    "FactorSums",
    "Fallback",
    "Inversion",
    "KroneckerBlock",
    "Layer",
    "LayerOptions",
    "LinearLayer",
    "PackedLayer",
    "Refusals",
    "RowSampler",
    "Transfer",
    "conv",
    "damped_diagonal",
    "damped_inverses",
    "damping_split",
    "describe",
    "direction",
    "fop_direction",
    "inner",
    "kfac_direction",
    "kronecker_product",
    "mean_eigenvalue",
    "refresh",
    "sampling",
    "sub_batch_runs",
]


def function_watches() -> int:
    """How many calls of modules are watched for functions in this thread."""
    return len(functions._thread.watchers)
