"""Prints accuracy on the digits by `adamw_lr`: how the default was chosen (records/adamw-rate).

`OMP_NUM_THREADS=1 python tools/adamw_rate.py` takes two minutes; it needs scikit-learn (the extra `bench`).
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fop import FOP

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)


class Reader(nn.Module):
    """Reads an image row by row; the weights of an LSTM are AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def cnn() -> nn.Module:
    """Convolutions with norms between them, whose parameters are AdamW's."""
    # Twenty steps are too few for running averages at 0.1: they would be judged, and not the weights.
    norm = partial(nn.BatchNorm2d, momentum=0.3)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


# Model, batch size, steps.
TASKS = {"LSTM": (Reader, 128, 200), "CNN, full batch": (cnn, 1300, 20)}


def accuracy(task: str, rate: float, seed: int) -> float:
    """Percent of the held-out digits after a training with warm-up and linear decay."""
    build, batch, steps = TASKS[task]
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000))
    train, test = order[:1300], order[1300:]
    torch.manual_seed(seed)
    model = build()
    optimizer = FOP(model, adamw_lr=rate)
    warm = max(1, steps * 15 // 100)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, max(0.02, (steps - t) / (steps - warm)))
    )
    for _ in range(steps):
        chosen = train if batch >= len(train) else train[torch.randperm(len(train))[:batch]]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x[test]).argmax(1) == y[test]).double().mean())


def main() -> None:
    """Train and print."""
    print("| task | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
    print("|---|" + "---|" * len(RATES))
    for task in TASKS:
        cells = []
        for rate in RATES:
            found = [accuracy(task, rate, seed) for seed in SEEDS]
            cells.append(f"{statistics.mean(found):.1f} ({min(found):.1f}–{max(found):.1f})")
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
