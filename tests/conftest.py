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
# Of more cases than these `make test-all` runs half, and those marked whole.
HALF_ABOVE = 32


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as many what `make test` leaves to others, and as rest what `make test-all` does."""
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("rest"):
            item.add_marker(pytest.mark.many)
        else:
            families[item.nodeid.partition("[")[0]].append(item)
    for name, cases in families.items():
        quick = max(AT_LEAST, len(cases) // ONE_IN)
        usual = len(cases) // 2 if len(cases) > HALF_ABOVE else len(cases)
        # The same in every worker; every so many would always be of the same kind.
        for place, item in enumerate(random.Random(name).sample(cases, len(cases))):
            if place >= quick:
                item.add_marker(pytest.mark.many)
            if place >= usual and not item.get_closest_marker("whole"):
                item.add_marker(pytest.mark.rest)


def pytest_collection_finish() -> None:
    """Tests that call `gc.collect` need not walk through torch and every test module each time."""
    gc.collect()
    gc.freeze()
