"""Changed equations, for the studies that ask what the paper's formula leaves open.

The only file here that reaches behind the public names of `fop`: an equation is no option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from fop.curvature import KroneckerCurvature


def _damped_product(curvature: KroneckerCurvature, V: Tensor) -> Tensor:
    """Return F̂·V of a curvature that holds F̂⁻¹ as factors; those that are diagonals are (groups, side)."""
    inverses = (curvature.state[name] for name in curvature.inverses)
    A_inv, G_inv = (torch.diag_embed(each) if each.dim() == 2 else each for each in inverses)
    return torch.linalg.inv(G_inv) @ V @ torch.linalg.inv(A_inv)


@contextmanager
def _damped_projection() -> Iterator[None]:
    with patch.object(KroneckerCurvature, "fisher", _damped_product):
        yield


# By name: what a run is made within.
FORMULAS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "paper": nullcontext,
    "damped projection": _damped_projection,
}
