"""The state of an optimizer: saved, loaded, carried to another model or dtype; copies; hooks on both.

A run that goes on from its state equals one that never stopped, and a wrong state changes nothing.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from contract import (
    BUSY,
    COPIES,
    FORMS,
    LR,
    Make,
    State,
    copied,
    every,
    every_variant,
    only,
    ours,
    saved,
    start,
    train,
    trained,
)
from fop import FOP, KFAC
from models import (
    Attentive,
    Mixed,
    assert_differs,
    assert_equal,
    batch,
    loss_of,
    mlp,
    sentences,
    snapshot,
    tokens,
    train_step,
    weights,
)


def train_both(one: tuple[nn.Module, Optimizer], other: tuple[nn.Module, Optimizer], seeds: range) -> None:
    """Train two models on the same batches, and compare them and their optimizers bit for bit."""
    for model, optimizer in (one, other):
        train(model, optimizer, seeds)
    assert_equal(weights(one[0]), weights(other[0]))
    assert_equal(snapshot(one[1]), snapshot(other[1]))


# --- continuing --------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("stop", [0, 1, 7, 13])
def test_continuing_equals_never_having_stopped(make: Make, stop: int) -> None:
    """Stops at the start, after the first step, and while the curvature interval grows."""
    model, optimizer = trained(make, stop, weight_decay=0.1)
    twin = copied(model)
    other = start(make, twin, lr=9.0)
    other.load_state_dict(saved(optimizer.state_dict()))
    assert_equal(snapshot(other), snapshot(optimizer))
    train_both((model, optimizer), (twin, other), range(stop, stop + 7))


WAYS: dict[str, Callable[[State], State]] = {
    "as-it-is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@every
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_carry_a_state(make: Make, way: str) -> None:
    model, optimizer = trained(make, 7, weight_decay=0.1)
    twin = copied(model)
    other = start(make, twin, lr=9.0)
    state = WAYS[way](optimizer.state_dict())
    kept = copy.deepcopy(state)
    other.load_state_dict(state)
    assert_equal(state, kept)
    train(twin, other, range(7, 14))
    # Only now: a state dict shares its tensors with the optimizer that gave it.
    expected, its = trained(make, 14, weight_decay=0.1)
    assert_equal(weights(twin), weights(expected))
    assert_equal(snapshot(other), snapshot(its))


def params_of(model: nn.Module, way: str) -> Any:
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": 0.2, "damping": 0.01}, {"params": params[2:]}]
    return {"module": model, "bare": params, "groups": groups}[way]


@ours
@pytest.mark.parametrize(("way", "later"), [("module", "bare"), ("bare", "module"), ("groups", "groups")])
@pytest.mark.parametrize("stop", [1, 13, 31])
def test_model_optimizer_and_schedule_continue(stop: int, way: str, later: str, library: type[FOP]) -> None:
    """Into an optimizer that knows its modules, or not yet, or has trained something else; in an interval."""

    def fresh(way: str) -> tuple[Mixed, FOP, CosineAnnealingLR]:
        model = Mixed()
        optimizer = library(params_of(model, way), lr=0.1, weight_decay=0.05, **BUSY)
        return model, optimizer, CosineAnnealingLR(optimizer, 36)

    def run(all_of_it: tuple[Any, Any, CosineAnnealingLR], seeds: range) -> None:
        for seed in seeds:
            train(*all_of_it[:2], [seed])
            all_of_it[2].step()

    first = fresh(way)
    run(first, range(stop))
    assert first[1].curvature_due == (stop == 1)
    states = [saved(each.state_dict()) for each in first]
    second = fresh(later)
    if stop == 13:
        run(second, range(50, 53))
    for each, state in zip(second, states, strict=True):
        each.load_state_dict(state)
    for both in (first, second):
        run(both, range(stop, stop + 5))
    assert_equal(weights(second[0]), weights(first[0]))
    assert_equal(snapshot(second[1]), snapshot(first[1]))


@only("SGD", "AdamW", "FOP", "KFAC")
@pytest.mark.parametrize("between", ["nothing", "load", "deepcopy"])
def test_loading_goes_back(make: Make, between: str) -> None:
    """To a state that was saved before the optimizer went on, or was loaded or copied itself."""
    model, optimizer = trained(make, 4)
    state, values = snapshot(optimizer), copy.deepcopy(model.state_dict())
    if between == "load":
        optimizer.load_state_dict(snapshot(optimizer))
    elif between == "deepcopy":
        model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 8))
    expected = weights(model), snapshot(optimizer)
    model.load_state_dict(values)
    optimizer.load_state_dict(state)
    assert_equal(snapshot(optimizer), state)
    train(model, optimizer, range(4, 8))
    assert_equal((weights(model), snapshot(optimizer)), expected)


def test_loaded_state_is_a_copy() -> None:
    model, optimizer = trained(FOP)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other = FOP(twin := copied(model))
    other.load_state_dict(state)
    train(twin, other, range(3))
    assert_equal(state, kept)


@every
def test_layout_of_a_state_dict(make: Make) -> None:
    model = Mixed()
    first, *rest = model.parameters()
    optimizer = make([{"params": [first]}, {"params": rest, "tag": "mine"}])
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert not optimizer.state and optimizer.state_dict()["state"] == {}
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0], [1, 2, 3, 4, 5, 6]]
    assert set(state["state"]) == set(range(7))
    assert state["param_groups"][1]["tag"] == "mine"
    for index, p in enumerate(model.parameters()):
        for key, value in state["state"][index].items():
            assert value is optimizer.state[p][key]


@every
def test_options_come_with_the_state(make: Make) -> None:
    """Of the groups that are loaded, not of those the optimizer was made with; the user's own included."""
    _, optimizer = trained(make, lr=0.2, weight_decay=0.3)
    optimizer.param_groups[0]["tag"] = "mine"
    other = make(Mixed().parameters())
    params = other.param_groups[0]["params"]
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["tag"]) == (0.2, 0.3, "mine")
    assert group["params"] == params
    assert other.defaults["lr"] == LR
    group["lr"] = 0.7
    assert optimizer.param_groups[0]["lr"] == 0.2


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


@every
def test_state_goes_by_position(make: Make) -> None:
    """torch never looks at names: an optimizer over the layers in another order gets the state by order."""
    model, reverse = two_layers(), two_layers()
    x, y = batch(6, shape=(3,))
    optimizer = make(model.parameters())
    for _ in range(3):
        train_step(model, optimizer, x, y)
    other = make([*reverse[2].parameters(), *reverse[0].parameters()])
    other.load_state_dict(snapshot(optimizer))
    for layer, source in ((reverse[2], model[0]), (reverse[0], model[2])):
        for p, q in zip(layer.parameters(), source.parameters(), strict=True):
            assert_equal(dict(other.state[p]), dict(optimizer.state[q]))
    train_step(reverse, other, x, y)
    assert all(bool(p.isfinite().all()) for p in reverse.parameters())


@every
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_states_with_and_without_names_fit_each_other(make: Make, named: tuple[bool, bool]) -> None:
    model, twin = Mixed(), Mixed()
    optimizer, other = (
        make(each.named_parameters() if with_names else each.parameters())
        for each, with_names in zip((model, twin), named, strict=True)
    )
    train(model, optimizer, range(3))
    other.load_state_dict(snapshot(optimizer))
    twin.load_state_dict(model.state_dict())
    assert other.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(3, 6))
    assert_equal(weights(twin), weights(model))


@every
def test_state_made_by_a_step_of_nothing_before_the_first_pass(make: Make) -> None:
    """torch.distributed.checkpoint makes a state to load into so: zero gradients, a rate of 0, one step."""
    model, optimizer = trained(make, 4)
    twin = copied(model)
    other = make(twin.parameters())
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    other.param_groups[0]["lr"] = 0.0
    other.step()
    other.zero_grad()
    assert_equal(weights(twin), weights(model))
    other.load_state_dict(snapshot(optimizer))
    train_both((model, optimizer), (twin, other), range(4, 8))


@every
@pytest.mark.parametrize("steps", [6, 11])
@pytest.mark.parametrize("way", ["assign", "clear", "clear each"])
def test_state_may_be_thrown_away(make: Make, way: str, steps: int) -> None:
    """Scripts reset an optimizer by emptying its state; it fills up again, and what is saved is complete."""
    model, optimizer = trained(make, steps)
    keys = [set(optimizer.state[p]) for p in model.parameters()]
    if way == "assign":
        optimizer.state = defaultdict(dict)
    elif way == "clear":
        optimizer.state.clear()
    else:
        for state in optimizer.state.values():
            state.clear()
    train(model, optimizer, range(6, 9))
    assert [set(optimizer.state[p]) for p in model.parameters()] == keys
    twin = copied(model)
    other = make(twin.parameters())
    other.load_state_dict(snapshot(optimizer))
    train_both((model, optimizer), (twin, other), range(9, 12))


# --- every kind of layer, other dtypes ---------------------------------------------------------------------


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def text() -> nn.Module:
    """Tied embedding and head, a factor kept as its diagonal."""
    embed, head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9)
    head.weight = embed.weight
    return nn.Sequential(embed, nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), head)


class Series(nn.Module):
    """Packed and separate attention with the batch in dim 1, and an LSTM, which takes AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.packed(x, x, x)[0]
        x = x + self.separate(x, x[..., :3], x[..., 2:])[0]
        out: Tensor = self.head(self.lstm(x)[0]).transpose(0, 1)
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "images": (images, lambda: torch.randn(6, 2, 4, 4)),
    "text": (text, lambda: torch.randint(9, (6, 3))),
    "series": (Series, lambda: torch.randn(6, 3, 4)),
}
models = pytest.mark.parametrize("kind", MODELS)


def build(kind: str, way: str = "parameters", library: type[FOP] = FOP) -> tuple[nn.Module, FOP]:
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    norms = {nn.BatchNorm2d: {"path": "fop"}, nn.LayerNorm: {"path": "fop"}}
    used = {norm: choice for norm, choice in norms.items() if any(type(m) is norm for m in model.modules())}
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "damping": 1e-2}
    # Not so often that every step has new inverses.
    options["curvature_interval"] = 100
    given = model if way == "module" else model.parameters()
    return model, library(given, **options, layer_options=used)


def run(model: nn.Module, optimizer: FOP, kind: str, seeds: range) -> None:
    dtype = next(model.parameters()).dtype
    for seed in seeds:
        torch.manual_seed(seed)
        x = MODELS[kind][1]()
        optimizer.zero_grad()
        out = model(x.to(dtype) if x.is_floating_point() else x)
        (out.float() - 1).square().flatten(1).sum(1).mean().backward()
        optimizer.step()


def files(path: Path, *things: Any) -> Any:
    torch.save([thing.state_dict() for thing in things], path)
    return torch.load(path, weights_only=True)


@models
@pytest.mark.parametrize(
    ("stop", "way", "library"),
    [
        (1, "parameters", FOP),
        (13, "module", FOP),
        (13, "parameters", FOP),
        (13, "parameters-after-a-pass", FOP),
        (13, "module", KFAC),
    ],
)
def test_every_kind_of_layer_continues(
    stop: int, way: str, library: type[FOP], kind: str, tmp_path: Path
) -> None:
    """Through a file; the new optimizer knows its modules, or not yet, or from a forward pass."""
    model, optimizer = build(kind, way, library)
    run(model, optimizer, kind, range(stop))
    # The curvature of step 12 is kept in step 13.
    assert optimizer.curvature_due is (stop == 1)
    state = files(tmp_path / "run.pt", model, optimizer)
    resumed, other = build(kind, way, library)
    if way == "parameters-after-a-pass":
        run(resumed, other, kind, range(50, 52))
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert_equal(snapshot(other), snapshot(optimizer))
    for seed in range(stop, stop + 3):
        run(model, optimizer, kind, range(seed, seed + 1))
        run(resumed, other, kind, range(seed, seed + 1))
        assert other.curvature_due is optimizer.curvature_due
        assert_equal(weights(resumed), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))
    ages = [layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()]
    assert [layer.steps_since_curvature for layer in other.diagnostics().layers.values()] == ages
    paths = [(row.path, row.factors, row.bytes) for row in optimizer.summary().rows]
    assert [(row.path, row.factors, row.bytes) for row in other.summary().rows] == paths


@models
def test_resuming_between_backward_and_step(kind: str, tmp_path: Path) -> None:
    """What an unfinished step had gathered is not part of the state, and does not leak into the next."""
    model, optimizer = build(kind, "module")
    run(model, optimizer, kind, range(13))
    state = files(tmp_path / "run.pt", model, optimizer)
    expected, unbroken = build(kind, "module")
    model(MODELS[kind][1]()).square().mean().backward()
    for net, its in ((model, optimizer), (expected, unbroken)):
        net.load_state_dict(state[0])
        its.load_state_dict(state[1])
        run(net, its, kind, range(13, 18))
    assert_equal(weights(model), weights(expected))


def test_statistics_gathered_before_loading_enter_no_average() -> None:
    model, optimizer = trained(FOP, curvature_interval=1)
    state = snapshot(optimizer)
    optimizer.zero_grad()
    loss_of(model, *tokens()).backward()
    optimizer.load_state_dict(state)
    optimizer.step()
    for held, kept in zip(snapshot(optimizer)["state"].values(), state["state"].values(), strict=True):
        for key in {"A", "G"} & kept.keys():
            assert_equal(held[key], kept[key])


@models
@pytest.mark.parametrize(
    ("before", "after", "tolerance"),
    [
        (torch.float32, torch.float64, 1e-4),
        (torch.float64, torch.float32, 1e-4),
        # Weights in bfloat16 lose much of every update; 0.3 is measured.
        (torch.bfloat16, torch.float32, 0.4),
        (torch.float32, torch.bfloat16, 0.4),
        (torch.bfloat16, torch.bfloat16, 0.0),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_state_of_another_dtype(
    before: torch.dtype, after: torch.dtype, tolerance: float, kind: str, tmp_path: Path
) -> None:
    """Factors are in float32 at least; the run stays close to the one that goes on unchanged."""
    model, optimizer = build(kind)
    model.to(before)
    run(model, optimizer, kind, range(8))
    state = files(tmp_path / "run.pt", model, optimizer)
    resumed, other = build(kind)
    resumed.to(after).load_state_dict(state[0])
    other.load_state_dict(state[1])
    held = torch.promote_types(after, torch.float32)
    for entries in other.state.values():
        kept = {entries[key].dtype for key in ("A", "G", "A_inv", "momentum_buffer") if key in entries}
        assert kept <= {held}
    start = nn.utils.parameters_to_vector(resumed.parameters()).detach().double()
    for net, own in ((model, optimizer), (resumed, other)):
        run(net, own, kind, range(8, 12))
    ends = [nn.utils.parameters_to_vector(net.parameters()).detach().double() for net in (model, resumed)]
    assert (ends[0] - ends[1]).norm() <= tolerance * (ends[0] - start).norm()


@pytest.mark.filterwarnings("ignore:the inversion:RuntimeWarning")
def test_layer_that_has_no_inverse_yet() -> None:
    """All its inputs are zero and there is no damping: factors, but nothing to precondition with."""
    states: list[State] = []
    for _ in range(2):
        model = nn.Linear(6, 4, bias=False)
        optimizer = FOP(model, damping=0.0, damping_kind="absolute")
        for state in states:
            optimizer.load_state_dict(state)
        train_step(model, optimizer, torch.zeros(4, 6), torch.ones(4, 4))
        states.append(saved(optimizer.state_dict()))
    assert "A" in states[0]["state"][0] and "A_inv" not in states[0]["state"][0]


@pytest.mark.parametrize("later", [{}, {"damping": 0.7}, {"damping": lambda step: 0.7}])
def test_a_function_belongs_to_the_optimizer_and_a_number_to_the_state(later: dict[str, Any]) -> None:
    """Loading brings the last value; a function of the optimizer that loads replaces it in the next step."""
    _, optimizer = trained(FOP, damping=lambda step: 0.1 * 0.5**step)
    state = saved(optimizer.state_dict())
    assert state["param_groups"][0]["damping"] == 0.1 * 0.5**2
    other = FOP(model := Mixed(), **later)
    other.load_state_dict(state)
    train(model, other, [3])
    expected = 0.7 if callable(later.get("damping")) else 0.1 * 0.5**2
    assert other.param_groups[0]["damping"] == expected


# --- wrong states ------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "curvature_interval": 4}


def state_of(model: nn.Module, make: Make = FOP, groups: Any = None) -> State:
    torch.manual_seed(0)
    optimizer = make(model.parameters() if groups is None else groups, **(OPTIONS if make is FOP else {}))
    x = torch.randn(6, next(model.parameters()).shape[1], dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return snapshot(optimizer)


def stack(*sizes: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in itertools.pairwise(sizes))).double()


def in_groups(model: nn.Sequential) -> State:
    return state_of(model, groups=[{"params": model[i].parameters()} for i in (0, 2)])


# States of other models and optimizers, which a fresh optimizer can tell too.
FOREIGN: dict[str, Callable[[], Any]] = {
    "SGD": lambda: state_of(mlp(), torch.optim.SGD),
    "AdamW": lambda: state_of(mlp(), torch.optim.AdamW),
    "layer-added": lambda: state_of(stack(5, 6, 6, 3)),
    "layer-removed": lambda: state_of(stack(5, 3)),
    "wider": lambda: state_of(stack(5, 7, 3)),
    "turned": lambda: state_of(stack(3, 6, 5)),
    "no-bias": lambda: state_of(stack(5, 6, 3, bias=False)),
    "other-kind": lambda: state_of(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()),
    "more-groups": lambda: in_groups(mlp()),
}


def entry(**values: Any) -> Callable[[State], Any]:
    return lambda state: state["state"][0].update(values)


def tensor(key: str, *shape: int) -> Callable[[State], Any]:
    return entry(**{key: torch.ones(shape, dtype=torch.float64)})


def group(**values: Any) -> Callable[[State], Any]:
    return lambda state: state["param_groups"][0].update(values)


def spoiled(key: str, value: float) -> Callable[[State], Any]:
    """One number of a tensor is bad."""
    return lambda state: state["state"][0][key].view(-1)[-1:].fill_(value)


nan = float("nan")
EDITS: dict[str, Callable[[State], Any]] = {
    "empty": lambda s: s.clear(),
    "no-state": lambda s: s.pop("state"),
    "no-groups": lambda s: s.pop("param_groups"),
    **{f"group-without-{key}": lambda s, key=key: s["param_groups"][0].pop(key)  # type: ignore[misc]
       for key in ("params", "step", "damping")},
    **{f"without-{key}": lambda s, key=key: s["state"][0].pop(key)  # type: ignore[misc]
       for key in ("A", "G", "A_inv", "refresh_at", "refreshed_at")},
    "A-too-large": tensor("A", 1, 9, 9),
    "A-not-square": tensor("A", 1, 5, 6),
    "A-not-a-stack": tensor("A", 6, 6),
    "A-without-bias-column": lambda s: (tensor("A", 1, 5, 5)(s), tensor("A_inv", 1, 5, 5)(s)),
    "G-too-small": tensor("G", 1, 2, 2),
    "G-not-square": tensor("G", 1, 6, 3),
    "A_inv-too-large": tensor("A_inv", 1, 9, 9),
    "G_inv-too-small": tensor("G_inv", 1, 2, 2),
    "momentum-of-other-shape": tensor("momentum_buffer", 2, 2),
    "momentum-not-a-tensor": entry(momentum_buffer=0.5),
    "A-not-a-tensor": entry(A=[[1.0]]),
    "complete-not-a-tensor": entry(complete=True),
    # Of the wrong type.
    "state-is-a-list": lambda s: s.update(state=[]),
    "state-is-none": lambda s: s.update(state=None),
    "entry-is-a-list": lambda s: s["state"].update({0: [1]}),
    "groups-are-none": lambda s: s.update(param_groups=None),
    "groups-are-a-dict": lambda s: s.update(param_groups=s["param_groups"][0]),
    "group-is-a-list": lambda s: s.update(param_groups=[[0, 1, 2, 3]]),
    "params-are-none": group(params=None),
    "params-are-a-number": group(params=4),
    "refresh_at-is-a-string": entry(refresh_at="4"),
    "refreshed_at-is-none": entry(refreshed_at=None),
    "refresh_at-before-curvature": lambda s: s["state"].update({0: {"refresh_at": None}}),
    "inverse_at-is-a-float": entry(inverse_at=0.5),
    **{f"{key}-is-none": group(**{key: None})
       for key in ("step", "betas", "lr", "base_lr", "last_lr", "momentum", "damping", "beta", "maximize")},
    "betas-of-one": group(betas=(0.9,)),
    "step-is-a-float": group(step=1.5),
    "step-is-negative": group(step=-1),
    "lr-is-a-tensor": group(lr=torch.tensor(0.1)),
    # Numbers that no step could use.
    **{f"{key}-is-nan": group(**{key: nan})
       for key in ("lr", "base_lr", "last_lr", "weight_decay", "adamw_lr", "damping", "kl_clip", "eps")},
    "lr-is-negative": group(lr=-0.1),
    "lr-is-infinite": group(lr=float("inf")),
    "betas-with-nan": group(betas=(0.9, nan)),
    "nesterov-without-momentum": group(step_length="paper", nesterov=True, momentum=0.0),
    "unknown-length": group(step_length="kl"),
    "kl_clip-of-the-paper": group(kl_clip=1e-2),
    **{f"averaging_weight-{value}": entry(averaging_weight=value) for value in (0.0, 1.5, nan, "1")},
    **{f"{key}-with-nan": spoiled(key, nan)
       for key in ("A", "G", "A_inv", "G_inv", "momentum_buffer", "reference_norm", "reach")},
    **{f"reach-of-{radius}": lambda s, radius=radius: s["state"][0]["reach"][1:].fill_(radius)
       for radius in (0, -1, 5)},
    "A_inv-infinite": spoiled("A_inv", float("inf")),
}  # fmt: skip
# What an optimizer of bare parameters can tell before the first forward pass.
SHAPES_ALONE = ["A-too-large", "A_inv-too-large", "G-not-square"]
TARGETS = ["trained", "module", "bare", "bare-after-a-pass"]


def edited(edit: str) -> State:
    state = state_of(mlp())
    EDITS[edit](state)
    return state


def check_refused(optimizer: Optimizer, model: nn.Module, wrong: Any, message: str = r".{20,}") -> None:
    before, params = snapshot(optimizer), weights(model)
    tensors = [id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    groups, defaults = [id(group) for group in optimizer.param_groups], dict(optimizer.defaults)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    assert_equal(snapshot(optimizer), before)
    assert_equal(weights(model), params)
    assert [id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)] == tensors
    assert [id(group) for group in optimizer.param_groups] == groups
    assert optimizer.defaults == defaults


@pytest.mark.parametrize(
    ("wrong", "into"),
    [
        *((wrong, into) for wrong in FOREIGN for into in TARGETS),
        *((wrong, "trained") for wrong in EDITS),
        *((wrong, "bare") for wrong in SHAPES_ALONE),
    ],
)
def test_wrong_state_raises_and_changes_nothing(wrong: str, into: str) -> None:
    models = [mlp(), mlp()]
    optimizers = [FOP(model if into == "module" else model.parameters(), **OPTIONS) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        if into == "bare-after-a-pass":
            model(batch()[0])
        for seed in range(3 if into == "trained" else 0):
            train_step(model, optimizer, *batch(6, seed))
    layers = r"(parameters|parameter \d).*(another model|must have)"
    message = layers if wrong in FOREIGN and wrong not in ("SGD", "AdamW", "more-groups") else r".{20,}"
    check_refused(optimizers[0], models[0], FOREIGN[wrong]() if wrong in FOREIGN else edited(wrong), message)
    for model, optimizer in zip(models, optimizers, strict=True):
        for seed in range(3, 6):
            train_step(model, optimizer, *batch(6, seed))
    assert_equal(weights(models[0]), weights(models[1]))


def test_wrong_adamw_state_raises() -> None:
    model, optimizer = trained(FOP)
    state = snapshot(optimizer)
    index = next(i for i, held in state["state"].items() if "exp_avg" in held)
    state["state"][index]["exp_avg"] = torch.zeros(2, 2)
    check_refused(optimizer, model, state)
    state = snapshot(optimizer)
    del state["state"][index]["exp_avg_sq"]
    check_refused(optimizer, model, state)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        state = snapshot(optimizer)
        state["state"][index][key].view(-1)[0] = nan
        check_refused(optimizer, model, state, f"{key!r} of.*not finite")
    for size in (-1.0, nan, "1"):
        state = snapshot(optimizer)
        state["state"][index]["initial_size"] = size
        check_refused(optimizer, model, state, "'initial_size'; got")
    # Half precision overflows there, and such a parameter stays where it is.
    state = snapshot(optimizer)
    state["state"][index]["exp_avg_sq"].fill_(float("inf"))
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", ["kl_clip", "max_grad_norm", "loss_reduction", "sub_batches"])
def test_state_whose_groups_disagree_on_the_whole_step(name: str) -> None:
    other = {"kl_clip": 0.5, "max_grad_norm": 2.0, "loss_reduction": "sum", "sub_batches": 4}[name]
    model = mlp()
    groups = [{"params": model[index].parameters()} for index in (0, 2)]
    optimizer = FOP(groups, step_length="paper")
    train_step(model, optimizer, *batch())
    state = snapshot(optimizer)
    state["param_groups"][1][name] = other
    check_refused(optimizer, model, state, rf"param_groups\[1\] has {name}=.*set it in all groups alike")


def test_refused_state_after_a_user_hook() -> None:
    """What the hook makes of a good state is checked, too."""
    model, optimizer = trained(FOP)

    def spoil(given: Optimizer, state: State) -> State:
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": nan}]}

    optimizer.register_load_state_dict_pre_hook(spoil)
    check_refused(optimizer, model, snapshot(optimizer), "parameter group 0 of the state_dict: lr=nan")


def test_kfac_stays_kfac() -> None:
    """Whoever loads FOP's state into K-FAC, or gives a group its options, would train by FOP unknowingly."""
    model = mlp()
    optimizer = KFAC(model)
    train_step(model, optimizer, *batch())
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"KFAC has beta=0\.0, and the state_dict has beta='adaptive'; use FOP"
    ):
        optimizer.load_state_dict(FOP(mlp()).state_dict())
    with pytest.raises(ValueError, match=r"KFAC has eta=1\.0, and a parameter group has eta=0\.5; use FOP"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "eta": 0.5})
    with pytest.raises(ValueError, match=r"KFAC has beta=0\.0, and a parameter group has beta=0\.1; use FOP"):
        KFAC([{"params": mlp().parameters(), "beta": 0.1}])
    assert_equal(snapshot(optimizer), before)
    optimizer.param_groups[0]["beta"] = "adaptive"
    with pytest.raises(ValueError, match="KFAC has beta"):
        train_step(model, optimizer, *batch())
    optimizer.param_groups[0]["beta"] = 0.0
    KFAC(mlp()).load_state_dict(optimizer.state_dict())
    # The other way round the options come with the state, as all do.
    corrected = FOP(mlp())
    corrected.load_state_dict(optimizer.state_dict())
    assert corrected.param_groups[0]["beta"] == 0.0


@pytest.mark.parametrize("wrong", [None, [], "state", 3])
def test_something_else_than_a_state_dict(wrong: Any) -> None:
    _, optimizer = trained(FOP)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        optimizer.load_state_dict(wrong)
    assert_equal(snapshot(optimizer), before)


@every
def test_state_of_other_groups_is_refused_and_changes_nothing(make: Make) -> None:
    model, optimizer = trained(make)
    params = list(Mixed().parameters())
    before = snapshot(optimizer)
    for groups in ([{"params": params[:3]}, {"params": params[3:]}], params[:3]):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(make(groups).state_dict())
    assert_equal(snapshot(optimizer), before)
    train(model, optimizer, range(3, 5))


def test_state_of_other_layer_options() -> None:
    """Refused where the layers are known; otherwise those that do not fit start afresh, and only those."""
    choice = {**FORMS, nn.GroupNorm: {"path": "fop"}, nn.Module: {"block_dim": 1024}}
    model = Attentive()
    optimizer = FOP(model, **OPTIONS)
    for seed in range(3):
        train_step(model, optimizer, *sentences(6, seed))
    state = saved(optimizer.state_dict())
    del optimizer
    check_refused(FOP(model, layer_options=choice, **OPTIONS), model, state)
    optimizer = FOP(model.parameters(), layer_options=choice, **OPTIONS)
    optimizer.load_state_dict(state)
    before = weights(model)
    model(sentences()[0])
    fits = {name for name, p in model.named_parameters() if "weight" in name and "A" in optimizer.state[p]}
    assert fits == {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
    for seed in range(3):
        train_step(model, optimizer, *sentences(6, seed))
    assert_differs(before, weights(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    fresh = FOP(fresh_model := Attentive(), layer_options=choice, **OPTIONS)
    train_step(fresh_model, fresh, *sentences())
    for (name, p), q in zip(model.named_parameters(), fresh_model.parameters(), strict=True):
        for key in {"A", "G", "A_inv", "G_inv"} & fresh.state[q].keys():
            assert optimizer.state[p][key].shape == fresh.state[q][key].shape, name


# --- hooks of the state ------------------------------------------------------------------------------------


@every
def test_state_dict_hooks(make: Make) -> None:
    _, optimizer = trained(make)
    calls: list[str] = []

    def post(given: Optimizer, state: State) -> State:
        calls.append("post")
        return {**state, "epoch": 3}

    handles = [
        optimizer.register_state_dict_pre_hook(lambda given: calls.append("pre")),
        optimizer.register_state_dict_post_hook(post),
    ]
    assert optimizer.state_dict()["epoch"] == 3
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    assert "epoch" not in optimizer.state_dict()


@every
def test_load_hooks_and_their_order(make: Make) -> None:
    """What a hook returns is loaded, not what was given."""
    _, optimizer = trained(make)

    def double(given: Optimizer, state: State) -> None:
        state["param_groups"][0]["lr"] *= 2

    def replace(given: Optimizer, state: State) -> State:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        for held in state["state"].values():
            for key in held.keys() & {"momentum_buffer", "exp_avg"}:
                held[key].zero_()
        return state

    seen: list[float] = []
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda given: seen.append(given.param_groups[0]["lr"]))
    optimizer.load_state_dict(snapshot(optimizer))
    assert seen == [0.006]
    assert optimizer.param_groups[0]["lr"] == 0.006
    for held in optimizer.state.values():
        (average,) = {"momentum_buffer", "exp_avg"} & held.keys()
        assert not held[average].any()


@every
def test_load_hook_may_fit_a_state_of_other_groups(make: Make) -> None:
    """The documented use: the saved run had one group, this one has two."""
    model, optimizer = trained(make)
    twin = copied(model)
    params = list(twin.parameters())
    other = make([{"params": params[:3]}, {"params": params[3:]}])

    def split(given: Optimizer, state: State) -> State:
        (group,) = state["param_groups"]
        ids = group["params"]
        return {**state, "param_groups": [{**group, "params": ids[:3]}, {**group, "params": ids[3:]}]}

    other.register_load_state_dict_pre_hook(split)
    other.load_state_dict(snapshot(optimizer))
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its, range(3, 6))
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-12, atol=1e-14)


# --- foreign keys ------------------------------------------------------------------------------------------

# What wrappers (TRAC, SAM, schedule-free ones) keep in the state: torch allows any key.
KEYS: dict[str, Any] = {"trac": {"count": torch.ones(2)}, "note": "text", "tensor": torch.ones(2), 17: [1]}


@every
def test_foreign_keys_in_the_state(make: Make) -> None:
    """Through steps, a save, a load and a copy; no step is another one for them."""
    expected, _ = trained(make, 7)
    model, optimizer = trained(make, 2)
    optimizer.state.update(copy.deepcopy(KEYS))
    train(model, optimizer, range(2, 4))
    assert_equal({key: optimizer.state[key] for key in KEYS}, KEYS)
    twin, other = copied(model), None
    other = make(twin.parameters())
    # 17 would pass for the number of a parameter.
    state = {key: value for key, value in snapshot(optimizer)["state"].items() if key != 17}
    other.load_state_dict({**snapshot(optimizer), "state": state})
    assert_equal({key: other.state[key] for key in KEYS if key != 17}, {k: KEYS[k] for k in KEYS if k != 17})
    train(twin, other, range(4, 7))
    assert_equal(weights(twin), weights(expected))
    third_model, third = copy.deepcopy((model, optimizer))
    train(third_model, third, range(4, 7))
    assert_equal(weights(third_model), weights(expected))
    if isinstance(other, FOP):
        assert str(other.summary()) == str(third.summary())


@only("SGD", "FOP", "KFAC")
def test_foreign_keys_while_the_model_moves(make: Make) -> None:
    model = Mixed().float()
    optimizer = make(model.parameters())
    train_as_it_is(model, optimizer, range(5))
    optimizer.state.update(copy.deepcopy(KEYS))
    check_float64(model.double(), optimizer, make)
    assert_equal({key: optimizer.state[key] for key in KEYS}, KEYS)


@ours
def test_foreign_entries_of_a_parameter(library: type[FOP]) -> None:
    """As SAM's copy of the weights, before the first step and later: they stay, and go where it goes."""
    model, expected = Mixed().float(), Mixed().float()
    optimizer, plain = library(model.parameters()), library(expected.parameters())
    kept = {p: p.detach().clone() for p in model.parameters()}
    for p, value in kept.items():
        optimizer.state[p] |= {"old_p": value, "count": torch.tensor(3), "mask": value > 0, "share": 0.5}
    for net, its in ((model, optimizer), (expected, plain)):
        train_as_it_is(net, its, range(4))
        its.load_state_dict(snapshot(its))
        net.double()
        train_as_it_is(net, its, range(4, 6))
    assert_equal(weights(model), weights(expected))
    for p, value in kept.items():
        held = optimizer.state[p]
        assert torch.equal(held["old_p"], value.double()) and held["old_p"].dtype is torch.float64
        assert held["count"].dtype is torch.int64 and held["mask"].dtype is torch.bool
        assert held["share"] == 0.5


def test_foreign_keys_do_not_hide_that_a_state_must_be_made() -> None:
    """torch.distributed.checkpoint's step of nothing."""
    model = Mixed()
    optimizer = FOP(model)
    optimizer.state["note"] = {"count": 1}
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert "A_inv" in optimizer.state[model.first.weight]
    assert_equal(weights(model), before)


# --- copies ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("way", COPIES)
def test_copy_of_model_and_optimizer_trains_on_alone(make: Make, way: str) -> None:
    model, optimizer = trained(make, 7)
    twin, other = COPIES[way]((model, optimizer))
    assert type(other) is type(optimizer)
    assert {key: other.defaults[key] for key in optimizer.defaults} == optimizer.defaults
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    assert_equal(snapshot(other), snapshot(optimizer))
    before = weights(model), snapshot(optimizer)
    train(twin, other, range(7, 19))
    assert_equal((weights(model), snapshot(optimizer)), before)
    train(model, optimizer, range(7, 19))
    assert_equal(weights(twin), weights(model))
    assert_equal(snapshot(other), snapshot(optimizer))
    if isinstance(optimizer, FOP):
        assert other.summary() == optimizer.summary()


@every
def test_copy_of_the_optimizer_alone(make: Make) -> None:
    """It copies the parameters with it: of no use, but scripts do it, and the original must not care."""
    expected, _ = trained(make, 8)
    model, optimizer = trained(make, 4)
    other = copy.deepcopy(optimizer)
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    train(model, optimizer, range(4, 8))
    assert_equal(weights(model), weights(expected))


# --- moves -------------------------------------------------------------------------------------------------


def train_as_it_is(model: Mixed, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = tokens(6, seed)
        optimizer.zero_grad()
        loss_of(model, x, y.to(model.shift.dtype)).backward()
        optimizer.step()


def check_float64(model: Mixed, optimizer: Optimizer, make: Make) -> None:
    """Whatever was float32 before, the further steps are close to those of an all-float64 run."""
    train_as_it_is(model, optimizer, range(5, 10))
    assert all(p.dtype is torch.float64 and p.isfinite().all() for p in model.parameters())
    expected, _ = trained(make, 10)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-3, atol=1e-4)


@only("SGD", "FOP", "KFAC")
def test_model_moves_to_float64_in_mid_training(make: Make) -> None:
    """Without a word to the optimizer. AdamW needs the load below: its moments stay in float32."""
    model = Mixed().float()
    optimizer = make(model.parameters())
    train_as_it_is(model, optimizer, range(5))
    check_float64(model.double(), optimizer, make)


@every
@pytest.mark.parametrize("fresh", [False, True])
def test_state_of_float32_loads_into_float64(make: Make, fresh: bool) -> None:
    model = Mixed().float()
    optimizer = make(model.parameters())
    train_as_it_is(model, optimizer, range(5))
    state = saved(optimizer.state_dict())
    model.double()
    if fresh:
        model = copied(model)
        optimizer = make(model.parameters())
    optimizer.load_state_dict(state)
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        held = [value[key] for value in optimizer.state.values() if key in value]
        assert all(value.dtype is torch.float64 for value in held)
    check_float64(model, optimizer, make)


SETTINGS: dict[str, Callable[[nn.Module, FOP], FOP]] = {
    "loaded": lambda model, optimizer: (optimizer.load_state_dict(snapshot(optimizer)), optimizer)[1],
    "loaded-into-a-new-one": lambda model, optimizer: loaded(FOP(model.parameters()), snapshot(optimizer)),
    "loaded-into-one-of-the-module": lambda model, optimizer: loaded(FOP(model), snapshot(optimizer)),
    "moved-there-and-back": lambda model, optimizer: (model.double(), model.float(), optimizer)[2],
}


def loaded(optimizer: FOP, state: State) -> FOP:
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_model_moves_between_a_load_and_the_next_step(setting: str, dtype: torch.dtype) -> None:
    """As if the load had come after the move."""
    model, expected = Mixed().float(), Mixed().float()
    optimizer, plain = FOP(model.parameters()), FOP(expected.parameters())
    for net, its in ((model, optimizer), (expected, plain)):
        train_as_it_is(net, its, range(5))
    optimizer = SETTINGS[setting](model, optimizer)
    model.to(dtype)
    expected.to(dtype)
    plain.load_state_dict(snapshot(plain))
    for net, its in ((model, optimizer), (expected, plain)):
        train_as_it_is(net, its, range(5, 8))
    assert_equal(weights(model), weights(expected))
    assert_equal(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_move_before_their_first_step(when: str) -> None:
    """The model moved before the copy was made, and the state had not followed; or the copy moved."""
    model = Mixed().float()
    optimizer = FOP(model.parameters())
    train_as_it_is(model, optimizer, range(5))
    if when == "before":
        model.double()
    for way in COPIES.values():
        twin, other = way((model, optimizer))
        check_float64(twin.double(), other, FOP)


def test_model_moves_after_its_state_was_made() -> None:
    """By torch.distributed.checkpoint's step of nothing."""
    model = Mixed().float()
    optimizer = FOP(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = LR
    model.double()
    train_as_it_is(model, optimizer, range(3))
    assert all(
        held[key].dtype is torch.float64
        for held in optimizer.state.values()
        for key in held.keys() & {"A", "momentum_buffer", "exp_avg"}
    )
