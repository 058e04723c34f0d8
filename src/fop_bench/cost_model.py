"""What several ranks pay for a step: bytes, memory, operations, and times under stated assumptions.

Bytes are those that a rank sends with a bandwidth-optimal algorithm, on average over the ranks
(docs/scaling.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fop.distributed import SKETCH, LayerSize, Plan, make_plan, packed_shape
from fop_bench.models import resnet50
from fop_bench.tables import section

Method = Literal["sgd", "kfac", "compatible", "lean", "fsdp"]
MAX_FACTOR_DIM = 8192  # the default: of a factor with a larger side, without the bias, the diagonal is kept
INTERVAL = 100  # the default of `curvature_interval`
BYTES = 4  # of an element: gradients, updates and factors travel and stay in float32
SCALARS = 9  # numbers that go with the update of a layer
FSDP_GATHERED = 2  # bytes of a weight that FSDP gathers, in bfloat16
GPUS_PER_NODE = 8

# Assumed rates of an H100 SXM, per second. None of them was measured by this project.
H100 = {
    # Operations of a product with a factor: half of the TF32 peak, 495·10¹² without sparsity (NVIDIA's
    # datasheet). Without TF32, as is torch's default, the peak is 67·10¹².
    "matmul": 0.5 * 495e12,
    # Of a Cholesky factorisation and the inverse from it: 15 % of the float32 peak. What cuSOLVER reaches
    # depends on the side, and has to be measured on your own GPU.
    "inversion": 0.15 * 67e12,
    "inside": 450e9,  # bytes that a GPU sends inside a node, one direction of NVLink's 900·10⁹
    "outside": 50e9,  # bytes through one network card, one card to a GPU: 400 Gbit/s
}


def bandwidth(ranks: int) -> float:
    """Return the bytes per second of every rank in a collective; rings leave a node through all its cards."""
    inside, outside = H100["inside"], H100["outside"]
    return inside if ranks <= GPUS_PER_NODE else min(inside, GPUS_PER_NODE * outside)


# --- Sizes


@dataclass(frozen=True)
class Architecture:
    """What the cost model needs to know of a model."""

    title: str
    layers: Sequence[LayerSize]  # those that take the FOP step
    other_elements: int  # number of parameters on the AdamW path
    buffer_bytes: int = 0  # what DistributedDataParallel copies from rank 0 before a forward pass

    @property
    def fop_elements(self) -> int:
        """Number of parameters that take the FOP step."""
        return sum(layer.gradient_elements for layer in self.layers)

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return self.fop_elements + self.other_elements


def linear(name: str, out_dim: int, in_dim: int, *, bias: bool = True, groups: int = 1) -> LayerSize:
    """Return the size of a linear layer with the default `max_factor_dim`."""
    diagonals = {"diagonal_A": in_dim > MAX_FACTOR_DIM, "diagonal_G": out_dim > MAX_FACTOR_DIM}
    return LayerSize(name, groups=groups, out_dim=out_dim, in_dim=in_dim + bias, **diagonals)


def embedding(name: str, vocabulary: int, features: int) -> LayerSize:
    """Return the size of an embedding, whose A is a diagonal of counts."""
    return LayerSize(name, groups=1, out_dim=features, in_dim=vocabulary, diagonal_A=True)


def architecture_of(model: nn.Module, title: str) -> Architecture:
    """Return the sizes of a model of linear layers and convolutions; all its other parameters take AdamW."""
    # Written without the optimizer's own search, so that a prediction from it can be wrong.
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            outputs, inputs = module.weight.flatten(1).shape
            bias = module.bias is not None
            layers.append(linear(name, outputs // groups, inputs, bias=bias, groups=groups))
    taken = sum(layer.gradient_elements for layer in layers)
    others = sum(param.numel() for param in model.parameters()) - taken
    return Architecture(title, layers, others, sum(buffer.nbytes for buffer in model.buffers()))


def decoder(
    blocks: int, width: int, vocabulary: int, sizes: Mapping[str, tuple[int, int]], *, bias: bool
) -> list[LayerSize]:
    """Return the layers of an embedding and ``blocks`` times the linear layers of some (outputs, inputs)."""
    layers = [embedding("embedding", vocabulary, width)]
    for block in range(blocks):
        layers += [linear(f"blocks.{block}.{name}", *sizes[name], bias=bias) for name in sizes]
    return layers


def gpt(blocks: int, width: int, vocabulary: int) -> list[LayerSize]:
    """A GPT whose output layer is tied to the embedding, without learned positions (Radford et al. 2019)."""
    sizes = {"qkv": (3 * width, width), "proj": (width, width)}
    sizes |= {"up": (4 * width, width), "down": (width, 4 * width)}
    return decoder(blocks, width, vocabulary, sizes, bias=True)


def llama(blocks: int, width: int, key_value_width: int, hidden: int, vocabulary: int) -> list[LayerSize]:
    """A GPT with grouped queries, SwiGLU, no biases and an output layer of its own (Touvron et al. 2023)."""
    sizes = {"qkv": (width + 2 * key_value_width, width), "proj": (width, width)}
    sizes |= {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    head = linear("head", vocabulary, width, bias=False)
    return [*decoder(blocks, width, vocabulary, sizes, bias=False), head]


def published() -> list[Architecture]:
    """Return the models that `fop-bench scale --predict` makes tables of; what is not in layers is norms."""
    with torch.device("meta"):
        resnet = architecture_of(resnet50(), "ResNet-50")
    return [
        Architecture(resnet.title, resnet.layers, resnet.other_elements),
        Architecture("GPT, 1.3 billion parameters", gpt(24, 2048, 50257), (2 * 24 + 1) * 2 * 2048),
        Architecture("GPT, 70 billion parameters", llama(80, 8192, 1024, 28672, 128256), (2 * 80 + 1) * 8192),
    ]


# --- Bytes, memory and times


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
    layers, count = architecture.layers, len(architecture.layers)
    if method == "fsdp":
        # Gathered for the forward and again for the backward pass; the gradients are scattered in float32.
        wrapper = architecture.elements * (2 * FSDP_GATHERED + BYTES) * share
    else:
        averaged = architecture.other_elements if method == "lean" else architecture.elements
        wrapper = (2 * BYTES * averaged + architecture.buffer_bytes) * share
    if method == "sgd" or ranks == 1:
        return Traffic(wrapper, {}, {})
    update, scalars = BYTES * architecture.fop_elements, BYTES * SCALARS * count
    # This rank's part of Gd; beside it a sketch of its gradient, and whether it has a pair.
    pair = {"gradients": (update + BYTES * (SKETCH + 1) * count) * share}
    if ranks % 2:
        # The rank's gradient, its part of Gd, whether it has a pair, and that it uses the layer.
        lean = (2 * update + 2 * BYTES * count) * share
    else:
        # Added up among the W/2 ranks of a side; then one of two owners side by side gives its sum to the
        # other. With each gradient goes the number of ranks that use the layer.
        lean = (update + BYTES * count) * ((1 - 2 / ranks) + 1 / ranks)
    # Every rank has a W-th of each gradient and wants a W-th of each update.
    shards = {"gradient shards": update / ranks * share, "updates": (update / ranks + scalars) * share}
    plain = {"updates": (update + scalars) * share}
    plain |= {"kfac": {}, "compatible": pair, "lean": {"gradients": lean}, "fsdp": pair | shards}[method]
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


def predict(architecture: Architecture, ranks: int, methods: Sequence[Method]) -> dict[str, Any]:
    """Predict a step of ``methods``, either those under DistributedDataParallel or that under FSDP.

    ``ratios`` are each method's bytes as a multiple of what the wrapper sends by itself; None on one rank.
    ``extra_seconds`` are for what is beyond that. The rest is of the owner that has most of it.
    """
    # Without its optimizer, FSDP sends the same.
    baseline = traffic(architecture, ranks, "fsdp" if "fsdp" in methods else "sgd").wrapper
    sent = {method: traffic(architecture, ranks, method).amortised() for method in methods}
    layers, plan = architecture.layers, plan_for(architecture.layers, ranks)
    products, inversions = (
        [each.product_flops for each in layers],
        [each.inversion_flops for each in layers],
    )
    return {
        **{"ranks": ranks, "baseline_bytes": baseline, "owners": len(set(plan.owners))},
        "ratios": {name: each / baseline if baseline else None for name, each in sent.items()},
        "extra_seconds": {name: (each - baseline) / bandwidth(ranks) for name, each in sent.items()},
        "factor_bytes": max(factor_bytes(layers, plan)),
        "product_seconds": max(_by_rank(plan, products)) / H100["matmul"],
        "inversion_seconds": max(_by_rank(plan, inversions)) / H100["inversion"],
    }


# --- Tables of what is predicted

REPLICATED = 3 * 4  # bytes of weight, gradient and momentum of a parameter, which DDP has on every rank
GPU_BYTES = 80e9
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LABELS: dict[Method, str] = {"kfac": "K-FAC", "compatible": "compatible", "lean": "lean", "fsdp": "FOP"}
ASSUMED = (
    f"Assumed for an H100: {H100['matmul'] / 1e12:.0f} TFLOPS in products, "
    f"{H100['inversion'] / 1e12:.0f} TFLOPS in Cholesky inversions, {H100['inside'] / 1e9:.0f} GB/s inside a "
    f"node of {GPUS_PER_NODE}, {H100['outside'] / 1e9:.0f} GB/s per GPU between nodes."
)


def predictions(gpus: Sequence[int] = GPUS) -> dict[str, list[dict[str, Any]]]:
    """Predict every published architecture on every number of GPUs, by title."""
    return {each.title: [predict(each, ranks, _methods(each)) for ranks in gpus] for each in published()}


def _methods(architecture: Architecture) -> Sequence[Method]:
    fits = REPLICATED * architecture.elements < GPU_BYTES
    return ("kfac", "compatible", "lean") if fits else ("fsdp",)


def predicted_tables(predicted: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Return one table an architecture as Markdown, as docs/scaling.md has them."""
    return "\n\n".join(_predicted(each, predicted[each.title]) for each in published()) + "\n"


def _predicted(architecture: Architecture, rows: Sequence[dict[str, Any]]) -> str:
    methods = _methods(architecture)
    wrapper, where = ("FSDP", "over all GPUs.") if "fsdp" in methods else ("DDP", "on every GPU.")

    def cells(row: dict[str, Any]) -> dict[str, object]:
        inversion = row["inversion_seconds"] * 1e3
        ratios = {f"{LABELS[name]} ×{wrapper}": row["ratios"][name] for name in methods}
        return {
            **{"GPUs": row["ranks"], f"{wrapper} GB": _short(row["baseline_bytes"] / 1e9)},
            **{head: f"{ratio:.3f}" if ratio else "–" for head, ratio in ratios.items()},
            **{"owners": row["owners"], "curvature GB": _short(row["factor_bytes"] / 1e9)},
            **{"products ms": _short(row["product_seconds"] * 1e3), "inversion ms": _short(inversion)},
            f"inversion ms ÷ {INTERVAL}": _short(inversion / INTERVAL),
            **{f"{LABELS[name]} sending ms": _short(row["extra_seconds"][name] * 1e3) for name in methods},
        }

    note = (
        f"{architecture.elements / 1e6:,.1f} million parameters, {len(architecture.layers)} layers with "
        "curvature. Weights, gradients and momentum in float32: "
        f"{REPLICATED * architecture.elements / 1e9:,.1f} GB {where}"
    )
    return section(f"{architecture.title}, under {wrapper}", note, list(map(cells, rows)), level=3)


def _short(value: float) -> str:
    """Write three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"
