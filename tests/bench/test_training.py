import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from fop_bench import training
from fop_bench.models import mlp
from fop_bench.training import Samples, cosine, train


def blobs(count=48):
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, 4, generator=generator) + 2.0 * nn.functional.one_hot(targets, 4)
    return Samples(inputs, targets)


def small_model():
    return mlp((4, 8, 3))


def sgd(model, lr):
    return SGD(model.parameters(), lr=lr)


def run(seed=0, learning_rate=0.1, **changes):
    arguments = {"batch_size": 16, "epochs": 4, "seed": seed, "learning_rate": learning_rate, **changes}
    return train(small_model, sgd, blobs(), blobs(), **arguments)


def without_seconds(curve):
    return [replace(epoch, seconds=0.0, processor_seconds=0.0) for epoch in curve]


def test_same_seed_same_run_and_another_seed_another_run():
    first, again, other = run(seed=5), run(seed=5), run(seed=6)
    assert without_seconds(first.curve) == without_seconds(again.curve)
    assert without_seconds(first.curve) != without_seconds(other.curve)


def test_curve_is_complete_and_learns():
    result = run(epochs=30, learning_rate=0.5)
    assert [epoch.epoch for epoch in result.curve] == list(range(1, 31))
    assert not result.diverged
    assert result.curve[-1].accuracy > 0.85
    assert result.curve[-1].train_loss < 0.5 * result.curve[0].train_loss


def test_divergence_ends_the_run_and_is_reported():
    result = run(learning_rate=1e30, epochs=6)
    assert result.diverged
    assert len(result.curve) < 6
    assert all(math.isfinite(epoch.train_loss) for epoch in result.curve)


def test_seconds_leave_evaluation_out(monkeypatch):
    clock = [0.0]

    class SlowSGD(SGD):
        def step(self, closure=None):
            clock[0] += 1.0
            return super().step(closure)

    def slow_accuracy(model, samples):
        clock[0] += 1000.0
        return 0.5

    monkeypatch.setattr(training, "_now", lambda device: clock[0])
    monkeypatch.setattr(training, "accuracy", slow_accuracy)
    data = blobs()
    result = train(
        small_model,
        lambda model, lr: SlowSGD(model.parameters(), lr=lr),
        data,
        data,
        learning_rate=0.1,
        batch_size=16,
        epochs=3,
        seed=0,
    )
    assert [epoch.seconds for epoch in result.curve] == [3.0, 6.0, 9.0]


@pytest.mark.parametrize(("batch_size", "used"), [(16, 48), (20, 40), (48, 48)])
def test_every_epoch_is_a_new_order_of_distinct_samples(batch_size, used):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.extend(x[:, 0].tolist())
            return super().forward(x)

    data = Samples(torch.arange(48.0).unsqueeze(1), torch.zeros(48, dtype=torch.int64))
    train(lambda: Spy(1, 2), sgd, data, data, learning_rate=0.0, batch_size=batch_size, epochs=2, seed=0)
    assert len(seen) == 2 * used
    first, second = seen[:used], seen[used:]
    assert len(set(first)) == len(set(second)) == used
    assert first != second


def test_learning_rate_follows_half_a_cosine_to_zero():
    rates = []

    class Spy(SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    data = blobs()
    train(
        small_model,
        lambda model, lr: Spy(model.parameters(), lr=lr),
        data,
        data,
        learning_rate=0.4,
        batch_size=12,
        epochs=2,
        seed=0,
    )
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert cosine(1.0) == 0.0


def test_accuracy_counts_right_answers_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(1.0), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
    samples = Samples(torch.eye(3)[[0, 1, 2, 0] * 300], torch.tensor([0, 1, 1, 2] * 300))
    assert training.accuracy(model, samples) == 0.5


@pytest.mark.parametrize("batch_size", [0, 49])
def test_a_batch_size_outside_the_data_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}.*1 to the 48"):
        run(batch_size=batch_size)


def test_warnings_go_into_the_record():
    def noisy(model, lr):
        import warnings

        warnings.warn("mind the gap", UserWarning, stacklevel=1)
        return SGD(model.parameters(), lr=lr)

    result = train(small_model, noisy, blobs(), blobs(), learning_rate=0.1, batch_size=16, epochs=1, seed=0)
    assert result.warnings == ["UserWarning: mind the gap"]
