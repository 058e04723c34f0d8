"""torch.compile: the same updates as in eager mode, without a graph break, whatever came first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from fop import FOP, KFAC
from models import batch, conv_net, mlp, train_step, weights

Make = Callable[..., Any]
Batches = list[tuple[Tensor, Tensor]]

# aot_eager traces and splits forward and backward as every backend does, and leaves the arithmetic alone.
compiled = partial(torch.compile, backend="aot_eager")

# From step 10 on, the curvature is renewed in every second step only.
STEPS = 13
OPTIONS: dict[str, Any] = {"damping": 1e-2, "curvature_interval": 2}
IMAGE = (2, 5, 6)
IMAGES = [batch(6, seed, IMAGE) for seed in range(STEPS)]
VECTORS = [batch(6, seed) for seed in range(STEPS)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def breaks() -> int:
    return sum(counters["graph_break"].values())


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def train(forward: nn.Module, optimizer: Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        train_step(forward, optimizer, x, y)


def eager(build: Callable[[], nn.Module], batches: Batches, make: Make = FOP, **options: Any) -> nn.Module:
    """A model that has been trained in eager mode."""
    model = build()
    train(model, make(model, **{**OPTIONS, **options}), batches)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-12)


def assert_all_paired(optimizer: FOP, but: Iterable[str] = ()) -> None:
    """Every layer has taken the FOP step in every step."""
    layers = optimizer.diagnostics().layers
    assert layers
    assert {name: d.why_kfac for name, d in layers.items() if d.kfac_steps and name not in but} == {}


# --- one model, every order of compiling and constructing --------------------------------------------------


def compile_after(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    optimizer = make(model)
    return optimizer, compiled(model)


def compile_before(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    forward = compiled(model)
    return make(model), forward


def from_compiled(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    forward = compiled(model)
    return make(forward), forward


def in_place(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    model.compile(backend="aot_eager")
    return make(model), model


def in_place_after(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    optimizer = make(model)
    model.compile(backend="aot_eager")
    return optimizer, model


def bare_after(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    optimizer = make(model.parameters())
    return optimizer, compiled(model)


def bare_before(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    forward = compiled(model)
    return make(forward.parameters()), forward


def bare_in_place(model: nn.Module, make: Make) -> tuple[Any, nn.Module]:
    model.compile(backend="aot_eager")
    return make(model.parameters()), model


GIVEN = [compile_after, compile_before, from_compiled, in_place, in_place_after]
BARE = [bare_after, bare_before, bare_in_place]
Setup = Callable[[nn.Module, Make], tuple[Any, nn.Module]]


@pytest.mark.parametrize("setup", GIVEN)
def test_every_order_of_compiling_and_constructing(setup: Setup) -> None:
    model = mlp()
    optimizer, forward = setup(model, partial(FOP, **OPTIONS))
    train(forward, optimizer, VECTORS)
    assert_same(model, eager(mlp, VECTORS))
    assert_all_paired(optimizer)
    assert (graphs(), breaks()) == (1, 0)


# torch warns of any global hook; ours is gone after the first pass.
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
@pytest.mark.parametrize("setup", BARE)
def test_bare_parameters_cost_at_most_a_break_in_the_first_call(setup: Setup) -> None:
    model = conv_net()
    optimizer, forward = setup(model, partial(FOP, **OPTIONS))
    train(forward, optimizer, IMAGES)
    assert_same(model, eager(conv_net, IMAGES))
    assert_all_paired(optimizer)
    assert breaks() <= 1
    # After the look for the owners the model is one graph; it does not stay in pieces.
    assert graphs() <= 2


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
@pytest.mark.parametrize("given", ["module", "parameters"])
def test_a_model_that_may_not_break(given: str) -> None:
    """fullgraph=True makes an error of a graph break."""
    model = mlp()
    optimizer = FOP(model if given == "module" else model.parameters(), **OPTIONS)
    train(compiled(model, fullgraph=True), optimizer, VECTORS)
    assert_same(model, eager(mlp, VECTORS))
    assert graphs() == 1


# --- every kind of layer -----------------------------------------------------------------------------------


class Everything(nn.Module):
    """Embedding tied to the output, 3-d Linear, Conv1d, a norm of each path, a weight with two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.linear, self.twin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin.weight = self.linear.weight
        self.norm, self.diagonal = nn.LayerNorm(6), nn.RMSNorm(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = self.norm(h + torch.tanh(self.twin(torch.tanh(self.linear(h)))))
        h = self.diagonal(h + self.conv(h.transpose(1, 2)).relu_().transpose(1, 2))
        out: Tensor = self.out(h)
        return out


def sentences(n: int, seed: int, length: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (n, length), generator=generator)
    return ids, torch.randn(n, length, 9, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("make", [FOP, KFAC])
def test_every_kind_of_layer(make: Make) -> None:
    batches = [sentences(5, seed) for seed in range(STEPS)]
    options = {"layer_options": {"diagonal": {"path": "fop"}}}
    expected = eager(Everything, batches, make, **options)
    model = Everything()
    optimizer = make(model, **OPTIONS, **options)
    train(compiled(model), optimizer, batches)
    assert_same(model, expected)
    assert (graphs(), breaks()) == (1, 0)
    assert optimizer.diagnostics().layers.keys() == {"out", "linear", "conv", "diagonal"}
    assert {row.name for row in optimizer.summary().rows if row.path == "AdamW"} == {
        "norm.weight", "norm.bias", "linear.bias", "twin.bias",
    }  # fmt: skip
    if make is FOP:
        assert_all_paired(optimizer)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_changing_size(dynamic: bool | None) -> None:
    """The pair is split by the size of the batch that runs, not of the one that was traced."""
    batches = [batch(n, seed) for seed, n in enumerate([6, 4, 9, 7, 6, 2, 5])]
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model, dynamic=dynamic), optimizer, batches)
    assert_same(model, eager(mlp, batches))
    assert_all_paired(optimizer)
    assert graphs() <= 2 and breaks() == 0


class Positions(nn.Module):
    """Learned positions: the same for all samples, so there is nothing to split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(9, 6), nn.Embedding(4, 6)
        self.out = nn.Linear(6, 9)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.embed(ids) + self.place(torch.arange(ids.shape[1]))))
        return out


@pytest.mark.parametrize("n", [4, 6])
def test_positions_are_never_taken_for_samples(n: int) -> None:
    """Not even with as many samples as positions."""
    batches = [sentences(n, seed) for seed in range(3)]
    expected = eager(Positions, batches)
    model = Positions()
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model), optimizer, batches)
    assert optimizer.diagnostics().layers["place"].kfac_steps == 3
    assert_same(model, expected)
    assert_all_paired(optimizer, but=["place"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(12)), nn.Linear(5, 3)).double()


def test_blocks_compiled_one_by_one_share_their_graph() -> None:
    """Regional compilation: without FOP there are two graphs, for the first block and the others."""
    model = stack()
    optimizer = FOP(model, **OPTIONS)
    for block in list(model)[:-1]:
        block.compile(backend="aot_eager")
    train(model, optimizer, VECTORS[:3])
    assert_same(model, eager(stack, VECTORS[:3]))
    assert_all_paired(optimizer)
    assert graphs() <= 3 and breaks() == 0


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self[2](checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False))
        return out


def test_checkpointing_inside_a_compiled_model() -> None:
    model = Checkpointed(*mlp())
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model), optimizer, VECTORS)
    assert_same(model, eager(mlp, VECTORS))
    assert_all_paired(optimizer)
    assert breaks() == 0


# --- what cannot be seen in a graph ------------------------------------------------------------------------


def encoder(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double()


def sequences(seed: int, n: int = 5, length: int = 4) -> tuple[Tensor, Tensor]:
    return batch(n, seed, (length, 6))[0], batch(n, seed + 50, (length, 6))[0]


SEQUENCES = [sequences(seed) for seed in range(3)]


def test_attention_in_a_graph_takes_adamw_and_says_so() -> None:
    model = encoder()
    optimizer = FOP(model, **OPTIONS)
    before = weights(model)
    train(compiled(model), optimizer, SEQUENCES)
    rows = {row.name: row for row in optimizer.summary().rows if "self_attn" in row.name}
    assert len(rows) == 4
    for name, row in rows.items():
        assert row.path == "AdamW" and "torch.compile" in row.reason, row
        assert not torch.equal(before[name], weights(model)[name])
    assert optimizer.diagnostics().layers.keys() == {"layers.0.linear1", "layers.0.linear2"}
    assert_all_paired(optimizer)
    # The same steps as if the attention had been left to AdamW.
    left = partial(encoder)
    assert_same(model, eager(left, SEQUENCES, layer_options={"*self_attn*": {"path": "adamw"}}))


def test_attention_compiled_in_mid_training_says_why_it_has_no_pair() -> None:
    model = encoder()
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, SEQUENCES)
    train(compiled(model), optimizer, SEQUENCES)
    layers = optimizer.diagnostics().layers
    for name in ("layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"):
        assert layers[name].kfac_steps == 3 and layers[name].why_kfac
    assert layers["layers.0.linear1"].kfac_steps == 0
    assert all(torch.isfinite(value).all() for value in weights(model).values())


@pytest.mark.parametrize("told", [False, True])
def test_sequences_first(told: bool) -> None:
    """Which dimension counts samples is not seen in a graph: by `layer_options` the pair is right."""
    chosen: dict[str, Any] = {"*self_attn*": {"path": "adamw"}}
    build = partial(encoder, batch_first=False)
    batches = [(x.transpose(0, 1), y.transpose(0, 1)) for x, y in SEQUENCES]
    expected = eager(build, batches, layer_options=chosen)
    if told:
        chosen = {**chosen, "*linear*": {"batch_dim": 1}}
    model = build()
    optimizer = FOP(model, **OPTIONS, layer_options=chosen)
    train(compiled(model), optimizer, batches)
    assert breaks() == 0
    if told:
        assert_same(model, expected)
        assert_all_paired(optimizer)
    else:
        layers = optimizer.diagnostics().layers
        assert layers.keys() == {"layers.0.linear1", "layers.0.linear2"}
        assert all(d.kfac_steps == 3 and "batch_dim" in (d.why_kfac or "") for d in layers.values())
