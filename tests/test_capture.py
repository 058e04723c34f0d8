"""One forward and one backward pass give the right pair and the right statistics, whatever else goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import (
    PLAIN,
    assert_equal,
    batch,
    check_step,
    conv_net,
    direction,
    gradients,
    halves,
    kfac,
    loss_of,
    mlp,
    train_step,
    weights,
)
from reference import ReferenceFOP, half_squared_error

IMAGE = (2, 5, 6)


def plain_oracle(model: nn.Sequential) -> ReferenceFOP:
    return ReferenceFOP(model, **{k: v for k, v in PLAIN.items() if k != "curvature_interval"})


def check_oracle(model: nn.Module, oracle: ReferenceFOP) -> None:
    torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-10, atol=1e-11)


def started(build: Callable[[], nn.Sequential] = mlp) -> tuple[nn.Sequential, nn.Sequential, FOP]:
    """A model, a copy of it that no optimizer knows, and its optimizer."""
    model = build()
    twin = copy.deepcopy(model)
    return model, twin, FOP(model, **PLAIN)


def linear(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3, **options), nn.Flatten()).double()


# --- the split -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 3, 6, 7])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, (5,)),
        (conv_net, IMAGE),
        (lambda: linear(bias=False), (5,)),
        (linear, (4, 5)),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.Flatten()).double(), IMAGE),
    ],
    ids=["mlp", "conv-net", "no-bias", "rows", "grouped"],
)
def test_split_equals_two_backward_passes(
    build: Callable[[], nn.Sequential], shape: tuple[int, ...], N: int
) -> None:
    model, twin, optimizer = started(build)
    x, _ = batch(N, shape=shape)
    y = torch.randn_like(model(x).detach())
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    check_step(model, twin, optimizer, pairs)


# --- forward passes that no backward pass follows ----------------------------------------------------------


def no_grad_forward(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(batch(4, seed=7)[0])
    model.train()


def eval_forward(model: nn.Module) -> None:
    model.eval()
    model(batch(4, seed=7)[0])
    model.train()


def second_forward(model: nn.Module) -> None:
    model.kept = loss_of(model, *batch(6, seed=7))  # type: ignore[assignment]  # its graph stays alive


def gradient_of_inputs(model: nn.Module) -> None:
    x = batch(6, seed=7)[0].requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)


def gradient_of_weights(model: nn.Module) -> None:
    torch.autograd.grad(model(batch(6, seed=7)[0]).square().sum(), list(model.parameters()))


@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize(
    "disturb", [no_grad_forward, eval_forward, second_forward, gradient_of_inputs, gradient_of_weights]
)
def test_only_the_backwarded_forward_counts(disturb: Callable[[nn.Module], None], when: str) -> None:
    model, _, optimizer = started()
    oracle = plain_oracle(model)
    for seed in range(2):
        x, y = batch(6, seed)
        oracle.step(x, y, half_squared_error)
        optimizer.zero_grad()
        if when == "before":
            disturb(model)
        loss = loss_of(model, x, y)
        if when == "between":
            disturb(model)
        loss.backward()
        if when == "after":
            disturb(model)
        optimizer.step()
        check_oracle(model, oracle)


def test_gradient_of_inputs_on_the_same_graph() -> None:
    model, _, optimizer = started()
    oracle = plain_oracle(model)
    x, y = batch()
    oracle.step(x, y, half_squared_error)
    x.requires_grad_()
    loss = loss_of(model, x, y)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, x)
    optimizer.step()
    check_oracle(model, oracle)


# --- gradients that do not come through the layer's output alone: the right pair or K-FAC, nothing else ---


def gradient_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return half_squared_error(out, y) + slope.square().sum(1).mean()


def weight_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss_of(model, x, y) + 0.5 * sum(p.square().sum() for p in model.parameters())


def weight_used_twice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A tied autoencoder: the decoder uses the encoder's weight through a function."""
    weight = model[0].weight  # type: ignore[index]
    decoded = nn.functional.linear(torch.tanh(model[0](x)), weight.T)  # type: ignore[index]
    return loss_of(model, x, y) + half_squared_error(decoded, x)


def check_right_pair_or_kfac(
    model: nn.Module, twin: nn.Module, optimizer: FOP, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    for name, pair in pairs.items():
        try:
            check_step(model, twin, optimizer, {name: pair})
        except AssertionError:
            check_step(model, twin, optimizer, kfac({name: pair}))


@pytest.mark.parametrize("loss_fn", [gradient_penalty, weight_penalty, weight_used_twice])
def test_other_ways_into_the_gradient_do_not_falsify_the_pair(
    loss_fn: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    model, twin, optimizer = started()
    x, y = batch()
    pairs = halves(twin, x, y, loss_fn)
    loss_fn(model, x, y).backward()
    optimizer.step()
    check_right_pair_or_kfac(model, twin, optimizer, pairs)


def test_hook_on_the_weight_does_not_falsify_the_pair() -> None:
    model, twin, optimizer = started()
    x, y = batch()
    pairs = halves(twin, x, y)
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    loss_of(model, x, y).backward()
    average, difference = pairs["0"]
    average = torch.cat([model[0].weight.grad, average[0, :, -1:]], dim=1)[None]  # type: ignore[list-item]
    optimizer.step()
    check_step(model, twin, optimizer, kfac({"0": (average, difference)}))


@pytest.mark.parametrize("first", ["hook", "optimizer"])
def test_forward_hook_that_replaces_the_output(first: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    twin[0].register_forward_hook(lambda module, args, output: 3 * output)
    x, y = batch()
    pairs = halves(twin, x, y)
    if first == "hook":
        model[0].register_forward_hook(lambda module, args, output: 3 * output)
    optimizer = FOP(model, **PLAIN)
    if first == "optimizer":
        model[0].register_forward_hook(lambda module, args, output: 3 * output)
    train_step(model, optimizer, x, y)
    check_step(model, twin, optimizer, pairs)


def test_forward_hook_that_makes_the_output_a_tuple() -> None:
    model = nn.Linear(5, 3)
    model.register_forward_hook(lambda module, args, output: (output, None))
    optimizer = FOP(model)
    model(torch.randn(4, 5))[0].square().mean().backward()
    optimizer.step()
    assert optimizer.diagnostics().layers or optimizer.summary().rows[0].path == "AdamW"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph() -> None:
    model, _, optimizer = started()
    oracle = plain_oracle(model)
    for seed in range(3):
        x, y = batch(6, seed)
        oracle.step(x, y, half_squared_error)
        optimizer.zero_grad()
        loss_of(model, x, y).backward(create_graph=True)
        optimizer.step()
        check_oracle(model, oracle)


# --- shared and unused modules -----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("N", [6, 5])
def test_module_called_several_times(N: int) -> None:
    model = Recurrent()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(N)
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    check_step(model, twin, optimizer, pairs)
    hidden = [x, torch.tanh(twin.cell(x))]
    hidden.append(torch.tanh(twin.cell(hidden[-1])))
    rows = torch.cat([torch.cat([h, torch.ones_like(h[:, :1])], dim=1) for h in hidden])
    torch.testing.assert_close(optimizer.state[model.cell.weight]["A"][0], rows.T @ rows / N)


def test_module_called_on_batches_of_other_size_is_kfac() -> None:
    model = Recurrent()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch()

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, x, y) + model.cell(x[:3]).square().sum()  # type: ignore[operator]

    whole = gradients(twin, loss_fn(twin, x, y))
    loss_fn(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, {"cell": (whole["cell"], None)})


class Tied(nn.Module):
    """One weight in two modules, with one bias or a bias each."""

    def __init__(self, one_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight
        if one_bias:
            self.b.bias = self.a.bias
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out


@pytest.mark.parametrize("one_bias", [False, True])
@pytest.mark.parametrize("N", [6, 5])
def test_weight_of_two_modules_is_one_block(N: int, one_bias: bool) -> None:
    model = Tied(one_bias)
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(N)
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    rows = torch.cat([x, torch.tanh(twin.a(x)).detach()])
    if one_bias:
        check_step(model, twin, optimizer, pairs)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    else:
        average, difference = (part[..., :-1] for part in pairs["a"])
        expected = direction(optimizer, model.a.weight, average, difference)[0]
        taken = (twin.a.weight - model.a.weight).detach() / PLAIN["lr"]
        torch.testing.assert_close(taken, expected, rtol=1e-9, atol=1e-10)
        # A bias each: they are no part of the one matrix. Adam's first step is its lr.
        for bias, before in ((model.a.bias, twin.a.bias), (model.b.bias, twin.b.bias)):
            torch.testing.assert_close((bias - before).abs(), torch.full_like(bias, 1e-3), rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.state[model.a.weight]["A"][0], rows.T @ rows / N)


def test_use_of_a_weight_by_only_one_of_its_modules() -> None:
    """An auxiliary head that is left out of some steps."""
    model = Tied(one_bias=True)
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    train_step(model, optimizer, *batch())
    twin.load_state_dict(model.state_dict())

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return half_squared_error(model.head(torch.tanh(model.a(x))), y)  # type: ignore[operator]

    x, y = batch(6, seed=2)
    pairs = halves(twin, x, y, loss_fn)
    optimizer.zero_grad()
    loss_fn(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)


def test_layer_unused_in_a_step() -> None:
    model, twin, optimizer = started()
    x, y = batch()
    train_step(model, optimizer, x, y)
    used = weights(model)
    state = copy.deepcopy(optimizer.state[model[0].weight])
    optimizer.zero_grad()
    half_squared_error(model[2](batch(6, seed=3, shape=(6,))[0]), y).backward()
    assert model[0].weight.grad is None
    optimizer.step()
    assert torch.equal(model[0].weight, used["0.weight"])
    assert not torch.equal(model[2].weight, used["2.weight"])
    assert_equal(dict(optimizer.state[model[0].weight]), dict(state))
    twin.load_state_dict(model.state_dict())
    x, y = batch(6, seed=4)
    pairs = halves(twin, x, y)
    train_step(model, optimizer, x, y)
    check_step(model, twin, optimizer, pairs)
