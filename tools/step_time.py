"""Compares the step time of two source trees of `fop`, in processor seconds of one thread.

Two processes, one for each tree, take turns in short blocks of steps, so that what else the machine does
meets both alike. SGD is measured with them: its ratio is the error of the measurement.

    python tools/step_time.py ../old/src src --output records/step-time/step-time.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import runpy
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

TASKS = ("mlp", "resnet", "vit")
# By their defaults, and with the paper's steps, which were the only ones before there was `step_length`.
OPTIMIZERS = ("SGD", "KFAC", "FOP", "KFAC paper", "FOP paper")
STEPS = ("plain", "statistics")
TREES = ("old", "new")


# --- in a worker -------------------------------------------------------------------------------------------


def tasks() -> dict[str, Callable[[], tuple[Any, Any, Any]]]:
    """Model, inputs and labels of each task; torch is imported by workers alone."""
    import torch  # noqa: PLC0415

    # By its path: both trees step the same networks.
    models = runpy.run_path(str(Path(__file__).parents[1] / "src/fop_bench/models.py"))

    def drawn(make: Callable[[], Any], *shape: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        return make(), torch.randn(shape), torch.randint(10, (shape[0],))

    return {
        "mlp": lambda: drawn(lambda: models["mlp"]((64, 128, 128, 10)), 128, 64),
        "resnet": lambda: drawn(lambda: models["ResNet"](16, (2, 2, 2, 2)), 128, 3, 32, 32),
        "vit": lambda: drawn(lambda: models["ViT"](dim=128, depth=2, heads=4), 64, 3, 32, 32),
    }


@cache
def stepper(task: str, optimizer: str, step: str) -> Callable[[], float]:
    """Return what takes one step of this kind and returns its processor seconds."""
    import torch  # noqa: PLC0415

    import fop  # noqa: PLC0415

    model, x, y = tasks()[task]()
    if optimizer == "SGD":
        chosen: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    else:
        name, *paper = optimizer.split()
        known = "step_length" in inspect.signature(fop.FOP).parameters
        options = {"step_length": "paper"} if paper and known else {}
        interval = 1 if step == "statistics" else 10**6
        chosen = getattr(fop, name)(model, lr=1e-3, curvature_interval=interval, **options)

    def one() -> float:
        start = time.process_time()
        chosen.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        chosen.step()
        return time.process_time() - start

    def timed() -> float:
        # Early in training some steps have statistics whatever the interval is.
        while step == "plain" and getattr(chosen, "curvature_due", False):
            one()
        return one()

    timed()
    return timed


def work() -> None:
    """Answer commands on standard input: [task, optimizer, step, number of steps]."""
    import torch  # noqa: PLC0415

    import fop  # noqa: PLC0415

    torch.set_num_threads(1)
    print(json.dumps({"fop": fop.__file__, "torch": str(torch.__version__)}), flush=True)
    for line in sys.stdin:
        *key, steps = json.loads(line)
        run = stepper(*key)
        print(json.dumps(sum(run() for _ in range(steps)) / steps if steps else None), flush=True)


# --- in the process that asks ------------------------------------------------------------------------------


class Worker:
    """A process with one source tree."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.about = self._read()
        if not Path(self.about["fop"]).is_relative_to(tree):
            raise SystemExit(f"{tree} holds no package fop: {self.about['fop']} was imported")

    def seconds(self, case: tuple[str, ...], steps: int) -> float:
        """Return the mean processor seconds of so many steps; 0 steps only set up."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*case, steps]) + "\n")
        self.process.stdin.flush()
        return self._read()  # type: ignore[no-any-return]

    def end(self) -> None:
        """Let the process go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}")
        return json.loads(line)


def compare(case: tuple[str, ...], workers: dict[str, Worker], blocks: int, budget: float) -> dict[str, Any]:
    """Measure both trees in turns; which one is first changes from block to block."""
    for worker in workers.values():
        worker.seconds(case, 0)
    steps = max(1, round(budget / max(worker.seconds(case, 2) for worker in workers.values())))
    seconds: dict[str, list[float]] = {tree: [] for tree in TREES}
    for block in range(blocks):
        for tree in TREES if block % 2 == 0 else reversed(TREES):
            seconds[tree].append(workers[tree].seconds(case, steps))
    ratios = [new / old for old, new in zip(seconds["old"], seconds["new"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        **dict(zip(("task", "optimizer", "step"), case, strict=True)),
        "steps_per_block": steps,
        "seconds": seconds,
        "median_seconds": {tree: statistics.median(values) for tree, values in seconds.items()},
        "ratio": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
        "ratio_of_minima": min(seconds["new"]) / min(seconds["old"]),
    }


def source_of(tree: Path) -> dict[str, str]:
    """The tree's path, and what git calls the state of its `fop`."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=tree / "fop", check=False, capture_output=True, text=True
        )
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", ".") else ""
    return {
        "path": str(tree),
        "commit": git("rev-parse", "HEAD") + changed,
        "tree": git("rev-parse", "HEAD:./"),
    }


def main() -> None:
    """Compare two trees, as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("old", type=Path, help="directory that holds the package fop")
    parser.add_argument("new", type=Path, help="likewise")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--blocks", type=int, default=21, help="of each tree, at least 2")
    parser.add_argument("--seconds", type=float, default=0.5, help="processor seconds of a block")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    trees = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    workers = {tree: Worker(path) for tree, path in trees.items()}
    cases = [
        (task, optimizer, step)
        for task in arguments.tasks
        for optimizer in arguments.optimizers
        for step in (STEPS if optimizer != "SGD" else STEPS[:1])
    ]
    print(f"{'':24} {'old':>10} {'new':>10}   new/old (quartiles)")
    results = []
    for case in cases:
        result = compare(case, workers, arguments.blocks, arguments.seconds)
        results.append(result)
        old, new = (1e3 * result["median_seconds"][tree] for tree in TREES)
        low, high = result["ratio"]["quartiles"]
        print(
            f"{' '.join(case):24} {old:7.2f} ms {new:7.2f} ms   {result['ratio']['median']:.3f} "
            f"({low:.3f} to {high:.3f})",
            flush=True,
        )
    about = workers["new"].about
    for worker in workers.values():
        worker.end()
    if arguments.output:
        record = {
            "command": f"python {shlex.join(sys.argv)}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "trees": {tree: source_of(path) for tree, path in trees.items()},
            "environment": {
                "python": platform.python_version(),
                "torch": about["torch"],
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "threads": 1,
            },
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()
