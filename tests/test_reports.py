"""`summary()`: every parameter once, what its step is, and why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import Attentive, Mixed, batch, conv_net, mlp, sentences, tokens, train_step
from reference import half_squared_error

IMAGE = (2, 5, 6)


def held_bytes(optimizer: FOP, param: Tensor) -> int:
    values = optimizer.state[param].values()
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def given(model: nn.Module, way: str) -> Any:
    if way == "groups":
        params = list(model.parameters())
        return [{"params": params[2:]}, {"params": params[:2]}]
    return {"module": model, "bare": model.parameters(), "named": model.named_parameters()}[way]


NORM = "LayerNorm; a diagonal Fisher with path='fop' in layer_options"


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
        "embed.weight": (path, "Embedding", "(A 7, G 4²)"),
        "norm.weight": ("AdamW", NORM, ""),
        "norm.bias": ("AdamW", NORM, ""),
        "shift": ("AdamW", "no Kronecker factors for Mixed", ""),
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


class Everything(nn.Module):
    """What takes AdamW for one reason or another, next to layers with factors of every form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Attentive()
        self.mixed_dims = nn.MultiheadAttention(4, 1, kdim=3, vdim=2, add_bias_kv=True, batch_first=True)
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.bilinear = nn.Bilinear(3, 3, 3)
        self.bags = nn.EmbeddingBag(7, 3)
        self.capped = nn.Embedding(7, 3, max_norm=1.0)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.batch_norm = nn.BatchNorm1d(3)
        self.shift = nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(ids)
        keys = x[:, None]
        x = x + self.mixed_dims(self.body.embed(ids), keys, keys[..., :2], need_weights=False)[0][:, 0, :3]
        x = self.bilinear(self.recurrent(x[:, None])[0][:, 0], x) + self.bags(ids) + self.capped(ids).sum(1)
        return self.batch_norm(self.normed(x)) + self.shift  # type: ignore[no-any-return]


@pytest.mark.parametrize("bare", [False, True])
def test_every_row_on_the_adamw_path_says_why(bare: bool) -> None:
    model = Everything()
    optimizer = FOP(model.parameters() if bare else model, layer_options={"body.head": {"path": "adamw"}})
    train_step(model, optimizer, *sentences())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert len(rows) == len(list(model.parameters()))
    fop = {name: row for name, row in rows.items() if row.path == "FOP"}
    assert {name: row.factors for name, row in fop.items() if row.factors} == {
        "body.embed.weight": "(A 7, G 4²)",
        "body.attention.in_proj_weight": "3×(A 5², G 4²)",
        "body.attention.out_proj.weight": "(A 5², G 4²)",
        "body.down.weight": "(A 9², G 3²)",
        "body.up.weight": "(A 7², G 4²)",
        "mixed_dims.q_proj_weight": "(A 4², G 4²)",
        "mixed_dims.k_proj_weight": "(A 3², G 4²)",
        "mixed_dims.v_proj_weight": "(A 2², G 4²)",
        "mixed_dims.out_proj.weight": "(A 5², G 4²)",
    }
    biases = ("body.attention.in_proj_bias", "body.attention.out_proj.bias", "body.down.bias", "body.up.bias")
    assert {name for name, row in fop.items() if not row.factors} == {*biases, "mixed_dims.out_proj.bias"}
    adamw = {name: row.reason for name, row in rows.items() if row.path == "AdamW"}
    assert fop.keys() | adamw.keys() == rows.keys()
    kinds = {
        "body.norm.": NORM,
        "body.group.": NORM.replace("LayerNorm", "GroupNorm"),
        "body.head.": "layer_options say so",
        "mixed_dims.in_proj_bias": "one bias for three weights",
        "mixed_dims.bias_": "of MultiheadAttention is no weight of a layer",
        "recurrent.": "no Kronecker factors for GRU",
        "bilinear.": "no Kronecker factors for Bilinear",
        "bags.": "no Kronecker factors for EmbeddingBag",
        "capped.": "an Embedding with max_norm changes its own weight",
        "normed.bias": "its weight is computed from other parameters",
        "normed.parametrizations.": "no Kronecker factors for",
        "batch_norm.": NORM.replace("LayerNorm", "BatchNorm1d"),
        "shift": "no Kronecker factors for Everything",
    }
    for name, reason in adamw.items():
        (expected,) = (text for start, text in kinds.items() if name.startswith(start))
        assert expected in reason, name
    assert all(any(name.startswith(start) for name in adamw) for start in kinds)


def test_summary_of_diagonal_curvature() -> None:
    model = Attentive()
    choice = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}, "*": {"max_factor_dim": 5}}
    optimizer = FOP(model, layer_options=choice)
    train_step(model, optimizer, *sentences())
    rows = {row.name: row for row in optimizer.summary().rows}
    factors = {name: row.factors for name, row in rows.items() if name.endswith("weight")}
    assert factors["norm.weight"] == factors["group.weight"] == "diagonal 8"
    assert (rows["norm.bias"].path, rows["norm.bias"].reason) == ("FOP", "LayerNorm")
    # The bias' column does not count towards the limit.
    assert factors["down.weight"] == "(A 9, G 3²)"
    assert factors["up.weight"] == "(A 7, G 4²)"
    assert factors["head.weight"] == "(A 5², G 3²)"
    for name, param in model.named_parameters():
        assert rows[name].bytes == held_bytes(optimizer, param) > 0
    layers = optimizer.diagnostics().layers
    for name in ("norm", "group"):
        layer, F = layers[name], optimizer.state[dict(model.named_parameters())[f"{name}.weight"]]["A"]
        assert layer.damping_A == pytest.approx(1e-3 / (float(F.mean()) + 1e-3), rel=1e-9)
        assert layer.damping_G is None
        assert 0 <= layer.rho <= 1
    assert layers.keys() == {
        "embed", "attention.in_proj", "attention.out_proj", "norm", "down", "up", "group", "head",
    }  # fmt: skip
    assert str(optimizer.diagnostics()).count("–") == 2, "the two without G"


def test_summary_prints_as_a_table() -> None:
    model = Mixed()
    optimizer = FOP(model.parameters())
    for paths in ("7 unknown", "3 AdamW, 4 FOP"):
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
