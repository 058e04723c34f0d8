"""Copies of a model work anywhere and never feed the optimizer; what is kept alive, and what is left."""

from __future__ import annotations

import copy
import gc
import pickle
import pickletools
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.hooks import RemovableHandle

from fop import FOP, KFAC
from internals import Batch, ConvLayer, Layer, LinearLayer
from models import assert_differs, assert_equal, batch, conv_net, mlp, snapshot, train_step, weights
from reference import half_squared_error

OPTIONS: dict[str, Any] = {"lr": 0.05, "damping": 1e-2, "curvature_interval": 3}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(40, 3),
    )


def tied() -> nn.Module:
    """Token embedding tied to the head."""
    embed, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embed.weight
    return nn.Sequential(embed, nn.Linear(4, 4), nn.Tanh(), head)


def attention() -> nn.Module:
    return nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    )


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 6, 5, dtype=torch.float64)


def ids(n: int) -> Tensor:
    return torch.randint(9, (n, 5))


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, 4, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutional": (convolutional, images),
    "tied": (tied, ids),
    "attention": (attention, sequences),
}
models = pytest.mark.parametrize("kind", MODELS)


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind][0]().double()


def inputs(kind: str, seed: int, n: int = 6) -> Tensor:
    torch.manual_seed(seed)
    return MODELS[kind][1](n)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - 1).square().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, seeds: Any) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, inputs(kind, seed)).backward()
        optimizer.step()


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {"deepcopy": copy.deepcopy, "pickle": pickled}


# --- copies ------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize(("way", "bare"), [("deepcopy", False), ("deepcopy", True), ("pickle", True)])
def test_copy_never_feeds_the_optimizer(kind: str, way: str, bare: bool) -> None:
    """Copies made before, between and after forward and backward train on, in the middle of every step."""

    def run(disturbed: bool) -> tuple[Any, Any]:
        model = make(kind)
        optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
        for seed in range(4):
            twins = [COPIES[way](model)] if disturbed else []
            optimizer.zero_grad()
            loss = loss_of(model, inputs(kind, seed))
            if disturbed:
                twins.append(COPIES[way](model))
                loss_of(twins[0], inputs(kind, seed + 20, 4)).backward()
            loss.backward()
            for twin in twins:
                before = weights(twin)
                own = torch.optim.SGD(twin.parameters(), lr=0.1)
                train(twin, own, kind, [seed + 30])
                assert_differs(weights(twin), before)
            optimizer.step()
        return weights(model), snapshot(optimizer)

    assert_equal(run(disturbed=True), run(disturbed=False))


@models
def test_copy_in_the_backward_pass_of_the_model(kind: str) -> None:
    """As a teacher's in distillation."""

    def run(together: bool) -> tuple[Any, Any]:
        model = make(kind)
        optimizer = FOP(model, **OPTIONS)
        twin = copy.deepcopy(model)
        for seed in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, inputs(kind, seed))
            if together:
                loss = loss + loss_of(twin, inputs(kind, seed + 20, 4))
            loss.backward()
            optimizer.step()
        return weights(model), snapshot(optimizer)

    assert_equal(run(together=True), run(together=False))


@models
@pytest.mark.parametrize("way", COPIES)
def test_copy_trains_by_an_optimizer_of_its_own(kind: str, way: str) -> None:
    """As a model that never had another: hooks that came along do nothing, and none are missing."""
    model = make(kind)
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, kind, range(3))
    twin, fresh = COPIES[way](model), make(kind)
    fresh.load_state_dict(model.state_dict())
    for net in (twin, fresh):
        train(net, FOP(net, **OPTIONS), kind, range(3, 8))
    assert_equal(weights(twin), weights(fresh))


@models
def test_copy_gives_what_the_model_gives(kind: str) -> None:
    model = make(kind)
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, kind, range(3))
    model.eval()
    x = inputs(kind, 9)
    for twin in (copy.deepcopy(model), pickled(model), pickled(copy.deepcopy(model))):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
        # Tied stays tied.
        assert len(list(twin.parameters())) == len(list(model.parameters()))


@models
@pytest.mark.parametrize("average", ["by hand", "mean", "ema"])
def test_averages(kind: str, average: str) -> None:
    """`AveragedModel` with its learning rate, or the loop of many scripts; evaluated between the steps."""

    def run(averaged: bool) -> tuple[nn.Module, Any, list[dict[str, Tensor]]]:
        model = make(kind)
        optimizer = FOP(model, **OPTIONS)
        train(model, optimizer, kind, [50])
        path, follower = [], None
        if averaged and average == "by hand":
            follower = copy.deepcopy(model).eval().requires_grad_(False)
            path.append(weights(model))
        elif averaged:
            function = None if average == "mean" else get_ema_multi_avg_fn(0.9)
            follower = AveragedModel(model, multi_avg_fn=function)
        schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
        for seed in range(4):
            train(model, optimizer, kind, [seed])
            path.append(weights(model))
            if isinstance(follower, AveragedModel):
                follower.update_parameters(model)
                follower(inputs(kind, seed + 60)).sum().backward()
            elif follower is not None:
                with torch.no_grad():
                    for mean, param in zip(follower.parameters(), model.parameters(), strict=True):
                        mean.lerp_(param, 0.1)
                    follower(inputs(kind, seed + 60))
            schedule.step()
        if isinstance(follower, AveragedModel):
            update_bn([inputs(kind, seed) for seed in range(3)], follower)
        train(model, optimizer, kind, [5])
        return model, follower, path

    (model, follower, path), (other, _, _) = run(averaged=True), run(averaged=False)
    assert_equal(weights(model), weights(other))
    for name, mean in getattr(follower, "module", follower).named_parameters():
        expected = path[0][name]
        for count, step in enumerate(path[1:], start=2):
            share = 1 / count if average == "mean" else 0.1
            expected = (1 - share) * expected + share * step[name]
        torch.testing.assert_close(mean.detach(), expected)
    assert torch.isfinite(follower.eval()(inputs(kind, 70))).all()


# --- files -------------------------------------------------------------------------------------------------

LOADS = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name == "fop" or name.startswith("fop."):
            raise ImportError("fop is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
for path in sys.argv[1:]:
    model, x, y = torch.load(path, weights_only=False)
    model.eval()
    assert torch.equal(model(x), y), path
    model.train()
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.eval()(x), y), path
    torch.save(model, path)
assert not [name for name in sys.modules if name.split(".")[0] == "fop"]
"""


@models
def test_saved_model_names_no_class_of_the_library(kind: str, tmp_path: Path) -> None:
    """So it can be loaded where fop is not installed; `test_saved_model_needs_no_library` does it."""
    model = make(kind)
    optimizer = FOP(model.parameters(), **OPTIONS)
    train(model, optimizer, kind, range(2))
    torch.save(model, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        named = {
            str(arg).split(" ")[0] for _, arg, _ in pickletools.genops(file.read(name)) if arg is not None
        }
    assert "torch.nn.modules.container" in named
    assert not [module for module in named if module.split(".")[0] == "fop"]


@models
@pytest.mark.parametrize("bare", [False, True])
def test_model_of_another_process_trains_as_its_copy(
    kind: str, bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There numbers of hooks begin at 0 again, and hooks of here may have those of the pickled ones."""
    # Above those of hooks that live here.
    start = RemovableHandle.next_id + 1000
    monkeypatch.setattr(RemovableHandle, "next_id", start)
    model = make(kind)
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, kind, range(2))
    saved, twin = pickle.dumps(model), copy.deepcopy(model)
    train(twin, FOP(twin, **OPTIONS), kind, range(3))
    for first in range(10):
        monkeypatch.setattr(RemovableHandle, "next_id", start + first)
        loaded = pickle.loads(saved)
        train(loaded, FOP(loaded.parameters() if bare else loaded, **OPTIONS), kind, range(3))
        assert_equal(weights(loaded), weights(twin))


@pytest.mark.slow
def test_saved_model_needs_no_library(tmp_path: Path) -> None:
    """It is loaded, run, trained and saved again where fop cannot be imported; and then used here."""
    cases = [(kind, bare) for kind in MODELS for bare in (False, True)]
    for kind, bare in cases:
        model = make(kind)
        optimizer = FOP(model.parameters() if bare else model, **OPTIONS)
        train(model, optimizer, kind, range(2))
        x = inputs(kind, 9)
        torch.save((model.eval(), x, model(x).detach()), tmp_path / f"{kind}-{bare}.pt")
    # One process for all: importing torch is what takes the time.
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *sorted(map(str, tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind, bare in cases:
        twin = torch.load(tmp_path / f"{kind}-{bare}.pt", weights_only=False).train()
        before = weights(twin)
        train(twin, FOP(twin, **OPTIONS), kind, range(2))
        assert_differs(weights(twin), before)


# --- dropping the optimizer --------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Every hook on every module and parameter, and the global ones."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hook" in key and isinstance(value, dict):
                found[f"{name}.{key}"] = list(value.values())
    for name, param in model.named_parameters():
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{key}"] = list((getattr(param, key, None) or {}).values())
    for key, value in vars(nn.modules.module).items():
        if key.startswith("_global") and "hook" in key and isinstance(value, dict):
            found[key] = list(value.values())
    return found


@models
@pytest.mark.parametrize(
    ("library", "bare", "steps"), [(FOP, False, 2), (FOP, True, 2), (KFAC, True, 2), (FOP, True, 0)]
)
def test_dropping_the_optimizer_frees_everything(
    kind: str, library: type[FOP], bare: bool, steps: int
) -> None:
    """Itself, its state and its hooks, without the garbage collector; the user's own hooks stay."""
    model = make(kind)
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("forward"))
    next(model.parameters()).register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    before = hooks_of(model)
    assert any(before.values())
    gc.collect()
    gc.disable()
    try:
        optimizer = library(model.parameters() if bare else model, **OPTIONS)
        train(model, optimizer, kind, range(steps))
        assert hooks_of(model) != before
        if steps:  # all owners are known
            found = hooks_of(model)
            assert not any(found[key] != before[key] for key in found if key.startswith("_global"))
        tensors = [
            weakref.ref(value)
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        assert len(tensors) > 10 or steps == 0
        refs = [weakref.ref(optimizer), *tensors]
        del optimizer
        assert [ref for ref in refs if ref() is not None] == []
    finally:
        gc.enable()
    assert hooks_of(model) == before
    loss_of(model, inputs(kind, 1)).backward()
    assert {"forward", "gradient"} <= set(seen)


@models
def test_dropping_between_forward_and_backward(kind: str) -> None:
    """The graph that is left computes its gradients, and no error."""
    model, twin = make(kind), make(kind)
    optimizer = FOP(model, **OPTIONS)
    loss = loss_of(model, inputs(kind, 0))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss.backward()
    loss_of(twin, inputs(kind, 0)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@models
def test_one_optimizer_after_the_other(kind: str) -> None:
    """A script that makes a new optimizer for each phase: no hooks pile up, nothing of the first is left."""
    model = make(kind)
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, kind, range(2))
    count = {key: len(hooks) for key, hooks in hooks_of(model).items()}
    for _ in range(3):
        optimizer = None  # type: ignore[assignment]
        optimizer = FOP(model, **OPTIONS)
        train(model, optimizer, kind, range(2))
        assert {key: len(hooks) for key, hooks in hooks_of(model).items()} == count


@models
def test_model_dies_before_its_optimizer(kind: str) -> None:
    """The optimizer holds parameters, as any other does, but not the modules."""
    model = make(kind)
    optimizer = FOP(model, **OPTIONS)
    train(model, optimizer, kind, range(2))
    modules = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [ref for ref in modules if ref() is not None] == []
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(optimizer.summary().rows) == len(held)
    before = [param.detach().clone() for param in held]
    optimizer.step()
    assert all(torch.isfinite(param).all() for param in held)
    assert not any(torch.equal(param, old) for param, old in zip(held, before, strict=True))


# --- activations -------------------------------------------------------------------------------------------


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
        x, y = batch(shape=(2, 5, 6))
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


# --- statistics only when due ------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [FOP, KFAC])
def test_statistics_cost_nothing_when_not_due(library: type[FOP], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"factor_sums": 0, "gradients": 0, "layout": 0}

    def count(kind: type[Layer] | type[Batch], name: str) -> None:
        original = getattr(kind, name)

        def counted(self: Any, *args: Tensor, **options: Any) -> Any:
            calls[name] += 1
            return original(self, *args, **options)

        monkeypatch.setattr(kind, name, counted)

    for kind in (LinearLayer, ConvLayer):
        count(kind, "factor_sums")
        count(kind, "gradients")
    count(Batch, "layout")
    model = conv_net()
    optimizer = library(model, curvature_interval=4)
    due_steps = 0
    for seed in range(40):
        due = optimizer.curvature_due
        due_steps += due
        before = dict(calls)
        train_step(model, optimizer, *batch(6, seed, (2, 5, 6)))
        did = {name: calls[name] - before[name] for name in calls}
        pair = library is FOP
        # Those of the three runs of samples are together what autograd would have computed.
        assert did == {"factor_sums": 3 * due, "gradients": 9 * pair, "layout": 3 * (due or pair)}
    assert 10 < due_steps < 30
