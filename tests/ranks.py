"""Real processes that train together: started afresh, met through a file, every exit code looked at."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60.0


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    seconds: float = SECONDS,
    timeout: float = 30.0,
    expected: tuple[int, ...] | None = None,
) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``ranks`` new processes joined by gloo; return what each gave.

    Args:
        function: of a module, so that the processes can import it.
        ranks: number of processes.
        arguments: picklable.
        seconds: limit for all of it.
        timeout: of the process group.
        expected: exit codes; zeros if not given. A process with another one, or none in time, fails the test.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(rank, ranks, folder, timeout, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error*")))
        assert not hanging, f"ranks {hanging} did not end in {seconds} s\n{errors}"
        codes = tuple(process.exitcode for process in processes)
        assert codes == (expected or (0,) * ranks), f"exit codes {codes}\n{errors}"
        return [
            torch.load(path, weights_only=False)
            if (path := Path(folder) / f"result{rank}").exists()
            else None
            for rank in range(ranks)
        ]


def _child(
    rank: int,
    ranks: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(rank, *arguments), Path(folder) / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stdout.flush()
        # Not `raise`: other threads of torch may wait for ranks that are gone.
        os._exit(1)


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one rank, for what needs one but no partner."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
