"""The processes that train together under `torchrun`, or the single one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class World:
    """What the benchmark asks of the ranks; a world of one asks nobody.

    Args:
        device: of this rank.
    """

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def agree(self, value: T) -> T:
        """Give rank 0's value, on every rank."""
        return value

    def total(self, values: Tensor) -> Tensor:
        """Give the sum over the ranks."""
        return values

    def least(self, number: int) -> int:
        """Give the smallest of the ranks' numbers."""
        return number

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make gradients the mean over the ranks."""
        return model


class Ranks(World):
    """Several ranks; decisions travel beside the gradients, so that no rank waits for its GPU to make one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._talk = dist.new_group(backend="gloo")

    def agree(self, value: T) -> T:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._talk)
        agreed: T = box[0]
        return agreed

    def total(self, values: Tensor) -> Tensor:
        summed = values.detach().cpu().clone()
        dist.all_reduce(summed, group=self._talk)
        return summed

    def least(self, number: int) -> int:
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._talk)
        return int(smallest)

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)


def under_torchrun() -> bool:
    """Tell whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def world_on(device: torch.device) -> Iterator[World]:
    """Join the ranks that torchrun started, each on its own GPU, or be alone."""
    if not under_torchrun():
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(device)
    finally:
        dist.destroy_process_group()
