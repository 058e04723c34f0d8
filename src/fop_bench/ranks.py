"""Local processes that train together: started afresh, met through a file, none of them forgotten."""

from __future__ import annotations

import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float) -> list[Any]:
    """Call ``function(*arguments)`` in ``ranks`` new processes, one thread each, joined by gloo.

    Args:
        function: of a module, so that the processes can import it.
        ranks: number of processes; a single one has no process group.
        arguments: picklable.
        seconds: limit for all of it.

    Returns:
        What it returned, by rank.

    Raises:
        RuntimeError: a process failed; the message has its traceback. The others are ended.
        TimeoutError: they have not ended in time, and are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _rank, (ranks, folder, seconds, function, arguments), ranks, join=False, start_method="spawn"
        )
        assert context is not None
        end = time.monotonic() + seconds
        try:
            while not context.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise TimeoutError(
                        f"{ranks} processes did not end in {seconds:g} s; give them more time, or less to do"
                    )
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise RuntimeError(f"rank {error.error_index} of {ranks} failed:\n{error}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(ranks)]


def _rank(
    rank: int,
    ranks: int,
    folder: str,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        if sys.platform.startswith("linux"):
            # Otherwise gloo looks up the name of the host, which need not have an address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=math.ceil(seconds)),
        )
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(function(*arguments)))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
