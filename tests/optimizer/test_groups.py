"""Parameter groups, frozen and unused layers: for any optimizer, and against the dense equations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import LR, Make, every, train
from fop import FOP
from models import (
    PLAIN,
    Mixed,
    assert_differs,
    assert_equal,
    conv_net,
    direction,
    halves,
    loss_of,
    mlp,
    tokens,
    train_step,
    weights,
)
from models import batch as pair_of
from reference import (
    Tape,
    correct,
    dense_damped_fisher,
    dense_fisher,
    estimate,
    full,
    half_squared_error,
    observe,
    split,
    unvec,
    vec,
)

# --- any optimizer -----------------------------------------------------------------------------------------


def by_layer(model: Mixed) -> tuple[list[Tensor], list[Tensor]]:
    layer = list(model.first.parameters())
    return layer, [p for p in model.parameters() if all(p is not own for own in layer)]


@every
def test_every_group_has_its_own_learning_rate(make: Make) -> None:
    model = Mixed()
    still, moving = by_layer(model)
    optimizer = make([{"params": still, "lr": 0.0}, {"params": moving}], weight_decay=0.1)
    before = weights(model)
    train(model, optimizer, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("first")
    for group in optimizer.param_groups:
        group["lr"] = LR - group["lr"]
    before = weights(model)
    train(model, optimizer, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("first")


@every
def test_every_group_has_its_own_weight_decay(make: Make) -> None:
    """Without a gradient to speak of, only the decay is left."""
    model = Mixed()
    still, shrinking = by_layer(model)
    optimizer = make([{"params": still}, {"params": shrinking, "weight_decay": 0.5}])
    (0 * loss_of(model, *tokens())).backward()
    before = weights(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("first"):
            assert torch.equal(p, before[name])
        elif before[name].any():
            assert p.norm() < before[name].norm()


@every
@pytest.mark.parametrize("named", [False, True])
def test_add_param_group_in_mid_training(make: Make, named: bool) -> None:
    model, extra = Mixed(), nn.Linear(3, 3).double()
    optimizer = make(model.named_parameters() if named else model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(3))
    given = extra.named_parameters() if named else extra.parameters()
    optimizer.add_param_group({"params": given, "lr": 0.01})
    group = optimizer.param_groups[1]
    assert group["params"] == [extra.weight, extra.bias]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    whole = nn.Sequential(model, extra)
    before = weights(whole)
    for seed in range(2):
        train_step(whole, optimizer, *tokens(6, seed))
    assert_differs(weights(whole), before)
    assert len(optimizer.state_dict()["state"]) == 9


@every
def test_two_optimizers_over_two_parts_of_a_model(make: Make) -> None:
    """Each steps its own part at its own time (GAN, actor and critic)."""
    model = Mixed()
    optimizers = [make(part) for part in by_layer(model)]
    for seed in range(4):
        before = weights(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, *tokens(6, seed)).backward()
        optimizers[seed % 2].step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name.startswith("first") == bool(seed % 2))


@every
@pytest.mark.parametrize("start", ["frozen", "thawed"])
def test_frozen_layer_stays_and_moves_again_when_thawed(make: Make, start: str) -> None:
    model = Mixed()
    layer = model.first.requires_grad_(start == "thawed")
    optimizer = make(model.parameters(), weight_decay=0.1)
    if start == "thawed":
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        layer.requires_grad_(False)
    frozen, others = weights(layer), weights(model.second)
    state = copy.deepcopy(optimizer.state[layer.weight])
    train(model, optimizer, range(3, 6))
    assert_equal(weights(layer), frozen)
    assert_equal(optimizer.state[layer.weight], state)
    assert_differs(weights(model.second), others)
    layer.requires_grad_(True)
    train(model, optimizer, range(6, 8))
    assert_differs(weights(layer), frozen)


class Branches(nn.Module):
    """Two layers of which a forward pass uses one, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Mixed()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).double()
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[self.chosen](self.base(x))
        return out


@every
def test_layer_that_the_forward_pass_leaves_out_keeps_its_value(make: Make) -> None:
    model = Branches()
    optimizer = make(model.parameters(), weight_decay=0.1)
    for seed, model.chosen in enumerate([0, 0, 1, 1, 0]):
        before = weights(model)
        train_step(model, optimizer, *tokens(6, seed))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith(f"experts.{1 - model.chosen}")


# --- steps by the dense equations --------------------------------------------------------------------------

L = 4
BLOCKS = {"embed", "attention.in_proj", "attention.out_proj", "conv", "head"}


class Net(nn.Module):
    """Every way a weight and its bias lie in a block, and a norm on the AdamW path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 2, padding=1, groups=2)
        self.head = nn.Linear(4, 2)
        self.double()
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.head(torch.tanh(self.conv(x.mT).mT))
        return out


def batch(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (n, L), generator=generator)
    return ids, torch.randn(n, L + 1, 2, dtype=torch.float64, generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        ids, y = batch(seed)
        optimizer.zero_grad()
        half_squared_error(model(ids), y).backward()
        optimizer.step()


def groups_of(optimizer: FOP) -> dict[Tensor, dict[str, Any]]:
    return {param: group for group in optimizer.param_groups for param in group["params"]}


def checked_step(model: nn.Module, optimizer: FOP, seed: int, *frozen: str) -> None:
    """A step that follows the dense equations, each block and each parameter with its own options."""
    old = copy.deepcopy(model)
    twin = copy.deepcopy(old).requires_grad_(True)
    steps(model, optimizer, seed)
    new, groups = dict(model.named_parameters()), groups_of(optimizer)
    ids, y = batch(seed)
    blocks = observe(twin, Tape(twin), (ids,), y, half_squared_error)
    moved = {}
    for name, was in old.named_parameters():
        group = groups.get(new[name], optimizer.param_groups[0])
        decayed = was if name in frozen else was * (1 - group["lr"] * group["weight_decay"])
        moved[name] = (decayed - new[name]).detach() / group["lr"]
        assert name not in frozen or torch.equal(was, new[name]), f"{name} is frozen and has moved"
    for name, block in blocks.items():
        if name in frozen or block.diagonal or new[name] not in groups:
            continue
        state, group = optimizer.state[new[name]], groups[new[name]]
        A, G = full(state["A"]), full(state["G"])
        g1, g2 = map(block.mean_gradient, split(len(y)))
        Ga, Gd = (g1 + g2) / 2, g1 - g2
        without_bias = block.bias in frozen
        if without_bias:
            Ga[..., -1] = Gd[..., -1] = 0
        F, F_hat = dense_fisher(A, G), dense_damped_fisher(A, G, group["damping"])
        mixed = correct(F, F_hat, vec(Ga), vec(Gd), group["beta"], group["eta"])
        expected = unvec(mixed.direction, like=Ga)
        if without_bias:
            expected[..., -1] = 0
        error = float((block.matrix(moved) - expected).norm() / expected.norm())
        assert error < 1e-9, f"{name}: {error:.1e}"
        assert abs(mixed.beta) * mixed.perpendicular.norm() > 1e-4 * Ga.norm(), "the case cannot fail"


def falling(step: int) -> float:
    return 0.5 / (1 + step)


def rising(step: int) -> float:
    return 0.1 * (1 + step)


# --- frozen parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "before-bare", "after"])
@pytest.mark.parametrize("name", [name for name, _ in Net().named_parameters()])
def test_one_parameter_frozen_and_thawed(name: str, when: str) -> None:
    """Before the optimizer is made or in mid-training: it and its state stay, the others do their step."""
    model = Net()
    frozen = model.get_parameter(name)
    if when != "after":
        frozen.requires_grad_(False)
    optimizer = FOP(model.parameters() if when == "before-bare" else model, **PLAIN)
    if when == "after":
        steps(model, optimizer, 0)
    frozen.grad = None
    frozen.requires_grad_(False)
    state = copy.deepcopy(optimizer.state[frozen]) if name.endswith("weight") else {}
    checked_step(model, optimizer, 1, name)
    assert frozen.grad is None
    if name.endswith("weight"):
        assert_equal(copy.deepcopy(optimizer.state[frozen]), state)
    frozen.requires_grad_(True)
    before = frozen.detach().clone()
    checked_step(model, optimizer, 2)
    assert not torch.equal(frozen, before)


def test_only_biases_train() -> None:
    """As in BitFit: no block has its weight, so the biases take AdamW, and the table says so."""
    model, twin = Net(), Net()
    for net in (model, twin):
        for name, param in net.named_parameters():
            param.requires_grad_(name.endswith("bias"))
    biases = {name for name, param in model.named_parameters() if param.requires_grad}
    optimizer = FOP(model, **PLAIN, adamw_lr=0.01)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    steps(model, optimizer, 0, 1, 2)
    steps(twin, adamw, 0, 1, 2)
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, msg=name)
    rows = {row.name: row for row in optimizer.summary().rows}
    for name in biases:
        assert rows[name].path == "AdamW", f"{name}: {rows[name]}"
        assert rows[name].reason
    for param in model.parameters():
        param.requires_grad_(True)
    checked_step(model, optimizer, 3)


def test_gradual_unfreezing_by_groups() -> None:
    """Each layer is thawed and given to the optimizer in a group of its own while the others train.

    A function of a later group gets the number of the step that the whole optimizer is in.
    """
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = FOP(model.head.parameters(), **{**PLAIN, "damping": falling})
    known, step = ["head"], 0
    for part in ("conv", "attention", "embed", None):
        for _ in range(2):
            frozen = [name for name, _ in model.named_parameters() if name.split(".")[0] not in known]
            checked_step(model, optimizer, step, *frozen)
            later = [rising(step)] * (len(known) - 1)
            assert [group["damping"] for group in optimizer.param_groups] == [falling(step), *later]
            step += 1
        if part is not None:
            layer = getattr(model, part).requires_grad_(True)
            group = {"params": layer.parameters(), "lr": 0.5 / step, "damping": rising}
            optimizer.add_param_group(group)
            known.append(part)
    assert optimizer.diagnostics().layers.keys() == BLOCKS


# --- groups ------------------------------------------------------------------------------------------------


def layerwise(model: Net) -> list[dict[str, Any]]:
    """Every option that may differ, and a bias in another group than its weight."""
    return [
        {"params": [*model.embed.parameters(), *model.norm.parameters()], "lr": 0.1, "damping": 1.0},
        {
            "params": [model.attention.in_proj_weight, *model.attention.out_proj.parameters()],
            "lr": 0.2,
            "weight_decay": 0.1,
            "curvature_interval": 4,
            "stat_decay": 0.5,
            "damping": rising,
        },
        {"params": [model.attention.in_proj_bias], "lr": 0.05, "weight_decay": 0.3, "damping": 50.0},
        {"params": model.conv.parameters(), "beta": 0.25, "eta": "adaptive", "damping": 0.02},
        {"params": model.head.parameters(), "beta": "adaptive", "eta": 0.5, "lr": 1.0},
    ]


def test_groups_with_all_options_of_their_own() -> None:
    model = Net()
    optimizer = FOP(layerwise(model), **{**PLAIN, "damping": falling})
    # All renew their curvature in each of these steps.
    for step in range(3):
        # It reads the damping from the groups.
        checked_step(model, optimizer, step)
        used = [group["damping"] for group in optimizer.param_groups]
        assert used == [1.0, rising(step), 50.0, 0.02, falling(step)]
    assert optimizer.diagnostics().layers["conv"].beta == 0.25
    assert optimizer.diagnostics().layers.keys() == BLOCKS


def refreshes(step: int, interval: int) -> int:
    """The step after ``step`` that renews the curvature, as docs/architecture.md has it."""
    return step + max(1, min(interval, step))


@pytest.mark.parametrize("intervals", [(1, 4), (lambda step: 1 + step // 12, lambda step: 100)])
def test_every_group_renews_its_curvature_in_its_own_time(
    intervals: Sequence[int | Callable[[int], int]],
) -> None:
    """Factors after every step against an average of our own, for two groups with other intervals."""
    model = Net()
    parts: list[list[nn.Module]] = [[model.embed, model.attention], [model.norm, model.conv, model.head]]
    groups = [
        {"params": [p for m in part for p in m.parameters()], "curvature_interval": each, "stat_decay": decay}
        for part, each, decay in zip(parts, intervals, (0.8, 0.3), strict=True)
    ]
    optimizer = FOP(groups, **{**PLAIN, "lr": 0.02})
    names = {param: name for name, param in model.named_parameters()}
    held: dict[str, dict[str, Tensor]] = {}
    due = [0, 0]
    renewed: list[list[int]] = [[], []]
    for step in range(20):
        twin = copy.deepcopy(model)
        ids, y = batch(step)
        blocks = observe(twin, Tape(twin), (ids,), y, half_squared_error)
        for index, group in enumerate(groups):
            if due[index] != step:
                continue
            each = intervals[index]
            due[index] = refreshes(step, each(step) if callable(each) else each)
            renewed[index].append(step)
            for param in group["params"]:
                block = blocks.get(names[param])
                if block is None or block.diagonal:
                    continue
                fresh, decay = estimate(block), group["stat_decay"]
                old = held.get(names[param], fresh)
                held[names[param]] = {key: decay * old[key] + (1 - decay) * fresh[key] for key in fresh}
        steps(model, optimizer, step)
        for param, name in names.items():
            for key, value in held.get(name, {}).items():
                torch.testing.assert_close(optimizer.state[param][key], value, rtol=1e-9, atol=1e-12)
    assert len(held) == 5
    assert renewed[0] != renewed[1]


def test_new_head_in_mid_training() -> None:
    """Transfer: the old head is taken out of the model, the new one comes with a group and options."""
    model = Net()
    optimizer = FOP(model, **PLAIN)
    steps(model, optimizer, 0, 1)
    gone = model.head
    before = weights(gone)
    model.head = nn.Linear(4, 2).double()
    start = weights(model.head)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.25, "damping": 0.5})
    for seed in (2, 3):
        checked_step(model, optimizer, seed)
    assert_differs(weights(model.head), start)
    assert_equal(weights(gone), before)


def test_many_groups_added_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradual unfreezing: each group costs one look at the model, not one more for every group before."""
    model = mlp()
    walk, looks = nn.Module.named_modules, 0

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += module is model
        return walk(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    optimizer = FOP(model)
    assert looks > 0
    counts = []
    for _ in range(8):
        before = looks
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        counts.append(looks - before)
    assert set(counts) == {counts[0]}, counts


def test_weight_without_its_bias() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    x, y = pair_of()
    optimizer = FOP([model[0].weight, model[2].weight], **PLAIN)
    (average, difference) = halves(twin, x, y)["0"]
    train_step(model, optimizer, x, y)
    state = optimizer.state[model[0].weight]
    torch.testing.assert_close(state["A"][0], x.T @ x / 6)
    full = direction(optimizer, model[0].weight, average[..., :-1], difference[..., :-1])
    taken = (twin[0].weight - model[0].weight).detach() / 0.5
    torch.testing.assert_close(taken, full[0], rtol=1e-9, atol=1e-10)
    assert torch.equal(model[0].bias, twin[0].bias)


def test_bias_without_its_weight_takes_adamw() -> None:
    model = mlp()
    before = weights(model)
    optimizer = FOP([model[0].bias], adamw_lr=1e-3)
    train_step(model, optimizer, *pair_of())
    rows = optimizer.summary().rows
    assert [(row.name, row.path) for row in rows] == [("0.bias", "AdamW")]
    assert "weight" in rows[0].reason
    # The first step of Adam is lr times the sign of the gradient.
    torch.testing.assert_close((model[0].bias - before["0.bias"]).abs(), torch.full((6,), 1e-3).double())


class Casting(nn.Module):
    """Linear layers with and without bias, some in float32 and some in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=n % 3 != 1) for n in range(6))
        for layer in self.layers[1::2]:
            layer.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


def test_weights_that_are_stepped_together_step_as_by_themselves() -> None:
    """By rates and dtypes of their own: the scalars of those that are alike are computed as one tensor."""
    results = []
    for apart in (False, True):
        model = Casting()
        groups = [
            {"params": [p for layer in part for p in layer.parameters()], "lr": lr, "weight_decay": lr}
            for lr, part in zip((0.05, 0.2), (model.layers[:2], model.layers[2:]), strict=True)
        ]
        optimizers = [FOP(groups)]
        if apart:
            optimizers = [
                FOP(layer.parameters(), lr, weight_decay=lr)
                for lr, layer in zip((0.05, 0.05, 0.2, 0.2, 0.2, 0.2), model.layers, strict=True)
            ]
        model(pair_of()[0]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_bare_layers_and_conv_groups_reach_the_same_end() -> None:
    """Two optimizers on disjoint parts of one model do what one with two groups does, without a KL clip."""
    results = []
    for apart in (False, True):
        model = conv_net()
        parts = [list(model[0].parameters()), [*model[2].parameters(), *model[4].parameters()]]
        options = {**PLAIN, "momentum": 0.9}
        if apart:
            optimizers = [FOP(part, **options) for part in parts]
        else:
            optimizers = [FOP([{"params": part} for part in parts], **options)]
        for seed in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, *pair_of(6, seed, (2, 5, 6))).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append(weights(model))
    assert_equal(*results)
