"""Layers with one huge side, huge vocabularies and huge batches: what is kept and made stays bounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fop import FOP
from models import PLAIN, batch, check_step, half_squared_error, halves, loss_of, mlp, train_step, weights
from reference import full

CLASSES, FEATURES, WIDTH = 50_000, 64, 16_384


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives memory of its own."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = (
            t.untyped_storage().nbytes() // t.element_size()
            for t in tree_leaves(out)
            if isinstance(t, Tensor)
        )
        self.elements = max(self.elements, *sizes, 0)
        return out


# --- large sides -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Token numbers in, scores of all tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 16, padding_idx=0)
        self.linear = nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.linear(self.embed(ids))).mean(1))
        return out


class Untied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 16)
        self.out = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(ids).mean(1))
        return out


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(8, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 8))


def vectors(dim: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, dim)


def ids() -> Tensor:
    return torch.randint(0, CLASSES, (6, 5))


HUGE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, str]]] = {
    "head": (head, vectors(8), {"0": "(A 9², G 64²)", "2": "(A 65², G 50000)"}),
    "wide": (wide, vectors(16), {"0": "(A 17², G 16384)", "2": "(A 16385, G 8²)"}),
    "tied": (Tied, ids, {"embed": "(A 16², G 50000)", "linear": "(A 17², G 16²)"}),
    "untied": (Untied, ids, {"embed": "(A 50000, G 16²)", "out": "(A 17², G 10²)"}),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_layers_train_in_the_memory_of_their_weights(case: str) -> None:
    """Momentum is as large as the weight; factors and inverses of the large sides are vectors."""
    build, inputs, factors = HUGE[case]
    torch.manual_seed(0)
    model = build()
    optimizer = FOP(model)
    x = inputs()
    y = torch.randint(0, 8, (6,))
    losses = []
    with Largest() as largest:
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert {name: d.kfac_steps for name, d in optimizer.diagnostics().layers.items() if d.kfac_steps} == {}
    rows = {row.name: row for row in optimizer.summary().rows}
    assert {name: rows[f"{name}.weight"].factors for name in factors} == factors
    held = sum(row.bytes for row in rows.values())
    assert held == sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor)
    )
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    assert params <= held < 1.3 * params
    # Gradient and scores are as large as the weight; nothing is larger than it, with its bias.
    assert largest.elements <= max(p.numel() + max(p.shape) for p in model.parameters())


def test_the_default_cap() -> None:
    """A side counts without the column of the bias."""
    model = nn.Sequential(nn.Linear(8192, 1), nn.Linear(1, 8193), nn.Linear(8193, 2), nn.Linear(2, 512))
    rows = {row.name: row.factors for row in FOP(model).summary().rows if row.factors}
    assert rows == {
        "0.weight": "(A 16×513², G 1²)",
        "1.weight": "(A 2², G 8193)",
        "2.weight": "(A 8194, G 2²)",
        "3.weight": "(A 3², G 512²)",
    }


# --- diagonals ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class SmallTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :3] * 3).long().remainder(7)
        out: Tensor = self.out(torch.tanh(self.embed(tokens)))
        return out


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "rows": (lambda: nn.Linear(3, 5, bias=False), (4, 3)),
    "conv": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), (4, 5)),
    "attention": (Attention, (5, 4)),
    "embedding": (SmallTied, (5,)),
}


def one_step(name: str, **chosen: Any) -> FOP:
    build, shape = SMALL[name]
    torch.manual_seed(0)
    model = build().double()
    optimizer = FOP(model, **PLAIN, layer_options={"*": chosen})
    x = batch(6, shape=shape)[0]
    optimizer.zero_grad()
    half_squared_error(model(x), torch.zeros(())).backward()
    optimizer.step()
    return optimizer


def factors(optimizer: FOP) -> Iterable[tuple[str, Tensor]]:
    for index, state in enumerate(optimizer.state.values()):
        yield from ((f"{key} of {index}", state[key]) for key in ("A", "G") if key in state)


@pytest.mark.parametrize("cap", [0, 3, 4, 5, 6])
@pytest.mark.parametrize("name", SMALL)
def test_factors_above_the_cap_are_the_diagonals_of_the_dense_ones(name: str, cap: int) -> None:
    dense = dict(factors(one_step(name)))
    capped = dict(factors(one_step(name, max_factor_dim=cap)))
    assert capped.keys() == dense.keys() and dense
    for key, whole in dense.items():
        part = capped[key]
        if part.dim() == whole.dim():
            # The column of the bias does not count.
            assert part.dim() == 2 or part.shape[-1] <= cap + 1
        else:
            assert part.shape[-1] > cap
            whole = whole.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)
    if cap == 0:
        assert all(part.dim() == 2 for part in capped.values())


@pytest.mark.parametrize(
    ("cap", "diagonal"),
    [
        (3, {"0": "AG", "2": "A"}),
        (5, {"0": "G", "2": "A"}),
        (6, {}),
        (0, {"0": "AG", "2": "AG"}),
    ],
)
def test_steps_with_a_cap_follow_the_equations(cap: int, diagonal: Mapping[str, str]) -> None:
    """Linear(5, 6) and Linear(6, 3): caps that take one side, both, or none."""
    model = mlp()
    optimizer = FOP(model, **PLAIN, layer_options={"*": {"max_factor_dim": cap}})
    for seed in range(3):
        twin = copy.deepcopy(model)
        x, y = batch(7, seed)
        pairs = halves(twin, x, y)
        train_step(model, optimizer, x, y)
        states = {name: optimizer.state[model.get_submodule(name).weight] for name in ("0", "2")}
        kept = {name: "".join(key for key in "AG" if s[key].dim() == 2) for name, s in states.items()}
        assert {name: which for name, which in kept.items() if which} == diagonal
        held = [(state, dict(state)) for state in states.values()]
        for state in states.values():
            state.update({key: full(state[key]) for key in "AG"})
        check_step(model, twin, optimizer, pairs)
        for state, own in held:
            state.update(own)


# --- large batches -----------------------------------------------------------------------------------------


def patches_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 5, padding=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 5, stride=2),
        nn.Flatten(),
        nn.Linear(3 * 15 * 15, 3),
    ).double()


CHUNK = 2**13


def trained_on_images(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, int]:
    if chunk is not None:
        monkeypatch.setattr("fop.layers.conv.CHUNK_ELEMENTS", chunk)
    model = patches_net()
    optimizer = FOP(model, damping=1e-2, statistics_rows=None, layer_options={"4": {"path": "adamw"}})
    with Largest() as largest:
        for seed in range(2):
            train_step(model, optimizer, *batch(50, seed, (4, 6, 6)))
    assert optimizer.diagnostics().layers.keys() == {"0", "2"}
    return model, largest.elements


@pytest.mark.parametrize("chunk", [CHUNK, 1])
def test_statistics_of_a_large_batch_are_summed_in_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more rows than a chunk, or one sample, at a time; the output is the largest of the rest."""
    whole, unbounded = trained_on_images(None, monkeypatch)
    model, bounded = trained_on_images(chunk, monkeypatch)
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-10, atol=1e-12)
    output, one_sample = 50 * 3 * 15 * 15, 4 * 25 * 15 * 15
    assert bounded <= max(output, one_sample, chunk)
    assert unbounded > 10 * bounded


def test_a_loss_over_many_rows_needs_no_more_than_its_rows() -> None:
    """3-d inputs of Linear: the rows are a view, not a copy for each of the factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    optimizer = FOP(model)
    x, y = batch(20, shape=(50, 8))[0], torch.zeros(20, 50, 3, dtype=torch.float64)
    with Largest() as largest:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    assert largest.elements <= 20 * 50 * 12
