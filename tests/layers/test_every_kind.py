"""Every kind of layer against the oracle: factors and whole steps; and the oracle against plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from fop import FOP
from models import PLAIN
from reference import (
    Block,
    Case,
    Tape,
    check_rows,
    check_steps,
    dense_fisher,
    double,
    estimate,
    full,
    half_squared_error,
    observe,
    vec,
)
from reference.cases import (
    AFFINE,
    ATTENTION,
    BLOCKS,
    CONV2D,
    CONVOLUTIONS,
    DIAGONAL,
    EMBEDDINGS,
    LINEAR,
    REDUCE,
    SHARED,
    TRANSFORMERS,
    TRANSPOSED,
    Conv1D,
    single,
)

# Each case is a kind of its own.
pytestmark = pytest.mark.whole


def joined(*tables: Mapping[str, Case]) -> dict[str, Case]:
    cases = {name: case for table in tables for name, case in table.items()}
    assert len(cases) == sum(map(len, tables)), "two cases have one name"
    return cases


LAYERS = joined(CONVOLUTIONS, CONV2D, TRANSPOSED, LINEAR, EMBEDDINGS, SHARED, ATTENTION, TRANSFORMERS, AFFINE)
TABLES = {"reduce": REDUCE, "diagonal": DIAGONAL, "blocks": BLOCKS}
OPTIONS = {f"{key}-{name}": case for key, table in TABLES.items() for name, case in table.items()}
# One of each kind, for what need not be asked of every geometry.
SOME = [
    "conv1d-geometry",
    "conv3d-groups",
    "transposed2d-groups",
    "transformers-conv1d-deep",
    "embedding-padding",
    "repeated",
    "twins-different-biases",
    "tied-padding",
    "cross",
    "separate",
    "encoder",
    "layer-norm-sequence",
    "conv-net-train",
]
# K-FAC, and losses that are sums, are columns of tests/compatibility.py.
VARIANTS: dict[str, dict[str, Any]] = {
    # Looser than ε(float32): a step is a small difference of rounded weights.
    "float32": {"dtype": torch.float32, "tolerance": 1e-4},
    # β* and η* are one number for a block, all of its groups together.
    "adaptive": {"plain": {**PLAIN, "beta": "adaptive", "eta": "adaptive"}},
    "relative": {"plain": {**PLAIN, "damping_kind": "relative"}},
}


# Damped by the curvature itself, as far as the weight is long; the paper's way is in `PLAIN`.
BY_WEIGHT: dict[str, Any] = {**PLAIN, "step_length": "weight", "damping_kind": "relative", "anneal": False}


# The loss does not change when all keys shift: the summed rows are rounding, and so is F̂ without damping in
# absolute numbers (docs/architecture.md, known limits).
ROUNDING = {"reduce-attention", "reduce-encoder"}


@pytest.mark.parametrize("name", joined(LAYERS, OPTIONS))
def test_curvature_and_steps(name: str) -> None:
    check_steps(joined(LAYERS, OPTIONS)[name], FOP, PLAIN)


@pytest.mark.parametrize("name", sorted(joined(LAYERS, OPTIONS).keys() - ROUNDING))
def test_curvature_and_steps_as_long_as_the_weight(name: str) -> None:
    check_steps(joined(LAYERS, OPTIONS)[name], FOP, BY_WEIGHT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SOME)
def test_variants(name: str, variant: str) -> None:
    check_steps(LAYERS[name], FOP, **{"plain": PLAIN, **VARIANTS[variant]})


@pytest.mark.parametrize("name", [name for name in (*LINEAR, *ATTENTION, *TRANSFORMERS) if name != "windows"])
def test_batches_as_large_as_other_dimensions(name: str) -> None:
    """Sequences of these models have 2, 3 or 4 positions: the samples are still told from them."""
    check_steps(LAYERS[name], FOP, PLAIN, sizes=(2, 3, 4))


def test_windows_of_as_many_tokens_as_samples() -> None:
    """(4, 2, d) for 2 samples are two windows for each, or 4 tokens with the samples in dim 1.

    The layer may not guess: a split by token would pass for a gradient pair.
    """
    model, ((x,), y) = LINEAR["windows"].model(), LINEAR["windows"].batch(2)
    optimizer = FOP(model, **PLAIN)
    half_squared_error(model(x), y).backward()
    optimizer.step()
    assert all("batch_dim" in str(layer.why_kfac) for layer in optimizer.diagnostics().layers.values())


ADAMW: dict[str, set[str]] = {
    "twins-different-biases": {"left.bias", "right.bias"},
    "tied-bias": {"head.bias"},
    "separate": {"attention.in_proj_bias"},
    "self-bias-kv": {"attention.bias_k", "attention.bias_v"},
    "encoder": {f"layer.{norm}.{key}" for norm in ("norm1", "norm2") for key in ("weight", "bias")},
    "norm-by-name": {"4.weight"},
    "shared-bias": {"left.bias"},
    "conv-net-adamw": {f"{norm}.{key}" for norm in (1, 5) for key in ("weight", "bias")},
}


@pytest.mark.parametrize("name", ADAMW)
def test_parameters_without_a_block_step_exactly_as_adamw(name: str) -> None:
    """What the oracle leaves out of the blocks, and so could not miss."""
    case, names = LAYERS[name], ADAMW[name]
    model = case.model()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **{**PLAIN, **case.options, "adamw_lr": 0.1, "weight_decay": 0.1})
    new, expected = dict(model.named_parameters()), dict(twin.named_parameters())
    adamw = torch.optim.AdamW([expected[key] for key in names], lr=0.1, weight_decay=0.1)
    start = {key: expected[key].detach().clone() for key in names}
    for step in range(2):
        inputs, y = case.batch(4, seed=step)
        twin.load_state_dict({**model.state_dict(), **{key: expected[key].detach() for key in names}})
        for either, stepper in ((model, optimizer), (twin, adamw)):
            stepper.zero_grad()
            half_squared_error(either(*inputs), y).backward()
            stepper.step()
    rows = {row.name: row for row in optimizer.summary().rows}
    assert {key for key, row in rows.items() if row.path == "AdamW"} == names
    assert all(rows[key].reason for key in names)
    for key in names:
        torch.testing.assert_close(new[key], expected[key])
        assert not torch.equal(new[key], start[key])


def test_the_conv1d_of_transformers() -> None:
    real = pytest.importorskip("transformers.pytorch_utils").Conv1D
    ours, theirs = Conv1D(3, 4), real(3, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    check_steps(single(lambda: real(3, 4), 2, 4), FOP, PLAIN)


# --- the oracle against what is below it -------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_rows_reproduce_autograd(name: str) -> None:
    check_rows(LAYERS[name])


@pytest.mark.parametrize("name", [*ATTENTION, *TRANSFORMERS])
def test_the_dense_attention_is_torchs(name: str) -> None:
    """Outputs and all gradients, those of inputs, bias_k and bias_v included."""
    model, (inputs, y) = LAYERS[name].model(), LAYERS[name].batch(4)
    inputs = tuple(t.requires_grad_() for t in inputs)
    twin = copy.deepcopy(model)
    tape = Tape(twin)
    out, dense = model(*inputs), twin(*inputs)
    assert len(tape.entries) >= 2
    torch.testing.assert_close(dense, out)
    ours = torch.autograd.grad((dense * y).sum(), [*inputs, *twin.parameters()])
    theirs = torch.autograd.grad((out * y).sum(), [*inputs, *model.parameters()])
    torch.testing.assert_close(ours, theirs)


def blocks_of(case: Case, N: int, *, whole: bool = False) -> dict[str, Block]:
    model = case.model()
    inputs, y = case.batch(N)
    return observe(model, Tape(model), inputs, y, half_squared_error, whole=whole)


@pytest.mark.parametrize(
    "name", ["layer-norm-sequence", "group-norm-image", "conv-net-eval", "norm-called-twice"]
)
def test_a_whole_batch_gives_what_single_samples_give(name: str) -> None:
    """`whole`, needed where samples depend on each other, is checked where they do not."""
    one_by_one, whole = (blocks_of(LAYERS[name], 4, whole=whole) for whole in (False, True))
    assert one_by_one.keys() == whole.keys()
    for key, block in one_by_one.items():
        for n in range(4):
            torch.testing.assert_close(block.sample_gradient(n), whole[key].sample_gradient(n))


class Repeat(nn.Module):
    """(N, d) to (N, 3, d)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, 3, -1)


ONE_ROW: dict[str, tuple[Case, dict[str, Any]]] = {
    "linear": (single(lambda: nn.Linear(3, 2), 3), {}),
    "linear-no-bias": (single(lambda: nn.Linear(3, 2, bias=False), 3), {}),
    "transformers-conv1d": (single(lambda: Conv1D(3, 4), 4), {}),
    "conv1d": (single(lambda: nn.Conv1d(2, 3, 4), 2, 4), {}),
    "transposed": (single(lambda: nn.ConvTranspose2d(2, 3, 1), 2, 1, 1), {}),
    "embedding": (EMBEDDINGS["embedding"], {}),
    # Rows that are alike: with the gradients summed, they are one.
    "reduce": (Case(lambda: nn.Sequential(Repeat(), nn.Linear(4, 3)), double(4), {"1.weight"}),
               {"reduce": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_sample_with_one_row_is_the_empirical_fisher(name: str) -> None:
    """A ⊗ G = vec(g) vec(g)ᵀ exactly."""
    case, options = ONE_ROW[name]
    (block,) = blocks_of(case, 1).values()
    held, g = estimate(block, **options), vec(block.sample_gradient(0))
    torch.testing.assert_close(dense_fisher(full(held["A"]), full(held["G"])), torch.outer(g, g))


def test_the_diagonal_fisher_is_that_of_the_samples() -> None:
    """The mean of squares, not the square of the mean."""
    (block,) = blocks_of(LAYERS["layer-norm-sequence"], 3).values()
    gradients = torch.stack([block.sample_gradient(n) for n in range(3)])
    full_fisher = torch.stack([torch.outer(vec(g), vec(g)) for g in gradients]).mean(0)
    torch.testing.assert_close(vec(estimate(block)["A"]), full_fisher.diagonal())


@pytest.mark.parametrize("name", ["tied", "tied-bias", "tied-padding"])
def test_a_tied_block_has_the_trace_of_its_two_terms(name: str) -> None:
    """And each term's share of it in either factor."""
    block = blocks_of(LAYERS[name], 4)["embed.weight"]
    parts = [Block(block.weight, None, [[use] for use in uses]) for uses in zip(*block.samples, strict=True)]
    assert [type(part.kind).__name__ for part in parts] == ["Lookup", "Kind"]
    lookup, head = ({key: full(value)[0] for key, value in estimate(part).items()} for part in parts)
    A, G = (estimate(block)[key][0] for key in "AG")
    whole = sum(t["A"].trace() * t["G"].trace() for t in (lookup, head))
    assert float(A.trace() * G.trace()) == pytest.approx(float(whole), rel=1e-12)
    assert float(A.trace()) == pytest.approx(float(G.trace()), rel=1e-12)
    # Between the two terms' directions, and of neither alone.
    for value, one, other in ((A, head["A"], lookup["G"]), (G, head["G"], lookup["A"])):
        mixed = torch.stack([one.flatten(), other.flatten()])
        weights = torch.linalg.lstsq(mixed.T, value.flatten()[:, None]).solution
        assert (weights > 0).all()
        torch.testing.assert_close((mixed.T @ weights).reshape(value.shape), value)
