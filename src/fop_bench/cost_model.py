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
DDP_METHODS: tuple[Method, ...] = ("kfac", "compatible", "lean")
FSDP_METHODS: tuple[Method, ...] = ("fsdp",)

INTERVAL = 100  # the default of `curvature_interval`
BYTES = 4  # of an element: gradients, updates and factors travel and stay in float32
SCALARS = 7  # numbers that go with the update of a layer
FSDP_GATHERED = 2  # bytes of a weight that FSDP gathers, in bfloat16
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Hardware:
    """Assumed rates of an H100 SXM, per second. None of them was measured by this project."""

    # Operations of a product with a factor: half of the TF32 peak, 495·10¹² without sparsity (NVIDIA's
    # datasheet). Without TF32, as is torch's default, the peak is 67·10¹².
    matmul: float = 0.5 * 495e12
    # Of a Cholesky factorisation and the inverse from it: 15 % of the float32 peak. What cuSOLVER reaches
    # depends on the side, and has to be measured on your own GPU.
    inversion: float = 0.15 * 67e12
    inside: float = 450e9  # bytes that a GPU sends inside a node, one direction of NVLink's 900·10⁹
    outside: float = 50e9  # bytes through one network card, one card to a GPU: 400 Gbit/s

    def bandwidth(self, ranks: int) -> float:
        """Return the bytes per second of every rank in a collective.

        Its rings go through all GPUs of a node before they leave it, and each takes another card: a node
        sends what one rank sends, through all of its cards.
        """
        return self.inside if ranks <= GPUS_PER_NODE else min(self.inside, GPUS_PER_NODE * self.outside)


H100 = Hardware()


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, on average over the ranks."""

    wrapper: float  # by DistributedDataParallel or FSDP
    plain: Mapping[str, float]  # by the optimizer in a step without a curvature update, by category
    curvature: Mapping[str, float]  # the same in a step with one

    def amortised(self, interval: int = INTERVAL) -> float:
        """Return the mean over ``interval`` steps, one of them with a curvature update."""
        plain, curvature = sum(self.plain.values()), sum(self.curvature.values())
        return self.wrapper + (plain * (interval - 1) + curvature) / interval


def traffic(architecture: Architecture, ranks: int, method: Method) -> Traffic:
    """Predict what a rank sends in a step."""
    share = (ranks - 1) / ranks
    if method == "fsdp":
        # Gathered for the forward and again for the backward pass; the gradients are scattered in float32.
        wrapper = architecture.elements * (2 * FSDP_GATHERED + BYTES) * share
    else:
        averaged = architecture.other_elements if method == "lean" else architecture.elements
        wrapper = (2 * BYTES * averaged + architecture.buffer_bytes) * share
    if method == "sgd" or ranks == 1:
        return Traffic(wrapper, {}, {})
    layers, count = architecture.layers, len(architecture.layers)
    update = BYTES * architecture.fop_elements
    scalars = BYTES * SCALARS * count
    plain = {"updates": (update + scalars) * share}
    if method in ("compatible", "fsdp"):
        # This rank's part of Gd; beside it a sketch of its gradient, and whether it has a pair.
        plain["gradients"] = (update + BYTES * (SKETCH + 1) * count) * share
    if method == "lean" and ranks % 2:
        # The rank's gradient, its part of Gd, whether it has a pair, and that it uses the layer.
        plain["gradients"] = (2 * update + 2 * BYTES * count) * share
    elif method == "lean":
        # Added up among the W/2 ranks of a side; then one of two owners side by side gives its sum to the
        # other. With each gradient goes the number of ranks that use the layer.
        plain["gradients"] = (update + BYTES * count) * ((1 - 2 / ranks) + 1 / ranks)
    elif method == "fsdp":
        # Every rank has a W-th of each gradient and wants a W-th of each update.
        plain["gradient shards"] = update / ranks * share
        plain["updates"] = update / ranks * share + scalars * share
    curvature = {
        "curvature factors": BYTES * sum(map(_sent_elements, layers)) * share,
        # Numbers of samples and rows in float64, and what became of each layer.
        "control": 2 * share * (8 * sum(1 + layer.groups for layer in layers) + 4 * count),
    }
    return Traffic(wrapper, plain, plain | curvature)


def _sent_elements(layer: LayerSize) -> int:
    """Return the elements of A and G as sent: a triangle as a rectangle, for odd sides half a row longer."""
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
    return [2 * BYTES * total for total in _by_rank(plan, [layer.factor_elements for layer in layers])]


def _by_rank(plan: Plan, values: Sequence[int]) -> list[int]:
    return [sum(values[layer] for layer in plan.layers_of(rank)) for rank in range(plan.ranks)]


@dataclass(frozen=True)
class Burden:
    """What the owner of some layers keeps and computes; of all ranks, the most that one has."""

    owners: int  # ranks that own a layer
    imbalance: float  # largest load as a multiple of the lower bound
    factor_bytes: int  # factors and inverses
    inversion_flops: int  # of one curvature update
    product_flops: int  # of one step


def burden(layers: Sequence[LayerSize], plan: Plan) -> Burden:
    """Return what the owners keep and compute."""
    return Burden(
        owners=len(set(plan.owners)),
        imbalance=plan.imbalance,
        factor_bytes=max(factor_bytes(layers, plan)),
        inversion_flops=max(_by_rank(plan, [layer.inversion_flops for layer in layers])),
        product_flops=max(_by_rank(plan, [layer.product_flops for layer in layers])),
    )


@dataclass(frozen=True)
class Prediction:
    """One row of the tables: an architecture on so many GPUs, one rank each.

    ``ratios`` are the bytes of each method as a multiple of the baseline, curvature updates spread over the
    interval; None on one rank, which sends nothing. ``extra_seconds`` are for what a method sends beyond the
    baseline, with nothing hidden behind computation, and without latency.
    """

    ranks: int
    baseline_bytes: float  # that plain DistributedDataParallel, or FSDP, sends per rank and step
    ratios: Mapping[str, float | None]
    extra_seconds: Mapping[str, float]
    burden: Burden  # of the owner that has most
    product_seconds: float  # of a step
    inversion_seconds: float  # of a curvature update


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
