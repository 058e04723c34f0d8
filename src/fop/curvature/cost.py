"""What a weight's curvature takes: memory, messages between ranks, operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Products with F and F̂⁻¹ in a FOP step: F·Ga, F̂⁻¹·Ga and F̂⁻¹·G⊥.
PRODUCTS = 3


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one layer's curvature, and what keeping, sending and using it takes.

    Attributes:
        groups: number of blocks of the curvature, each with an A and a G.
        in_dim: side of A, the bias column included.
        diagonal_A, diagonal_G: whether only the diagonal is kept of A or G.
        blocks_A, blocks_G: in how many blocks along its diagonal A or G is kept.
        single: whether the curvature is one diagonal in the shape of the gradient (norms), without a G.
    """

    name: str
    groups: int
    out_dim: int
    in_dim: int
    diagonal_A: bool = False
    diagonal_G: bool = False
    single: bool = False
    blocks_A: int = 1
    blocks_G: int = 1

    @property
    def gradient_elements(self) -> int:
        """Entries of the gradient matrix, and of the update that the owner sends."""
        return self.groups * self.out_dim * self.in_dim

    @property
    def factor_elements(self) -> int:
        """Entries of A and G as stored, all groups; the inverses take as many again."""
        return self._sum_over_factors(lambda side: side * side)

    @property
    def packed_elements(self) -> int:
        """Entries of A and G as sent, all groups: of a symmetric matrix one triangle, of a diagonal all."""
        return self._sum_over_factors(lambda side: side * (side + 1) // 2)

    @property
    def inversion_flops(self) -> int:
        """Floating-point operations of one curvature update's inversions, all groups.

        d³ for a matrix of side d: Cholesky d³/3, the inverse from it 2d³/3 (LAPACK potrf, potri; solving for
        the identity instead makes it up to 7/3 of that). d for a diagonal.
        """
        return self._sum_over_factors(lambda side: side**3)

    @property
    def product_flops(self) -> int:
        """Floating-point operations of one step's three products F·Ga, F̂⁻¹·Ga and F̂⁻¹·G⊥, all groups.

        Each multiplies the gradient by two factors: 2·out·in·side for blocks of a side, out·in for a
        diagonal.
        """
        per_entry = sum(1 if diagonal else 2 * side for _, side, diagonal in self._factors)
        return PRODUCTS * self.gradient_elements * (1 if self.single else per_entry)

    @property
    def _factors(self) -> list[tuple[int, int, bool]]:
        """Return for A and G number and side of the blocks, of side 1 for a diagonal, and if it is one."""
        A = self.in_dim, self.blocks_A, self.diagonal_A
        G = self.out_dim, self.blocks_G, self.diagonal_G
        return [
            (side, 1, True) if diagonal else (count, -(-side // count), False)
            for side, count, diagonal in (A, G)
        ]

    def _sum_over_factors(self, of_block: Callable[[int], int]) -> int:
        """Sum ``of_block(side)`` over the blocks of the factors."""
        if self.single:
            return self.gradient_elements
        return self.groups * sum(count * of_block(side) for count, side, _ in self._factors)
