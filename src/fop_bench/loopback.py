"""Bytes that processes on this machine send each other, as the operating system counts them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

_COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")
_SEGMENT = 2**20  # bytes, gloo's largest


def loopback_bytes() -> int:
    """Give the bytes sent so far through the loopback interface, by all programs of this machine.

    Raises:
        OSError: they are not counted here.
    """
    return int(_COUNTER.read_text())


def why_uncounted() -> str | None:
    """Say why the bytes cannot be read; None where they can."""
    try:
        loopback_bytes()
    except (OSError, ValueError) as error:
        return f"the loopback interface's counter cannot be read: {error}"
    return None


def gloo_reduce_bytes(size: int, ranks: int) -> float:
    """Give the bytes that a rank sends in gloo's reduce of ``size`` bytes, on average over the ranks.

    The sums are scattered over a ring in S segments of 1 MiB at most, two or more for each rank. All but two
    are sent, where S(W-1)/W would do. Then they are gathered on one rank (gloo/reduce.cc).
    """
    if ranks == 1:
        return 0.0
    segments = max(2, math.ceil(size / _SEGMENT / ranks)) * ranks
    return size * (1 - 2 / segments) + size / ranks * (ranks - 1) / ranks


@contextmanager
def noting_reduces(noted: list[float]) -> Iterator[None]:
    """Note of every reduce how many bytes gloo sends beyond the n(W-1)/W that a pipeline of ranks would."""
    reduce = dist.reduce

    def noting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        ranks, size = dist.get_world_size(options.get("group")), tensor.numel() * tensor.element_size()
        noted.append(gloo_reduce_bytes(size, ranks) - size * (ranks - 1) / ranks)
        return reduce(tensor, *args, **options)

    dist.reduce = noting
    try:
        yield
    finally:
        dist.reduce = reduce
