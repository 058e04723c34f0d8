"""Models that are moved, overwritten or rebuilt under a living optimizer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fop import FOP
from models import (
    PLAIN,
    assert_differs,
    assert_equal,
    batch,
    check_kept_pair,
    check_lost_pair,
    check_step,
    halves,
    kfac,
    mlp,
    snapshot,
    train_step,
    weights,
)
from reference import Tape, half_squared_error, observe, split
from reference.steps import check_direction

# Nothing but momentum, so that a lost buffer shows; the curvature of step 16 is kept until step 19.
RUN: dict[str, Any] = {"step_length": "paper", "lr": 0.02, "momentum": 0.9, "damping": 0.1, "kl_clip": None}


class Net(nn.Module):
    """Tied embedding and head, packed attention with the batch in dim 1, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        x = self.inner(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        out: Tensor = self.head(torch.tanh(x)).transpose(0, 1)
        return out


BLOCKS = {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "inner.weight"}


def sentences(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (6, 3), generator=generator)
    return ids, torch.randn(6, 3, 7, generator=generator, dtype=torch.float64).to(
        next(model.parameters()).dtype
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        ids, y = sentences(model, seed)
        optimizer.zero_grad()
        half_squared_error(model(ids), y).backward()
        optimizer.step()


def check(model: nn.Module, optimizer: FOP, seed: int, tolerance: float = 1e-9) -> None:
    """One more step, by the dense equations with the factors that the optimizer holds."""
    twin = copy.deepcopy(model)
    train(model, optimizer, seed)
    ids, y = sentences(model, seed)
    old = {name: param.detach().clone() for name, param in twin.named_parameters()}
    blocks = observe(twin, Tape(twin), (ids,), y, half_squared_error)
    new = dict(model.named_parameters())
    moved = {name: (was - new[name]).detach() / PLAIN["lr"] for name, was in old.items()}
    for name in BLOCKS:
        g1, g2 = map(blocks[name].mean_gradient, split(6))
        held = optimizer.state[new[name]]
        check_direction(name, blocks[name].matrix(moved), held, (g1 + g2) / 2, g1 - g2, PLAIN, tolerance)
    found = optimizer.diagnostics().layers
    assert len(found) == len(BLOCKS)
    assert {layer.why_kfac for layer in found.values()} == {None}


def started(bare: bool = False, steps: int = 2, **options: Any) -> tuple[Net, FOP]:
    model = Net().double()
    optimizer = FOP(model.parameters() if bare else model, **(options or PLAIN))
    train(model, optimizer, *range(steps))
    return model, optimizer


both = pytest.mark.parametrize("bare", [False, True])


# --- dtype and memory --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("steps", [3, 18])
def test_to_float64_goes_on_as_a_run_that_was_float64(bare: bool, steps: int) -> None:
    """As a fresh float64 model with the same weights, and an optimizer with the state of that time."""
    model = Net()
    optimizer = FOP(model.parameters() if bare else model, **RUN)
    train(model, optimizer, *range(steps))
    saved = snapshot(optimizer)
    model.to(torch.float64)
    twin = copy.deepcopy(model)
    other = FOP(twin, **RUN)
    other.load_state_dict(saved)
    for seed in range(steps, steps + 4):
        train(model, optimizer, seed)
        train(twin, other, seed)
        assert_equal(weights(model), weights(twin))
    assert_equal(snapshot(optimizer), snapshot(other))
    floats = [
        t
        for s in optimizer.state.values()
        for k, t in s.items()
        if isinstance(t, Tensor) and t.is_floating_point() and k != "step"
    ]
    assert {t.dtype for t in floats} == {torch.float64}


@both
def test_step_after_a_move_is_exact(bare: bool) -> None:
    model = Net()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    train(model, optimizer, 0, 1)
    model.double()
    for seed in (2, 3):
        # Factors of float32 are symmetric to its rounding only, and the oracle takes them as they are.
        check(model, optimizer, seed, tolerance=1e-7)


def test_channels_last_in_mid_training() -> None:
    results = []
    for moved in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 3)
        )
        model = model.double()
        optimizer = FOP(model, **RUN)
        for seed in range(8):
            if moved and seed == 4:
                model.to(memory_format=torch.channels_last)
                assert not model[0].weight.is_contiguous()
            x, y = batch(6, seed, (3, 5, 5))
            train_step(model, optimizer, x.contiguous(memory_format=torch.channels_last) if moved else x, y)
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@both
def test_conversion_that_replaces_the_parameters(bare: bool) -> None:
    """torch's switch by which ``model.to`` makes new Parameters."""
    model = Net()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    train(model, optimizer, 0, 1)
    before = list(model.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert not {id(p) for p in before} & {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match=r"embed\.weight was shared .* different parameters now"):
        optimizer.step()
    model.head.weight = model.embed.weight
    check_followed(model, optimizer)


# --- parameters replaced -----------------------------------------------------------------------------------


def check_followed(model: Net, optimizer: FOP) -> None:
    """After at most one step without the pair the new parameters do the right steps; the old are let go."""
    before = weights(model)
    train(model, optimizer, 30)
    assert_differs(weights(model), before)
    for seed in (31, 32):
        check(model, optimizer, seed, tolerance=1e-7)
    held = {param for group in optimizer.param_groups for param in group["params"]}
    assert held == set(model.parameters())
    assert set(optimizer.state) <= held
    assert {row.name for row in optimizer.summary().rows} == {name for name, _ in model.named_parameters()}


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_load_state_dict_with_assign(dtype: torch.dtype, bare: bool) -> None:
    """Of the same weights, once in the optimizer's dtype and once in another: the run goes on."""
    model = Net().to(dtype)
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    train(model, optimizer, 0, 1)
    old = [weakref.ref(param) for param in model.parameters()]
    model.load_state_dict({k: v.double().clone() for k, v in model.state_dict().items()}, assign=True)
    model.head.weight = model.embed.weight
    check_followed(model, optimizer)
    gc.collect()
    assert [ref for ref in old if ref() is not None] == []


@both
def test_state_is_kept_over_assign(bare: bool) -> None:
    """Momentum, factors, moments: the next step is that of a run whose weights were copied instead."""
    results = []
    for assign in (False, True):
        model, optimizer = started(bare, 18, **RUN, beta=0.0)
        assert not optimizer.curvature_due
        model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()}, assign=assign)
        model.head.weight = model.embed.weight
        train(model, optimizer, 18)
        results.append((weights(model), snapshot(optimizer)["state"]))
    assert_equal(results[1], results[0])


def test_assign_of_another_shape() -> None:
    """Not a silent restart: an error that names the parameter, and nothing has changed."""
    model = mlp()
    optimizer = FOP(model, **PLAIN)
    train_step(model, optimizer, *batch())
    state = snapshot(optimizer)
    model[2].weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    model[2].bias = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer.zero_grad()
    model(batch()[0]).square().mean().backward()
    before = weights(model)
    with pytest.raises(ValueError, match=r"2\.(weight|bias).*replaced"):
        optimizer.step()
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer), state)


# --- hooks cleared -----------------------------------------------------------------------------------------


def clear(*names: str) -> Callable[[nn.Module], None]:
    def cleared(module: nn.Module) -> None:
        for name in names:
            getattr(module, name).clear()

    return cleared


@pytest.fixture
def no_modes() -> Iterator[None]:
    """No function mode stays on, which would see every later call of this process."""
    yield
    left = torch.overrides._get_current_function_mode_stack()
    for _ in left:
        torch._C._pop_torch_function_stack()
    assert left == []


CLEARED = {
    "forward": clear("_forward_hooks"),
    "pre": clear("_forward_pre_hooks"),
    "all": clear("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
}


@pytest.mark.usefixtures("no_modes")
@both
@pytest.mark.parametrize("which", CLEARED)
def test_hooks_come_back_after_apply(which: str, bare: bool) -> None:
    """Those on the layers, and those on the model that tell where the batch is."""
    model, optimizer = started(bare)
    model.apply(CLEARED[which])
    before = weights(model)
    train(model, optimizer, 2)
    assert_differs(weights(model), before)
    for seed in (3, 4):
        check(model, optimizer, seed)


def test_step_without_hooks_is_a_kfac_step_and_counted() -> None:
    model = mlp()
    optimizer = FOP(model, **PLAIN)
    train_step(model, optimizer, *batch(6, 0))
    model.apply(CLEARED["all"])
    twin = copy.deepcopy(model)
    train_step(model, optimizer, *batch(6, 1))
    check_step(model, twin, optimizer, kfac(halves(twin, *batch(6, 1))))
    check_lost_pair(optimizer)
    twin.load_state_dict(model.state_dict())
    train_step(model, optimizer, *batch(6, 2))
    check_step(model, twin, optimizer, halves(twin, *batch(6, 2)))
    check_kept_pair(optimizer, steps=1)


# --- parametrizations --------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrization_after_construction() -> None:
    """The weight becomes an input of a function: AdamW from this step on; FOP again when it is taken off."""
    model = mlp()
    optimizer = FOP(model, **PLAIN, adamw_lr=0.01)
    train_step(model, optimizer, *batch(6, 0))
    weight = model[0].weight
    parametrize.register_parametrization(model[0], "weight", Doubled())
    assert model[0].parametrizations.weight.original is weight
    before = weight.detach().clone()
    twin = copy.deepcopy(model)
    train_step(model, optimizer, *batch(6, 1))
    # The first step of Adam is its rate times the sign of the gradient.
    torch.testing.assert_close((weight - before).abs(), torch.full_like(before, 0.01), rtol=1e-2, atol=0)
    rows = [row for row in optimizer.summary().rows if row.shape == (6, 5)]
    assert [(row.path, bool(row.reason)) for row in rows] == [("AdamW", True)]
    x, y = batch(6, 1)
    pairs = halves(nn.Sequential(nn.Identity(), nn.Identity(), twin[2]), torch.tanh(twin[0](x)).detach(), y)
    check_step(
        nn.Sequential(*[nn.Identity()] * 2, model[2]),
        nn.Sequential(*[nn.Identity()] * 2, twin[2]),
        optimizer,
        pairs,
    )
    parametrize.remove_parametrizations(model[0], "weight")
    assert model[0].weight is weight
    # Back in the order of the twin's.
    model[0].bias = model[0]._parameters.pop("bias")
    train_step(model, optimizer, *batch(6, 2))
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    train_step(model, optimizer, *batch(6, 3))
    check_step(model, twin, optimizer, halves(twin, *batch(6, 3)))
    assert {row.name: row.path for row in optimizer.summary().rows}["0.weight"] == "FOP"


@both
def test_weight_norm_after_construction(bare: bool) -> None:
    """Its two new parameters train once they are given to the optimizer; the old weight stays in peace."""
    model = mlp()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    train_step(model, optimizer, *batch(6, 0))
    nn.utils.parametrizations.weight_norm(model[0])
    train_step(model, optimizer, *batch(6, 1))
    new = [p for name, p in model.named_parameters() if "original" in name]
    assert len(new) == 2
    optimizer.add_param_group({"params": new})
    before = weights(model)
    train_step(model, optimizer, *batch(6, 2))
    assert_differs(weights(model), before)
    rows = [row for row in optimizer.summary().rows if "original" in row.name]
    assert [(row.path, bool(row.reason)) for row in rows] == [("AdamW", True), ("FOP", True)]


# --- modules replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "alive", "bare"),
    [
        ("new", True, False),
        ("new", False, True),
        ("copy", False, False),
        ("copy", True, True),
        ("hooks too", True, False),
    ],
)
def test_module_replaced_by_another_with_the_same_parameters(way: str, alive: bool, bare: bool) -> None:
    """Whether or not somebody still holds the old one: from the second step on the new one is watched.

    Quantisation-aware training puts the hooks of the modules that it swaps on the new ones, without keywords.
    """
    model = mlp()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    train_step(model, optimizer, *batch(6, 0))
    old = model[0]
    new = copy.copy(old) if way == "copy" else nn.Linear(5, 6)
    new.weight, new.bias = old.weight, old.bias
    for hook in old._forward_hooks.values() if way == "hooks too" else ():
        new.register_forward_hook(hook)
    model[0] = new
    keep = [old] if alive else []
    del old, new
    gc.collect()
    train_step(model, optimizer, *batch(6, 1))
    twin = mlp()
    for seed in (2, 3):
        twin.load_state_dict(model.state_dict())
        train_step(model, optimizer, *batch(6, seed))
        check_step(model, twin, optimizer, halves(twin, *batch(6, seed)))
    layers = optimizer.diagnostics().layers
    assert layers.keys() == {"0", "2"}
    assert {layer.why_kfac for layer in layers.values()} == {None}
    assert len(keep) == alive


def test_module_replaced_by_one_with_new_parameters() -> None:
    model = mlp()
    optimizer = FOP(model, **PLAIN)
    train_step(model, optimizer, *batch())
    model[0] = nn.Linear(5, 6).double()
    for _ in range(2):
        train_step(model, optimizer, *batch())
    rows = optimizer.summary().rows
    assert [row.reason for row in rows[:2]] == ["belongs to no module any more"] * 2
    assert [row.path for row in rows[2:]] == ["FOP", "FOP"]


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_one_parameter_of_a_layer_is_replaced(key: str) -> None:
    """The other one keeps its place; the state of both goes on."""
    model = mlp()
    optimizer = FOP(model, **RUN)
    layer = model[0]
    train_step(model, optimizer, *batch(6, 0))
    momentum = optimizer.state[getattr(layer, key)]["momentum_buffer"]
    setattr(layer, key, nn.Parameter(getattr(layer, key).detach().clone()))
    optimizer.zero_grad()
    for seed in (1, 2):
        before = snapshot(model)
        train_step(model, optimizer, *batch(6, seed))
        assert_differs(snapshot(model), before)
    assert optimizer.state[getattr(layer, key)]["momentum_buffer"] is momentum
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}
    assert [each.why_kfac for each in optimizer.diagnostics().layers.values()] == [None, None]
