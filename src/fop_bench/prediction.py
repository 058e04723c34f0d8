"""What a step may take on more ranks, from what one rank was measured to take and the sizes of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fop.curvature import LayerSize, packed_shape
from fop.distributed import SKETCH, make_plan
from fop_bench.overhead import Row
from fop_bench.scale import CONTENDERS
from fop_bench.tables import section

PREDICTED = tuple(2**n for n in range(11))  # ranks, by default
BYTES = 4  # of an element: gradients, updates and factors travel and stay in float32
SCALARS = 11  # numbers that go with the update of a layer
NOTE = (
    "A prediction: **nobody has checked it against a cluster**. It is made of what one rank was measured to "
    "take, and of the sizes of the layers. MB: what a rank sends in a step, on average over the ranks, "
    "DistributedDataParallel's own included. Factors: factors and inverses of the fullest rank; owners: "
    "ranks that have any. Milliseconds, from least to most: what a step takes beyond SGD's is divided "
    "among the owners, as their products and inversions are, or not at all; and a rank sends {:g} GB a "
    "second, hidden behind nothing and without latency. *Curvature*: a step with a curvature update."
)


def predict(one: Sequence[Row], ranks: Sequence[int], bandwidth: float) -> list[Row]:
    """Predict every optimizer on every number of ranks, which send ``bandwidth`` bytes a second.

    ``one`` are the rows that `scale.measure_scale` gives of one rank.
    """
    by_name = {row["optimizer"]: row for row in one}
    rows = []
    for count in ranks:
        names = ["fop"] if count == 1 else ["fop-compatible", "fop-lean"]
        for name in ("sgd", "kfac", *names):
            row = _predict(by_name["sgd"], by_name[name.split("-")[0]], count, bandwidth, name)
            rows.append({"ranks": count, "optimizer": name, **row})
    return rows


def _predict(sgd: Row, row: Row, ranks: int, bandwidth: float, name: str) -> Row:
    sample = row["samples"][0]
    layers = [LayerSize(**each) for each in sample["layers"]]
    plan = make_plan(layers, ranks, curvature_interval=1)

    def fullest(of: Callable[[LayerSize], int]) -> int:
        return max(sum(of(layers[n]) for n in plan.layers_of(rank)) for rank in set(plan.owners) or (0,))

    def share(of: Callable[[LayerSize], int]) -> float:
        return fullest(of) / (sum(map(of, layers)) or 1)

    sent = traffic(layers, sample["gradient_bytes"], sample["buffer_bytes"], ranks, name)
    of_sgd, plain = sgd["plain_seconds"][0], row["plain_seconds"][0]
    least, most = (
        {"plain": of_sgd + (plain - of_sgd) * share(lambda each: each.product_flops)},
        {"plain": plain},
    )
    if row["curvature_seconds"]:
        most["curvature"] = row["curvature_seconds"][0]
        update = (most["curvature"] - plain) * share(lambda each: each.inversion_flops)
        least["curvature"] = least["plain"] + update
    total = {kind: sent["wrapper"] + sum(sent[kind].values()) for kind in most}
    return {
        **{"owners": len(set(plan.owners)), "traffic": sent, "bytes": total},
        "factor_bytes": 2 * BYTES * fullest(lambda each: each.factor_elements),
        "seconds": {
            kind: [each[kind] + count / bandwidth for each in (least, most)] for kind, count in total.items()
        },
    }


def traffic(layers: Sequence[LayerSize], gradients: int, buffers: int, ranks: int, name: str) -> Row:
    """Predict the bytes that a rank sends in a step, as `measure_scale` has them: docs/scaling.md.

    ``gradients`` and ``buffers`` are the bytes of all parameters' gradients and of the model's buffers.
    """
    others, count = (ranks - 1) / ranks, len(layers)
    update = BYTES * sum(layer.gradient_elements for layer in layers)
    averaged = gradients - update if name == "fop-lean" else gradients
    sent: Row = {"wrapper": (2 * averaged + buffers) * others, "plain": {}, "curvature": {}}
    if not layers or ranks == 1:
        return sent
    plain = {"updates": (update + BYTES * SCALARS * count) * others}
    if name == "fop-compatible":
        # This rank's part of Gd, a sketch of its gradient, and whether it has a pair.
        plain["gradients"] = (update + BYTES * (SKETCH + 1) * count) * others
    elif name == "fop-lean":
        # The gradient, among the ranks of a side and between owners side by side, and how many ranks use the
        # layer; for an odd number of ranks its part of Gd, too, and whether it has a pair.
        twice = 1 + ranks % 2
        plain["gradients"] = twice * (update + BYTES * count) * others
    factors = {"curvature factors": BYTES * sum(map(_sent_elements, layers)) * others}
    # Numbers of samples and rows in float64, and what became of each layer.
    control = 8 * sum(1 + layer.groups for layer in layers) + 4 * count
    return sent | {"plain": plain, "curvature": plain | factors | {"control": 2 * control * others}}


def _sent_elements(layer: LayerSize) -> int:
    """Return the elements of A and G as sent: a triangle as a rectangle, for odd sides half a row longer."""
    if layer.single:
        return layer.gradient_elements
    elements = 0
    for side, blocks, diagonal in (
        (layer.in_dim, layer.blocks_A, layer.diagonal_A),
        (layer.out_dim, layer.blocks_G, layer.diagonal_G),
    ):
        block = -(-side // blocks)
        shape = (layer.groups, side) if diagonal else (layer.groups * blocks, block, block)
        elements += math.prod(packed_shape(shape))
    return elements


def predicted_table(rows: Sequence[Row], bandwidth: float) -> str:
    """Return the table of what was predicted as Markdown."""

    def cells(row: Row) -> Row:
        shown: Row = {"ranks": row["ranks"], "optimizer": CONTENDERS[row["optimizer"]][0]}
        shown |= {"owners": row["owners"] or "–", "factors MB": f"{row['factor_bytes'] / 1e6:.1f}"}
        for kind in ("plain", "curvature"):
            there = kind in row["seconds"]
            shown[f"{kind} MB"] = f"{row['bytes'][kind] / 1e6:.1f}" if there else "–"
            least, most = (f"{each * 1e3:.1f}" for each in row["seconds"].get(kind, (0, 0)))
            shown[f"{kind} ms"] = (least if least == most else f"{least}–{most}") if there else "–"
        return shown

    return section("Predicted", NOTE.format(bandwidth / 1e9), list(map(cells, rows))) + "\n"
