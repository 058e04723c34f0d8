"""How many operations of torch one `step()` takes, apart from views; as a script, prints the numbers.

On a GPU each costs the host about 10 µs, whatever its size, so that they bound how small a step can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fop import FOP, KFAC

# Of a step, and of every `Linear` with a bias more; docs/architecture.md has them, too.
BUDGETS = {
    (FOP, "plain"): (315, 54),
    (FOP, "statistics"): (450, 84),
    (KFAC, "plain"): (180, 25),
    (KFAC, "statistics"): (305, 54),
}


class CountOperations(TorchDispatchMode):
    """Counts operations that compute or copy something."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        returned = [each.alias_info for each in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not view and function is not torch.ops.aten.promote_types.default
        return function(*args, **(kwargs or {}))


def operations(kind: type[FOP], statistics: str, layers: int) -> int:
    """Return the operations of a step of a network of so many linear layers of one shape, and another."""
    torch.manual_seed(0)
    hidden = [module for _ in range(layers) for module in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 10))
    optimizer = kind(model, curvature_interval=1 if statistics == "statistics" else 1000)
    x, y = torch.randn(64, 16), torch.randint(10, (64,))
    # Past the first updates of the curvature, which come in steps 0, 1, 2, 4, 8 and 16.
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        with CountOperations() as counted:
            optimizer.step()
    return counted.count


def numbers(kind: type[FOP], statistics: str) -> tuple[float, float]:
    """Return the operations of a step, without those of its layers, and of each layer."""
    few, many = (operations(kind, statistics, layers) for layers in (2, 12))
    each = (many - few) / 10
    return few - 3 * each, each


@pytest.mark.parametrize(("kind", "statistics"), BUDGETS)
def test_operations_of_a_step(kind: type[FOP], statistics: str) -> None:
    found, budget = numbers(kind, statistics), BUDGETS[kind, statistics]
    assert all(x <= y for x, y in zip(found, budget, strict=True)), f"{found}, and {budget} are allowed"
    # Had the counter missed most of them, no budget would be too small.
    assert found[0] > budget[0] / 2 and found[1] > budget[1] / 2


if __name__ == "__main__":
    for of_kind, of_step in BUDGETS:
        print(of_kind.__name__, of_step, numbers(of_kind, of_step))
