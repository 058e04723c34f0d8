"""Numbers that the host reads later, so that it does not wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Transfer:
    """A tensor on its way to the host; from other devices than CUDA's it is there at once."""

    def __init__(self, numbers: Tensor) -> None:
        # Into pinned memory, without which the copy would wait.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._there = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def read(self) -> Any:
        """Return the numbers, nested as in the tensor; waits for what was asked before the transfer."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()
