"""The one training loop that every optimizer goes through; it can stop at any step and go on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fop_bench.optimizers import gradients

# Given the numbers of samples, their inputs and class numbers.
Batch = Callable[[Tensor], tuple[Tensor, Tensor]]

EVALUATED_AT_ONCE = 1000


@dataclass
class Progress:
    """How far a training is."""

    epoch: int = 0  # finished ones
    step: int = 0  # taken in the current epoch
    order: Tensor | None = None  # the current epoch's sample numbers; None before its first step
    loss: Tensor | None = None  # 0-dim sum of the current epoch's losses; None before its first step
    seconds: float = 0.0
    processor_seconds: float = 0.0
    # By epoch: its number from 1, seconds of training since the start, accuracy, and the mean of the losses.
    curve: list[dict[str, float]] = field(default_factory=list)
    diverged: bool = False  # a loss was not finite


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Go down half a cosine from the learning rate to 0."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * (step / steps))))


@dataclass
class Training:
    """A training with cross-entropy that stops when told to, and goes on from its state as if it had not."""

    model: nn.Module
    optimizer: Optimizer
    # Given the number of all steps. Stepped after every step, or, if it waits for a plateau, after an epoch.
    schedule: Callable[[Optimizer, int], LRScheduler]
    batch: Batch
    evaluate: Callable[[], float]  # returns the accuracy
    samples: int
    batch_size: int
    epochs: int
    seed: int
    bf16: bool = False
    draw: torch.Generator | None = None  # what `batch` draws from
    mean: Callable[[Tensor], float] = float  # of a loss over all processes that train together
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.samples:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be from 1 to the {self.samples} training samples"
            )
        self.steps = self.samples // self.batch_size  # of an epoch
        self.device = next(self.model.parameters()).device
        self.shuffle = torch.Generator().manual_seed(self.seed)
        self.scheduler = self.schedule(self.optimizer, self.steps * self.epochs)
        self.parts: tuple[Any, ...] = (self.model, self.optimizer, self.scheduler)
        self._since = (0.0, 0.0)

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the end, or until ``stop``, asked before every step, says so; tell which."""
        now = self.progress
        while not now.diverged and now.epoch < self.epochs:
            try:
                if not self._epoch(stop):
                    return False
                self._close_epoch()
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # missing in its stubs
                # How an optimizer that takes roots of matrices says that they are not finite any more.
                warnings.warn(f"a step failed: {error}", stacklevel=2)
                now.diverged = True
        return True

    def start_clock(self) -> None:
        self._since = _now(self.device), time.process_time()

    def stop_clock(self) -> None:
        """Add the time since the clock was started to the progress."""
        self.progress.seconds += _now(self.device) - self._since[0]
        self.progress.processor_seconds += time.process_time() - self._since[1]

    def _epoch(self, stop: Callable[[], bool]) -> bool:
        """Take the steps that are left of this epoch; return False if told to stop in between."""
        now = self.progress
        if now.order is None or now.loss is None:
            # What does not fill a last batch is left out of this epoch.
            order = torch.randperm(self.samples, generator=self.shuffle)[: self.steps * self.batch_size]
            now.order, now.loss = order.to(self.device), torch.zeros((), device=self.device)
        self.model.train()
        self.start_clock()
        while now.step < self.steps:
            if stop():
                return False
            numbers = now.order[now.step * self.batch_size : (now.step + 1) * self.batch_size]
            now.loss = now.loss + self._step(numbers)  # read once an epoch: no sync in between
            now.step += 1
        self.stop_clock()
        return True

    def _step(self, numbers: Tensor) -> Tensor:
        loss = gradients(self.optimizer, self.model, *self.batch(numbers), bf16=self.bf16)
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        return loss

    def _close_epoch(self) -> None:
        now = self.progress
        assert now.loss is not None
        loss = self.mean(now.loss) / self.steps
        now.epoch, now.step, now.order, now.loss = now.epoch + 1, 0, None, None
        now.diverged = not math.isfinite(loss)
        if now.diverged:
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        times = {"seconds": now.seconds, "processor_seconds": now.processor_seconds}
        now.curve.append({"epoch": now.epoch, **times, "train_loss": loss, "accuracy": self.evaluate()})

    def state_dict(self) -> dict[str, Any]:
        """Return all that another process needs to go on, the state of torch's random numbers included."""
        return {
            "parts": [part.state_dict() for part in self.parts],
            "random": [generator.get_state() for generator in self._generators()],
            "progress": vars(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        for generator, saved in zip(self._generators(), state["random"], strict=True):
            generator.set_state(saved)
        self.progress = Progress(**state["progress"])

    def _generators(self) -> list[torch.Generator]:
        known = [self.shuffle, torch.default_generator, *([self.draw] if self.draw else [])]
        if self.device.type == "cuda":
            known.append(torch.cuda.default_generators[self.device.index or 0])
        return known


def by_sub_batch(count: int) -> Tensor:
    """Return the places of a batch, those in FOP's first sub-batch (by parity of bits) before the others."""
    return torch.tensor([place.bit_count() % 2 for place in range(count)]).argsort(stable=True)


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what was warned of, each text once."""
    return list(dict.fromkeys(f"{each.category.__name__}: {each.message}" for each in caught))


@torch.no_grad()
def share_right(
    model: nn.Module, count: int, batch: Batch, total: Callable[[Tensor], Tensor] = lambda counts: counts
) -> float:
    """Return the share of ``count`` samples that a model gets right, and with ``total`` of all processes'."""
    model.eval()
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for numbers in torch.arange(count, device=device).split(EVALUATED_AT_ONCE):
        inputs, targets = batch(numbers)
        right += (model(inputs).argmax(dim=1) == targets).sum()
    right_of, all_of = total(torch.stack([right, torch.tensor(count, device=device)])).tolist()
    return float(right_of / all_of)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
