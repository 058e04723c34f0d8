"""The training loop: what it steps, counts and records."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fop_bench import training
from fop_bench.models import mlp
from fop_bench.training import Training, cosine, count_right

TARGETS = torch.arange(48) % 3
INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(3)) + 2.0 * nn.functional.one_hot(
    TARGETS, 4
)


def blobs(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return INPUTS[numbers], TARGETS[numbers]


def run(
    seed: int = 0,
    lr: float = 0.1,
    epochs: int = 4,
    batch_size: int = 16,
    optimizer: Callable[..., Optimizer] = SGD,
    model: nn.Module | None = None,
    evaluate: Callable[[], float] | None = None,
    batch: training.Batch = blobs,
) -> training.Progress:
    torch.manual_seed(seed)
    model = model or mlp((4, 8, 3))
    made = Training(
        model,
        optimizer(model.parameters(), lr=lr),
        cosine,
        batch,
        evaluate or (lambda: count_right(model, 48, batch) / 48),
        samples=48,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=torch.Generator().manual_seed(seed),
    )
    assert made.run()
    return made.progress


def timeless(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{**epoch, "seconds": 0.0, "processor_seconds": 0.0} for epoch in curve]


def test_same_seed_same_run_and_another_seed_another_run() -> None:
    first, again, other = (timeless(run(seed).curve) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_curve_is_complete_and_learns() -> None:
    result = run(epochs=30, lr=0.5)
    assert [epoch["epoch"] for epoch in result.curve] == list(range(1, 31))
    assert not result.diverged
    assert result.curve[-1]["accuracy"] > 0.85
    assert result.curve[-1]["train_loss"] < 0.5 * result.curve[0]["train_loss"]


def test_divergence_ends_the_run_and_is_reported() -> None:
    result = run(lr=1e30, epochs=6)
    assert result.diverged
    assert len(result.curve) < 6
    assert all(math.isfinite(epoch["train_loss"]) for epoch in result.curve)


def test_seconds_leave_evaluation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class SlowSGD(SGD):
        def step(self, closure: Any = None) -> Any:
            clock[0] += 1.0
            return super().step(closure)

    def slow_accuracy() -> float:
        clock[0] += 1000.0
        return 0.5

    monkeypatch.setattr(training, "_now", lambda device: clock[0])
    result = run(epochs=3, optimizer=SlowSGD, evaluate=slow_accuracy)
    assert [epoch["seconds"] for epoch in result.curve] == [3.0, 6.0, 9.0]


@pytest.mark.parametrize(("batch_size", "used"), [(16, 48), (20, 40), (48, 48)])
def test_every_epoch_is_a_new_order_of_distinct_samples(batch_size: int, used: int) -> None:
    seen: list[int] = []

    def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend(numbers.tolist())
        return blobs(numbers)

    run(batch_size=batch_size, epochs=2, batch=batch, evaluate=lambda: 0.0)
    assert len(seen) == 2 * used
    first, second = seen[:used], seen[used:]
    assert len(set(first)) == len(set(second)) == used
    assert first != second


def test_learning_rate_follows_half_a_cosine_to_zero() -> None:
    rates: list[float] = []

    class Spy(SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    run(lr=0.4, batch_size=12, epochs=2, optimizer=Spy)
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_accuracy_counts_right_answers_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(1.0), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
    inputs, targets = torch.eye(3)[[0, 1, 2, 0] * 300], torch.tensor([0, 1, 1, 2] * 300)
    assert count_right(model, 1200, lambda numbers: (inputs[numbers], targets[numbers])) == 600


@pytest.mark.parametrize("batch_size", [0, 49])
def test_a_batch_size_outside_the_data_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}.*1 to the 48"):
        run(batch_size=batch_size)
