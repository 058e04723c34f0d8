"""Gradients that change between `backward` and `step`: a scale is followed, anything else costs the pair."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import (
    PLAIN,
    batch,
    check_step,
    conv_net,
    gradients,
    halves,
    kfac,
    layers,
    loss_of,
    mlp,
    train_step,
)
from reference import Tape, half_squared_error, observe
from reference.steps import check_direction

Change = Callable[[nn.Module], None]
IMAGE = (2, 5, 6)
# With this interval the curvature of step 15 is the last one before step 18.
BETWEEN = {**PLAIN, "curvature_interval": 100, "lr": 0.02}


def grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def check_kept_pair(optimizer: FOP, names: set[str], steps: int = 0) -> None:
    """These layers had the pair in the last step, and missed it ``steps`` times so far."""
    found = optimizer.diagnostics().layers
    for name in names:
        assert (found[name].kfac_steps, found[name].why_kfac) == (steps, None), name


def check_lost_pair(optimizer: FOP, names: set[str], steps: int = 1) -> None:
    """These layers had no pair in the last step, said why, and missed it ``steps`` times so far."""
    found = optimizer.diagnostics().layers
    for name in names:
        assert found[name].kfac_steps == steps, name
        assert "p.grad" in (found[name].why_kfac or ""), name
        assert f"{name} took K-FAC's step" in str(optimizer.diagnostics())


def due_or_not(due: bool) -> tuple[nn.Module, nn.Module, FOP]:
    """A model, its twin, and an optimizer whose next step has statistics or has not."""
    model = mlp()
    if due:
        return model, copy.deepcopy(model), FOP(model, **PLAIN)
    optimizer = FOP(model, **BETWEEN)
    for seed in range(18):
        train_step(model, optimizer, *batch(6, seed))
    assert not optimizer.curvature_due
    return model, copy.deepcopy(model), optimizer


# --- changes of scale --------------------------------------------------------------------------------------


def halved(model: nn.Module) -> None:
    for p in model.parameters():
        grad(p).mul_(0.5)


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = grad(p) * 1e-3


def enlarged(model: nn.Module) -> None:
    for p in model.parameters():
        grad(p).mul_(1e6)


def clipped(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clipped_one_by_one(model: nn.Module) -> None:
    for module in layers(model).values():
        nn.utils.clip_grad_norm_(module.parameters(), 0.02)


def clipped_by_largest(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=torch.inf)


SCALES: list[Change] = [
    halved,
    replaced,
    enlarged,
    clipped,
    clipped_one_by_one,
    clipped_by_largest,
]


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("change", SCALES)
def test_pair_follows_a_scale(change: Change, due: bool) -> None:
    model, twin, optimizer = due_or_not(due)
    x, y = batch(7, 30)
    pairs = halves(twin, x, y)
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    before = {name: grad(layer.weight).norm() for name, layer in layers(model).items()}
    change(model)
    scale = {name: float(grad(layer.weight).norm() / before[name]) for name, layer in layers(model).items()}
    assert all(abs(number - 1) > 0.1 for number in scale.values()), "the change is none"
    optimizer.step()
    check_step(model, twin, optimizer, {k: (scale[k] * Ga, scale[k] * Gd) for k, (Ga, Gd) in pairs.items()})
    check_kept_pair(optimizer, set(pairs))


def test_clip_that_is_not_active_changes_nothing() -> None:
    model, twin, optimizer = due_or_not(True)
    pairs = halves(twin, *batch())
    loss_of(model, *batch()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    nn.utils.clip_grad_value_(model.parameters(), 1e6)
    optimizer.step()
    check_step(model, twin, optimizer, pairs)
    check_kept_pair(optimizer, set(pairs))


class Attentive(nn.Module):
    """Blocks whose matrix is not laid out as the weight is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(self.attention(x, x, x)[0])
        return out


def test_clip_of_embedding_and_attention() -> None:
    model, twin = Attentive(), Attentive()
    inputs, y = (torch.randint(9, (6, 5)),), torch.randn(6, 5, 3, dtype=torch.float64)
    blocks = observe(twin, Tape(twin), inputs, y, half_squared_error)
    optimizer = FOP(model, **PLAIN)
    half_squared_error(model(*inputs), y).backward()
    before = grad(model.head.weight).norm()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
    scale = float(grad(model.head.weight).norm() / before)
    optimizer.step()
    new = dict(model.named_parameters())
    moved = {name: (old - new[name]).detach() / PLAIN["lr"] for name, old in twin.named_parameters()}
    assert blocks.keys() == {
        f"{key}weight" for key in ("embed.", "attention.in_proj_", "attention.out_proj.", "head.")
    }
    for name, block in blocks.items():
        g1, g2 = block.mean_gradient(0, 3), block.mean_gradient(3, 6)
        check_direction(
            name,
            block.matrix(moved),
            optimizer.state[new[name]],
            scale * (g1 + g2) / 2,
            scale * (g1 - g2),
            PLAIN,
            tolerance=1e-9,
        )
    check_kept_pair(optimizer, {"embed", "attention.in_proj", "attention.out_proj", "head"})


# --- other changes -----------------------------------------------------------------------------------------


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def negated(model: nn.Module) -> None:
    for p in model.parameters():
        grad(p).neg_()


def centralised(model: nn.Module) -> None:
    for p in model.parameters():
        grad(p).sub_(grad(p).mean(-1, keepdim=True))


def noisy(model: nn.Module) -> None:
    torch.manual_seed(3)
    for p in model.parameters():
        grad(p).add_(torch.randn_like(p) * 0.1 * grad(p).abs().mean())


def signs_only(model: nn.Module) -> None:
    for p in model.parameters():
        grad(p).sign_()


def weight_and_bias_apart(model: nn.Module) -> None:
    for layer in layers(model).values():
        assert layer.bias is not None
        grad(layer.weight).mul_(0.5)
        grad(layer.bias).mul_(2.0)


def decayed(model: nn.Module) -> None:
    """L2 regularisation by hand."""
    for p in model.parameters():
        grad(p).add_(p.detach(), alpha=0.1)


def rows_clipped(model: nn.Module) -> None:
    """Adaptive gradient clipping: one scale a row."""
    for layer in layers(model).values():
        rows = grad(layer.weight).norm(dim=1, keepdim=True)
        grad(layer.weight).mul_((0.01 / rows).clamp(max=1))


OTHERS: list[Change] = [
    by_value,
    negated,
    centralised,
    noisy,
    signs_only,
    weight_and_bias_apart,
    decayed,
    rows_clipped,
]


def changed_pairs(model: nn.Module) -> dict[str, tuple[Tensor, None]]:
    """The gradient as it is now, without a second one."""
    found = {}
    for name, layer in layers(model).items():
        assert layer.bias is not None
        found[name] = (torch.cat([grad(layer.weight), grad(layer.bias)[:, None]], dim=1)[None].clone(), None)
    return found


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("change", OTHERS)
def test_any_other_change_is_a_kfac_step_and_counted(change: Change, due: bool) -> None:
    model, twin, optimizer = due_or_not(due)
    optimizer.zero_grad()
    loss_of(model, *batch(7, 30)).backward()
    change(model)
    expected = changed_pairs(model)
    optimizer.step()
    check_step(model, twin, optimizer, expected)
    check_lost_pair(optimizer, set(expected))
    train_step(model, optimizer, *batch(7, 31))
    check_kept_pair(optimizer, set(expected), steps=1)


def test_clip_by_value_costs_only_the_layers_that_it_reaches() -> None:
    model, twin, optimizer = due_or_not(True)
    x, y = batch()
    pairs = halves(twin, x, y)
    loss_of(model, x, y).backward()
    first, second = (max(grad(p).abs().max() for p in model[i].parameters()) for i in (0, 2))  # type: ignore[index]
    assert first < 0.9 * second
    nn.utils.clip_grad_value_(model.parameters(), float((first + second) / 2))
    expected = {"0": pairs["0"], "2": changed_pairs(model)["2"]}
    optimizer.step()
    check_step(model, twin, optimizer, expected)
    check_kept_pair(optimizer, {"0"})
    check_lost_pair(optimizer, {"2"})


def test_diagnostics_of_a_lost_pair_are_those_of_a_kfac_step() -> None:
    """A fixed β was not used."""
    model, _, optimizer = due_or_not(True)
    loss_of(model, *batch()).backward()
    by_value(model)
    optimizer.step()
    assert [layer.beta for layer in optimizer.diagnostics().layers.values()] == [0, 0]


def test_count_over_several_steps() -> None:
    """Only the steps without a pair, whether they had statistics or not."""
    model = conv_net()
    optimizer = FOP(model, **BETWEEN)
    names = {"0", "2", "4"}
    lost = 0
    for seed in range(20):
        optimizer.zero_grad()
        loss_of(model, *batch(6, seed, IMAGE)).backward()
        if seed in (2, 7, 8, 17):
            by_value(model)
            lost += 1
        optimizer.step()
        (check_lost_pair if seed in (2, 7, 8, 17) else check_kept_pair)(optimizer, names, lost)
    assert lost == 4


# --- hooks of the user's -----------------------------------------------------------------------------------


def noise(gradient: Tensor) -> Tensor:
    return gradient + 0.1 * gradient.abs().mean() * torch.randn_like(gradient)


def double(gradient: Tensor) -> Tensor:
    return 2 * gradient


@pytest.mark.parametrize("hook", [noise, double])
@pytest.mark.parametrize("first", ["hook", "optimizer"])
def test_hook_on_a_parameter(hook: Callable[[Tensor], Tensor], first: str) -> None:
    """It changes the gradient on its way into p.grad: no pair, in steps with and without statistics."""
    model = mlp()
    weight = layers(model)["0"].weight
    handle = weight.register_hook(hook) if first == "hook" else None
    optimizer = FOP(model, **BETWEEN)
    handle = handle or weight.register_hook(hook)
    for seed in range(18):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        loss_of(model, *batch(6, seed)).backward()
        expected = changed_pairs(model)
        pairs = halves(twin, *batch(6, seed))
        optimizer.step()
        check_step(model, twin, optimizer, {"0": expected["0"], "2": pairs["2"]})
        check_lost_pair(optimizer, {"0"}, seed + 1)
        check_kept_pair(optimizer, {"2"})
    assert not optimizer.curvature_due
    handle.remove()
    optimizer.request_curvature()
    train_step(model, optimizer, *batch(6, 20))
    check_kept_pair(optimizer, {"0"}, 18)


@pytest.mark.parametrize("first", ["hook", "optimizer"])
def test_hook_after_accumulation(first: str) -> None:
    """It may run before the library's own hook or after it: the right pair, or K-FAC's step and said so."""
    model = mlp()
    twin = copy.deepcopy(model)

    def hook(p: Tensor) -> None:
        grad(p).mul_(0.5)

    if first == "optimizer":
        optimizer = FOP(model, **PLAIN)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    if first == "hook":
        optimizer = FOP(model, **PLAIN)
    pairs = {name: (Ga / 2, Gd / 2) for name, (Ga, Gd) in halves(twin, *batch()).items()}
    train_step(model, optimizer, *batch())
    if optimizer.diagnostics().layers["0"].why_kfac is None:
        check_step(model, twin, optimizer, pairs)
        check_kept_pair(optimizer, set(pairs))
    else:
        check_step(model, twin, optimizer, kfac(pairs))
        check_lost_pair(optimizer, set(pairs))


def test_hook_that_only_looks() -> None:
    model, twin, optimizer = due_or_not(True)
    seen = []
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append(gradient.norm()))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(grad(p).norm()))
    layers(model)["2"].register_full_backward_hook(lambda *_: None)
    pairs = halves(twin, *batch())
    train_step(model, optimizer, *batch())
    assert len(seen) == 8
    check_step(model, twin, optimizer, pairs)
    check_kept_pair(optimizer, set(pairs))


@pytest.mark.parametrize("after", ["nothing", "backward"])
def test_gradients_given_by_hand(after: str) -> None:
    """Ga is p.grad wherever it comes from; what an earlier backward pass left has no part in it."""
    model, twin, optimizer = due_or_not(False)
    wanted = gradients(twin, loss_of(twin, *batch(6, 40)))
    optimizer.zero_grad()
    if after == "backward":
        loss_of(model, *batch(6, 41)).backward()
    for name, layer in layers(model).items():
        assert layer.bias is not None
        layer.weight.grad = wanted[name][0, :, :-1].clone()
        layer.bias.grad = wanted[name][0, :, -1].clone()
    optimizer.step()
    check_step(model, twin, optimizer, {name: (matrix, None) for name, matrix in wanted.items()})
    check_lost_pair(optimizer, set(wanted))
