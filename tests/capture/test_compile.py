"""torch.compile: the same updates as in eager mode, without a graph break, whatever came first."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from fop import FOP, KFAC
from models import (
    Own,
    assert_equal,
    batch,
    check_kept_pair,
    check_lost_pair,
    conv_net,
    loss_of,
    mlp,
    snapshot,
    train_step,
    weights,
)
from versions import one_graph

Batches = list[tuple[Tensor, Tensor]]

# aot_eager traces and splits forward and backward as every backend does, and leaves the arithmetic alone.
compiled = partial(torch.compile, backend="aot_eager")

# From step 10 on, the curvature is renewed in every second step only.
# With a smaller eps AdamW moves by the rounding of gradients that are 0, as those of attention's key biases.
OPTIONS: dict[str, Any] = {"damping": 1e-2, "curvature_interval": 2, "adamw_lr": 1e-3, "eps": 1e-6}
IMAGES = [batch(6, seed, (2, 5, 6)) for seed in range(13)]
VECTORS = [batch(6, seed) for seed in range(13)]
SHORT = VECTORS[:4]

# torch warns of any global hook; ours is gone after the first pass.
pytestmark = pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")


@pytest.fixture(scope="module", autouse=True)
def no_burden_on_others() -> Iterator[None]:
    """What the compiler keeps is not walked through by every later `gc.collect`."""
    yield
    torch.compiler.reset()
    gc.collect()
    gc.freeze()


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


def eager(
    build: Callable[[], nn.Module], batches: Batches, make: type[FOP] = FOP, **options: Any
) -> nn.Module:
    """A model that has been trained in eager mode."""
    model = build()
    train(model, make(model, **{**OPTIONS, **options}), batches)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs g++")
def test_code_that_torch_compiles_itself() -> None:
    """The default backend; its sums may have another order."""
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    train(torch.compile(model), optimizer, VECTORS)
    torch.testing.assert_close(weights(model), weights(eager(mlp, VECTORS)), rtol=1e-8, atol=1e-8)
    check_kept_pair(optimizer)


@pytest.mark.core
@one_graph
@pytest.mark.parametrize("make", [FOP, KFAC])
def test_one_graph_without_breaks(make: type[FOP]) -> None:
    model = conv_net()
    optimizer = make(model, **OPTIONS)
    train(compiled(model, fullgraph=True), optimizer, IMAGES)
    assert_same(model, eager(conv_net, IMAGES, make))
    assert (graphs(), breaks()) == (1, 0)


# --- every order of compiling and constructing -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "when"),
    [
        ("model", "before"),
        ("model", "after"),
        ("model", "in place after"),
        ("parameters", "after"),
        pytest.param("model", "in place before", marks=pytest.mark.slow),
        pytest.param("forward", "before", marks=pytest.mark.slow),
        pytest.param("parameters", "before", marks=pytest.mark.slow),
        pytest.param("parameters", "in place before", marks=pytest.mark.slow),
    ],
)
def test_every_order_of_compiling_and_constructing(given: str, when: str) -> None:
    """A break in the first call at most, where the owners of bare parameters are still to be found."""
    build, batches = (conv_net, IMAGES) if given == "parameters" else (mlp, VECTORS)
    model = build()

    def compile_() -> nn.Module:
        if "in place" not in when:
            return compiled(model, fullgraph=given == "model")
        model.compile(backend="aot_eager")
        return model

    forward = compile_() if "before" in when else model
    optimizer = FOP({"model": model, "forward": forward}.get(given, model.parameters()), **OPTIONS)
    forward = compile_() if "after" in when else forward
    train(forward, optimizer, batches)
    assert_same(model, eager(build, batches))
    check_kept_pair(optimizer)
    # The model does not stay in pieces.
    assert (breaks() <= 1 and graphs() <= 2) if given == "parameters" else (graphs(), breaks()) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [FOP, KFAC])
def test_bare_parameters_of_a_model_that_may_not_break(make: type[FOP]) -> None:
    """fullgraph=True makes an error of a graph break."""
    model = mlp()
    train(compiled(model, fullgraph=True), make(model.parameters(), **OPTIONS), VECTORS)
    assert_same(model, eager(mlp, VECTORS, make))
    assert graphs() == 1


@pytest.mark.parametrize(
    ("past", "bare"),
    [
        ("itself", False),
        ("its class", True),
        ("eager", False),
        pytest.param("itself", True, marks=pytest.mark.slow),
        pytest.param("its class", False, marks=pytest.mark.slow),
    ],
)
def test_what_ran_before(past: str, bare: bool) -> None:
    """Guards of a graph do not see new hooks, and compiled code belongs to the class: all is traced anew."""
    model = mlp()
    forward = compiled(model) if past == "itself" else model
    other = mlp() if past == "its class" else model
    ran = compiled(other) if past == "its class" else forward
    loss_of(ran, *batch()).backward()
    other.zero_grad()
    optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
    forward = forward if past == "itself" else compiled(model)
    train(forward, optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))
    check_kept_pair(optimizer)
    torch.compiler.reset()  # disturbs no running optimizer
    train(forward, optimizer, SHORT)
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}
    check_kept_pair(optimizer)


# --- batches and parts of models (every kind of layer: tests/test_compatibility.py) -----------------------


def sentences(n: int, seed: int, length: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (n, length), generator=generator)
    return ids, torch.randn(n, length, 9, dtype=torch.float64, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_changing_size(dynamic: bool | None) -> None:
    """The pair is split by the size of the batch that runs, not of the one that was traced."""
    batches = [batch(n, seed) for seed, n in enumerate([6, 4, 9, 7, 6, 2, 5])]
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model, dynamic=dynamic), optimizer, batches)
    assert_same(model, eager(mlp, batches))
    check_kept_pair(optimizer)
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


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 6])
def test_positions_are_never_taken_for_samples(n: int) -> None:
    """Not even with as many samples as positions."""
    batches = [sentences(n, seed) for seed in range(3)]
    expected = eager(Positions, batches)
    model = Positions()
    optimizer = FOP(model, **OPTIONS)
    train(compiled(model), optimizer, batches)
    check_lost_pair(optimizer, ["place"], 3)
    assert_same(model, expected)
    check_kept_pair(optimizer, ["embed", "out"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(12)), nn.Linear(5, 3)).double()


class Nested(nn.Module):
    """A model whose layers are all in one part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Own(6, 3))
        self.unused = Own(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@contextlib.contextmanager
def walks() -> Iterator[list[nn.Module]]:
    """The models whose modules somebody walks through."""
    found: list[nn.Module] = []
    walk = nn.Module.modules

    def modules(self: nn.Module) -> Iterator[nn.Module]:
        found.append(self)
        return walk(self)

    with mock.patch.object(nn.Module, "modules", modules):
        yield found


@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])
@pytest.mark.parametrize("unused", [False, True])
def test_nobody_looks_for_compiled_parts_in_every_step(wrapped: bool, unused: bool) -> None:
    """Only until a step has settled what functions tell; for a weight without a gradient in 16 passes."""
    model = Nested()
    if not unused:
        del model.unused
    if wrapped:
        model.net[0] = compiled(model.net[0])
    else:
        model.net[0].compile(backend="aot_eager")
    optimizer = FOP(model, **OPTIONS)
    with walks() as found, pytest.warns(UserWarning, match=r"net\.2\.weight: functions are not seen"):
        train(model, optimizer, VECTORS[:1])
    assert found
    if unused:
        train(model, optimizer, VECTORS)
    with walks() as found:
        train(model, optimizer, VECTORS)
    assert found == []
    check_kept_pair(optimizer)


def test_part_compiled_later() -> None:
    """The rest is seen as before; what was recognised inside the part has no pair any more, and says why."""
    model, expected = Nested(), Nested()
    optimizer, other = FOP(model, **OPTIONS), FOP(expected, **OPTIONS)
    train(model, optimizer, VECTORS[:3])
    train(expected, other, VECTORS[:3])
    model.net[0].compile(backend="aot_eager")
    train(model, optimizer, VECTORS[3:6])
    train(expected, other, VECTORS[3:6])
    assert_same(model, expected)
    check_kept_pair(optimizer, ["net.0", "net.2"])
    model.net[2].compile(backend="aot_eager")
    train(model, optimizer, VECTORS[6:9])
    check_lost_pair(optimizer, ["net.2"], 3)
    check_kept_pair(optimizer, ["net.0"])


def test_blocks_compiled_one_by_one_share_their_graph() -> None:
    """Regional compilation: without FOP there are two graphs, for the first block and the others."""
    model = stack()
    optimizer = FOP(model, **OPTIONS)
    for block in list(model)[:-1]:
        block.compile(backend="aot_eager")
    train(model, optimizer, VECTORS[:3])
    assert_same(model, eager(stack, VECTORS[:3]))
    check_kept_pair(optimizer)
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
    check_kept_pair(optimizer)
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
    check_kept_pair(optimizer)
    # The same steps as if the attention had been left to AdamW.
    left = partial(encoder)
    assert_same(model, eager(left, SEQUENCES, layer_options={"*self_attn*": {"path": "adamw"}}))


def test_attention_compiled_in_mid_training_says_why_it_has_no_pair() -> None:
    model = encoder()
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, SEQUENCES)
    train(compiled(model), optimizer, SEQUENCES)
    check_lost_pair(optimizer, ["layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"], 3)
    check_kept_pair(optimizer, ["layers.0.linear1"])
    assert all(torch.isfinite(value).all() for value in weights(model).values())


@pytest.mark.slow
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
        check_kept_pair(optimizer)
    else:
        check_lost_pair(optimizer, ["layers.0.linear1", "layers.0.linear2"], 3, "batch_dim")


# --- one optimizer after the other, and copies -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given", ["model", "forward", "parameters"])
def test_the_next_optimizer_of_a_compiled_model(given: str) -> None:
    """A graph that was traced with one optimizer serves the next."""
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    train(forward, optimizer, SHORT)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    model.load_state_dict(mlp().state_dict())
    model.zero_grad()
    optimizer = FOP({"model": model, "forward": forward, "parameters": model.parameters()}[given], **OPTIONS)
    train(forward, optimizer, SHORT)
    assert_same(model, eager(mlp, SHORT))
    check_kept_pair(optimizer)


def test_a_compiled_model_without_its_optimizer_is_as_before() -> None:
    model, twin = mlp(), mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    loss_of(forward, *batch()).backward()
    del optimizer
    gc.collect()
    model.zero_grad()
    loss_of(forward, *batch()).backward()
    loss_of(twin, *batch()).backward()
    for param, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, plain.grad, rtol=1e-12, atol=1e-12)
        assert not param._post_accumulate_grad_hooks  # type: ignore[attr-defined]


COPIES: dict[str, Callable[[Any, Any], Any]] = {
    "of the model": lambda model, forward: compiled(copy.deepcopy(model)),
    "of the compiled": lambda model, forward: copy.deepcopy(forward),
    "in eager mode": lambda model, forward: copy.deepcopy(model),
}


@pytest.mark.parametrize(
    ("way", "traced"), [*itertools.product(list(COPIES)[:2], (False, True)), ("in eager mode", False)]
)
def test_copies_never_feed_the_optimizer(way: str, traced: bool) -> None:
    """The copy runs forwards and backwards between the model's own passes, before or after it is traced."""
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    other = COPIES[way](model, forward)
    if not traced and way != "in eager mode":
        loss_of(other, *batch(6, seed=99)).backward()
    train(forward, optimizer, SHORT[:1])
    for x, y in SHORT[1:]:
        optimizer.zero_grad()
        loss = loss_of(forward, x, y)
        loss_of(other, *batch(6, seed=99)).backward()
        loss.backward()
        state = snapshot(optimizer)
        loss_of(other, *batch(6, seed=98)).backward()
        assert_equal(snapshot(optimizer), state)
        optimizer.step()
    assert_same(model, eager(mlp, SHORT))
    check_kept_pair(optimizer)


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_trains_with_an_optimizer_of_its_own() -> None:
    model = mlp()
    forward = compiled(model)
    optimizer = FOP(model, **OPTIONS)
    train(forward, optimizer, SHORT)
    other = copy.deepcopy(mlp())
    own = FOP(other, **OPTIONS)
    both = compiled(other)
    for x, y in SHORT:
        train_step(both, own, x, y)
        train_step(forward, optimizer, x, y)
    assert_same(other, eager(mlp, SHORT))
    assert_same(model, eager(mlp, [*SHORT, *SHORT]))
    check_kept_pair(own)


# --- the loop around a compiled model ----------------------------------------------------------------------


def accumulate(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for part in range(3):
        x, y = batch(4, 10 * step + part)
        (loss_of(forward, x, y) / 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def uneven(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for part, n in enumerate((4, 3)):
        (loss_of(forward, *batch(n, 10 * step + part)) / 2).backward()
    optimizer.step()
    model.zero_grad(set_to_none=False)


def evaluate_between(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    x, y = batch(6, step)
    loss = loss_of(forward, x, y)
    model.eval()
    with torch.no_grad():
        forward(batch(5, 100 + step)[0])
    with torch.inference_mode():
        forward(batch(3, 100 + step)[0])
    model.train()
    forward(batch(6, 100 + step)[0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def freeze_and_thaw(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    for param in model[0].parameters():  # type: ignore[index]
        param.requires_grad_(step not in (1, 2))
    train_step(forward, optimizer, *batch(6, step))


def compiled_and_eager_in_turn(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    train_step(forward if step % 2 else model, optimizer, *batch(6, step))


def input_gradients(forward: nn.Module, model: nn.Module, optimizer: FOP, step: int) -> None:
    x, y = batch(6, step)
    x.requires_grad_()
    torch.autograd.grad(forward(x).sum(), x)
    train_step(forward, optimizer, x, y)


LOOPS: list[Callable[[nn.Module, nn.Module, FOP, int], None]] = [
    accumulate,
    uneven,
    evaluate_between,
    freeze_and_thaw,
    compiled_and_eager_in_turn,
    input_gradients,
]


@pytest.mark.parametrize(
    "loop", [*LOOPS[:4], *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS[4:])]
)
def test_loops_around_a_compiled_model(loop: Callable[[nn.Module, nn.Module, FOP, int], None]) -> None:
    runs: list[tuple[nn.Module, FOP]] = []
    for wrap in (lambda model: model, compiled):
        model = mlp()
        optimizer = FOP(model, **OPTIONS)
        forward: Any = wrap(model)
        for step in range(4):
            loop(forward, model, optimizer, step)
        runs.append((model, optimizer))
    (plain, expected), (model, optimizer) = runs
    assert_same(model, plain)
    for name, layer in optimizer.diagnostics().layers.items():
        assert layer.kfac_steps == expected.diagnostics().layers[name].kfac_steps == 0
    assert breaks() == 0 and graphs() > 0
