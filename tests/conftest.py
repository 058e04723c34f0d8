"""Settings shared by all tests."""

import torch

# The tensors of the tests are tiny: more threads only cost, and one thread gives the same sums everywhere.
torch.set_num_threads(1)
