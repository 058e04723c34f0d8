"""`layer_options`: who is meant, what it changes, and what is refused; weights that modules share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import (
    PLAIN,
    Attentive,
    Mixed,
    assert_equal,
    batch,
    half_squared_error,
    mlp,
    sentences,
    snapshot,
    tokens,
    train_step,
    weights,
)

KFAC_PLAIN = {key: value for key, value in PLAIN.items() if key not in ("beta", "eta")}


def paths(optimizer: FOP) -> dict[str, str]:
    return {row.name: row.path for row in optimizer.summary().rows}


def taking_adamw(model: nn.Module, choice: Any) -> set[str]:
    """Names of the modules that are left to AdamW because the options say so."""
    rows = FOP(model, layer_options=choice).summary().rows
    return {row.name.rpartition(".")[0] for row in rows if row.reason == "layer_options say so"}


# --- refused -----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "list": ([("0", {"path": "adamw"})], TypeError, ("layer_options=", "{'head': {'path': 'adamw'}}")),
    "string": ("adamw", TypeError, ("layer_options='adamw'", "dict")),
    "number-as-key": ({0: {"path": "adamw"}}, TypeError, ("key 0", "name pattern or a module type")),
    "module-as-key": ({nn.Linear(1, 1): {}}, TypeError, ("key Linear(", "name pattern or a module type")),
    "other-type-as-key": ({dict: {}}, TypeError, ("dict", "name pattern or a module type")),
    "no-dict": ({"0": "adamw"}, TypeError, ("'0'", "dict of options", "got 'adamw'")),
    "unknown": ({"0": {"lr": 0.1}}, ValueError, ("unknown option 'lr' of '0'", "path", "max_factor_dim")),
    "path": ({"0": {"path": "sgd"}}, ValueError, ("path='sgd' of '0'", "'fop' or 'adamw'")),
    "no-path": ({"0": {"path": None}}, ValueError, ("path=None of '0'", "'fop' or 'adamw'")),
    "sharing": ({nn.Linear: {"weight_sharing": 1}}, ValueError, ("1 of Linear", "'expand' or 'reduce'")),
    "batch-dim": ({"0": {"batch_dim": 2}}, ValueError, ("batch_dim=2 of '0'", "0 or 1")),
    "negative-batch-dim": ({"0": {"batch_dim": -1}}, ValueError, ("batch_dim=-1", "0 or 1")),
    "boolean-batch-dim": ({"0": {"batch_dim": True}}, ValueError, ("batch_dim=True", "0 or 1")),
    "negative-dim": ({"0": {"max_factor_dim": -1}}, ValueError, ("max_factor_dim=-1 of '0'", "0 or more")),
    "fraction": ({"0": {"max_factor_dim": 2.5}}, ValueError, ("max_factor_dim=2.5", "whole number")),
    "boolean-dim": ({"0": {"max_factor_dim": True}}, ValueError, ("max_factor_dim=True", "whole number")),
    "second-entry": ({"0": {"path": "fop"}, "2": {"path": 1}}, ValueError, ("path=1 of '2'",)),
}  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("case", BAD)
def test_refused_when_the_optimizer_is_made(case: str, library: type[FOP], bare: bool) -> None:
    given, error, parts = BAD[case]
    model = mlp()
    with pytest.raises(error) as caught:
        library(model.parameters() if bare else model, layer_options=given)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    train_step(model, library(model), *batch())


def test_they_are_no_option_of_a_group() -> None:
    """Groups hold numbers that a checkpoint keeps; layers go by name."""
    model = mlp()
    optimizer = FOP(model, layer_options={"0": {"path": "adamw"}})
    assert "layer_options" not in optimizer.param_groups[0]
    assert "layer_options" not in optimizer.state_dict()["param_groups"][0]


# --- who is meant ------------------------------------------------------------------------------------------

ADAMW, FOP_PATH = {"path": "adamw"}, {"path": "fop"}
PARTS = {f"body.{name}" for name in ("embed", "norm", "first", "second")}


class Headed(nn.Linear):
    """A type of the user's own that is an `nn.Linear`."""


def body_and_head() -> nn.Module:
    model = nn.Sequential()
    model.body, model.head = Mixed(), Headed(3, 3)
    return model


@pytest.mark.parametrize(
    ("build", "choice", "expected"),
    [
        (body_and_head, None, set()),
        (body_and_head, {}, set()),
        (body_and_head, {"body.first": ADAMW}, {"body.first"}),
        (body_and_head, {"*.first": ADAMW}, {"body.first"}),
        (body_and_head, {"*d*": ADAMW}, {"body", *PARTS, "head"}),
        (body_and_head, {"body.[es]*": ADAMW}, {"body.embed", "body.second"}),
        (body_and_head, {"first": ADAMW}, set()),
        (body_and_head, {"BODY.FIRST": ADAMW}, set()),
        (body_and_head, {nn.Linear: ADAMW}, {"body.first", "body.second", "head"}),
        (body_and_head, {nn.Linear: ADAMW, "head": FOP_PATH}, {"body.first", "body.second"}),
        (body_and_head, {"head": FOP_PATH, nn.Linear: ADAMW}, {"body.first", "body.second", "head"}),
        (body_and_head, {nn.Module: ADAMW, "*.?*": FOP_PATH}, {"body", "head"}),
        (body_and_head, {"*": ADAMW, nn.Embedding: FOP_PATH}, {"body", *PARTS, "head"} - {"body.embed"}),
        # Options of another kind are joined with those given before.
        (body_and_head, {"head": ADAMW, "h*": {"max_factor_dim": 3}}, {"head"}),
        # An attention module, and its output projection with a name and a type of its own.
        (Attentive, {"attention": ADAMW}, {"attention", "attention.out_proj"}),
        (Attentive, {"attention.out_proj": ADAMW}, {"attention.out_proj"}),
        (Attentive, {nn.Linear: ADAMW}, {"attention.out_proj", "head"}),
        # The name of a model that is one layer is empty.
        *((lambda: nn.Linear(3, 2), {key: ADAMW}, {""}) for key in ("", "*", nn.Linear, nn.Module)),
    ],
)
@pytest.mark.filterwarnings("error", "ignore:layer_options.*no module matches '(first|BODY.FIRST)'")
def test_patterns_and_types_in_their_order(
    build: Callable[[], nn.Module], choice: Any, expected: set[str]
) -> None:
    assert taking_adamw(build(), choice) == expected


@pytest.mark.parametrize("bare", [False, True])
def test_warning_of_a_pattern_that_nothing_matches(bare: bool) -> None:
    """Once, when all modules are known: with bare parameters that is the first forward pass."""
    model = mlp()
    choice = {"fc*": ADAMW, "0": {"max_factor_dim": 3}, nn.Conv2d: ADAMW}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = FOP(model.parameters() if bare else model, layer_options=choice)
        assert len(caught) == (0 if bare else 2)
        for seed in range(3):
            train_step(model, optimizer, *batch(6, seed))
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "no module matches 'fc*'" in messages[0]
    assert "no module matches Conv2d" in messages[1]
    assert {warning.category for warning in caught} == {UserWarning}
    here = {__file__, train_step.__code__.co_filename}
    assert {warning.filename for warning in caught} <= here


def test_a_change_of_the_dict_afterwards_has_no_effect() -> None:
    choice: dict[Any, dict[str, Any]] = {"0": {"path": "adamw"}}
    model = mlp()
    optimizer = FOP(model.parameters(), layer_options=choice)
    choice["0"]["path"] = "fop"
    choice["2"] = {"path": "adamw"}
    train_step(model, optimizer, *batch())
    assert paths(optimizer) == {"0.weight": "AdamW", "0.bias": "AdamW", "2.weight": "FOP", "2.bias": "FOP"}


# --- what it changes ---------------------------------------------------------------------------------------

CHOICE: dict[Any, dict[str, Any]] = {
    "embed": {"path": "adamw"},
    nn.LayerNorm: {"path": "fop"},
    "*": {"max_factor_dim": 4, "weight_sharing": "reduce"},
}


def run(make: Callable[[nn.Module], FOP], steps: int = 6) -> tuple[dict[str, Tensor], FOP]:
    model = Attentive()
    optimizer = make(model)
    for seed in range(steps):
        train_step(model, optimizer, *sentences(6, seed))
    return weights(model), optimizer


def test_same_run_from_bare_parameters_and_from_the_model() -> None:
    expected, optimizer = run(lambda model: FOP(model, layer_options=CHOICE))
    found, _ = run(lambda model: FOP(model.parameters(), layer_options=CHOICE))
    assert_equal(found, expected)
    plain, _ = run(FOP)
    assert all(not torch.equal(plain[name], value) for name, value in expected.items())
    assert paths(optimizer)["norm.weight"] == "FOP"
    assert paths(optimizer)["group.weight"] == paths(optimizer)["embed.weight"] == "AdamW"


def test_kfac_takes_them_too() -> None:
    expected, _ = run(lambda model: FOP(model, **{**PLAIN, "beta": 0.0, "eta": 1.0}, layer_options=CHOICE))
    found, optimizer = run(lambda model: KFAC(model, **KFAC_PLAIN, layer_options=CHOICE))
    assert_equal(found, expected)
    assert {"K-FAC", "AdamW"} == set(paths(optimizer).values())


def test_a_model_without_the_fop_step_has_neither_factors_nor_hooks() -> None:
    model = Mixed()
    optimizer = FOP(model, layer_options={"*": ADAMW})
    train_step(model, optimizer, *tokens())
    assert set(paths(optimizer).values()) == {"AdamW"}
    assert not any("A" in state for state in optimizer.state.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_asking_for_the_fop_step_where_there_is_none() -> None:
    """Everything that has one takes it; the others still say why not."""

    class Model(Attentive):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(3, 3, batch_first=True).double()
            self.batch_norm = nn.BatchNorm1d(3).double()

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.batch_norm(self.recurrent(super().forward(ids)[:, None])[0][:, 0])
            return out

    model = Model()
    optimizer = FOP(model, layer_options={"*": FOP_PATH})
    train_step(model, optimizer, *sentences())
    adamw = {row.name: row.reason for row in optimizer.summary().rows if row.path != "FOP"}
    assert adamw.keys() == {f"recurrent.{name}" for name in dict(model.recurrent.named_parameters())}
    assert set(adamw.values()) == {"no Kronecker factors for GRU"}


@pytest.mark.parametrize("N", [2, 4, 5])
@pytest.mark.parametrize("bare", [False, True])
def test_batch_in_the_second_dimension(bare: bool, N: int) -> None:
    """Steps of a layer that sees (length, N, features) are those of one that sees (N, length, features)."""

    class Model(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.dim = nn.Linear(5, 3).double(), dim

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.movedim(0, self.dim))
            return out.movedim(self.dim, 0)

    results = []
    for dim in (0, 1):
        model = Model(dim)
        optimizer = FOP(
            model.parameters() if bare else model, **PLAIN, layer_options={"layer": {"batch_dim": dim}}
        )
        for seed in range(2):
            # As long as the batch in one case: nothing but the option can tell.
            x, _ = batch(N, seed, (4, 5))
            optimizer.zero_grad()
            half_squared_error(model(x).flatten(1), torch.ones(N, 12).double()).backward()
            optimizer.step()
        results.append(weights(model))
        assert {layer.kfac_steps for layer in optimizer.diagnostics().layers.values()} == {0}
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_batch_dimension_that_an_input_does_not_have() -> None:
    model = mlp()
    optimizer = FOP(model, layer_options={"0": {"batch_dim": 1}})
    train_step(model, optimizer, *batch())
    layers = optimizer.diagnostics().layers
    assert "batch_dim=1, but its input is (6,)" in str(layers["0"].why_kfac)
    assert layers["2"].why_kfac is None


# --- one weight, several modules ---------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two modules; the second is a layer that takes the FOP step, or one that does not."""

    def __init__(self, second: Callable[[], nn.Module], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 5, bias=bias), second(), nn.Linear(5, 3)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if isinstance(self.b, nn.EmbeddingBag):
            return self.head(hidden + self.b(x.argmax(1, keepdim=True)))  # type: ignore[no-any-return]
        return self.head(torch.tanh(self.b(hidden)))  # type: ignore[no-any-return]


def shared() -> nn.Module:
    return Tied(lambda: nn.Linear(5, 5, bias=False), bias=False)


class TiedLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Linear(7, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(ids)))))
        return out


@pytest.mark.parametrize(
    "option", [{"max_factor_dim": 2}, {"max_factor_dim": 6}, {"weight_sharing": "reduce"}]
)
@pytest.mark.parametrize("which", ["a", "b", "?"])
@pytest.mark.parametrize("build", [shared, TiedLanguage])
@pytest.mark.filterwarnings("error")
def test_options_for_one_of_the_modules_that_share_a_weight(
    build: Callable[[], nn.Module], which: str, option: dict[str, Any]
) -> None:
    """Symmetric factors of the promised shapes, which can be loaded again; the lowest limit counts."""
    model = build()
    optimizer = FOP(model, layer_options={which: option})
    for seed in range(3):
        train_step(model, optimizer, *(batch(6, seed) if build is shared else tokens(6, seed)))
    state = optimizer.state[model.a.weight]  # type: ignore[union-attr, index]
    for key in ("A", "G"):
        factor = state[key]
        assert factor.dim() == 2 or torch.equal(factor, factor.mT), key
        assert state[f"{key}_inv"].shape == factor.shape
        # An embedding alone has a diagonal in place of a dense A, tied to an output layer it has none.
        side = factor.shape[-1]
        assert (factor.dim() == 2) == (side > option.get("max_factor_dim", 8192))
    assert optimizer.diagnostics().layers.keys() == {"a" if build is shared else "b", "head"}
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_equal(snapshot(optimizer), before)


class Conv1D(nn.Module):
    """As in `transformers.pytorch_utils`: a linear layer with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("bare", [False, True])
def test_tied_weights_are_one_block_visibly(bare: bool) -> None:
    model = Tied(lambda: nn.Linear(5, 5))
    before = weights(model)
    optimizer = FOP(model.parameters() if bare else model, weight_decay=0.0, adamw_lr=1e-3)
    train_step(model, optimizer, *batch())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert (rows["a.weight"].path, rows["a.weight"].reason) == ("FOP", "Linear, shared by a, b")
    assert (rows["head.weight"].path, rows["head.weight"].reason) == ("FOP", "Linear")
    assert optimizer.diagnostics().layers.keys() == {"a", "head"}
    for name in ("a.bias", "b.bias"):
        assert (rows[name].path, rows[name].reason) == ("AdamW", "its weight is shared, with other biases")
        step = (dict(model.named_parameters())[name] - before[name]).abs()
        torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("case", ["option", "kind", "layout"])
def test_tied_weights_that_fit_no_block_take_adamw_visibly(case: str, bare: bool) -> None:
    seconds: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "option": (lambda: nn.Linear(5, 5), "shared with b.weight, which takes no FOP step"),
        "kind": (lambda: nn.EmbeddingBag(5, 5), "shared with b.weight, which takes no FOP step"),
        "layout": (lambda: Conv1D(5, 5), "shared by a, b, whose curvatures do not fit together"),
    }
    second, reason = seconds[case]
    model = Tied(second)
    before = weights(model)
    choice = {"b": {"path": "adamw"}} if case == "option" else None
    optimizer = FOP(
        model.parameters() if bare else model, weight_decay=0.0, adamw_lr=1e-3, layer_options=choice
    )
    train_step(model, optimizer, *batch())
    rows = {row.name: row for row in optimizer.summary().rows}
    assert (rows["a.weight"].path, rows["a.weight"].reason) == ("AdamW", reason)
    assert rows["head.weight"].path == "FOP"
    assert all(row.path == "FOP" or row.reason for row in rows.values())
    step = (model.a.weight - before["a.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-3), rtol=1e-4, atol=0)
    assert rows["a.bias"].path == "AdamW"


def test_weight_that_no_module_call_reaches_takes_adamw_visibly() -> None:
    model = mlp()
    optimizer = FOP(model)
    for seed in range(2):
        x, y = batch(6, seed)
        optimizer.zero_grad()
        hidden = nn.functional.linear(x, model[0].weight, model[0].bias)
        half_squared_error(model[2](hidden), y).backward()
        optimizer.step()
    assert paths(optimizer)["2.weight"] == "FOP"
    row = optimizer.summary().rows[0]
    assert (row.name, row.path) == ("0.weight", "AdamW")
