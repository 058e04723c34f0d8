"""Records how defaults train deep networks without normalisation or schedule (records/no-schedule).

`OMP_NUM_THREADS=1 python tools/no_schedule.py --output FILE`, two minutes of a core; `--table FILE …` prints
the page's tables. With PYTHONPATH at another checkout's `src` it measures that one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from fop import FOP, KFAC
from fop_bench.environment import environment
from fop_bench.records import write_json
from fop_bench.tables import markdown_table

TRAINED, BATCH, STEPS, SEEDS = 1500, 200, 150, range(5)
OPTIMIZERS: dict[str, Any] = {"FOP": FOP, "K-FAC": KFAC, "AdamW": lambda model: AdamW(model.parameters())}


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), x of shape (N, channels, side, side)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + inner


def residual(blocks: int) -> nn.Module:
    """Return a residual network of 16 channels."""
    body = [Residual(16) for _ in range(blocks)]
    head = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *body, *head)


def perceptron(hidden: int) -> nn.Module:
    """Return a network of so many hidden layers of width 64."""
    layers = [part for _ in range(hidden) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "4 residual blocks": partial(residual, 4),
    "8 residual blocks": partial(residual, 8),
    "11 hidden layers": partial(perceptron, 11),
}


def accuracy(network: str, optimizer: str, seed: int) -> float:
    """Return the accuracy on held-out digits after training, in percent."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    made, draw = OPTIMIZERS[optimizer](model), torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = torch.randint(TRAINED, (BATCH,), generator=draw)
        made.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        made.step()
    with torch.no_grad():
        right = model(x[TRAINED:]).argmax(1) == y[TRAINED:]
    return 100 * float(right.float().mean())


def table(record: dict[str, Any]) -> str:
    """Return mean and range over the seeds."""
    rows = [
        [network, *(f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in of_one.values())]
        for network, of_one in record["accuracies"].items()
    ]
    return markdown_table(["network", *OPTIMIZERS], rows)


def main() -> None:
    """Measure, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--table", type=Path, nargs="*", default=[], help="files to print the tables of")
    given = parser.parse_args()
    if given.output is None and not given.table:
        parser.error("give --output FILE, or --table FILE … to print tables")
    for file in given.table:
        print(table(json.loads(file.read_text())))
    if given.output is not None:
        accuracies = {
            network: {name: [accuracy(network, name, seed) for seed in SEEDS] for name in OPTIMIZERS}
            for network in NETWORKS
        }
        how = {"batch": BATCH, "steps": STEPS, "seeds": len(SEEDS)}
        record = {"environment": environment(torch.device("cpu")), **how, "accuracies": accuracies}
        write_json(given.output, record)
        print(table(record))


if __name__ == "__main__":
    main()
