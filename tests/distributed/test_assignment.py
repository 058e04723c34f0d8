"""Which rank owns which layer: sizes of layers, balance of real models, bounds, determinism, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from architectures import gpt, resnet50, vit_b
from distributed_internals import (
    KroneckerBlock,
    Layer,
    LayerOptions,
    LayerSize,
    Plan,
    describe,
    fop_direction,
    make_plan,
)
from fop.curvature import make_curvature

thorough = settings(derandomize=True, deadline=None, max_examples=60, database=None)

MODELS = {"resnet50": resnet50(), "vit_b": vit_b(), "gpt": gpt(24, 2048, 50257)}
RANKS = [1, 2, 3, 4, 6, 8, 16, 32, 64]
# Ranks with the nodes that they may be on, None for a plan that does not look at nodes.
CLUSTERS = [(r, n) for r in RANKS for n in (None, 1, 2, 3, 4, 8, r) if n is None or r % n == 0]


# --- what the plan should be, written another way ----------------------------------------------------------


def exact_costs(layers: Sequence[LayerSize], interval: int = 100) -> list[Fraction]:
    """Each layer's share of the time of a step plus its share of the memory, from the sides alone."""
    times, memories = [], []
    for layer in layers:
        out, columns = layer.out_dim, layer.in_dim
        entries = out * columns
        if layer.single:
            product, inversion, memory = entries, entries, entries
        else:
            product = entries if layer.diagonal_A else 2 * out * columns**2
            product += entries if layer.diagonal_G else 2 * out**2 * columns
            inversion = (columns if layer.diagonal_A else columns**3) + (out if layer.diagonal_G else out**3)
            memory = (columns if layer.diagonal_A else columns**2) + (out if layer.diagonal_G else out**2)
        times.append(layer.groups * (3 * product + Fraction(inversion, interval)))
        memories.append(Fraction(layer.groups * memory))
    return [t / sum(times) + m / sum(memories) for t, m in zip(times, memories, strict=True)]


def exact_loads(costs: Sequence[Fraction], owners: Sequence[int], ranks: int) -> list[Fraction]:
    return [
        sum((cost for cost, owner in zip(costs, owners, strict=True) if owner == rank), Fraction(0))
        for rank in range(ranks)
    ]


def exact_bound(costs: Sequence[Fraction], ranks: int) -> Fraction:
    bound = sum(costs) / ranks
    for heap in range(1, len(costs) + 1):
        # The fewest layers of which one rank must have `heap`.
        if (crowd := (heap - 1) * ranks + 1) <= len(costs):
            largest = sorted(costs)[-crowd:]
            bound = max(bound, sum(largest[:heap], Fraction(0)))
    return bound


def sums(layers: Sequence[LayerSize], plan: Plan, attribute: str, *, together: int = 1) -> list[int]:
    """Sum of an attribute over the layers of each rank, or of every ``together`` ranks in a row."""
    totals = [0] * (plan.ranks // together)
    for layer, owner in zip(layers, plan.owners, strict=True):
        totals[owner // together] += getattr(layer, attribute)
    return totals


# --- sizes of a layer --------------------------------------------------------------------------------------


REAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 3), {}),
    "linear no bias": (lambda: nn.Linear(5, 3, bias=False), {}),
    "large input": (lambda: nn.Linear(5, 3), {"max_factor_dim": 4}),
    "large output": (lambda: nn.Linear(3, 5), {"max_factor_dim": 4}),
    "both large": (lambda: nn.Linear(6, 5), {"max_factor_dim": 4}),
    "blocks": (lambda: nn.Linear(7, 5), {"block_dim": 3}),
    "groups": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), {}),
    "groups and blocks": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2), {"block_dim": 2}),
    "embedding": (lambda: nn.Embedding(7, 3), {}),
    "norm": (lambda: nn.LayerNorm(6), {"path": "fop"}),
}


def real(name: str) -> tuple[Layer, LayerSize]:
    """A layer as the library has it, and its size."""
    build, options = REAL[name]
    described = describe(build(), LayerOptions(**options))
    assert isinstance(described, list), described
    has_bias = "no bias" not in name and name != "embedding"
    layer = described[0].build(has_bias, LayerOptions(**options))
    return layer, make_curvature(layer, [layer], {}).size(name)


@pytest.mark.parametrize("name", REAL)
def test_sizes_are_those_of_the_tensors(name: str) -> None:
    layer, size = real(name)
    factors = [torch.empty(shape) for shape in layer.factor_shapes]
    assert size.gradient_elements == torch.empty(layer.matrix_shape).numel()
    assert size.factor_elements == sum(factor.numel() for factor in factors)
    sent = 0
    for factor in factors:
        symmetric = not size.single and factor.dim() == 3
        sides = factor.shape[-1]
        sent += len(factor) * torch.tril_indices(sides, sides).shape[1] if symmetric else factor.numel()
    assert size.packed_elements == sent


@pytest.mark.parametrize("name", ["linear", "linear no bias", "groups"])
def test_products_are_what_torch_counts(name: str) -> None:
    layer, size = real(name)
    groups, out, columns = layer.matrix_shape
    A, G = (torch.eye(side).expand(groups, side, side) for side in (columns, out))
    average, difference = torch.randn(2, *layer.matrix_shape)
    with FlopCounterMode(display=False) as counter:
        fop_direction(KroneckerBlock(A, G, A, G), average, difference)
    assert size.product_flops == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("size", "products", "inversions"),
    [
        (LayerSize("", 2, 3, 5), 2 * 3 * 2 * 3 * 5 * (3 + 5), 2 * (27 + 125)),
        (LayerSize("", 2, 3, 5, diagonal_A=True), 2 * 3 * (15 + 2 * 3 * 3 * 5), 2 * (27 + 5)),
        (LayerSize("", 2, 3, 5, diagonal_G=True), 2 * 3 * (15 + 2 * 3 * 5 * 5), 2 * (3 + 125)),
        (LayerSize("", 2, 3, 5, diagonal_A=True, diagonal_G=True), 2 * 3 * 2 * 15, 2 * 8),
        (LayerSize("", 1, 2, 5, single=True), 3 * 10, 10),
    ],
)
def test_operations_of_diagonals(size: LayerSize, products: int, inversions: int) -> None:
    assert (size.product_flops, size.inversion_flops) == (products, inversions)


# --- plans of real models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "ranks_per_node"), CLUSTERS)
@pytest.mark.parametrize("name", MODELS)
def test_balance(name: str, ranks: int, ranks_per_node: int | None) -> None:
    layers = MODELS[name]
    plan = make_plan(layers, ranks, ranks_per_node=ranks_per_node)
    costs = exact_costs(layers)
    loads = exact_loads(costs, plan.owners, ranks)
    bound = exact_bound(costs, ranks)
    assert max(loads) <= Fraction(110, 100) * bound
    assert plan.imbalance == pytest.approx(float(max(loads) / bound), rel=1e-12)
    assert plan.lower_bound == pytest.approx(float(bound), rel=1e-12)
    assert plan.loads == pytest.approx([float(load) for load in loads], rel=1e-12)
    assert sum(plan.loads) == pytest.approx(2)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["resnet50", "vit_b"])
def test_memory_and_time_fall_with_ranks(name: str, ranks: int) -> None:
    """Not below what the largest layer takes: 1/7.2 of ResNet-50's memory, 1/32.7 of ViT-B/16's."""
    layers = MODELS[name]
    plan = make_plan(layers, ranks)
    for attribute in ("factor_elements", "product_flops"):
        sizes = [getattr(layer, attribute) for layer in layers]
        assert max(sums(layers, plan, attribute)) <= 1.2 * max(sum(sizes) / ranks, *sizes)
    largest = {"resnet50": 7.2, "vit_b": 32.7}
    share = sum(layer.factor_elements for layer in layers) / max(layer.factor_elements for layer in layers)
    assert share == pytest.approx(largest[name], rel=0.01)


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(16, 8), (32, 8), (64, 8), (16, 4), (8, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_nodes_send_equal_parts(name: str, ranks: int, ranks_per_node: int) -> None:
    """The GPT's embedding is 8 % of what is sent and little curvature, so its node sends more."""
    layers = MODELS[name]
    plan = make_plan(layers, ranks, ranks_per_node=ranks_per_node)
    sent = sums(layers, plan, "gradient_elements", together=ranks_per_node)
    assert max(sent) <= (1.45 if name == "gpt" else 1.08) * sum(sent) / len(sent)
    # Nothing is lost for it.
    assert sorted(plan.loads) == sorted(make_plan(layers, ranks).loads)


@pytest.mark.parametrize(("name", "ranks", "most"), [("resnet50", 64, 3), ("gpt", 32, 4)])
def test_heavy_layers_in_a_row_are_spread_over_nodes(name: str, ranks: int, most: int) -> None:
    layers = MODELS[name]
    median = sorted(layer.factor_elements for layer in layers)[len(layers) // 2]

    def crowd(plan: Plan) -> int:
        """How many of eight heavy layers in a row are on one node, at most."""
        owned = zip(layers, plan.owners, strict=True)
        nodes = [owner // 8 for layer, owner in owned if layer.factor_elements >= median]
        return max(nodes[i : i + 8].count(nodes[i]) for i in range(len(nodes) - 7))

    assert crowd(make_plan(layers, ranks, ranks_per_node=8)) <= most < crowd(make_plan(layers, ranks))


def test_more_ranks_than_layers() -> None:
    layers = gpt(80, 8192, 128256)
    plan = make_plan(layers, 1024, ranks_per_node=8)
    assert len(set(plan.owners)) == len(layers)
    assert plan.imbalance == 1
    assert plan.loads.count(0.0) == 1024 - len(layers)
    # The embedding sends as much as four other layers, and is alone on its node.
    sent = sums(layers, plan, "gradient_elements", together=8)
    assert sent[plan.owners[0] // 8] == layers[0].gradient_elements
    assert sorted(sent)[-2] <= 1.5 * sum(sent) / 128


# --- bounds ------------------------------------------------------------------------------------------------


@st.composite
def small_models(draw: st.DrawFn) -> list[LayerSize]:
    sides = st.integers(1, 12)
    flags = st.booleans()
    size = st.builds(LayerSize, st.just("x"), st.integers(1, 3), sides, sides, flags, flags, flags)
    return draw(st.lists(size, min_size=1, max_size=7))


@thorough
@given(layers=small_models(), ranks=st.integers(1, 3), interval=st.sampled_from([1, 7, 100]))
def test_against_the_best_of_all_assignments(layers: list[LayerSize], ranks: int, interval: int) -> None:
    plan = make_plan(layers, ranks, curvature_interval=interval)
    costs = exact_costs(layers, interval)
    best = min(
        max(exact_loads(costs, owners, ranks))
        for owners in itertools.product(range(ranks), repeat=len(layers))
        # Ranks are alike, so the first layer may stay on the first.
        if owners[0] == 0
    )
    found = max(exact_loads(costs, plan.owners, ranks))
    assert plan.lower_bound <= float(best) * (1 + 1e-12)
    assert best <= found <= Fraction(4, 3) * best
    assert max(plan.loads) == pytest.approx(float(found), rel=1e-12)


@thorough
@given(layers=small_models(), nodes=st.integers(1, 4), ranks_per_node=st.integers(1, 4))
def test_nodes_change_only_the_numbers_of_ranks(
    layers: list[LayerSize], nodes: int, ranks_per_node: int
) -> None:
    flat = make_plan(layers, nodes * ranks_per_node)
    plan = make_plan(layers, nodes * ranks_per_node, ranks_per_node=ranks_per_node)
    renumbered = set(zip(flat.owners, plan.owners, strict=True))
    assert len(renumbered) == len(set(flat.owners)) == len(set(plan.owners))
    assert all(flat.loads[old] == plan.loads[new] for old, new in renumbered)
    assert all(0 <= new < plan.ranks for new in plan.owners)


def test_lower_bound_counts_layers_that_must_share_a_rank() -> None:
    def bound(count: int, ranks: int) -> float:
        """The lower bound for equal layers, in layers."""
        return make_plan([LayerSize("x", 1, 4, 4)] * count, ranks).lower_bound * count / 2

    assert [bound(count, 3) for count in range(1, 8)] == pytest.approx([1, 1, 1, 2, 2, 2, 3])


def test_inversions_weigh_less_the_rarer_they_are() -> None:
    # A large side costs inversions, many groups cost products.
    layers = [LayerSize("inverted", 1, 1, 40), LayerSize("multiplied", 3000, 3, 3)]
    loads = []
    for interval in (1, 10, 1000):
        plan = make_plan(layers, 2, curvature_interval=interval)
        loads.append([plan.loads[owner] for owner in plan.owners])
        assert loads[-1] == pytest.approx([float(cost) for cost in exact_costs(layers, interval)])
    assert loads[0][0] > 1.1 * loads[1][0] > 1.1 * loads[2][0]


# --- the same on every rank --------------------------------------------------------------------------------

PLANS = """
import json
from architectures import gpt, resnet50
from distributed_internals import make_plan
plans = [make_plan(layers, 8, ranks_per_node=n) for layers in (resnet50(), gpt(3, 64, 99)) for n in (None, 2)]
print(json.dumps([[plan.owners, plan.loads] for plan in plans]))
"""


@pytest.mark.slow
def test_every_process_makes_the_same_plan() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    printed = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PLANS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    here = [
        make_plan(layers, 8, ranks_per_node=n) for layers in (resnet50(), gpt(3, 64, 99)) for n in (None, 2)
    ]
    assert printed[0] == printed[1] == [[list(plan.owners), list(plan.loads)] for plan in here]


def test_ties_go_by_position() -> None:
    """Names decide nothing: equal layers go in their order to the lowest rank with the smallest load."""
    sizes = [LayerSize(name, 1, 4, 4) for name in "zyxwv"]
    assert make_plan(sizes, 3).owners == (0, 1, 2, 0, 1)
    assert make_plan(sizes, 4, ranks_per_node=2).owners == (0, 2, 3, 1, 0)
    layers = MODELS["vit_b"]
    renamed = [dataclasses.replace(layer, name=str(-i)) for i, layer in enumerate(layers)]
    assert make_plan(renamed, 6) == make_plan(layers, 6)


# --- odd and bad input -------------------------------------------------------------------------------------


def test_layers_of_a_rank() -> None:
    plan = make_plan(MODELS["resnet50"], 6)
    owned = [plan.layers_of(rank) for rank in range(6)]
    assert sorted(itertools.chain(*owned)) == list(range(54))
    for rank, positions in enumerate(owned):
        assert list(positions) == sorted(positions)
        assert {plan.owners[position] for position in positions} == {rank}


@pytest.mark.parametrize("rank", [-1, 3])
def test_no_such_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} must be in \[0, 2\]"):
        make_plan(MODELS["vit_b"], 3).layers_of(rank)


def test_no_layers() -> None:
    plan = make_plan([], 4, ranks_per_node=2)
    assert plan == Plan(owners=(), ranks=4, loads=(0.0,) * 4, lower_bound=0.0)
    assert plan.imbalance == 1
    assert plan.layers_of(3) == ()


def test_layers_without_entries() -> None:
    plan = make_plan([LayerSize("empty", 1, 0, 0), LayerSize("x", 1, 2, 2)], 2)
    assert sorted(plan.loads) == [0.0, 2.0]
    assert make_plan([LayerSize("empty", 1, 0, 0)], 2).imbalance == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks=0 must be 1 or more; give the number of processes"),
        ({"ranks": -2}, ValueError, "ranks=-2 must be 1 or more"),
        ({"ranks": 2.0}, TypeError, "ranks=2.0 must be a whole number"),
        ({"ranks": True}, TypeError, "ranks=True must be a whole number"),
        ({"curvature_interval": 0}, ValueError, "curvature_interval=0 must be 1 or more; give the steps"),
        ({"curvature_interval": 0.5}, TypeError, "curvature_interval=0.5 must be a whole number"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node=0 must be 1 or more; give the processes"),
        ({"ranks_per_node": "2"}, TypeError, "ranks_per_node='2' must be a whole number"),
        ({"ranks_per_node": 3}, ValueError, "ranks=4 must be a multiple of ranks_per_node=3; give as many"),
        ({"ranks_per_node": 8}, ValueError, "ranks=4 must be a multiple of ranks_per_node=8"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(MODELS["vit_b"], **{"ranks": 4, **options})
