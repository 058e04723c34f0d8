"""What a measurement must say about where it was taken."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import torch

import fop

Git = Mapping[str, Any] | None  # as `git_state` returns it


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions, the source and the command of this measurement."""
    return machine(device) | {"git": git_state(Path(fop.__file__)), "command": this_command()}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions, now."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "fop": fop.__version__}
    return {
        **{"device": device_name(device), "processor": device.type, **versions},
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def this_command() -> str:
    """Return the command that this process was started with, as one would type it elsewhere."""
    program, *arguments = sys.orig_argv
    if arguments and Path(arguments[0]).name == "fop-bench":
        return shlex.join(["fop-bench", *arguments[1:]])
    return shlex.join([Path(program).name, *arguments])


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state(source: Path) -> Git:
    """Return the commit of the checkout that tracks a file, and whether it has changes; None without one."""
    found = _git(source, ["rev-parse", "HEAD"], ["status", "--porcelain"])
    return {"commit": found[0], "dirty": bool(found[1])} if found else None


@cache
def source_tree() -> str:
    """Name the library's source, which other commits may have too."""
    found = _git(Path(fop.__file__), ["rev-parse", "HEAD:./"], ["status", "--porcelain", "."])
    return found[0][:10] + (", changed" if found[1] else "") if found else fop.__version__


def _git(source: Path, *questions: list[str]) -> list[str] | None:
    """Return git's answers about the checkout that tracks a file; None without one."""
    # The first fails for a package installed into a virtual environment that merely lies inside a checkout.
    commands = [["ls-files", "--error-unmatch", source.name], *questions]
    try:
        answers = [
            subprocess.check_output(["git", *each], cwd=source.parent, text=True, stderr=DEVNULL, timeout=30)
            for each in commands
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return [each.strip() for each in answers[1:]]


def commit_title(state: Git) -> str:
    """Name what `git_state` returned in an error message."""
    if state is None:
        return "an installed package"
    return f"commit {state['commit'][:10]}" + (" with uncommitted changes" if state["dirty"] else "")
