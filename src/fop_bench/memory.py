"""Peak memory of a step, measured with one model alive at a time."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from fop_bench.optimizers import CONTENDERS
from fop_bench.workloads import Workload, expect_curvature, prepare, request_curvature, warm_up

PLAIN_STEPS = 2
M_MMAP_THRESHOLD = -3  # glibc's name and number
MMAP_BYTES = 64 * 1024
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes above those in use before the model was built, with model, batch and optimizer state.

    On a GPU the bytes are the allocator's (`max_memory_allocated`), on a CPU the process's resident set.
    A None is explained in `missing`.
    """

    plain_bytes: int | None
    curvature_bytes: int | None
    missing: str | None


def peak_memory(workload: Workload, device: torch.device) -> Mapping[str, PeakMemory]:
    """Measure the peak of a plain and of a curvature step for every optimizer.

    Call it while no other model is on the device.
    """
    if device.type == "cuda":
        return _measure_all(workload, device)
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(CONTENDERS, PeakMemory(None, None, "on a CPU only Linux's /proc tells the peak"))
    # The resident set of this process would hold what earlier measurements left behind: take a fresh one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure_all_on_cpu, workload, torch.get_num_threads()).result()


def _measure_all_on_cpu(workload: Workload, threads: int) -> Mapping[str, PeakMemory]:
    torch.set_num_threads(threads)
    # Tensors get pages of their own, so that freed ones leave the resident set at once.
    LIBC.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    try:
        _reset_peak(torch.device("cpu"))
    except OSError as error:
        return dict.fromkeys(CONTENDERS, PeakMemory(None, None, f"the peak cannot be reset: {error}"))
    return _measure_all(workload, torch.device("cpu"))


def _measure_all(workload: Workload, device: torch.device) -> Mapping[str, PeakMemory]:
    # Whoever comes first also pays for libraries and their workspaces, which stay: that is not counted.
    _measure(workload, "fop", device)
    return {name: _measure(workload, name, device) for name in CONTENDERS}


def _measure(workload: Workload, name: str, device: torch.device) -> PeakMemory:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        LIBC.malloc_trim(0)
    before = _reset_peak(device)
    trainer = prepare(workload, name, device)
    warm_up(trainer)
    _reset_peak(device)
    for _ in range(PLAIN_STEPS):
        expect_curvature(trainer.optimizer, due=False)
        trainer.step()
    plain = _peak(device) - before
    _reset_peak(device)
    if not request_curvature(trainer.optimizer):
        return PeakMemory(plain, None, "no curvature steps")
    expect_curvature(trainer.optimizer, due=True)
    trainer.step()
    return PeakMemory(plain, _peak(device) - before, None)


def _reset_peak(device: torch.device) -> int:
    """Forget the peak so far and give the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
