"""The one training loop that every optimizer goes through."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Samples:
    """Inputs of shape (samples, ...) and their class numbers of shape (samples,)."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Samples:
        """Copy both tensors to a device."""
        return Samples(self.inputs.to(device), self.targets.to(device))

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Epoch:
    """The state after an epoch; `seconds` is the training time since the start, without evaluation."""

    epoch: int
    seconds: float
    train_loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One training run: its curve ends before the epoch in which the loss became non-finite, if it did."""

    learning_rate: float
    seed: int
    curve: list[Epoch]
    diverged: bool
    warnings: list[str]


def cosine(progress: float) -> float:
    """Give the factor on the learning rate at a progress from 0 to 1: half a cosine from 1 down to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    build_model: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module, float], Optimizer],
    train_set: Samples,
    held_out: Samples,
    *,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
    schedule: Schedule = cosine,
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    """Train a fresh model with cross-entropy and report the accuracy on `held_out` after every epoch.

    Samples are shuffled anew each epoch; those that do not fill a last batch are left out of that epoch.
    """
    if not 1 <= batch_size <= len(train_set):
        raise ValueError(
            f"batch_size is {batch_size}; it must be from 1 to the {len(train_set)} training samples"
        )
    device = train_set.inputs.device
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    model = build_model().to(device)
    steps = len(train_set) // batch_size
    curve: list[Epoch] = []
    seconds = 0.0
    diverged = False
    # Warnings belong to the record of the run that caused them, not between the progress bars.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = build_optimizer(model, learning_rate)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step / (steps * epochs)))
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(train_set), generator=shuffle).to(device)[: steps * batch_size]
            start = _now(device)
            loss = _train_epoch(model, optimizer, scheduler, train_set, torch.split(order, batch_size))
            seconds += _now(device) - start
            on_epoch()
            if not math.isfinite(loss):
                diverged = True
                break
            curve.append(Epoch(epoch, seconds, loss, accuracy(model, held_out)))
    messages = dict.fromkeys(f"{each.category.__name__}: {each.message}" for each in caught)
    return Run(learning_rate, seed, curve, diverged, list(messages))


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    train_set: Samples,
    batches: tuple[Tensor, ...],
) -> float:
    """Take one step per batch of sample numbers and give the mean loss, non-finite if any loss was."""
    model.train()
    total = torch.zeros((), device=train_set.inputs.device)
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(train_set.inputs[batch]), train_set.targets[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.detach()  # read once an epoch: no sync in between
    return total.item() / len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """Give the share of samples whose largest logit is that of their class, in evaluation mode."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=samples.targets.device)
    for part in torch.split(torch.arange(len(samples), device=samples.targets.device), 1024):
        right += (model(samples.inputs[part]).argmax(dim=1) == samples.targets[part]).sum()
    return right.item() / len(samples)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
