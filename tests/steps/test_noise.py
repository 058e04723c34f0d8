"""The share of noise in a gradient, and the damping and the length of steps that follow from it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fop import FOP, KFAC
from fop.correction import SubBatchGradients, contrasts
from fop.curvature import NOISE
from fop.step_size import noise_share
from internals import direction
from reference import dense_damped_fisher, dense_fisher, unvec, vec

DIMS = (2, 3, 4)  # groups, out, in
MOMENTUM = 0.6


class Dense:
    """A damped Kronecker metric as dense matrices."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        groups, out, columns = DIMS
        A, G = (root @ root.mT / 5 for root in (torch.randn(groups, d, 5).double() for d in (columns, out)))
        self.F, self.F_hat = dense_fisher(A, G), dense_damped_fisher(A, G, 1e-2)
        self.inverse, self.trace = torch.linalg.inv(self.F_hat), self.F.trace()

    def fisher(self, V: Tensor) -> Tensor:
        return unvec(self.F @ vec(V), V)

    def solve(self, V: Tensor) -> Tensor:
        return unvec(self.inverse @ vec(V), V)

    def square(self, V: Tensor) -> Tensor:
        return vec(V) @ self.inverse @ vec(V)


def measured(metric: Dense, gradients: Tensor) -> Tensor:
    average = gradients.mean(0)
    shares = [1 / len(gradients)] * len(gradients)
    differences = contrasts([g / len(gradients) for g in gradients[:-1]], shares, average)
    noise = direction(metric, SubBatchGradients(average, differences, torch.tensor(True))).noise
    assert noise is not None
    return noise


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_noise_is_the_variance_of_the_mean_of_sub_batches(count: int) -> None:
    metric = Dense()
    gradients = torch.randn(count, *DIMS, dtype=torch.float64) + torch.randn(DIMS, dtype=torch.float64)
    average = gradients.mean(0)
    # The unbiased estimate of the variance of a mean of `count`.
    variance = sum(metric.square(g - average) for g in gradients) / (count * (count - 1))
    assert torch.allclose(
        measured(metric, gradients), torch.stack([variance, metric.square(average)]), rtol=1e-10
    )


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e12])
def test_equal_sub_batches_have_no_noise(size: float) -> None:
    metric = Dense()
    gradient = size * torch.randn(DIMS, dtype=torch.float64)
    noise, whole = measured(metric, torch.stack([gradient, gradient]))
    assert noise <= 1e-28 * whole
    assert whole > 0


def test_noise_alone_has_a_share_of_one() -> None:
    metric, averages = Dense(), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(200):
        norms = measured(metric, torch.randn(2, *DIMS, dtype=torch.float64))
        share, averages = noise_share(averages, norms[None], torch.tensor([True]))
    assert share > 0.75  # of ten steps' average; it is 0.99 at most


def test_what_is_not_believed_does_not_count() -> None:
    _, averages = noise_share(
        torch.zeros(2, 2), torch.tensor([[1.0, 4.0], [2.0, 2.0]]), torch.tensor([True] * 2)
    )
    for norms, trusted in (
        ([0.0, 9.0], torch.tensor([False, True])),
        ([math.nan, 1.0], torch.tensor([True, True])),
        ([1.0, math.inf], torch.tensor([True, True])),
    ):
        share, after = noise_share(averages, torch.tensor([norms, [1.0, 8.0]]), trusted)
        assert share[0] == 0.25 and share[1] < 0.99
        assert torch.equal(after[0], averages[0]) and not torch.equal(after[1], averages[1])
    share, after = noise_share(averages, None, None)
    assert share[0] == 0.25 and torch.equal(after, averages)
    assert noise_share(torch.zeros(1, 2), None, None)[0] == 1  # all counts as noise


# --- What follows from it


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(32, 6, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


def test_damping_is_the_share_that_fits_the_noise() -> None:
    model = net()
    optimizer = FOP(model)
    train(optimizer, model, 6)
    for layer in optimizer.diagnostics().layers.values():
        assert layer.noise is not None and 0 < layer.noise < 1
        # What six steps know; the damping's share in a mean eigenvalue is root / (1 + root).
        share = (1 - 0.9**6) * layer.noise
        root = max(1 / math.sqrt(1 - share) - 1, 0.1)
        assert layer.damping_G == pytest.approx(root / (1 + root), rel=1e-9)


@pytest.mark.parametrize("anneal", [False, True])
def test_where_none_was_measured_all_counts_as_noise(anneal: bool) -> None:
    """A batch of 1 has no halves: K-FAC's step, and as short as noise alone if lengths are annealed."""
    models, x = [net(), net()], torch.randn(1, 6, dtype=torch.float64)
    share = 0.01 / (0.01 + 0.99 * (1 - MOMENTUM) / (1 + MOMENTUM)) if anneal else 1.0
    fop, kfac = FOP(models[0], anneal=anneal), KFAC(models[1], lr=0.2 * share)
    for model, optimizer in zip(models, (fop, kfac), strict=True):
        model(x).square().mean().backward()
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-15) if anneal else torch.equal(p, q)
    assert all(layer.noise is None for layer in fop.diagnostics().layers.values())


def test_without_noise_or_sub_batches_damping_is_as_before_any_was_measured() -> None:
    for kind, options in ((KFAC, {}), (FOP, {"sub_batches": 1})):
        models = [net() for _ in range(2)]
        for model, damping in zip(models, ("adaptive", 0.01), strict=True):
            train(kind(model, damping=damping, **options), model, 5)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_a_step_is_as_long_as_its_share_of_signal(momentum: float) -> None:
    model = net()
    optimizer = FOP(model, lr=0.1, momentum=momentum)
    train(optimizer, model, 5)
    before = copy.deepcopy(model)
    train(optimizer, model, 1, start=5)
    for name in ("0", "2"):
        layer = optimizer.diagnostics().layers[name]
        assert layer.noise is not None and layer.length is not None
        # Of the average that momentum makes: all of the signal, (1 - μ)/(1 + μ) of the noise.
        noise = layer.noise * (1 - momentum) / (1 + momentum)
        assert layer.length == pytest.approx(0.1 * (1 - layer.noise) / (1 - layer.noise + noise), rel=1e-9)
        old, new = (m.get_submodule(name).weight.detach() for m in (before, model))
        turned = float(torch.acos((old * new).sum() / old.norm() / new.norm()))
        # The bias takes part in the length of the update, and so does what changes the norm.
        assert 0.5 * layer.length < math.tan(turned) < layer.length * (1 + 1e-9)


def test_a_scheduler_says_how_steps_get_shorter_if_there_is_one() -> None:
    schedulers = torch.optim.lr_scheduler
    for make, annealed in (
        (lambda of: schedulers.ConstantLR(of, 1.0, 1), False),
        (schedulers.ReduceLROnPlateau, True),
        (None, True),
    ):
        model = net()
        optimizer = FOP(model, lr=0.1)
        if make is not None:
            make(optimizer)
        train(optimizer, model, 3)
        lengths = [of.length for of in optimizer.diagnostics().layers.values()]
        assert all((each < 0.0999) if annealed else each == pytest.approx(0.1) for each in lengths), make
    for anneal in (True, False):
        model = net()
        optimizer = FOP(model, lr=0.1, anneal=anneal)
        if anneal:
            schedulers.ConstantLR(optimizer, 1.0, 1)
        train(optimizer, model, 3)
        lengths = [of.length for of in optimizer.diagnostics().layers.values()]
        assert all((each < 0.0999) is anneal for each in lengths)


def test_steps_get_shorter_as_a_network_fits_noise() -> None:
    """At a constant rate, batches of random labels: the weights would grow by 2 % a step for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = FOP(model)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(64, 6)), torch.randint(2, (64,)))
        loss.backward()
        optimizer.step()
    assert all(of.length is not None and of.length < 0.1 for of in optimizer.diagnostics().layers.values())
    assert loss < 1


def test_noise_is_in_a_checkpoint() -> None:
    model = net()
    optimizer = FOP(model)
    train(optimizer, model, 4)
    other = copy.deepcopy(model)
    loaded = FOP(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, of in ((optimizer, model), (loaded, other)):
        train(each, of, 3, start=4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    weight = next(model.parameters())
    assert torch.equal(optimizer.state[weight][NOISE], loaded.state[next(other.parameters())][NOISE])


class Positions(nn.Module):
    """The rows of ``positions`` belong to all samples alike: it never has sub-batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.positions, self.head = nn.Linear(6, 8), nn.Embedding(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((self.first(x)[:, None] + self.positions(torch.arange(5))[None]).tanh())
        return out.mean(1)


@pytest.mark.parametrize("options", [{}, {"inverse_delay": 3}, {"sub_batches": 1}], ids=str)
def test_distributed_checkpoints_know_the_noise_of_every_layer(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def state_of(model: nn.Module, optimizer: FOP) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}

    model, other = Positions().double(), Positions().double()
    optimizer, loaded = (FOP(each, **options) for each in (model, other))
    train(optimizer, model, 5)
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path)
    state = state_of(other, loaded)
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, loaded, state["optimizer"])
    for each, of in ((optimizer, model), (loaded, other)):
        train(each, of, 4, start=5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_scheduler_is_known_whether_it_or_the_state_comes_first(loaded_first: bool) -> None:
    model = net()
    optimizer = FOP(model, lr=0.1)
    train(optimizer, model, 1)
    state = copy.deepcopy(optimizer.state_dict())  # of a run without one
    model = net()
    optimizer = FOP(model, lr=0.1)
    for step in ("load", "schedule") if loaded_first else ("schedule", "load"):
        if step == "load":
            optimizer.load_state_dict(state)
        else:
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    train(optimizer, model, 3)
    assert all(of.length == pytest.approx(0.1) for of in optimizer.diagnostics().layers.values())


def test_a_layer_that_does_not_move_has_no_length() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    nn.init.zeros_(model[1].weight)
    optimizer = FOP(model, anneal=False)
    train(optimizer, model, 1)
    lengths = {name: of.length for name, of in optimizer.diagnostics().layers.items()}
    assert lengths == {"0": 0.0, "1": pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": "noise"}, "or 'adaptive'"),
        ({"anneal": "always"}, "True, False or 'auto'"),
        ({"anneal": 1.0}, "True, False or 'auto'"),
        ({"damping": "adaptive", "damping_kind": "absolute"}, "damping_kind is 'absolute'"),
        ({"damping": "adaptive", "step_length": "paper"}, "damping_kind is 'absolute'"),
    ],
)
def test_wrong_damping_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FOP(net(), **options)
