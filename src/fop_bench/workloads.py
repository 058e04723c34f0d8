"""One optimizer on one model and batch, ready to take steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from fop_bench.models import ViT, mlp, resnet18
from fop_bench.optimizers import BUILDERS

CLASSES = 10
PLAIN_STEPS = 3  # timed plain steps in a row at every turn of an optimizer
COMPARED = ("sgd", "adamw", "kfac", "fop")
# So small that the model hardly moves: every step does the same work, and no loss or gradient vanishes.
LEARNING_RATE = 1e-4
# An interval that no measurement lives to see the end of.
NEVER = 10**9

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (3, 32, 32)),
    "vit": (ViT, (3, 32, 32)),
    "mlp": (mlp, (784,)),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """A model by name, a batch size, and whether the forward pass runs under bf16 autocast."""

    model: str
    batch_size: int
    bf16: bool

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw inputs and class numbers."""
        shape = MODELS[self.model][1]
        inputs = torch.randn(self.batch_size, *shape, device=device)
        return inputs, torch.randint(CLASSES, (self.batch_size,), device=device)


@dataclass(frozen=True)
class Trainer:
    """A model of its own with its optimizer and a fixed random batch on the device."""

    model: nn.Module
    optimizer: Optimizer
    inputs: Tensor
    targets: Tensor
    bf16: bool

    def step(self, curvature: bool | None = None) -> None:
        """Take one training step: forward, backward, update.

        Raises RuntimeError unless it updates the curvature just as the measurement expects, if that is given.
        """
        due = getattr(self.optimizer, "curvature_due", False)
        if curvature is not None and due != curvature:
            raise RuntimeError(f"the next step has curvature_due={due}, the measurement needs {curvature}")
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.inputs.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()

    @property
    def interval(self) -> int | None:
        """Steps between curvature updates; None for an optimizer without any."""
        interval: int | None = self.optimizer.param_groups[0].get("curvature_interval")
        return interval

    def warm_up(self) -> None:
        """Take the first steps and go to the steady state: curvature updates by `request_curvature` alone."""
        self.step()
        for group in self.optimizer.param_groups:
            if "curvature_interval" in group:
                group["curvature_interval"] = NEVER
                # As late in training: in the first steps updates come more often than the interval says.
                group["step"] = 10 * NEVER
        self.request_curvature()
        for _ in range(3):
            self.step()

    def request_curvature(self) -> bool:
        """Make the next step update every layer's curvature; False for an optimizer that has none."""
        if not hasattr(self.optimizer, "request_curvature"):
            return False
        self.optimizer.request_curvature()
        return True


def prepare(workload: Workload, optimizer: str, device: torch.device) -> Trainer:
    """Build the model, its optimizer at default options and the batch; equal for all optimizers."""
    torch.manual_seed(0)
    model = MODELS[workload.model][0]().to(device)
    inputs, targets = workload.batch(device)
    return Trainer(model, BUILDERS[optimizer][1](model, lr=LEARNING_RATE), inputs, targets, workload.bf16)


def amortised(plain: float, curvature: float | None, interval: int | None) -> float:
    """Return the mean time of a step with one curvature update in every interval."""
    if curvature is None or interval is None:
        return plain
    return (plain * (interval - 1) + curvature) / interval


def in_turns(names: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """Yield A B C D, then B C D A, …: drift hits all alike, and nobody always follows the same neighbour."""
    for number in range(rounds):
        turn = number % len(names)
        yield [*names[turn:], *names[:turn]]
