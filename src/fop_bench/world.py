"""Processes that train together: those that `torchrun` started, and new ones on this machine."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class World:
    """This process, or all ranks of the default process group; decisions travel over gloo, not over GPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self._group = dist.new_group(backend="gloo") if joined else None

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.size == 1:
            return values
        summed = values.detach().cpu().clone()
        dist.all_reduce(summed, group=self._group)
        return summed

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        numbers = [number] * self.size
        if self.size > 1:
            dist.all_gather_object(numbers, number, group=self._group)
        return min(numbers)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make gradients the mean over the ranks."""
        return DistributedDataParallel(model) if self.size > 1 else model


def under_torchrun() -> bool:
    """Return whether this process is one of several that torchrun started."""
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
        yield World(device)
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call a function in ``ranks`` new processes of one thread, joined by gloo; return its results by rank.

    Raises ProcessException with the traceback if a process failed; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, Path(folder), function, arguments), ranks)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        if sys.platform.startswith("linux"):
            # Otherwise gloo looks up the name of the host, which need not have an address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    (folder / f"result{rank}").write_bytes(pickle.dumps(function(*arguments)))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
