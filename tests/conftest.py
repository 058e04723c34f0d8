"""Settings shared by all tests."""

import gc

import torch

# The tensors of the tests are tiny: more threads only cost, and one thread gives the same sums everywhere.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Tests that call `gc.collect` need not walk through torch and every test module each time."""
    gc.collect()
    gc.freeze()
