"""`summary()`: every parameter once, its step and why. `diagnostics()`: true, and free unless asked for."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from contract import ours
from fop import FOP, KFAC
from internals import Refusals
from models import Attentive, Mixed, batch, conv_net, loss_of, mlp, sentences, tokens, train_step
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


NORM = "LayerNorm; a diagonal Fisher with path='fop' in layer_options"


# --- summary -----------------------------------------------------------------------------------------------


@ours
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
        # A, G, both inverses, the momentum, the noise, the reach, and the norm that stands for one of 0, in
        # float64
        elements = 2 * groups * (dim_A**2 + state["G"].shape[-1] ** 2) + param.numel() + 5
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
        "normed.parametrizations.weight.original1": "(A 3², G 3²)",
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
    optimizer = FOP(model, damping_kind="absolute", layer_options=choice)
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


def test_summary_follows_beta_of_the_group() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch(6, 0))
    for beta, path in ((0.0, "K-FAC"), ("adaptive", "FOP")):
        optimizer.param_groups[0]["beta"] = beta
        assert {row.path for row in optimizer.summary().rows} == {path}


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


class Cells(HTMLParser):
    """Collects the text of the cells of an HTML table, row by row, and which tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if data.strip() and self.rows and self.tags.isdisjoint({"p"}):
            self.rows[-1][-1] += data


def test_summary_is_a_table_in_a_notebook() -> None:
    model = nn.ModuleDict({"a<b>&": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    summary = FOP(model).summary()
    cells = Cells()
    cells.feed(summary._repr_html_())
    head, *body = cells.rows
    printed, _, *table, total = str(summary).splitlines()
    assert head == printed.split()
    assert cells.tags == {"table", "tr", "th", "td", "p"}
    assert [row[0] for row in body] == ["a<b>&.weight", "a<b>&.bias", "norm.weight", "norm.bias"]
    assert ["".join("".join(row).split()) for row in body] == ["".join(row.split()) for row in table]
    assert total in summary._repr_html_()


def test_summary_is_a_table_of_rich() -> None:
    model = nn.ModuleDict({"a[bold]": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    summary, out = FOP(model).summary(), io.StringIO()
    Console(file=out, width=200).print(summary)
    shown, printed = ("".join(text.split()) for text in (out.getvalue(), str(summary)))
    for row in summary.rows:
        assert "".join(f"{row.name}│{'×'.join(map(str, row.shape))}│{row.path}".split()) in shown
    assert shown.startswith("┏") and shown.endswith(printed[-25:])


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
    options = {
        "step_length": "paper",
        "lr": 0.1,
        "momentum": 0.9,
        "damping": 0.05,
        "stat_decay": 0.8,
        "kl_clip": 1e-3,
        **mixing,
    }
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
            assert set(layer.fallbacks.values()) == {0}


def test_damping_shares() -> None:
    """The share of πγ in the mean eigenvalue of A + πγI, and of γ/π in that of G + γ/π I."""
    model = mlp()
    optimizer = FOP(model, damping=0.01, damping_kind="absolute")
    train_step(model, optimizer, *batch())
    for name, layer in optimizer.diagnostics().layers.items():
        state = optimizer.state[model[int(name)].weight]
        a = float(state["A"][0].trace()) / state["A"].shape[-1]
        g = float(state["G"][0].trace()) / state["G"].shape[-1]
        pi = math.sqrt(a / g)
        assert layer.damping_A == pytest.approx(0.1 * pi / (a + 0.1 * pi), rel=1e-9)
        assert layer.damping_G == pytest.approx(0.1 / pi / (g + 0.1 / pi), rel=1e-9)


def test_relative_damping_shares() -> None:
    """A tenth of the mean eigenvalue of G; of A likewise, but for the bias, which counts by itself."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = FOP(model, damping=0.01)
    train_step(model, optimizer, *batch())
    for name, layer in optimizer.diagnostics().layers.items():
        assert layer.damping_G == pytest.approx(0.1 / 1.1, rel=1e-9), name
        assert layer.damping_A == pytest.approx(0.1 / 1.1, rel=1e-9), name


def test_diagnostics_of_a_kfac_step() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    assert all(layer.beta != 0 for layer in optimizer.diagnostics().layers.values())
    train_step(model, optimizer, *batch(1))
    for layer in optimizer.diagnostics().layers.values():
        assert (layer.beta, layer.eta, layer.rho) == (0.0, 1.0, 0.0)
    assert optimizer.diagnostics().kl_scale <= 1.0


def test_fallbacks_are_counted_and_reported_once() -> None:
    """Without damping a factor with zeros on its diagonal cannot be inverted: more is needed at every update.

    Zeros, and not a factor of rank one, which rounding may make definite.
    """
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    optimizer = FOP(model, damping=0.0, curvature_interval=1)
    x, y = torch.eye(6)[:1].repeat(4, 1), torch.randn(1, 1).repeat(4, 1)
    with pytest.warns(RuntimeWarning, match=r"more damping.*reported once") as caught:
        for _ in range(3):
            train_step(model, optimizer, x, y)
    assert len({str(warning.message) for warning in caught}) == len(caught)
    (layer,) = optimizer.diagnostics().layers.values()
    assert sum(layer.fallbacks.values()) == 3, "one of two factors at each of three updates"
    assert torch.isfinite(model.weight).all()


def test_factor_that_no_damping_can_invert() -> None:
    """All inputs are zero and damping is zero: no curvature, no crash, no NaN, and it is reported."""
    model = nn.Linear(6, 4, bias=False)
    optimizer = FOP(model, damping=0.0, damping_kind="absolute")
    with pytest.warns(RuntimeWarning, match="inversion of a curvature factor"):
        for _ in range(2):
            train_step(model, optimizer, torch.zeros(4, 6), torch.ones(4, 4))
    assert torch.isfinite(model.weight).all()
    assert optimizer.summary().rows[0].path != "FOP" or "no curvature" in optimizer.summary().rows[0].reason


# --- steps without a pair ----------------------------------------------------------------------------------


def without_pair(optimizer: FOP) -> dict[str, tuple[int, str | None]]:
    layers = optimizer.diagnostics().layers
    return {name: (layer.kfac_steps, layer.why_kfac) for name, layer in layers.items()}


def one_sample(model: nn.Sequential, optimizer: FOP) -> None:
    loss_of(model, *batch(1)).backward()


def no_sample(model: nn.Sequential, optimizer: FOP) -> None:
    model(batch(0)[0]).sum().backward()


def other_sizes(model: nn.Sequential, optimizer: FOP) -> None:
    hidden = model[0](batch(6)[0])
    (model[2](hidden).mean() + model[2](hidden[:4]).mean() + model[0](batch(2)[0]).mean()).backward()


def changed_in_place(model: nn.Sequential, optimizer: FOP) -> None:
    loss_of(model, *batch()).backward()
    for p in model.parameters():
        p.grad.clamp_(-0.01, 0.01)  # type: ignore[union-attr]


def added_to(model: nn.Sequential, optimizer: FOP) -> None:
    loss_of(model, *batch()).backward()
    for p in model.parameters():
        p.grad.add_(1.0)  # type: ignore[union-attr]
    loss_of(model, *batch()).backward()


def penalised(model: nn.Sequential, optimizer: FOP) -> None:
    optimizer.request_curvature()
    (loss_of(model, *batch()) + sum(p.square().sum() for p in model.parameters())).backward()


def as_a_function(model: nn.Sequential, optimizer: FOP) -> None:
    x, y = batch()
    hidden = nn.functional.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]
    half_squared_error(nn.functional.linear(hidden, model[2].weight, model[2].bias), y).backward()  # type: ignore[arg-type]


def one_label(model: nn.Sequential, optimizer: FOP) -> None:
    with optimizer.sub_batch(1):
        loss_of(model, *batch()).backward()


CHANGED = "p.grad is not what the layer's own backward pass gave"
NO_PAIR: dict[Callable[[nn.Sequential, FOP], None], str] = {
    one_sample: "a batch of 1 has no halves",
    no_sample: "its batch is empty",
    # "its uses have batches of …", or "its input is (…) for a batch of …" after an earlier call.
    other_sizes: "batch",
    changed_in_place: CHANGED,
    added_to: CHANGED,
    penalised: CHANGED,
    as_a_function: "its gradient came by a path that no hook saw",
    one_label: "its backward passes were all of one sub-batch",
}


@pytest.mark.parametrize("backward", NO_PAIR)
def test_steps_without_a_pair_are_counted_and_explained(
    backward: Callable[[nn.Sequential, FOP], None],
) -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    assert without_pair(optimizer) == {"0": (0, None), "2": (0, None)}
    assert "took K-FAC's step" not in str(optimizer.diagnostics())
    for count in (1, 2):
        optimizer.zero_grad()
        backward(model, optimizer)
        optimizer.step()
        for name, (steps, why) in without_pair(optimizer).items():
            assert steps == count, name
            assert why is not None
            assert NO_PAIR[backward] in why
            assert f"{name} took K-FAC's step: {why}" in str(optimizer.diagnostics())
    optimizer.request_curvature()  # which also looks again for other paths into the gradient
    train_step(model, optimizer, *batch())
    assert without_pair(optimizer) == {"0": (2, None), "2": (2, None)}


def test_only_the_layers_without_a_pair_are_counted() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    optimizer.zero_grad()
    loss_of(model, *batch()).backward()
    model[0].weight.grad.neg_()  # type: ignore[union-attr]
    optimizer.step()
    found = without_pair(optimizer)
    assert (found["0"][0], found["2"]) == (1, (0, None))
    # A layer that is left out takes no step of any kind.
    optimizer.zero_grad()
    half_squared_error(model[2](batch(6, shape=(6,))[0]), batch()[1]).backward()
    optimizer.step()
    assert without_pair(optimizer) == found


def test_kfac_has_no_pairs_to_miss() -> None:
    model = mlp()
    optimizer = KFAC(model)
    for n in (6, 1):
        train_step(model, optimizer, *batch(n))
    assert without_pair(optimizer) == {"0": (0, None), "2": (0, None)}


# --- nothing is read before someone asks -------------------------------------------------------------------


def test_reports_alone_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: diagnostics() must fail on them, and a step must not."""
    # autocast knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    model = conv_net()
    optimizer = FOP(model, curvature_interval=100)
    step = 0
    while step < 12 or optimizer.curvature_due:
        train_step(model, optimizer, *batch(6, step, IMAGE))
        step += 1
    ghost = copy.deepcopy(model).to("meta")
    other = FOP(ghost, curvature_interval=100)
    other.load_state_dict(optimizer.state_dict())
    loss_of(ghost, *(tensor.to("meta") for tensor in batch(6, step, IMAGE))).backward()
    nn.utils.clip_grad_norm_(ghost.parameters(), 1.0)
    other.step()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        other.diagnostics()


def test_refusals_of_a_model_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was counted on one device does not meet what is counted on the next."""
    refusals, finite = Refusals(), torch.ones(1, dtype=torch.bool)
    monkeypatch.setattr(Refusals, "report", lambda self: None)
    for device in ("meta", "cpu", "meta"):
        refusals.count(("layer",), finite.to(device))
