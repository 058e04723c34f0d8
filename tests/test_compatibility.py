"""Every kind of layer in every situation: the cells of the table in `docs/compatibility.md`.

Each test checks what its column means, and that the layer took the step that the table says.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compatibility import (
    ADAMW,
    DOC,
    FEATURES,
    KFAC_STEP,
    LAYERS,
    NO_EFFECT,
    PAIR,
    Batch,
    Cell,
    adamw_of,
    options_of,
    table,
    written,
)
from fop import FOP, KFAC
from models import PLAIN, assert_differs, assert_equal, snapshot, weights
from reference import Case, check_steps, half_squared_error, joined, split
from reference.cases.options import diagonal, reduced
from versions import one_graph

Optimizer = torch.optim.Optimizer
pytestmark = pytest.mark.core


@pytest.fixture(params=LAYERS)
def cell(request: pytest.FixtureRequest) -> Cell:
    return Cell(request.param, request.function.__name__.removeprefix("test_"))


# --- helpers -----------------------------------------------------------------------------------------------


def loss_of(forward: Callable[..., Any], batch: Batch) -> Tensor:
    inputs, y = batch
    return half_squared_error(forward(*inputs), y)


def train(forward: Callable[..., Any], optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(forward, batch).backward()
        optimizer.step()


def trained(cell: Cell, batches: Iterable[Batch], **options: Any) -> nn.Module:
    """A model after plain steps."""
    model = cell.case.model()
    train(model, cell.optimizer(model, **options), batches)
    return model


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    inputs, y = batch
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs), y.to(dtype)


def moved(model: nn.Module, start: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Tensor:
    """The way that these parameters, or all, have gone since ``start``."""
    now = weights(model)
    way = torch.cat([(now[name] - start[name]).flatten() for name in names or start]).double()
    assert way.isfinite().all() and way.norm() > 0
    return way


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Up to the order of sums."""
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-9, atol=1e-11)


def assert_took(cell: Cell, model: nn.Module, optimizer: FOP) -> None:
    """The weights took the declared step in every step, as the optimizer itself reports it."""
    rows = {row.name: row for row in optimizer.summary().rows}
    assert rows.keys() == dict(model.named_parameters()).keys()
    layers = optimizer.diagnostics().layers
    paths = {name: row.path for name, row in rows.items()}
    assert all(row.reason for row in rows.values())
    taken = {PAIR: "FOP", KFAC_STEP: "K-FAC", ADAMW: "AdamW"}[cell.mark]
    assert {paths[name] for name in cell.case.blocks or rows} == {taken}
    assert len(layers) == (0 if taken == "AdamW" else len(cell.case.blocks))
    assert {(d.kfac_steps, d.why_kfac) for d in layers.values()} <= {(0, None)}
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))


def check_equations(cell: Cell, case: Case, make: type[FOP] = FOP, **options: Any) -> None:
    """Steps of ``case`` against the dense oracle, or against torch's AdamW where that is the step."""
    if cell.mark == ADAMW:
        model, expected = case.model(), case.model()
        optimizer, theirs = cell.optimizer(model, make, **options), adamw_of(expected)
        for inputs, y in cell.batches():
            for net, each in ((model, optimizer), (expected, theirs)):
                each.zero_grad()
                loss = loss_of(net, (inputs, y))
                (loss * len(y) if options.get("loss_reduction") == "sum" else loss).backward()
                each.step()
        assert_same(model, expected)
        assert_took(cell, model, optimizer)
        return
    made: list[tuple[nn.Module, FOP]] = []

    def make_and_keep(model: nn.Module, **given: Any) -> FOP:
        made.append((model, make(model, **given)))
        return made[0][1]

    case = replace(case, options={**case.options, **options})
    check_steps(case, make_and_keep, options_of(make, PLAIN), sizes=(4, 5))
    assert_took(cell, *made[0])


def check_no_effect(cell: Cell, **options: Any) -> None:
    """Bit for bit the steps without the option."""
    every = cell.batches()
    assert_equal(weights(trained(cell, every, layer_options={"*": options})), weights(trained(cell, every)))


# --- the step ----------------------------------------------------------------------------------------------


def test_pair(cell: Cell) -> None:
    check_equations(cell, cell.case)


def test_kfac(cell: Cell) -> None:
    check_equations(cell, cell.case, KFAC)


def test_sum(cell: Cell) -> None:
    check_equations(cell, cell.case, loss_reduction="sum")


def test_reduce(cell: Cell) -> None:
    if cell.mark == NO_EFFECT:
        check_no_effect(cell, weight_sharing="reduce")
    elif "tied" in cell.layer:
        options = ({"*": {"weight_sharing": "reduce"}}, {nn.Linear: {"weight_sharing": "reduce"}}, {})
        every, linear, none = (weights(trained(cell, cell.batches(), layer_options=o)) for o in options)
        assert_equal(every, linear)
        assert_differs(linear, none)
    else:
        check_equations(cell, reduced(cell.case))


def test_max_factor_dim(cell: Cell) -> None:
    if cell.mark == NO_EFFECT:
        check_no_effect(cell, max_factor_dim=2)
    else:
        check_equations(cell, diagonal(cell.case, 2))


# --- precision ---------------------------------------------------------------------------------------------


@cache
def has_lstm(dtype: torch.dtype) -> bool:
    """Whether torch has an LSTM of this dtype here: no CPU has one of float16, and some none of bfloat16."""
    try:
        with torch.autocast("cpu", dtype):
            nn.LSTM(3, 2)(torch.randn(4, 6, 3))
    except RuntimeError:
        return False
    return True


def check_precision(cell: Cell, dtype: torch.dtype, scale: float | None, tolerance: float) -> None:
    every = [cast(batch, torch.float32) for batch in cell.batches()]
    model, exact = cell.case.model().float(), cell.case.model().float()
    start = weights(model)
    train(exact, cell.optimizer(exact), every)
    optimizer = cell.optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for factor, batch in ((1.0, every[0]), (torch.inf, every[1]), (1.0, every[1])):
        if factor != 1.0 and scale is None:
            continue
        before = snapshot(optimizer), weights(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=cell.layer != "LSTM" or has_lstm(dtype)):
            loss = loss_of(model, batch)
        (factor * scaler.scale(loss)).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != 1.0:
            assert_equal((snapshot(optimizer), weights(model)), before)
    way = moved(exact, start)
    assert (moved(model, start) - way).norm() < tolerance * way.norm()
    assert {v.dtype for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)} <= {
        torch.float32, torch.bool,
    }  # fmt: skip
    assert_took(cell, model, optimizer)


def test_bf16(cell: Cell) -> None:
    check_precision(cell, torch.bfloat16, None, 0.03)


def test_fp16(cell: Cell) -> None:
    check_precision(cell, torch.float16, 2.0**10, 0.01)


def test_float64(cell: Cell) -> None:
    first, *rest = cell.batches(3)
    model = cell.case.model().float()
    optimizer = cell.optimizer(model)
    train(model, optimizer, [cast(first, torch.float32)])
    expected = copy.deepcopy(model).double()
    theirs = cell.optimizer(expected)
    theirs.load_state_dict(snapshot(optimizer))
    model.to(torch.float64)
    train(model, optimizer, rest)
    train(expected, theirs, rest)
    assert_equal(weights(model), weights(expected))
    assert_equal(snapshot(optimizer), snapshot(theirs))
    assert_took(cell, model, optimizer)


# --- between backward() and step() -------------------------------------------------------------------------


def clipped_step(model: nn.Module, optimizer: Optimizer, batch: Batch, bound: float) -> float:
    """One step; returns the norm of the gradients before clipping."""
    loss_of(model, batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), bound)
    optimizer.step()
    return float(norm)


def test_clip(cell: Cell) -> None:
    (batch,) = cell.batches(1)
    model, twin, start = cell.case.model(), cell.case.model(), weights(cell.case.model())
    optimizer = cell.optimizer(model, weight_decay=0.0)
    norm = clipped_step(model, optimizer, batch, 0.01)
    assert norm > 0.02
    if cell.mark == ADAMW:
        clipped_step(twin, adamw_of(twin, weight_decay=0.0), batch, 0.01)
        factor = 1.0
    else:
        clipped_step(twin, cell.optimizer(twin, weight_decay=0.0), batch, torch.inf)
        factor = 0.01 / (norm + 1e-6)
    # Not the bias that takes AdamW beside three separate projections.
    names = {row.name for row in optimizer.summary().rows if row.path == "FOP" or cell.mark == ADAMW}
    expected = factor * moved(twin, start, names)
    torch.testing.assert_close(moved(model, start, names), expected, rtol=1e-7, atol=1e-12)
    assert_took(cell, model, optimizer)


def test_accumulate(cell: Cell) -> None:
    first, second = cell.batches()
    if cell.case.whole:
        # Equal inputs have the statistics of either batch.
        second = (first[0], second[1])
    parts = split(len(first[1]))

    def both_of(left: Tensor, right: Tensor) -> Tensor:
        return joined(*(torch.cat([left[part], right[part]]) for part in parts))

    both = tuple(map(both_of, first[0], second[0])), both_of(first[1], second[1])
    expected, model = trained(cell, [both]), cell.case.model()
    optimizer = cell.optimizer(model)
    for batch in (first, second):
        (loss_of(model, batch) / 2).backward()
    optimizer.step()
    assert_same(model, expected)
    assert_took(cell, model, optimizer)


def test_sub_batch(cell: Cell) -> None:
    inputs, y = cell.batches(1)[0]
    if cell.case.whole:
        inputs = tuple(joined(x[:2], x[:2]) for x in inputs)
    expected, model = trained(cell, [(inputs, y)]), cell.case.model()
    optimizer = cell.optimizer(model)
    for i, part in enumerate(split(len(y))):
        with optimizer.sub_batch(i):
            (loss_of(model, (tuple(x[part] for x in inputs), y[part])) / 2).backward()
    optimizer.step()
    assert_same(model, expected)
    assert_took(cell, model, optimizer)


# --- the life of a model -----------------------------------------------------------------------------------


def test_resume(cell: Cell) -> None:
    every = cell.batches(3)
    expected = trained(cell, every)
    model = cell.case.model()
    optimizer = cell.optimizer(model)
    train(model, optimizer, every[:2])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = cell.case.model()
    model.load_state_dict(saved["model"])
    optimizer = cell.optimizer(model)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, every[2:])
    assert_equal(weights(model), weights(expected))
    assert_took(cell, model, optimizer)


def test_deepcopy(cell: Cell) -> None:
    every = cell.batches(3)
    expected = trained(cell, every)
    model = cell.case.model()
    optimizer = cell.optimizer(model)
    train(model, optimizer, every[:1])
    twin = copy.deepcopy(model)
    others = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in every[1:]:
        optimizer.zero_grad()
        train(twin, others, every[:1])
        loss = loss_of(model, batch)
        train(twin, others, every[:1])
        loss.backward()
        train(twin, others, every[:1])
        optimizer.step()
    assert_equal(weights(model), weights(expected))
    assert_took(cell, model, optimizer)


def test_freeze(cell: Cell) -> None:
    first, frozen, last = cell.batches(3)
    expected = trained(cell, [first, last])
    model = cell.case.model()
    optimizer = cell.optimizer(model)
    train(model, optimizer, [first])
    before = weights(model)
    for param in model.parameters():
        param.requires_grad_(False)
    optimizer.zero_grad()
    # Something else is trained on.
    (loss_of(model, frozen) + torch.zeros((), requires_grad=True)).backward()
    optimizer.step()
    assert_equal(weights(model), before)
    for param in model.parameters():
        param.requires_grad_(True)
    train(model, optimizer, [last])
    assert_equal(weights(model), weights(expected))
    assert_took(cell, model, optimizer)


# --- how the forward pass runs -----------------------------------------------------------------------------


QUICK_TO_COMPILE = {
    "Conv2d-grouped",
    "Linear-shared-weight",
    "Embedding-tied-Linear",
    "RMSNorm-fop",
    "LayerNorm",
}


@pytest.mark.parametrize(
    "cell",
    [pytest.param(name, marks=() if name in QUICK_TO_COMPILE else pytest.mark.slow) for name in LAYERS],
    indirect=True,
)
@one_graph
def test_compile(cell: Cell) -> None:
    torch.compiler.reset()
    every = cell.batches()
    left = {"layer_options": {"*": {"path": "adamw"}}} if cell.mark == ADAMW else {}
    expected, model = trained(cell, every, **left), cell.case.model()
    optimizer = cell.optimizer(model)
    train(torch.compile(model, backend="aot_eager", fullgraph=cell.layer != "LSTM"), optimizer, every)
    assert_same(model, expected)
    assert_took(cell, model, optimizer)


def test_recompute(cell: Cell) -> None:
    every = cell.batches()
    expected, model = trained(cell, every), cell.case.model()
    optimizer = cell.optimizer(model)
    train(partial(checkpoint, model, use_reentrant=False), optimizer, every)
    assert_equal(weights(model), weights(expected))
    assert_took(cell, model, optimizer)


# --- the document ------------------------------------------------------------------------------------------


def test_every_cell_has_a_test() -> None:
    tests = {
        name
        for name, test in globals().copy().items()
        if "cell" in getattr(test, "__annotations__", {}) and name.startswith("test_")
    }
    assert tests == {f"test_{name}" for name in FEATURES}


def test_table_is_what_is_declared() -> None:
    assert written() == table(), "run: python tests/compatibility.py"


def test_every_file_named_exists() -> None:
    root = DOC.parents[1]
    files = re.findall(r"(?:tests|docs)/[\w*/.]*\w", DOC.read_text())
    assert len(files) > 15
    assert [name for name in files if not any(root.glob(name))] == []


def test_tests_that_the_document_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", DOC.read_text())
    assert len(named) > 40
    for path, function in named:
        source = (DOC.parents[1] / path).read_text()
        assert not function or f"def {function}(" in source, (path, function)
