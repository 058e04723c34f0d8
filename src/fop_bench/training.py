"""The one training loop that every optimizer goes through, and that can stop and go on at any step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Schedule = Callable[[float], float]
# Given the numbers of samples, their inputs and class numbers.
Batch = Callable[[Tensor], tuple[Tensor, Tensor]]

EVALUATED_AT_ONCE = 1000


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
    """The state after an epoch.

    Attributes:
        epoch: its number, from 1.
        seconds: training time since the start, without evaluation.
        train_loss: mean over the epoch's batches, each before its step.
        accuracy: share of the held-out samples that are right after the epoch, from 0 to 1.
        processor_seconds: time that this process had a processor for since the start, without evaluation.
    """

    epoch: int
    seconds: float
    train_loss: float
    accuracy: float
    processor_seconds: float = 0.0


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


@dataclass
class Progress:
    """How far a training is; all of it but the order is plain numbers.

    Attributes:
        epoch: number of finished epochs.
        step: number of steps taken in the current one.
        order: the current epoch's sample numbers; None before its first step.
        loss: 0-dim sum of the current epoch's losses; None before its first step.
        seconds: training time.
        processor_seconds: processor time.
        curve: the finished epochs.
        diverged: whether a loss was not finite.
    """

    epoch: int = 0
    step: int = 0
    order: Tensor | None = None
    loss: Tensor | None = None
    seconds: float = 0.0
    processor_seconds: float = 0.0
    curve: list[Epoch] = field(default_factory=list)
    diverged: bool = False


class Training:
    """A training with cross-entropy that stops when told to, and goes on from its state as if it had not.

    Samples are shuffled anew each epoch; those that do not fill a last batch are left out of that epoch.

    Args:
        model: on the device already.
        optimizer: of the model.
        schedule: gives the scheduler, from the optimizer and the number of all steps; it is stepped after
            every step, or, if it waits for a plateau, with the mean loss after an epoch.
        batch: gives the inputs and targets of sample numbers.
        evaluate: gives the accuracy of the model.
        samples: number of training samples.
        batch_size: samples of a step.
        epochs: number of passes.
        seed: of the order of samples.
        mean: gives the mean of a loss over all processes that train together.
        bf16: whether the forward pass runs under bf16 autocast.
        on_epoch: called after every epoch.

    Raises:
        ValueError: a batch larger than the training set.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Callable[[Optimizer, int], LRScheduler],
        batch: Batch,
        evaluate: Callable[[], float],
        *,
        samples: int,
        batch_size: int,
        epochs: int,
        seed: int,
        bf16: bool = False,
        mean: Callable[[Tensor], float] = float,
        on_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        if not 1 <= batch_size <= samples:
            raise ValueError(
                f"batch_size is {batch_size}; it must be from 1 to the {samples} training samples"
            )
        self.model, self.optimizer = model, optimizer
        self.batch, self.evaluate, self.on_epoch = batch, evaluate, on_epoch
        self.samples, self.batch_size, self.epochs = samples, batch_size, epochs
        self.bf16, self.mean = bf16, mean
        self.device = next(model.parameters()).device
        self.shuffle = torch.Generator().manual_seed(seed)
        self.scheduler = schedule(optimizer, self.steps * epochs)
        self.progress = Progress()
        self._since: tuple[float, float] | None = None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def steps(self) -> int:
        """Number of steps of an epoch."""
        return self.samples // self.batch_size

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.progress.diverged or self.progress.epoch == self.epochs

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the end, or until ``stop``, asked before every step, says so; tell which."""
        while not self.finished:
            try:
                if not self._epoch(stop):
                    return False
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # missing in its stubs
                # How an optimizer that takes roots of matrices says that they are not finite any more.
                warnings.warn(f"a step failed: {error}", stacklevel=2)
                self.progress.diverged = True
                return True
            self._close_epoch()
        return True

    def stop_clock(self) -> None:
        """Stop the clock; the time since it was started belongs to the progress now."""
        now = self.progress
        if self._since is not None:
            started, processor_started = self._since
            now.seconds += _now(self.device) - started
            now.processor_seconds += time.process_time() - processor_started
        self._since = None

    def start_clock(self) -> None:
        """Count the time from here on as training."""
        self._since = _now(self.device), time.process_time()

    def _epoch(self, stop: Callable[[], bool]) -> bool:
        """Take the steps that are left of this epoch; False if told to stop in between."""
        now = self.progress
        if now.order is None or now.loss is None:
            order = torch.randperm(self.samples, generator=self.shuffle)[: self.steps * self.batch_size]
            now.order, now.loss = order.to(self.device), torch.zeros((), device=self.device)
        self.model.train()
        self.start_clock()
        stopped = False
        while now.step < self.steps and not (stopped := stop()):
            numbers = now.order[now.step * self.batch_size : (now.step + 1) * self.batch_size]
            now.loss = now.loss + self._step(numbers)  # read once an epoch: no sync in between
            now.step += 1
        self.stop_clock()
        return not stopped

    def _step(self, numbers: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        inputs, targets = self.batch(numbers)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        return loss.detach()

    def _close_epoch(self) -> None:
        now = self.progress
        assert now.loss is not None
        loss = self.mean(now.loss) / self.steps
        now.epoch, now.step, now.order, now.loss = now.epoch + 1, 0, None, None
        self.on_epoch()
        if not math.isfinite(loss):
            now.diverged = True
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        accuracy = self.evaluate()
        now.curve.append(Epoch(now.epoch, now.seconds, loss, accuracy, now.processor_seconds))

    def state_dict(self) -> dict[str, Any]:
        """Give all that another process needs to go on, the state of torch's random numbers included."""
        now = self.progress
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "random": torch.get_rng_state(),
            "random_on_device": torch.cuda.get_rng_state(self.device) if self._on_gpu else None,
            "progress": {**vars(now), "curve": [asdict(epoch) for epoch in now.curve]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["random"])
        if self._on_gpu:
            torch.cuda.set_rng_state(state["random_on_device"], self.device)
        progress = state["progress"]
        self.progress = Progress(**{**progress, "curve": [Epoch(**epoch) for epoch in progress["curve"]]})


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
    """Train a fresh model without a stop and report the accuracy on `held_out` after every epoch."""
    torch.manual_seed(seed)
    model = build_model().to(train_set.inputs.device)
    # Warnings belong to the record of the run that caused them, not between the progress bars.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = build_optimizer(model, learning_rate)
        training = Training(
            model,
            optimizer,
            lambda optimizer, steps: LambdaLR(optimizer, lambda step: schedule(step / steps)),
            lambda numbers: (train_set.inputs[numbers], train_set.targets[numbers]),
            lambda: accuracy(model, held_out),
            samples=len(train_set),
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            on_epoch=on_epoch,
        )
        training.run()
    return Run(learning_rate, seed, training.progress.curve, training.progress.diverged, messages(caught))


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    """Give what was warned of, each text once."""
    return list(dict.fromkeys(f"{each.category.__name__}: {each.message}" for each in caught))


def accuracy(model: nn.Module, samples: Samples) -> float:
    """Give the share of samples whose largest logit is that of their class, in evaluation mode."""
    return share_right(
        model, len(samples), lambda numbers: (samples.inputs[numbers], samples.targets[numbers])
    )


@torch.no_grad()
def share_right(
    model: nn.Module, count: int, batch: Batch, total: Callable[[Tensor], Tensor] = lambda counts: counts
) -> float:
    """Give the share of ``count`` samples that a model gets right in evaluation mode.

    ``total`` sums the numbers of right samples and of all samples over the processes that share the work.
    """
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
