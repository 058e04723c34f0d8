"""Settings shared by all tests."""

import gc
import random
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
    for name, cases in families.items():
        kept = min(len(cases), max(AT_LEAST, len(cases) // ONE_IN))
        # The same in every worker; every so many would always be of the same kind.
        for item in random.Random(name).sample(cases, len(cases) - kept):
            item.add_marker(pytest.mark.many)


def pytest_collection_finish() -> None:
    """Tests that call `gc.collect` need not walk through torch and every test module each time."""
    gc.collect()
    gc.freeze()
