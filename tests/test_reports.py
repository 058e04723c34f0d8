"""`summary()` and `diagnostics()`: complete, true, and free of charge until someone asks."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import Mixed, batch, conv_net, loss_of, mlp, tokens, train_step
from reference import ReferenceFOP, half_squared_error

IMAGE = (2, 5, 6)


def held_bytes(optimizer: FOP, param: Tensor) -> int:
    values = optimizer.state[param].values()
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def given(model: nn.Module, way: str) -> Any:
    if way == "groups":
        params = list(model.parameters())
        return [{"params": params[2:]}, {"params": params[:2]}]
    return {"module": model, "bare": model.parameters(), "named": model.named_parameters()}[way]


# --- summary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("way", ["module", "bare", "named", "groups"])
def test_summary_covers_every_parameter_once(way: str, library: type[FOP]) -> None:
    model = Mixed()
    optimizer = library(given(model, way))
    order = [param for group in optimizer.param_groups for param in group["params"]]
    names = {param: name for name, param in model.named_parameters()}
    before = optimizer.summary().rows
    assert [row.shape for row in before] == [tuple(p.shape) for p in order]
    assert all(row.bytes == 0 and row.reason for row in before)
    if way in ("module", "named"):
        assert [row.name for row in before] == [names[p] for p in order]
    if way != "module":
        assert all("first forward pass" in row.reason and row.path == "unknown" for row in before)

    for seed in range(2):
        train_step(model, optimizer, *tokens(6, seed))
    rows = optimizer.summary().rows
    assert [row.name for row in rows] == [names[p] for p in order]
    assert [row.shape for row in rows] == [tuple(p.shape) for p in order]
    path = "FOP" if library is FOP else "K-FAC"
    expected = {
        "embed.weight": ("AdamW", "Embedding is not one of Linear, Conv2d", ""),
        "norm.weight": ("AdamW", "LayerNorm is not one of Linear, Conv2d", ""),
        "norm.bias": ("AdamW", "LayerNorm is not one of Linear, Conv2d", ""),
        "shift": ("AdamW", "Mixed is not one of Linear, Conv2d", ""),
        "first.weight": (path, "Linear", "(A 5², G 6²)"),
        "first.bias": (path, "Linear", ""),
        "second.weight": (path, "Linear", "(A 6², G 3²)"),
    }
    assert {row.name: (row.path, row.reason, row.factors) for row in rows} == expected
    assert {row.name: row.bytes for row in rows} == {names[p]: held_bytes(optimizer, p) for p in order}
    assert all(row.bytes > 0 for row in rows)


def test_summary_shows_the_factors_that_are_held() -> None:
    model = conv_net()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch(shape=IMAGE))
    rows = {row.name: row for row in optimizer.summary().rows}
    assert rows["2.weight"].factors == "2×(A 7², G 2²)"
    for name, param in model.named_parameters():
        if "weight" not in name:
            continue
        state = optimizer.state[param]
        groups, dim_A, _ = state["A"].shape
        shown = [int(number) for number in re.findall(r"\d+", rows[name].factors)]
        assert shown == [groups] * (groups > 1) + [dim_A, state["G"].shape[-1]]
        # A, G, both inverses and the momentum, in float64
        elements = 2 * groups * (dim_A**2 + state["G"].shape[-1] ** 2) + param.numel()
        # and one bool: whether p.grad was all that the hooks saw
        assert rows[name].bytes == 8 * elements + 1


def test_summary_prints_as_a_table() -> None:
    model = Mixed()
    optimizer = FOP(model.parameters())
    for paths in ("7 unknown", "4 AdamW, 3 FOP"):
        text = str(optimizer.summary())
        head, rule, *body, foot = text.splitlines()
        assert set(rule) == {"-", " "}
        assert len(body) == len(list(model.parameters()))
        columns = [match.start() for match in re.finditer("-+", rule)]
        assert [head[c:].split("  ")[0] for c in columns] == [
            "parameter", "shape", "path", "why", "factors", "state",
        ]  # fmt: skip
        for line, row in zip(body, optimizer.summary().rows, strict=True):
            cells = [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
            shape = "×".join(map(str, row.shape))
            assert cells[:5] == [row.name, shape, row.path, row.reason, row.factors]
        count, counted = foot.split(";")[0].split(": ")
        assert (count, sorted(counted.split(", "))) == ("7 parameters", sorted(paths.split(", ")))
        train_step(model, optimizer, *tokens())


def test_summary_names_of_modules_called_one_by_one() -> None:
    """Encoder and decoder are never called as one model; the rows must still be told apart."""
    encoder, decoder = mlp(), nn.Sequential(nn.Linear(3, 3)).double()
    optimizer = FOP([*encoder.parameters(), *decoder.parameters()])
    half_squared_error(decoder(encoder(batch()[0])), batch()[1]).backward()
    optimizer.step()
    names = [row.name for row in optimizer.summary().rows]
    assert len(set(names)) == len(names)
    assert len(optimizer.diagnostics().layers) == 3


def test_summary_of_frozen_and_unused_layers() -> None:
    model = mlp()
    optimizer = FOP(model)
    model[0].requires_grad_(False)
    train_step(model, optimizer, *batch())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert "frozen" in rows["0.weight"].reason
    assert "frozen" in rows["0.bias"].reason
    assert rows["2.weight"].reason == "Linear"


# --- diagnostics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", [{}, {"beta": 0.1}, {"eta": 0.5}, {"beta": 0.1, "eta": 0.5}])
def test_diagnostics_against_the_oracle(mixing: dict[str, float]) -> None:
    model = conv_net()
    options = {"lr": 0.1, "momentum": 0.9, "damping": 0.05, "stat_decay": 0.8, "kl_clip": 1e-3, **mixing}
    oracle = ReferenceFOP(model, weight_decay=0.01, **options)
    optimizer = FOP(model, weight_decay=0.01, curvature_interval=1, **options)
    assert all(layer.beta is None for layer in optimizer.diagnostics().layers.values())
    assert optimizer.diagnostics().kl_scale == 1.0
    for seed in range(4):
        x, y = batch(6, seed, IMAGE)
        oracle.step(x, y, half_squared_error)
        train_step(model, optimizer, x, y)
        found = optimizer.diagnostics()
        assert found.kl_scale == pytest.approx(oracle.kl_scale, rel=1e-8)
        assert found.kl_scale < 1
        assert list(found.layers) == ["0", "2", "4"]
        for name, state in oracle.state.items():
            layer = found.layers[name]
            for key in ("beta", "eta", "rho"):
                assert getattr(layer, key) == pytest.approx(getattr(state.correction, key), rel=1e-7), key
            assert 0 < layer.rho < 1
            assert layer.steps_since_curvature == 0
            assert set(layer.rescues.values()) == {0}


def test_damping_shares() -> None:
    """The share of πγ in the mean eigenvalue of A + πγI, and of γ/π in that of G + γ/π I."""
    model = mlp()
    optimizer = FOP(model, damping=0.01)
    train_step(model, optimizer, *batch())
    for name, layer in optimizer.diagnostics().layers.items():
        state = optimizer.state[model[int(name)].weight]
        a = float(state["A"][0].trace()) / state["A"].shape[-1]
        g = float(state["G"][0].trace()) / state["G"].shape[-1]
        pi = math.sqrt(a / g)
        assert layer.damping_A == pytest.approx(0.1 * pi / (a + 0.1 * pi), rel=1e-9)
        assert layer.damping_G == pytest.approx(0.1 / pi / (g + 0.1 / pi), rel=1e-9)


def test_steps_since_curvature() -> None:
    model = mlp()
    optimizer = FOP(model, curvature_interval=6)
    age = -1
    ages = []
    for step in range(60):
        age = 0 if optimizer.curvature_due else age + 1
        train_step(model, optimizer, *batch(6, step))
        assert {layer.steps_since_curvature for layer in optimizer.diagnostics().layers.values()} == {age}
        ages.append(age)
    assert max(ages) == 5


def test_diagnostics_of_a_kfac_step() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    assert all(layer.beta != 0 for layer in optimizer.diagnostics().layers.values())
    train_step(model, optimizer, *batch(1))
    for layer in optimizer.diagnostics().layers.values():
        assert (layer.beta, layer.eta, layer.rho) == (0.0, 1.0, 0.0)
    assert optimizer.diagnostics().kl_scale <= 1.0


def test_rescues_are_counted_and_reported_once() -> None:
    """Without damping, factors of rank one cannot be inverted: more damping is needed at every update."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    optimizer = FOP(model, damping=0.0, curvature_interval=1)
    x, y = torch.randn(1, 6).repeat(4, 1), torch.randn(1, 4).repeat(4, 1)
    with pytest.warns(RuntimeWarning, match=r"more damping.*reported once") as caught:
        for _ in range(3):
            train_step(model, optimizer, x, y)
    assert len({str(warning.message) for warning in caught}) == len(caught)
    (layer,) = optimizer.diagnostics().layers.values()
    assert sum(layer.rescues.values()) == 6, "two factors at each of three updates"
    assert torch.isfinite(model.weight).all()


def test_factor_that_no_damping_can_invert() -> None:
    """All inputs are zero and damping is zero: no curvature, no crash, no NaN, and it is reported."""
    model = nn.Linear(6, 4, bias=False)
    optimizer = FOP(model, damping=0.0)
    with pytest.warns(RuntimeWarning, match="inversion of a curvature factor"):
        for _ in range(2):
            train_step(model, optimizer, torch.zeros(4, 6), torch.ones(4, 4))
    assert torch.isfinite(model.weight).all()
    assert optimizer.summary().rows[0].path != "FOP" or "no curvature" in optimizer.summary().rows[0].reason


# --- nothing is read before someone asks -------------------------------------------------------------------


def not_due(seed_model: nn.Module, **options: Any) -> tuple[FOP, int]:
    """An optimizer in the middle of a curvature interval."""
    optimizer = FOP(seed_model, curvature_interval=100, weight_decay=0.1, **options)
    step = 0
    while step < 12 or optimizer.curvature_due:
        train_step(seed_model, optimizer, *batch(6, step, IMAGE))
        step += 1
    return optimizer, step


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.1, "eta": 1.0}, {"nesterov": True}])
def test_step_reads_nothing_from_the_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: whatever reads one fails, as diagnostics() must."""
    # autocast knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    model = conv_net()
    optimizer, step = not_due(model, **options)
    ghost = copy.deepcopy(model).to("meta")
    other = FOP(ghost, curvature_interval=100, **options)
    other.load_state_dict(optimizer.state_dict())
    x, y = (tensor.to("meta") for tensor in batch(6, step, IMAGE))
    assert not other.curvature_due
    other.zero_grad()
    loss_of(ghost, x, y).backward()
    nn.utils.clip_grad_norm_(ghost.parameters(), 1.0)
    other.step()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        other.diagnostics()


def test_step_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a Python number made into a tensor is a blocking copy from pageable memory."""
    model = conv_net()
    optimizer, step = not_due(model, nesterov=True)
    made: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    optimizer.zero_grad()
    loss_of(model, *batch(6, step, IMAGE)).backward()
    for owner, name in (
        (Tensor, "new_tensor"),
        (torch, "tensor"),
        (torch, "as_tensor"),
        (torch, "scalar_tensor"),
    ):
        watch(owner, name)
    optimizer.step()
    assert made == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_never_waits_for_the_gpu() -> None:
    model = conv_net()
    optimizer, step = not_due(model)
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer
    model = model.cuda()
    optimizer = FOP(model, curvature_interval=100, weight_decay=0.1)
    optimizer.load_state_dict(saved)
    x, y = (tensor.cuda() for tensor in batch(6, step, IMAGE))
    assert not optimizer.curvature_due
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < optimizer.diagnostics().kl_scale <= 1
