"""In-place activations, checkpointing, autocast, copies of the model, and what is kept alive."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from fop import FOP, KFAC
from fop.capture.batch import Layout
from fop.layers import Layer
from fop.layers.conv import ConvLayer
from fop.layers.linear import LinearLayer
from models import (
    PLAIN,
    Attentive,
    assert_differs,
    assert_equal,
    batch,
    conv_net,
    loss_of,
    mlp,
    sentences,
    snapshot,
    train_step,
    weights,
)
from reference import ReferenceFOP, half_squared_error

IMAGE = (2, 5, 6)


# --- modules as people write them ---------------------------------------------------------------------------


INPLACE: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5,)),
    "linear-rows": (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True), nn.Flatten()), (4, 5)),
    "linear-rows-no-bias": (
        lambda: nn.Sequential(nn.Linear(5, 3, bias=False), nn.SiLU(inplace=True), nn.Flatten()),
        (4, 5),
    ),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True), nn.Flatten()), IMAGE),
}


@pytest.mark.parametrize("case", INPLACE)
def test_inplace_activation(case: str) -> None:
    build, shape = INPLACE[case]
    torch.manual_seed(0)
    model = build().double()
    oracle = ReferenceFOP(model, **{k: v for k, v in PLAIN.items() if k != "curvature_interval"})
    optimizer = FOP(model, **PLAIN)
    for seed in range(2):
        x, _ = batch(6, seed, shape)
        y = torch.randn_like(model(x).detach())
        train_step(model, optimizer, x, y)
        oracle.step(x, y, half_squared_error)
        torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-9, atol=1e-10)


class Keyword(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(input=x)
        return out.flatten(1)


@pytest.mark.parametrize(
    ("layer", "shape"), [(lambda: nn.Linear(5, 3), (5,)), (lambda: nn.Conv2d(2, 3, (4, 6)), IMAGE)]
)
def test_input_by_keyword(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Keyword(layer().double())
    plain = nn.Sequential(copy.deepcopy(model.layer), nn.Flatten())
    x, _ = batch(6, shape=shape)
    y = torch.randn_like(model(x).detach())
    for net in (model, plain):
        train_step(net, FOP(net, **PLAIN), x, y)
    assert_equal([*weights(model).values()], [*weights(plain).values()])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [mlp, Attentive])
def test_activation_checkpointing(build: Callable[[], nn.Module], reentrant: bool) -> None:
    model, plain = build(), build()
    optimizer, other = FOP(model, **PLAIN), FOP(plain, **PLAIN)
    for seed in range(3):
        x, y = sentences(6, seed) if build is Attentive else batch(6, seed)
        train_step(plain, other, x, y)
        optimizer.zero_grad()
        # Reentrant checkpointing wants an input with a gradient.
        start = torch.zeros((), dtype=torch.float64, requires_grad=True)
        out = checkpoint(lambda x, _, model=model: model(x), x, start, use_reentrant=reentrant)
        half_squared_error(out, y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-12, atol=1e-12)


def test_bfloat16_autocast_stays_close() -> None:
    results = []
    for enabled in (False, True):
        model = conv_net().float()
        optimizer = FOP(model, **{**PLAIN, "beta": "adaptive", "eta": "adaptive", "lr": 0.1})
        start = weights(model)
        for seed in range(5):
            x, y = (t.float() for t in batch(16, seed, IMAGE))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = half_squared_error(model(x), y)
            loss.backward()
            optimizer.step()
        results.append({name: p - start[name] for name, p in weights(model).items()})
    for name, exact in results[0].items():
        error = (results[1][name] - exact).norm() / exact.norm()
        assert error < 0.1, f"{name}: {error:.2f}"  # bfloat16 has 8 bits
    assert all(row.path == "FOP" and "no curvature" not in row.reason for row in optimizer.summary().rows)


# --- nothing is kept alive ---------------------------------------------------------------------------------


class Buffer(bytearray):
    """Memory of a tensor that a weak reference can watch: alive for as long as the tensor's storage."""


class Rehouse(torch.autograd.Function):
    """Moves an activation into a watched buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[weakref.ref[Buffer]]) -> Tensor:
        buffer = Buffer(bytes(x.contiguous().view(torch.uint8).flatten().tolist()))
        seen.append(weakref.ref(buffer))
        return torch.frombuffer(buffer, dtype=x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Watched(nn.Module):
    def __init__(self, seen: list[weakref.ref[Buffer]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Rehouse.apply(x, self.seen)
        return out


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        out: Tensor = self.attention(x, x, x, need_weights=False)[0][:, 0]
        return out


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone must do."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("library", [FOP, KFAC])
def test_activations_die_with_the_backward_pass(library: type[FOP]) -> None:
    seen: list[weakref.ref[Buffer]] = []
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.Flatten(), Watched(seen), nn.Linear(36, 4), Watched(seen)]
    layers += [SelfAttention(), Watched(seen), nn.LayerNorm(4), nn.Linear(4, 3)]
    model = nn.Sequential(Watched(seen), *layers).double()
    optimizer = library(model, layer_options={nn.LayerNorm: {"path": "fop"}})
    for _ in range(2):
        x, y = batch(shape=IMAGE)
        out = model(x.requires_grad_())
        loss = half_squared_error(out, y)
        assert [ref() is not None for ref in seen] == [True] * 4, "the test cannot fail"
        loss.backward()
        # out and loss are still held here, and so is their (freed) graph.
        assert [ref() for ref in seen] == [None] * 4
        del out, loss
        optimizer.step()
        optimizer.zero_grad()
        seen.clear()


@pytest.mark.usefixtures("no_collector")
def test_graph_without_backward_dies_with_its_output() -> None:
    seen: list[weakref.ref[Buffer]] = []
    model = nn.Sequential(Watched(seen), *mlp())
    optimizer = FOP(model)
    out = model(batch()[0].requires_grad_())
    assert seen[0]() is not None
    del out
    assert seen[0]() is None
    train_step(model, optimizer, *batch())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("build", [conv_net, Attentive])
def test_dropping_the_optimizer_frees_it_and_its_hooks(build: Callable[[], nn.Module], bare: bool) -> None:
    before = len(torch_module._global_forward_pre_hooks)
    model = build()
    norms = {nn.LayerNorm: {"path": "fop"}} if build is Attentive else None
    optimizer = FOP(model.parameters() if bare else model, layer_options=norms)
    if bare:
        assert len(torch_module._global_forward_pre_hooks) == before + 1
    for seed in range(2):
        train_step(model, optimizer, *(sentences(6, seed) if build is Attentive else batch(6, seed, IMAGE)))
    assert len(torch_module._global_forward_pre_hooks) == before, "all owners are known"
    optimizer.zero_grad()
    loss = loss_of(model, *(sentences() if build is Attentive else batch(shape=IMAGE)))
    held = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    watched = [weakref.ref(each) for each in (optimizer, *held)]
    del optimizer, held
    assert [ref() for ref in watched] == [None] * len(watched)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks and not p._backward_hooks
    loss.backward()  # a graph of its lifetime still works


@pytest.mark.usefixtures("no_collector")
def test_dropping_an_optimizer_that_never_saw_a_forward_pass() -> None:
    before = len(torch_module._global_forward_pre_hooks)
    model = mlp()
    optimizer = FOP(model.parameters())
    ref = weakref.ref(optimizer)
    del optimizer
    assert ref() is None
    assert len(torch_module._global_forward_pre_hooks) == before


# --- statistics only when due ------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_statistics_cost_nothing_when_not_due(library: type[FOP], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"factor_sums": 0, "gradient": 0, "batched": 0}

    def count(kind: type[Layer] | type[Layout], name: str) -> None:
        original = getattr(kind, name)

        def counted(self: Any, *args: Tensor) -> Any:
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(kind, name, counted)

    for kind in (LinearLayer, ConvLayer):
        count(kind, "factor_sums")
        count(kind, "gradient")
    count(Layout, "batched")
    model = conv_net()
    optimizer = library(model, curvature_interval=4)
    due_steps = 0
    for seed in range(40):
        due = optimizer.curvature_due
        due_steps += due
        before = dict(calls)
        train_step(model, optimizer, *batch(6, seed, IMAGE))
        did = {name: calls[name] - before[name] for name in calls}
        pair = library is FOP
        # With statistics the second half is computed too, to compare the sum with p.grad.
        gradients = 3 * pair * (1 + due)
        assert did == {"factor_sums": 3 * due, "gradient": gradients, "batched": 6 * (due or pair)}
    assert 10 < due_steps < 30


# --- copies ------------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "save"])
@pytest.mark.parametrize("build", [mlp, Attentive])
def test_copies_of_the_model_never_feed_the_optimizer(
    build: Callable[[], nn.Module], copied: Callable[[nn.Module], nn.Module], bare: bool
) -> None:
    data = sentences if build is Attentive else batch

    def run(disturbed: bool) -> tuple[Any, Any]:
        model = build()
        optimizer = FOP(model.parameters() if bare else model, curvature_interval=1)
        for seed in range(4):
            optimizer.zero_grad()
            loss = loss_of(model, *data(6, seed))
            if disturbed:
                twin = copied(model)
                own = FOP(twin) if seed % 2 else torch.optim.SGD(twin.parameters(), lr=0.1)
                before = weights(twin)
                loss_of(twin, *data(4, seed + 20)).backward()
            loss.backward()
            if disturbed:
                loss_of(twin, *data(4, seed + 30)).backward()
                own.step()
                assert_differs(weights(twin), before)
            optimizer.step()
        return weights(model), snapshot(optimizer)

    assert_equal(run(disturbed=True), run(disturbed=False))
