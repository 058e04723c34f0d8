"""The one training loop that every optimizer goes through; it can stop at any step and go on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fop_bench.optimizers import Loss, gradients

# Given the numbers of samples, their inputs and targets.
Batch = Callable[[Tensor], tuple[Tensor, Tensor]]
# Given how many samples there are and how many an epoch takes, the numbers of those.
Order = Callable[[int, int, Generator], Tensor]

EVALUATED_AT_ONCE = 1000


def without_replacement(samples: int, count: int, draw: Generator) -> Tensor:
    """Return the first ``count`` of all samples in a random order."""
    return torch.randperm(samples, generator=draw)[:count]


def with_replacement(samples: int, count: int, draw: Generator) -> Tensor:
    """Return ``count`` random samples, independent of each other."""
    return torch.randint(samples, (count,), generator=draw)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Go down half a cosine from the learning rate to 0."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * (step / steps))))


@dataclass
class Progress:
    """How far a training is."""

    steps: int = 0  # taken
    order: Tensor | None = None  # the current epoch's sample numbers
    losses: Tensor | None = None  # 0-dim sum of the current epoch's losses
    last_loss: Tensor | None = None
    seconds: float = 0.0
    processor_seconds: float = 0.0
    # By evaluation: number of the epoch from 1 or of the step, seconds of training since the start, accuracy,
    # and after an epoch the mean of its losses.
    curve: list[dict[str, float]] = field(default_factory=list)
    layers: dict[str, Any] | None = None  # what `evaluate` notes of the optimizer
    diverged: bool = False  # a loss was not finite


@dataclass
class Training:
    """A training that stops when told to, and goes on from its state as if it had not."""

    model: nn.Module
    optimizer: Optimizer
    # Given the number of all steps. Stepped after every step, or, if it waits for a plateau, after an epoch.
    schedule: Callable[[Optimizer, int], LRScheduler]
    batch: Batch
    evaluate: Callable[[], float]  # returns the accuracy, or another value to judge by
    samples: int
    batch_size: int
    shuffle: Generator  # decides the order of the samples
    # It ends after so many epochs or steps, whichever comes first.
    epochs: float = math.inf
    steps: float = math.inf
    order: Order = without_replacement
    loss: Loss = cross_entropy
    # Every how many steps it evaluates, and at the end; it asks in every step if the losses are finite. None:
    # after every epoch, and it asks only then, since a GPU must be waited for.
    every: int | None = None
    after_step: Callable[[], None] = lambda: None
    bf16: bool = False
    draw: Generator | None = None  # what `batch` draws from, if not from `shuffle`
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.samples:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be from 1 to the {self.samples} training samples"
            )
        whole = self.samples // self.batch_size
        self.steps = int(min(self.steps, self.epochs * whole))
        self.epoch_steps = min(whole, self.steps)
        self.device = next(self.model.parameters()).device
        self.scheduler = self.schedule(self.optimizer, self.steps)
        self.parts: tuple[Any, ...] = (self.model, self.optimizer, self.scheduler)
        self._since = (0.0, 0.0)

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the end, or until ``stop``, asked before every step, says so; return if it ended."""
        now = self.progress
        self.start_clock()
        while not now.diverged and now.steps < self.steps:
            if stop():
                return False
            try:
                self._step(now.steps % self.epoch_steps)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # missing in its stubs
                # How an optimizer that takes roots of matrices says that they are not finite any more.
                warnings.warn(f"a step failed: {error}", stacklevel=2)
                now.diverged = True
            between = self.every or self.epoch_steps
            if not now.diverged and (now.steps % between == 0 or now.steps == self.steps):
                self.stop_clock()
                self._evaluate()
                self.start_clock()
        return True

    def start_clock(self) -> None:
        self._since = _now(self.device), time.process_time()

    def stop_clock(self) -> None:
        """Add the time since the clock was started to the progress."""
        self.progress.seconds += _now(self.device) - self._since[0]
        self.progress.processor_seconds += time.process_time() - self._since[1]

    def _step(self, at: int) -> None:
        """Take step ``at`` of an epoch."""
        now, size = self.progress, self.batch_size
        if at == 0:
            self.model.train()
            # What does not fill a last batch is left out of this epoch.
            now.order = self.order(self.samples, self.epoch_steps * size, self.shuffle).to(self.device)
            now.losses = torch.zeros((), device=self.device)
        assert now.order is not None and now.losses is not None
        inputs, targets = self.batch(now.order[at * size : (at + 1) * size])
        now.last_loss = gradients(self.optimizer, self.model, inputs, targets, self.loss, self.bf16)
        if self.every and not now.last_loss.isfinite():
            now.diverged = True
            return
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.after_step()
        now.losses = now.losses + now.last_loss  # read once an epoch: no sync in between
        now.steps += 1

    def _evaluate(self) -> None:
        """Add an evaluation to the curve; what is not finite ends the training as diverged."""
        now = self.progress
        assert now.losses is not None
        loss = now.losses.item() / ((now.steps - 1) % self.epoch_steps + 1)
        now.diverged = not (math.isfinite(loss) and math.isfinite(value := self.evaluate()))
        self.model.train()
        if now.diverged:
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        at: dict[str, float] = {"epoch": len(now.curve) + 1, "train_loss": loss}
        if self.every:
            at = {"step": now.steps}
        times = {"seconds": now.seconds, "processor_seconds": now.processor_seconds}
        now.curve.append({**at, **times, "accuracy": value})

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

    def _generators(self) -> list[Generator]:
        known = [self.shuffle, torch.default_generator, *([self.draw] if self.draw else [])]
        if self.device.type == "cuda":
            known.append(torch.cuda.default_generators[self.device.index or 0])
        return known


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what was warned of, each text once."""
    return list(dict.fromkeys(f"{each.category.__name__}: {each.message}" for each in caught))


@torch.no_grad()
def count_right(model: nn.Module, count: int, batch: Batch) -> int:
    """Return how many of ``count`` samples a model gets right."""
    model.eval()
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for numbers in torch.arange(count, device=device).split(EVALUATED_AT_ONCE):
        inputs, targets = batch(numbers)
        right += (model(inputs).argmax(dim=1) == targets).sum()
    return int(right)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
