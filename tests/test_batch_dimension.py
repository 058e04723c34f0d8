"""The pair splits samples, never tokens: where the batch is in dim 1, permuted or folded into windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from models import PLAIN
from reference import dense_damped_fisher, dense_fisher, full, half_squared_error, unvec, vec
from reference.equations import correct

E = 4
Call = Callable[[nn.Module, Tensor], Tensor]
Parts = tuple[Tensor, Tensor | None]


# --- the oracle: halves by sample on a twin ----------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Parts]:
    """Weight and bias of every layer that takes the FOP step, by the library's name for it."""
    found: dict[str, Parts] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found[f"{name}.in_proj"] = (module.in_proj_weight, module.in_proj_bias)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            found[name] = (module.weight, getattr(module, "bias", None))
    return found


def matrix(model: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
    if name.endswith("in_proj"):
        assert bias is not None
        return torch.cat([torch.stack(weight.chunk(3)), torch.stack(bias.chunk(3))[..., None]], dim=2)
    if isinstance(model.get_submodule(name), nn.Embedding):
        return weight.T[None]
    rows = weight.flatten(1)[None]
    return rows if bias is None else torch.cat([rows, bias[None, :, None]], dim=2)


def gradients(model: nn.Module, call: Call, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    found = {}
    loss = half_squared_error(call(model, x), y)
    for name, parts in weights_of(model).items():
        params = [part for part in parts if part is not None]
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        found[name] = matrix(model, name, filled[0], filled[1] if len(filled) > 1 else None)
    return found


def check(
    build: Callable[[], nn.Module],
    x: Tensor,
    *,
    call: Call = lambda model, x: model(x),
    kfac: dict[str, str] | None = None,
    either: bool = False,
    bare: bool = False,
    **options: Any,
) -> FOP:
    """Two steps; the second is the dense equations' with halves by sample, or K-FAC's and says why.

    Args:
        build: makes the model.
        x: the batch, samples in dim 0.
        call: puts it through the model; gives the output with samples in dim 0.
        kfac: layers that cannot know, with a part of the reason.
        either: whether every layer may choose between the two.
        bare: whether the optimizer is made of bare parameters.
        options: of the optimizer.
    """
    torch.manual_seed(0)
    model = build().double()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN, **options)
    y = torch.randn_like(call(model, x))
    for _ in range(2):
        twin = copy.deepcopy(model)
        optimizer.zero_grad()
        half_squared_error(call(model, x), y).backward()
        optimizer.step()
    half = len(x) // 2
    whole = gradients(twin, call, x, y)
    g1, g2 = (gradients(twin, call, x[part], y[part]) for part in (slice(half), slice(half, None)))
    found = optimizer.diagnostics().layers
    assert found.keys() == whole.keys()
    for name, parts in weights_of(model).items():
        held = optimizer.state[parts[0]]
        A, G = full(held["A"]), full(held["G"])
        F, F_hat = dense_fisher(A, G), dense_damped_fisher(A, G, PLAIN["damping"])
        Ga, Gd = whole[name], g1[name] - g2[name]
        why = found[name].why_kfac
        if not either:
            assert (why is None) is (name not in (kfac or {})), f"{name}: {why}"
        assert found[name].kfac_steps == (0 if why is None else 2)
        assert why is None or (kfac or {}).get(name, "") in why, f"{name}: {why}"
        beta = PLAIN["beta"] if why is None else 0.0
        mixed = correct(F, F_hat, vec(Ga), vec(Gd), beta, PLAIN["eta"])
        old = weights_of(twin)[name]
        moved = matrix(
            model,
            name,
            (old[0] - parts[0]).detach() / PLAIN["lr"],
            None if old[1] is None or parts[1] is None else (old[1] - parts[1]).detach() / PLAIN["lr"],
        )
        expected = unvec(mixed.direction, like=Ga)
        error = float((moved - expected).norm() / expected.norm())
        assert error < 1e-9, f"{name}: {error:.1e} from {'the halves by sample' if beta else 'K-FAC'}"
        assert mixed.perpendicular.norm() > 1e-4 * Ga.norm(), "the case cannot fail"
    return optimizer


def check_factors(optimizer: FOP, weight: Tensor, rows: int) -> None:
    """A sums over the rows of a sample: its last entry, from the ones of the bias, counts them."""
    assert float(optimizer.state[weight]["A"][0, -1, -1]) == pytest.approx(rows)


def sequences(n: int, length: int) -> Tensor:
    return torch.randn(n, length, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def time_first(model: nn.Module, x: Tensor) -> Tensor:
    """The model takes and gives (length, N, features)."""
    out: Tensor = model(x.transpose(0, 1)).transpose(0, 1)
    return out


# --- batch_first=False of torch's own modules --------------------------------------------------------------


class Encoder(nn.Module):
    """A projection before, a `TransformerEncoder` with the batch in dim 1, and a head after it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(E, E)
        layer = nn.TransformerEncoderLayer(E, 2, 6, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.project(x)))
        return out


class Recurrent(nn.Module):
    """An LSTM with the batch in dim 1, a head on every step and one on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(E, 5)
        self.every = nn.Linear(5, 3)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x)
        out: Tensor = self.every(hidden) + self.last(hidden[-1])
        return out


class CrossAttention(nn.Module):
    """A bare `MultiheadAttention` over keys of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x[:2], x, x)[0])
        return out


TORCH = {"encoder": Encoder, "recurrent": Recurrent, "cross": CrossAttention}
PER_TOKEN = {
    "encoder": ["project", "head", *(f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2))],
    "recurrent": ["every"],
    "cross": [],
}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("n", "length"), [(6, 3), (3, 7), (7, 5)])
@pytest.mark.parametrize("kind", TORCH)
def test_batch_in_dim_1(kind: str, n: int, length: int, bare: bool) -> None:
    check(TORCH[kind], sequences(n, length), call=time_first, bare=bare)


@pytest.mark.parametrize("kind", TORCH)
def test_as_many_tokens_as_samples(kind: str) -> None:
    """Attention knows its own batch; a Linear between the modules cannot, and says what to do about it."""
    reasons = dict.fromkeys(PER_TOKEN[kind], "batch_dim")
    check(TORCH[kind], sequences(5, 5), call=time_first, kfac=reasons)


@pytest.mark.parametrize("kind", TORCH)
def test_batch_dim_of_layer_options(kind: str) -> None:
    fixed = {name: {"batch_dim": 1} for name in PER_TOKEN[kind]}
    optimizer = check(TORCH[kind], sequences(5, 5), call=time_first, layer_options=fixed)
    assert "batch_dim" not in str(optimizer.diagnostics())


def test_models_without_any_hint() -> None:
    """Linear layers alone, with the batch in dim 1 of the model's own input: only the user can know."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(E, 5), nn.Tanh(), nn.Linear(5, 3))

    options = {nn.Linear: {"batch_dim": 1}}
    for n, length in ((6, 3), (5, 5), (3, 6)):
        optimizer = check(build, sequences(n, length), call=time_first, layer_options=options)
        weight = optimizer.param_groups[0]["params"][0]
        check_factors(optimizer, weight, length)


def test_batch_dim_that_the_input_does_not_have() -> None:
    """Not a crash in the backward pass."""
    check(
        lambda: nn.Sequential(nn.Linear(E, 3)),
        sequences(6, 1)[:, 0],
        kfac={"0": "batch_dim=1"},
        layer_options={"0": {"batch_dim": 1}},
    )


# --- models that move the batch by themselves --------------------------------------------------------------


class Moved(nn.Module):
    """Takes samples in dim 0 and brings them into another form for its layers.

    Args:
        there: what it does to (N, L, E).
        back: what it does to the result, given N.
        layers: the layers between.
    """

    def __init__(
        self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor, int], Tensor], *layers: nn.Module
    ) -> None:
        super().__init__()
        self.there, self.back = there, back
        self.inner = nn.Sequential(*(layers or (nn.Linear(E, 5), nn.Tanh(), nn.Linear(5, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.inner(self.there(x)), len(x))


def permuted() -> nn.Module:
    """(N, L, E) -> (L, N, E)."""
    return Moved(lambda x: x.transpose(0, 1), lambda x, _: x.transpose(0, 1))


def windows() -> nn.Module:
    """(N, L, E) -> (N·L/3, 3, E), as Swin does for its attention."""
    return Moved(lambda x: x.reshape(-1, 3, E), lambda x, n: x.reshape(n, -1, x.shape[-1]))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def window_attention() -> nn.Module:
    return Moved(
        lambda x: x.reshape(-1, 3, E),
        lambda x, n: x.reshape(n, -1, x.shape[-1]),
        nn.Linear(E, E),
        SelfAttention(),
        nn.Linear(E, 3),
    )


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("n", "length"), [(4, 6), (5, 3), (7, 6)])
@pytest.mark.parametrize("build", [permuted, windows, window_attention])
def test_samples_are_found(build: Callable[[], nn.Module], n: int, length: int, bare: bool) -> None:
    check(build, sequences(n, length), bare=bare)


@pytest.mark.parametrize("n", [4, 6])
def test_permuted_with_as_many_tokens_as_samples_and_batch_dim(n: int) -> None:
    check(permuted, sequences(n, n), layer_options={nn.Linear: {"batch_dim": 1}})


# --- token numbers that the model makes itself -------------------------------------------------------------


class Positions(nn.Module):
    """Tokens by a table of random vectors; positions and segments are made in the forward pass."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.position, self.segment = nn.Embedding(9, E), nn.Embedding(2, E)
        self.head = nn.Linear(E, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1]).view(self.shape)
        what = (x[..., 0] > 0).long()
        out: Tensor = self.head(torch.tanh(x + self.position(where) + self.segment(what)))
        return out


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
@pytest.mark.parametrize("length", [3, 6, 8])
def test_positions_belong_to_no_sample(length: int, shape: tuple[int, ...], bare: bool) -> None:
    """Not even where there are as many of them as samples. Segments are of a sample each."""
    check(lambda: Positions(shape), sequences(6, length), kfac={"position": "positions"}, bare=bare)
