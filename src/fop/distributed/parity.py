"""Algorithm 1 of Lu & Armour (AAAI 2026): even ranks give g1, odd ranks g2."""

from __future__ import annotations


def side_of(rank: int) -> int:
    """Return which sub-batch a rank's batch belongs to: 0 for even ranks (primary), 1 for odd (secondary)."""
    return rank % 2


def difference_weight(rank: int, size: int) -> float:
    """Return what a rank's gradient weighs in Gd = g1 - g2, where g1 and g2 are means over their ranks."""
    return 1 / ((size + 1) // 2) if side_of(rank) == 0 else -1 / (size // 2)


def representative(owner: int, side: int) -> int:
    """Return the rank of a side that takes its gradients for an owner: the owner, or the one beside it.

    For an even number of ranks; neighbours are on the same node.
    """
    return owner if side_of(owner) == side else owner ^ 1
