"""Changed equations, for the studies that ask what the paper's formula leaves open.

The only file here that reaches behind the public names of `fop`: an equation is no option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from fop.algebra import KroneckerBlock
from torch import Tensor


def _damped_product(block: KroneckerBlock, V: Tensor) -> Tensor:
    """Return F̂·V of a block that holds F̂⁻¹ as factors; those that are diagonals are (groups, side)."""
    G_inv, A_inv = (
        torch.diag_embed(each) if each.dim() == 2 else each for each in (block.G_inv, block.A_inv)
    )
    product: Tensor = torch.linalg.inv(G_inv) @ V @ torch.linalg.inv(A_inv)
    return product


@contextmanager
def _damped_projection() -> Iterator[None]:
    with patch.object(KroneckerBlock, "fisher", _damped_product):
        yield


# By name: what a run is made within.
FORMULAS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "paper": nullcontext,
    "damped projection": _damped_projection,
}
