"""What several ranks pay for a step: bytes, memory, operations, and times under stated assumptions.

Bytes are those that a rank sends with a bandwidth-optimal algorithm, on average over the ranks: of n bytes
among W ranks 2n(W-1)/W for an all-reduce, n(W-1)/W for a reduce, a broadcast, a reduce-scatter or an
all-gather.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fop.distributed import SKETCH, LayerSize, Plan, make_plan, packed_shape
from fop_bench.architectures import Architecture

Method = Literal["sgd", "kfac", "compatible", "lean", "fsdp"]

INTERVAL = 100  # the default of `curvature_interval`
BYTES = 4  # of an element: gradients, updates and factors travel and stay in float32
SCALARS = 8  # numbers that go with the update of a layer
FSDP_GATHERED = 2  # bytes of a weight that FSDP gathers, in bfloat16
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Hardware:
    """Assumed rates, per second. None of them was measured by this project.

    Attributes:
        matmul: operations of a product with a factor. Half of the TF32 peak of an H100 SXM, 495·10¹² without
            sparsity (NVIDIA's H100 datasheet). Without TF32, as is torch's default, the peak is 67·10¹².
        inversion: operations of a Cholesky factorisation and the inverse from it. 15 % of the float32 peak
            of 67·10¹²: what cuSOLVER reaches depends on the side, and has to be measured on your own GPU.
        inside: bytes that a GPU sends inside a node, one direction of NVLink's 900·10⁹.
        outside: bytes through one network card, one card to a GPU: 400 Gbit/s.
    """

    matmul: float = 0.5 * 495e12
    inversion: float = 0.15 * 67e12
    inside: float = 450e9
    outside: float = 50e9

    def bandwidth(self, ranks: int) -> float:
        """Give the bytes per second of every rank in a collective.

        Its rings go through all GPUs of a node before they leave it, and each takes another card: a node
        sends what one rank sends, through all of its cards.
        """
        if ranks <= GPUS_PER_NODE:
            return self.inside
        return min(self.inside, GPUS_PER_NODE * self.outside)


H100 = Hardware()


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, on average over the ranks.

    Attributes:
        wrapper: by DistributedDataParallel or FSDP.
        plain: by the optimizer in a step without a curvature update, by category.
        curvature: the same in a step with one.
    """

    wrapper: float
    plain: Mapping[str, float]
    curvature: Mapping[str, float]

    def amortised(self, interval: int = INTERVAL) -> float:
        """Give the mean over ``interval`` steps, one of them with a curvature update."""
        plain, curvature = sum(self.plain.values()), sum(self.curvature.values())
        return self.wrapper + (plain * (interval - 1) + curvature) / interval


@dataclass(frozen=True)
class Burden:
    """What the owner of some layers keeps and computes; of all ranks, the most that one has.

    Attributes:
        owners: ranks that own a layer.
        imbalance: largest load as a multiple of the lower bound.
        factor_bytes: factors and inverses.
        inversion_flops: of one curvature update.
        product_flops: of one step.
    """

    owners: int
    imbalance: float
    factor_bytes: int
    inversion_flops: int
    product_flops: int


def traffic(architecture: Architecture, ranks: int, method: Method) -> Traffic:
    """Predict what a rank sends in a step."""
    share = (ranks - 1) / ranks
    wrapper = _wrapper(architecture, method) * share
    if method == "sgd" or ranks == 1:
        return Traffic(wrapper, {}, {})
    layers, count = architecture.layers, len(architecture.layers)
    update = BYTES * architecture.fop_elements
    # This rank's part of Gd; beside it a sketch of its gradient, and whether it has a pair.
    difference = update + BYTES * (SKETCH + 1) * count
    scalars = BYTES * SCALARS * count
    plain = {"updates": (update + scalars) * share}
    if method == "compatible":
        plain["gradients"] = difference * share
    elif method == "lean":
        plain["gradients"] = _lean_gradients(update, count, ranks)
    elif method == "fsdp":
        # Every rank has a W-th of each gradient and wants a W-th of each update.
        shards = update / ranks * share
        plain = {
            "gradients": difference * share,
            "gradient shards": shards,
            "updates": shards + scalars * share,
        }
    curvature = {
        "curvature factors": BYTES * sum(map(_travelling_elements, layers)) * share,
        # Numbers of samples and rows in float64, and what became of each layer.
        "control": 2 * share * (8 * sum(1 + layer.groups for layer in layers) + 4 * count),
    }
    return Traffic(wrapper, plain, plain | curvature)


def _wrapper(architecture: Architecture, method: Method) -> float:
    if method == "fsdp":
        # Gathered for the forward and again for the backward pass; the gradients are scattered in float32.
        return architecture.elements * (2 * FSDP_GATHERED + BYTES)
    averaged = architecture.other_elements if method == "lean" else architecture.elements
    return 2 * BYTES * averaged + architecture.buffer_bytes


def _lean_gradients(update: int, count: int, ranks: int) -> float:
    if ranks % 2:
        # The rank's gradient, its part of Gd, whether it has a pair, and that it uses the layer.
        return (2 * update + 2 * BYTES * count) * (ranks - 1) / ranks
    # Added up among the W/2 ranks of a side; then one of two owners side by side gives its sum to the other.
    # With each gradient goes the number of ranks that use the layer.
    counted = update + BYTES * count
    return counted * (1 - 2 / ranks) + counted / ranks


def _travelling_elements(layer: LayerSize) -> int:
    """Give the elements of A and G as sent: a triangle as a rectangle, for odd sides half a row longer."""
    if layer.single:
        return layer.gradient_elements
    sides = ((layer.in_dim, layer.diagonal_A), (layer.out_dim, layer.diagonal_G))
    return sum(
        layer.groups * side if diagonal else math.prod(packed_shape((layer.groups, side, side)))
        for side, diagonal in sides
    )


def plan_for(layers: Sequence[LayerSize], ranks: int) -> Plan:
    """Plan as the optimizer does; nodes would only give the ranks other numbers."""
    return make_plan(layers, ranks, curvature_interval=INTERVAL)


def factor_bytes(layers: Sequence[LayerSize], plan: Plan) -> list[int]:
    """Predict the bytes of factors and inverses on each rank."""
    return [2 * BYTES * total for total in _totals(plan, [layer.factor_elements for layer in layers])]


def burden(layers: Sequence[LayerSize], plan: Plan) -> Burden:
    """Give what the owners keep and compute."""
    return Burden(
        owners=len(set(plan.owners)),
        imbalance=plan.imbalance,
        factor_bytes=max(factor_bytes(layers, plan)),
        inversion_flops=max(_totals(plan, [layer.inversion_flops for layer in layers])),
        product_flops=max(_totals(plan, [layer.product_flops for layer in layers])),
    )


def _totals(plan: Plan, values: Sequence[int]) -> list[int]:
    return [sum(values[layer] for layer in plan.layers_of(rank)) for rank in range(plan.ranks)]


@dataclass(frozen=True)
class Prediction:
    """One row of the tables: an architecture on so many GPUs.

    Attributes:
        ranks: number of GPUs, one rank each.
        baseline_bytes: that plain DistributedDataParallel, or FSDP, sends per rank and step.
        ratios: bytes of each method as a multiple of the baseline, curvature updates spread over the
            interval; None on one rank, which sends nothing.
        extra_seconds: of each method for what it sends beyond the baseline, with nothing hidden behind
            computation, and without latency.
        burden: of the owner that has most.
        product_seconds: of a step.
        inversion_seconds: of a curvature update.
    """

    ranks: int
    baseline_bytes: float
    ratios: Mapping[str, float | None]
    extra_seconds: Mapping[str, float]
    burden: Burden
    product_seconds: float
    inversion_seconds: float


DDP_METHODS: tuple[Method, ...] = ("kfac", "compatible", "lean")
FSDP_METHODS: tuple[Method, ...] = ("fsdp",)


def predict(
    architecture: Architecture, ranks: int, methods: Sequence[Method], hardware: Hardware = H100
) -> Prediction:
    """Predict a step of ``methods``: either those under DistributedDataParallel or that under FSDP."""
    # Without its optimizer, FSDP sends the same.
    baseline = traffic(architecture, ranks, "fsdp" if "fsdp" in methods else "sgd").wrapper
    sent = {method: traffic(architecture, ranks, method).amortised() for method in methods}
    bandwidth = hardware.bandwidth(ranks)
    most = burden(architecture.layers, plan_for(architecture.layers, ranks))
    return Prediction(
        ranks=ranks,
        baseline_bytes=baseline,
        ratios={name: each / baseline if baseline else None for name, each in sent.items()},
        extra_seconds={name: (each - baseline) / bandwidth for name, each in sent.items()},
        burden=most,
        product_seconds=most.product_flops / hardware.matmul,
        inversion_seconds=most.inversion_flops / hardware.inversion,
    )
