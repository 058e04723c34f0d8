"""Says which part of FOP's step takes how long, beside SGD's step in the same process.

Processor seconds of one thread. Every part is timed without the parts inside it; FOP and SGD take turns.

    OMP_NUM_THREADS=1 python tools/profile_step.py --output records/step-profile/resnet18-16.json
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fop.capture import hooks, recorder
from fop.curvature import inversion, kronecker, refresh
from fop.distributed import distributor
from fop.layers.conv import ConvLayer
from fop.layers.linear import LinearLayer
from fop.optimizer import FOP
from fop_bench.environment import environment
from fop_bench.overhead import MODELS, Trainer, Workload, prepare_pair
from fop_bench.records import write_json
from fop_bench.tables import markdown_table

# What is timed: (where, name of the function, the part it is counted to).
FUNCTIONS: tuple[tuple[Any, str, str], ...] = (
    (ConvLayer, "input_gradient", "gradients of inputs"),
    (LinearLayer, "input_gradient", "gradients of inputs"),
    (recorder, "_sum_of_parts", "gradients of weights, run by run"),
    (recorder, "gather_statistics", "statistics"),
    (recorder.Recorder, "record", "hooks"),
    (hooks.Hook, "__call__", "hooks"),
    (recorder._LayerFunction, "backward", "hooks"),
    (distributor.Distributor, "gradients", "gradients of the sub-batches"),
    (refresh.Refresher, "refresh", "averages"),
    (inversion, "inverses_and_flags", "inversion"),
    (kronecker.KroneckerCurvature, "solve", "products with factors"),
    (kronecker.KroneckerCurvature, "fisher", "products with factors"),
    (FOP, "_updates", "correction, without the products"),
    (FOP, "_move", "lengths, momentum, moving"),
    (FOP, "_step_adamw", "AdamW"),
    (FOP, "step", "rest of the step"),
)
REST = "forward pass, and the rest of the backward pass"


class Clock:
    """Processor seconds by part, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Any) -> Any:
        """Return the function, counted to a part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.seconds[part] += took - self._inside.pop()
                self._inside[-1] += took

        return wrapper

    def instrument(self) -> None:
        """Time the `FUNCTIONS` from here on, under every name by which a module of fop has them."""
        modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fop"]
        for home, name, part in FUNCTIONS:
            plain = home.__dict__[name]
            function = plain.__func__ if isinstance(plain, staticmethod) else plain
            new = self.timed(part, function)
            for module in modules if not isinstance(home, type) else ():
                if module.__dict__.get(name) is function:
                    setattr(module, name, new)
            setattr(home, name, staticmethod(new) if isinstance(plain, staticmethod) else new)


def seconds_of(trainer: Trainer) -> float:
    """Return the processor seconds of one training step."""
    start = time.process_time()
    trainer.step()
    return time.process_time() - start


def profile(workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Return by kind of step what part of it takes which share of SGD's, medians over the rounds."""
    device = torch.device("cpu")
    sgd, _ = prepare_pair(workload, "sgd", device)
    plain, curvature = prepare_pair(workload, "fop", device)
    assert curvature is not None
    steps = {"plain": plain, "with statistics and inversion": curvature}
    clock = Clock()
    clock.instrument()
    shares: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in steps}
    for _ in range(rounds):
        of_sgd = seconds_of(sgd)
        for kind, trainer in steps.items():
            clock.seconds.clear()
            whole = seconds_of(trainer)
            parts = {**dict.fromkeys((part for *_, part in FUNCTIONS), 0.0), **clock.seconds}
            parts[REST] = whole - sum(parts.values())
            for part, seconds in {"all": whole, **parts}.items():
                shares[kind][part].append(seconds / of_sgd)
    return {kind: {part: statistics.median(of) for part, of in each.items()} for kind, each in shares.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """Lay out the shares, the largest part of a plain step first."""
    kinds = list(found)
    order = sorted(found[kinds[0]], key=lambda part: (part != "all", -found[kinds[0]][part]))
    rows = ([part, *(f"{found[kind][part]:.3f}" for kind in kinds)] for part in order)
    return markdown_table(["part", *kinds], rows)


def main() -> None:
    """Profile as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", choices=list(MODELS), default="resnet18-16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    workload = Workload(asked.model, asked.batch, bf16=False)
    found = profile(workload, asked.rounds)
    print(f"{workload.title}; shares of SGD's step, medians over {asked.rounds} rounds\n\n{table(found)}")
    if asked.output:
        about = environment(torch.device("cpu"))
        record = {"workload": workload.title, "rounds": asked.rounds, "shares": found, "environment": about}
        write_json(asked.output, record)


if __name__ == "__main__":
    main()
