"""Who owns which layer: a pure function from the layers' sizes to ranks, the same on every rank.

Costs are whole numbers until the end, so that no rounding decides a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from numbers import Integral
from typing import Any

from fop.curvature import LayerSize


@dataclass(frozen=True)
class Plan:
    """Which rank owns which layer.

    Attributes:
        owners: owner of each layer, in the order in which the layers were given.
        ranks: number of ranks.
        loads: cost of the layers of each rank; the costs of all layers add up to 2, see `make_plan`.
        lower_bound: no assignment has a smaller largest load.
    """

    owners: tuple[int, ...]
    ranks: int
    loads: tuple[float, ...]
    lower_bound: float

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Return the positions of the layers that ``rank`` owns; ValueError if there is no such rank."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank={rank} must be in [0, {self.ranks - 1}], the ranks of this plan")
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == rank)

    @property
    def imbalance(self) -> float:
        """Largest load as a multiple of the lower bound, 1 at best; 1 without layers."""
        return max(self.loads) / self.lower_bound if self.lower_bound else 1.0


def make_plan(
    layers: Sequence[LayerSize],
    ranks: int,
    *,
    curvature_interval: int = 100,
    ranks_per_node: int | None = None,
) -> Plan:
    """Return the owner of every layer by longest processing time first (Graham 1969).

    A layer's cost is its share of all layers' time plus its share of all layers' memory. Both must fall as
    1/ranks: all ranks wait for the slowest, and the fullest is what does not fit. A rank's share of either is
    at most its load, so balancing the sum bounds both, and no unit has to be weighed against another.

    Args:
        layers: in the same order on every rank.
        ranks: number of ranks.
        curvature_interval: steps between curvature updates, over which the time of inversions is spread.
        ranks_per_node: if given, node n has the ranks from n·ranks_per_node on, and what is sent is spread
            evenly over nodes. The loads are those of the plan without, in another order.

    Raises:
        ValueError: a number below 1, or ``ranks`` that is no multiple of ``ranks_per_node``.
        TypeError: not an integer.
    """
    _check_whole("ranks", ranks, "give the number of processes that share the layers")
    _check_whole("curvature_interval", curvature_interval, "give the steps between curvature updates")
    if ranks_per_node is not None:
        _check_whole("ranks_per_node", ranks_per_node, "give the processes on each node, or None")
        if ranks % ranks_per_node:
            raise ValueError(
                f"ranks={ranks} must be a multiple of ranks_per_node={ranks_per_node}; give as many ranks "
                "to each node, or None for a plan that does not look at nodes"
            )
    costs, unit = _costs(layers, curvature_interval)
    owners = _longest_first(costs, ranks)
    if ranks_per_node is not None:
        owners = _spread_over_nodes(owners, layers, ranks, ranks_per_node)
    loads = [0] * ranks
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += cost
    return Plan(tuple(owners), ranks, tuple(load / unit for load in loads), _lower_bound(costs, ranks, unit))


def _costs(layers: Sequence[LayerSize], interval: int) -> tuple[list[int], int]:
    """Return the cost of each layer as a whole number of some unit, and how many of these are 1."""
    # Of `interval` steps, one of them with a curvature update.
    times = [interval * layer.product_flops + layer.inversion_flops for layer in layers]
    memories = [layer.factor_elements for layer in layers]
    # Layers without a single entry cost nothing.
    all_time, all_memory = sum(times) or 1, sum(memories) or 1
    costs = [time * all_memory + memory * all_time for time, memory in zip(times, memories, strict=True)]
    return costs, all_time * all_memory


def _longest_first(costs: Sequence[int], ranks: int) -> list[int]:
    """Give each layer, the most expensive first, to the rank with the smallest load; return the owners."""
    heap = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        load, rank = heap[0]
        owners[layer] = rank
        heapreplace(heap, (load + costs[layer], rank))
    return owners


def _spread_over_nodes(
    owners: Sequence[int], layers: Sequence[LayerSize], ranks: int, ranks_per_node: int
) -> list[int]:
    """Return the owners with ranks renumbered, so that every node sends an equal part of the updates.

    Whole ranks are assigned to nodes, so loads do not change: the rank with most to send first, to the node
    that has least to send and still a place.
    """
    sent = [0] * ranks
    for owner, layer in zip(owners, layers, strict=True):
        sent[owner] += layer.gradient_elements
    nodes = [(0, 0, node) for node in range(ranks // ranks_per_node)]
    renumbered = [0] * ranks
    for rank in sorted(range(ranks), key=lambda rank: -sent[rank]):
        total, taken, node = heappop(nodes)
        renumbered[rank] = node * ranks_per_node + taken
        if taken + 1 < ranks_per_node:
            heappush(nodes, (total + sent[rank], taken + 1, node))
    return [renumbered[owner] for owner in owners]


def _lower_bound(costs: Sequence[int], ranks: int, unit: int) -> float:
    """Return a lower bound of the largest load of any assignment, in units of ``unit`` costs.

    It is the mean load; and, since some rank has k + 1 of the k·ranks + 1 most expensive layers, the cost of
    the k + 1 cheapest of these, for every k.
    """
    up_to = list(accumulate(sorted(costs, reverse=True), initial=0))
    crowded = [up_to[k * ranks + 1] - up_to[k * (ranks - 1)] for k in range((len(costs) - 1) // ranks + 1)]
    # Correctly rounded quotients of whole numbers keep their order, so the bound stays one.
    return max(up_to[-1] / (ranks * unit), max(crowded, default=0) / unit)


def _check_whole(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be a whole number, 1 or more; {remedy}")
    if value < 1:
        raise ValueError(f"{name}={value} must be 1 or more; {remedy}")
