"""Real processes that train together: forked by a server that has imported torch, joined by gloo."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server imports these once; then a new process costs milliseconds, not seconds.
IMPORTED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "sklearn.datasets",
    "sklearn.model_selection",
    "pytest",
    "fop",
]
# Far more than any test takes on a busy machine: it ends what hangs.
SECONDS = 600.0
# On a busy machine gloo sometimes closes a connection while it makes it. Then all ranks start again.
NOT_CONNECTED, TRIES = 75, 5


def run_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, expected: tuple[int, ...] | None = None
) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ``ranks`` new processes of one group; return what each gave.

    Args:
        function: of a module, so that the processes can import it.
        ranks: number of processes.
        arguments: picklable.
        expected: exit codes; zeros if not given. A process with another one fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    for _ in range(TRIES):
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=_child, args=(rank, ranks, folder, function, arguments), daemon=True)
                for rank in range(ranks)
            ]
            codes = _run(processes)
            if NOT_CONNECTED in codes:
                continue
            errors = "\n".join(path.read_text() for path in sorted(Path(folder).glob("error*")))
            assert codes == (expected or (0,) * ranks), f"exit codes {codes}\n{errors}"
            results = [Path(folder) / f"result{rank}" for rank in range(ranks)]
            return [torch.load(path, weights_only=False) if path.exists() else None for path in results]
    raise AssertionError(f"gloo has connected no ranks in {TRIES} tries")


def _run(processes: Sequence[Any]) -> tuple[int | None, ...]:
    """Start processes and wait until all have ended, or one was not connected; return their exit codes."""
    try:
        for process in processes:
            process.start()
        alive = list(processes)
        while alive and all(process.exitcode != NOT_CONNECTED for process in processes):
            connection.wait([process.sentinel for process in alive])
            alive = [process for process in alive if process.is_alive()]
        return tuple(process.exitcode for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _child(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with Path(folder, f"error{rank}").open("w") as errors:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=errors)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=ranks,
                # Whoever waits for a dead rank must notice without it.
                timeout=timedelta(days=1),
            )
            torch.save(function(rank, *arguments), Path(folder) / f"result{rank}")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            errors.write(f"rank {rank}:\n{(text := traceback.format_exc())}")
            errors.flush()
            # Not `raise`: other threads of torch may wait for ranks that are gone.
            os._exit(NOT_CONNECTED if "connectFullMesh failed" in text else 1)
