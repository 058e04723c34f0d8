"""Settings shared by all tests."""

import gc
from collections import defaultdict

import pytest
import torch

# The tensors of the tests are tiny: more threads only cost, and one thread gives the same sums everywhere.
torch.set_num_threads(1)

# Of the cases of one test `make test` runs one in so many, and so many at least.
ONE_IN, AT_LEAST = 8, 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark most cases of tests that have many; `make test` leaves them to `make test-all`."""
    families = defaultdict(list)
    for item in items:
        families[item.nodeid.partition("[")[0]].append(item)
    for cases in families.values():
        kept = min(len(cases), max(AT_LEAST, len(cases) // ONE_IN))
        for n, item in enumerate(cases):
            # Spread evenly: neighbours are alike.
            if n and n * kept // len(cases) == (n - 1) * kept // len(cases):
                item.add_marker(pytest.mark.many)


def pytest_collection_finish() -> None:
    """Tests that call `gc.collect` need not walk through torch and every test module each time."""
    gc.collect()
    gc.freeze()
