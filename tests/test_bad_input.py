"""Bad input: a clear error with the value, the allowed range and a remedy, and nothing is changed."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fop import FOP, KFAC
from models import assert_equal, batch, loss_of, mlp, snapshot, train_step, weights

NAN, INF = math.nan, math.inf


def hooks(model: nn.Module) -> int:
    """Hooks anywhere: on modules, on parameters, or for all modules of the process."""
    here = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    here += sum(
        len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters()
    )
    everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    return here + sum(len(registered) for registered in everywhere)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    before = hooks(nn.Sequential())
    yield
    nn.Identity()(0)  # the hook that waits for a first forward pass leaves with one
    if hooks(nn.Sequential()) > before:  # or its owner still hangs in a traceback
        gc.collect()
        nn.Identity()(0)
    assert hooks(nn.Sequential()) <= before


def says(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


# --- options -----------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    *[(name, value, ValueError, "[0, inf)") for name in ("lr", "damping", "weight_decay", "adamw_lr", "eps")
      for value in (-0.1, NAN, INF, -INF)],
    *[(name, value, ValueError, "[0, 1)") for name in ("stat_decay", "momentum")
      for value in (1.0, -0.1, NAN, 2)],
    ("curvature_interval", 0, ValueError, "1 or more"),
    ("curvature_interval", -5, ValueError, "1 or more"),
    ("curvature_interval", 2.5, TypeError, "1 or more"),
    ("curvature_interval", True, TypeError, "1 or more"),
    ("curvature_interval", "10", TypeError, "1 or more"),
    ("kl_clip", 0.0, ValueError, "(0, inf) or None"),
    ("kl_clip", -1e-3, ValueError, "(0, inf) or None"),
    ("kl_clip", NAN, ValueError, "(0, inf) or None"),
    ("beta", -0.1, ValueError, "[0, inf) or 'adaptive'"),
    ("beta", NAN, ValueError, "[0, inf) or 'adaptive'"),
    ("beta", "auto", TypeError, "[0, inf) or 'adaptive'"),
    ("eta", NAN, ValueError, "[0, inf) or 'adaptive'"),
    ("eta", None, TypeError, "[0, inf) or 'adaptive'"),
    ("betas", (0.9, 1.0), ValueError, "[0, 1)"),
    ("betas", (NAN, 0.9), ValueError, "[0, 1)"),
    ("betas", 0.9, TypeError, "[0, 1)"),
    ("betas", (0.9,), TypeError, "[0, 1)"),
    ("nesterov", 1, TypeError, "True or False"),
    ("maximize", "yes", TypeError, "True or False"),
    ("lr", "0.1", TypeError, "[0, inf)"),
    ("lr", None, TypeError, "[0, inf)"),
    ("lr", True, TypeError, "[0, inf)"),
    ("damping", 1j, TypeError, "[0, inf)"),
    ("lr", len, TypeError, "[0, inf)"),  # only some options may be functions
    ("loss_reduction", "max", ValueError, "'mean' or 'sum'"),
    ("loss_reduction", None, ValueError, "'mean' or 'sum'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "allowed"), OPTIONS)
def test_option_out_of_range(name: str, value: Any, error: type[Exception], allowed: str) -> None:
    model = mlp()
    for given in (model, list(model.parameters())):
        with pytest.raises(error) as caught:
            FOP(given, **{name: value})
        bad = (
            next(v for v in value if not 0 <= v < 1) if isinstance(value, tuple) and len(value) > 1 else value
        )
        says(caught, f"{name}=", repr(value) if error is TypeError else str(bad), allowed)
    with pytest.raises(error) as caught:
        FOP([{"params": model[0].parameters()}, {"params": model[2].parameters(), name: value}])
    says(caught, f"{name}=")
    assert hooks(model) == 0
    FOP(model)


def test_option_out_of_range_in_a_group_added_later() -> None:
    model, extra = mlp(), nn.Linear(2, 2)
    optimizer = FOP(model)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"damping=-1"):
        optimizer.add_param_group({"params": extra.parameters(), "damping": -1})
    assert_equal(snapshot(optimizer), before)
    optimizer.add_param_group({"params": extra.parameters()})


@pytest.mark.parametrize("lr", [torch.tensor(0.1), nn.Parameter(torch.tensor(0.1))])
def test_tensor_lr(lr: Tensor) -> None:
    with pytest.raises(TypeError) as caught:
        FOP(mlp(), lr=lr)  # type: ignore[arg-type]
    says(caught, "lr=", "[0, inf)", "float(lr)")


def test_nesterov_without_momentum() -> None:
    with pytest.raises(ValueError) as caught:
        FOP(mlp(), momentum=0.0, nesterov=True)
    says(caught, "nesterov=True", "momentum > 0", "momentum=0")


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_unknown_keyword(library: type[FOP]) -> None:
    with pytest.raises(TypeError, match="dampening"):
        library(mlp(), 0.1, dampening=0.5)
    with pytest.raises(TypeError):
        library(mlp(), 0.1, 0.9)  # type: ignore[misc]  # options by name only


@pytest.mark.parametrize("name", ["beta", "eta"])
def test_kfac_takes_no_mixing(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        KFAC(mlp(), **{name: 0.5})
    says(caught, name, "Use FOP")


def test_numbers_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    model = mlp()
    options = {"lr": np.float64(0.1), "damping": np.float32(0.1), "curvature_interval": np.int64(3)}
    optimizer = FOP([{"params": model.parameters(), "lr": np.float32(0.2)}], **options)
    train_step(model, optimizer, *batch())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)  # refuses whatever is not a plain number


# --- parameters --------------------------------------------------------------------------------------------


def exhausted() -> Any:
    params = mlp().parameters()
    list(params)
    return params


def shared_between_groups() -> Any:
    model = mlp()
    return [{"params": model.parameters()}, {"params": model[2].parameters()}]


def twice() -> Any:
    model = mlp()
    return [*model.parameters(), model[0].weight]


def not_a_leaf() -> Any:
    return [mlp()[0].weight * 2]


def sparse() -> Any:
    return [torch.eye(3).to_sparse().requires_grad_()]


class Holder(nn.Module):
    """A module with a parameter of any dtype."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.fine = nn.Linear(2, 2)
        self.odd = nn.Parameter(parameter, requires_grad=parameter.dtype.is_complex)


PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "empty": (list, ValueError, ("empty", "model.parameters()")),
    "no-parameters": (nn.ReLU, ValueError, ("ReLU", "no parameters")),
    "exhausted": (exhausted, ValueError, ("empty", "only once")),
    "exhausted-group": (lambda: [{"params": exhausted()}], ValueError, ("empty", "only once")),
    "some-names": (
        lambda: [*mlp().named_parameters(), nn.Parameter(torch.zeros(2))],
        ValueError,
        ("names for some", "to all or to none"),
    ),
    "twice": (twice, ValueError, ("(6, 5)", "2 times", "give each parameter once")),
    "two-groups": (shared_between_groups, ValueError, ("(3, 6)", "more than one parameter group", "once")),
    "complex": (lambda: [torch.zeros(2, dtype=torch.cfloat)], TypeError, ("complex64", "real floating")),
    "complex-module": (lambda: Holder(torch.zeros(2, dtype=torch.cfloat)), TypeError, ("odd", "complex64")),
    "integer": (lambda: [torch.zeros(2, dtype=torch.int64)], TypeError, ("int64", "real floating point")),
    "integer-module": (lambda: Holder(torch.zeros(2, dtype=torch.int8)), TypeError, ("odd", "int8")),
    "boolean": (lambda: [torch.zeros(2, dtype=torch.bool)], TypeError, ("bool", "real floating point")),
    "not-a-leaf": (not_a_leaf, ValueError, ("(6, 5)", "leaf", "computed from")),
    "sparse": (sparse, ValueError, ("sparse", "dense")),
    "tensor": (lambda: mlp()[0].weight, TypeError, ("single tensor", "[param]")),
    "strings": (lambda: ["weight"], TypeError, ("tensors", "str")),
    "group-without-params": (lambda: [{"lr": 0.1}], TypeError, ("'params'",)),
    "mixed": (lambda: [{"params": mlp().parameters()}, mlp()[0].weight], TypeError, ("'params'",)),
    "lazy": (lambda: nn.LazyLinear(3), ValueError, ("weight", "uninitialised", "run the lazy module once")),
    "sparse-embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)),
        ValueError,
        ("sparse=True", "sparse=False", "SparseAdam"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_that_cannot_be_trained(case: str) -> None:
    make, error, parts = PARAMS[case]
    given = make()
    installed = hooks(given) if isinstance(given, nn.Module) else 0  # a lazy module has its own
    other_model = mlp()
    other = FOP(other_model)
    with pytest.raises(error) as caught:
        FOP(given)
    says(caught, *parts)
    if isinstance(given, nn.Module):
        assert hooks(given) == installed
    train_step(other_model, other, *batch())


@pytest.mark.parametrize("case", ["complex", "integer", "boolean"])
def test_dtype_errors_name_a_way_out(case: str) -> None:
    with pytest.raises(TypeError, match=r"(?i)view_as_real|buffer|leave|without|exclude|other optimizer"):
        FOP(PARAMS[case][0]())


def test_unordered_parameters() -> None:
    """A set has another order in every process, and a checkpoint would land on other parameters."""
    with pytest.raises(TypeError, match=r"set|order"):
        FOP(set(mlp().parameters()))


# Lists of groups are no group; owners of an added group are looked for at the next forward pass.
NO_GROUPS = (
    "exhausted-group",
    "two-groups",
    "mixed",
    "group-without-params",
    "sparse-embedding",
)


# Unlike a whole optimizer, a group may be empty, as with torch.optim.
EMPTY_GROUPS = ("empty", "no-parameters")


@pytest.mark.parametrize("case", [case for case in PARAMS if case not in NO_GROUPS + EMPTY_GROUPS])
def test_bad_group_added_later_changes_nothing(case: str) -> None:
    make, error, _ = PARAMS[case]
    given = make()
    model = mlp()
    optimizer = FOP(model)
    if case == "tensor":
        given = model[0].weight  # one tensor is a fine group, but this one is in a group already
        error = ValueError
    before, installed = snapshot(optimizer), hooks(model)
    rows = optimizer.summary().rows
    with pytest.raises(error):
        optimizer.add_param_group({"params": given})
    assert_equal(snapshot(optimizer), before)
    assert hooks(model) == installed
    assert optimizer.summary().rows == rows
    train_step(model, optimizer, *batch())


@pytest.mark.parametrize("case", EMPTY_GROUPS)
def test_empty_group_changes_no_step(case: str) -> None:
    """A list of parameters that were filtered out; no step and no report minds it."""
    model, plain = mlp(), mlp()
    optimizer, other = FOP([{"params": []}, {"params": model.parameters()}]), FOP(plain)
    optimizer.add_param_group({"params": PARAMS[case][0]()})
    for seed in range(3):
        train_step(model, optimizer, *batch(6, seed))
        train_step(plain, other, *batch(6, seed))
    assert_equal(weights(model), weights(plain))
    assert len(optimizer.summary().rows) == 4


def test_sparse_gradients_at_run_time() -> None:
    """From bare parameters the module is not known; nothing may have moved when the error comes."""
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = FOP(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="sparse=False"):
        for _ in range(2):  # the first forward pass may say it, or else the step
            model(torch.tensor([1, 2, 3])).square().sum().backward()
            optimizer.step()
    assert_equal(weights(model), before)


def test_sparse_gradient_given_by_hand() -> None:
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    before, state = weights(model), snapshot(optimizer)
    loss_of(model, *batch()).backward()
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(ValueError, match=r"2\.weight.*sparse"):
        optimizer.step()
    assert_equal(weights(model), before)
    assert_equal(snapshot(optimizer)["state"], state["state"])


# --- one optimizer for a parameter -------------------------------------------------------------------------


@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("first_bare", [False, True])
@pytest.mark.parametrize("second", ["module", "bare", "part", "group"])
def test_driven_by_another_live_optimizer(second: str, first_bare: bool, library: type[FOP]) -> None:
    model, clean = mlp(), mlp()
    optimizer = FOP(model.parameters() if first_bare else model)
    expected = FOP(clean)
    installed = hooks(model)
    given = {
        "module": model,
        "bare": list(model.parameters()),
        "part": [model[2].weight],
        "group": [{"params": [*nn.Linear(2, 2).parameters()]}, {"params": [*model[2].parameters()]}],
    }[second]
    with pytest.raises(ValueError) as caught:
        library(given)
    says(caught, "another live", "del optimizer")
    del caught
    assert hooks(model) == installed
    for seed in range(3):  # the first one still works, and as if nothing had been
        train_step(model, optimizer, *batch(6, seed))
        train_step(clean, expected, *batch(6, seed))
    assert_equal(weights(model), weights(clean))
    del optimizer
    other = library(given)
    train_step(model, other, *batch())
    if second != "part":
        assert not torch.equal(model[2].weight, clean[2].weight)


def test_group_of_another_live_optimizer() -> None:
    model, extra = mlp(), mlp()
    first, second = FOP(model), FOP(extra)
    before = snapshot(second)
    with pytest.raises(ValueError, match="another live"):
        second.add_param_group({"params": model[0].parameters()})
    assert_equal(snapshot(second), before)
    del first
    second.add_param_group({"params": model[0].parameters()})


def test_failed_constructor_leaves_its_parameters_free() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    with pytest.raises(ValueError, match="sparse") as caught:
        FOP(model)
    optimizer = FOP(model[0])  # while the failed one may still hang in the traceback
    assert str(caught.value)
    assert optimizer.summary().rows[0].path == "FOP"


def test_disjoint_parts_of_one_model_are_fine() -> None:
    model = mlp()
    first, second = FOP(model[0].parameters()), KFAC(model[2].parameters())
    before = weights(model)
    loss_of(model, *batch()).backward()
    first.step()
    assert torch.equal(model[2].weight, before["2.weight"])
    second.step()
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert {row.path for row in first.summary().rows} == {"FOP"}
    assert {row.path for row in second.summary().rows} == {"K-FAC"}
