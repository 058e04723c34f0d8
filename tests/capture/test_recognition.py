"""A layer is what it computes: functions train a weight as the module of torch that computes the same."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils.checkpoint import checkpoint

from fop import FOP
from internals import function_watches
from models import PLAIN, Own, assert_equal, loss_of, train_step, weights
from reference import correct, dense_damped_fisher, dense_fisher, split, unvec, vec

Build = Callable[..., nn.Module]


# --- spellings of one layer --------------------------------------------------------------------------------


class Casted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Halved(nn.Linear):
    """Keeps its weight in another precision than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float()).double()


class Extended(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Keywords(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(bias=self.bias, weight=self.weight, input=x)


class Outside(nn.Module):
    """Uses the weight of a module that is never called."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class Helped(Own):
    """Calls a function of its own between the module and torch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(x)

    def _apply_weight(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Listed(nn.Module):
    """Keeps weight and bias in a list."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        inner = nn.Linear(*sizes)
        self.both = nn.ParameterList([inner.weight, inner.bias])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.both[0], self.both[1])


class Added(Own):
    """GPT-2's way: the weight is (in, out)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.data.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def replaced(*sizes: int) -> nn.Module:
    """A module whose forward somebody has wrapped, as accelerate does."""
    module = nn.Linear(*sizes)
    inner = module.forward
    module.forward = lambda x: inner(x)  # type: ignore[method-assign]
    return module


LINEAR: dict[str, Build] = {
    build.__name__: build
    for build in (Casted, Extended, Keywords, Outside, Own, Helped, Listed, Added, replaced)
}


class Product(nn.Module):
    """A product of matrices, without a bias."""

    def __init__(self, inputs: int, outputs: int, spelling: str) -> None:
        super().__init__()
        weight = nn.Linear(inputs, outputs).weight.data
        self.by_columns = not spelling.endswith("T")
        self.table = nn.Parameter(weight.T.contiguous() if self.by_columns else weight)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        spellings: dict[str, Callable[[Any, Any], Tensor]] = {
            "x @ W": lambda x, W: x @ W,
            "x @ W.T": lambda x, W: x @ W.T,
            "matmul(x, W)": torch.matmul,
            "x.mm(W)": lambda x, W: x.mm(W),
            "linear(x, W.T) .T": lambda x, W: F.linear(x, W),
            "linear(x, W.T)": lambda x, W: F.linear(x, W.T),
        }
        return spellings[self.spelling](x, self.table)


PRODUCTS = ("x @ W", "x @ W.T", "matmul(x, W)", "x.mm(W)", "linear(x, W.T)")


class OwnConv(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        inner = conv(transposed)
        self.kernels, self.shift = nn.Parameter(inner.weight.data), nn.Parameter(inner.bias.data)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            return F.conv_transpose2d(x, self.kernels, self.shift, 2, 1, 1, 2)
        return F.conv2d(x, self.kernels, self.shift, stride=(2, 1), padding=1, dilation=1, groups=2)


class CalledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.clone(), self.bias)


def conv(transposed: bool) -> nn.Module:
    if transposed:
        return nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)
    return nn.Conv2d(4, 6, 3, (2, 1), 1, groups=2)


class OwnTable(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx) * 2.0


class ScaledTable(nn.Module):
    """What `OwnTable` computes, by a module of torch."""

    def __init__(self, *sizes: int, padding_idx: int) -> None:
        super().__init__()
        self.table = nn.Embedding(*sizes, padding_idx=padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids) * 2.0
        return out


def stack(layer: Build, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    parts = [layer(5, 6, *args), nn.Tanh(), layer(6, 6, *args), nn.Tanh(), layer(6, 3, *args)]
    return nn.Sequential(*parts).double()


def images(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()


def ids(seed: int) -> Tensor:
    return torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(seed))


def vectors(seed: int) -> Tensor:
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int) -> Tensor:
    return torch.randn(8, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(
    model: nn.Module, inputs: Callable[[int], Tensor], bare: bool = False, steps: int = 6
) -> tuple[list[Tensor], FOP]:
    """Outputs after every step, with two batches a step now and then."""
    torch.manual_seed(0)
    with torch.no_grad():
        target = torch.randn_like(model(inputs(0)))
    optimizer = FOP(
        model.parameters() if bare else model, **{**PLAIN, "momentum": 0.5, "curvature_interval": 2}
    )
    found = []
    for step in range(steps):
        train_step(model, optimizer, inputs(step), target)
        found.append(model(inputs(99)).detach())
    return found, optimizer


def assert_trains_like(
    model: nn.Module, other: nn.Module, inputs: Callable[[int], Tensor], bare: bool = False
) -> FOP:
    """The same outputs as another model after every step, and a pair in every step."""
    expected, _ = trained(other, inputs)
    found, optimizer = trained(model, inputs, bare)
    for one, each in zip(expected, found, strict=True):
        torch.testing.assert_close(each, one, rtol=1e-9, atol=1e-11)
    diagnosed = optimizer.diagnostics().layers.values()
    assert diagnosed and all(layer.kfac_steps == 0 for layer in diagnosed)
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}
    return optimizer


@pytest.mark.parametrize("bare", [False, True], ids=["model", "parameters"])
@pytest.mark.parametrize("spelling", LINEAR)
def test_linear(spelling: str, bare: bool) -> None:
    optimizer = assert_trains_like(stack(LINEAR[spelling]), stack(nn.Linear), vectors, bare)
    reasons = {row.reason for row in optimizer.summary().rows}
    function = "addmm" if spelling == "Added" else "F.linear"
    where = "Linear" if spelling == "replaced" else spelling
    assert reasons == ({"Linear"} if spelling == "Outside" else {f"{function} in {where}"})


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_product(spelling: str) -> None:
    other = stack(lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False))
    model = stack(Product, spelling)
    copied = [layer.weight for layer in other if isinstance(layer, nn.Linear)]  # type: ignore[attr-defined]
    for layer, weight in zip((layer for layer in model if isinstance(layer, Product)), copied, strict=True):  # type: ignore[attr-defined]
        layer.table.data = weight.data.T.clone() if layer.by_columns else weight.data.clone()
    assert_trains_like(model, other, vectors)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(transposed: bool) -> None:
    models = images(lambda: OwnConv(transposed)), images(lambda: conv(transposed))
    for model in models:
        model(pictures(0))
    models[0].load_state_dict(dict(zip(models[0].state_dict(), models[1].state_dict().values(), strict=True)))
    optimizer = assert_trains_like(*models, pictures)
    function = "conv_transpose2d" if transposed else "conv2d"
    assert optimizer.summary().rows[0].reason == f"F.{function} in OwnConv"


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_subclass_of_a_convolution(mode: str) -> None:
    models = [
        images(lambda kind=kind: kind(4, 3, 3, padding=1, padding_mode=mode))
        for kind in (CalledConv, nn.Conv2d)
    ]  # type: ignore[misc]
    for model in models:
        model(pictures(0))
    models[0].load_state_dict(models[1].state_dict())
    assert_trains_like(models[0], models[1], pictures)


def test_embedding() -> None:
    def model(table: Build) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(table(7, 5, padding_idx=0), nn.Flatten(), nn.Linear(20, 3)).double()

    assert_trains_like(model(OwnTable), model(ScaledTable), ids)


class Twice(Own):
    """One weight in two calls of a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight, self.bias)


class TwiceCalled(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(torch.tanh(self.inner(x)))
        return out


def test_several_uses() -> None:
    def model(twice: Build) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(twice(5, 5), nn.Linear(5, 3)).double()

    assert_trains_like(model(Twice), model(TwiceCalled), vectors)


def test_use_in_two_modules() -> None:
    """One weight, a module that owns it and another that uses it by a function around a call of that."""

    class Both(nn.Module):
        def __init__(self, by_function: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.by_function = nn.Linear(5, 5), nn.Linear(5, 3), by_function

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            x = F.linear(x, self.first.weight, self.first.bias) if self.by_function else self.first(x)
            out: Tensor = self.last(torch.tanh(x))
            return out

    class Tables(nn.Module):
        """The backward pass of an embedding is autograd's, that of a linear layer the library's."""

        def __init__(self, by_function: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.last, self.by_function = nn.Embedding(7, 5), nn.Linear(5, 3), by_function

        def forward(self, ids: Tensor) -> Tensor:
            x, other = self.table(ids), 6 - ids
            x = x * (F.embedding(other, self.table.weight) if self.by_function else self.table(other))
            out: Tensor = self.last(torch.tanh(x))
            return out

    assert_trains_like(Both(True).double(), Both(False).double(), vectors)
    assert_trains_like(Tables(True).double(), Tables(False).double(), ids)


def test_owner_that_is_an_empty_container() -> None:
    """It counts as False, and is there all the same."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = nn.Sequential()
            self.holder.register_parameter("weight", nn.Parameter(torch.randn(3, 5, dtype=torch.float64)))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.holder.get_parameter("weight"))

    model = Net()
    optimizer = FOP(model, **PLAIN)
    train_step(model, optimizer, vectors(0), torch.zeros(8, 3, dtype=torch.float64))
    assert [row.path for row in optimizer.summary().rows] == ["FOP"]


# --- weights that are computed -----------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean(1, keepdim=True), self.weight.std(1, keepdim=True)
        return F.linear(x, (self.weight - mean) / std)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


def scaled(inputs: int, outputs: int) -> nn.Module:
    return Scaled(inputs, outputs, bias=False)


def standardised(inputs: int, outputs: int) -> nn.Module:
    return Standardised(inputs, outputs, bias=False)


def weight_norm(inputs: int, outputs: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(inputs, outputs, bias=False))


def gradient_of(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    param = model.get_parameter(name)
    (found,) = torch.autograd.grad(loss_of(model, x, y), param)
    return found.flatten(1)[None]


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[int], Tensor]]] = {
    "scale": (lambda: stack(scaled), "2.weight", vectors),
    "standardised": (lambda: stack(standardised), "2.weight", vectors),
    "weight norm": (lambda: stack(weight_norm), "2.parametrizations.weight.original1", vectors),
    "convolution": (
        lambda: nn.Sequential(StandardisedConv(4, 3, 3, bias=False), nn.Flatten(), nn.Linear(36, 3)).double(),
        "0.weight",
        pictures,
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight(kind: str) -> None:
    """The step is that of the weight's own sub-batch gradients, with A of the inputs and G scaled by rows."""
    build, name, inputs = COMPUTED[kind]
    torch.manual_seed(0)
    model = build()
    optimizer = FOP(model, **PLAIN)
    x, y = inputs(1), torch.randn(8, 3, dtype=torch.float64)
    for _ in range(2):
        twin = copy.deepcopy(model)
        train_step(model, optimizer, x, y)
    (row,) = (row for row in optimizer.summary().rows if row.name == name)
    assert row.path == "FOP" and "of a computed weight in" in row.reason
    Ga = gradient_of(twin, name, x, y)
    g1, g2 = (gradient_of(twin, name, x[part], y[part]) for part in split(8))
    held = optimizer.state[model.get_parameter(name)]
    F_, F_hat = (
        dense_fisher(held["A"], held["G"]),
        dense_damped_fisher(held["A"], held["G"], PLAIN["damping"]),
    )
    expected = correct(F_, F_hat, vec(Ga), vec(g1 - g2), PLAIN["beta"], PLAIN["eta"]).direction
    moved = (twin.get_parameter(name) - model.get_parameter(name)).detach().flatten(1)[None] / PLAIN["lr"]
    error = float((moved - unvec(expected, like=Ga)).norm() / moved.norm())
    assert error < 1e-9, f"{error:.1e}"


def test_scaled_weight_has_the_curvature_of_the_weight() -> None:
    """With f(W) = c W the factors are A and c² G of the same layer without a scale."""
    torch.manual_seed(0)
    model, plain = nn.Sequential(scaled(5, 3)).double(), nn.Linear(5, 3, bias=False).double()
    plain.weight.data = 0.3 * model[0].weight.data
    x, y = vectors(1), torch.randn(8, 3, dtype=torch.float64)
    held = []
    for each in (model, plain):
        optimizer = FOP(each, **PLAIN)
        train_step(each, optimizer, x, y)
        held.append(optimizer.state[next(each.parameters())])
    torch.testing.assert_close(held[0]["A"], held[1]["A"])
    torch.testing.assert_close(held[0]["G"], 0.3**2 * held[1]["G"])


# --- what is not recognised --------------------------------------------------------------------------------


class Strange(nn.Module):
    """A weight in a function that is no layer, one that is only added, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixing = nn.Parameter(torch.randn(5, 4))
        self.position = nn.Parameter(torch.randn(1, 4))
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.einsum("ni,io->no", x, self.mixing) + self.position)
        return out


def steps_of(model: nn.Module, count: int = 3, **options: Any) -> tuple[FOP, list[str]]:
    optimizer = FOP(model, **PLAIN, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(count):
            train_step(model, optimizer, vectors(step), torch.zeros(8, 3, dtype=torch.float64))
    return optimizer, [str(each.message) for each in caught]


def test_weight_of_another_function_is_named_once() -> None:
    optimizer, messages = steps_of(Strange())
    assert len(messages) == 1 and "mixing: used by einsum" in messages[0] and "position" not in messages[0]
    rows = {row.name: row for row in optimizer.summary().rows}
    factors = "no Kronecker factors for Strange"
    assert (rows["mixing"].path, rows["mixing"].reason) == ("AdamW", f"{factors}; used by einsum")
    assert (rows["position"].path, rows["position"].reason) == ("AdamW", f"{factors}; used by add")
    assert rows["head.weight"].path == "FOP"


class Experts(nn.Module):
    """Weights of several layers in one parameter."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.spelling = nn.Parameter(torch.randn(2, 3, 5)), spelling
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "bmm":
            return torch.bmm(x.expand(2, *x.shape), self.experts.transpose(1, 2)).sum(0)
        return F.linear(x, self.experts[0]) + F.linear(x, self.experts[1])


@pytest.mark.parametrize(("spelling", "seen"), [("bmm", "bmm, transpose"), ("linear", "linear")])
def test_weights_of_experts_are_named(spelling: str, seen: str) -> None:
    optimizer, messages = steps_of(Experts(spelling))
    assert optimizer.summary().rows[0].path == "AdamW" and seen in optimizer.summary().rows[0].reason
    assert len(messages) == 1 and "experts" in messages[0]


def test_user_who_knows_is_not_warned() -> None:
    _, messages = steps_of(Strange(), layer_options={"": {"path": "adamw"}})
    assert messages == []


def test_function_outside_the_model() -> None:
    """Nobody sees what a script does with a parameter between the calls of modules."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    model.register_parameter("out", nn.Parameter(torch.randn(3, 4, dtype=torch.float64)))
    optimizer = FOP(model, **PLAIN)
    F.linear(model(vectors(0)), model.out).square().mean().backward()  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="out: no function that FOP knows was seen to use it"):
        optimizer.step()
    assert {row.name: row.path for row in optimizer.summary().rows}["out"] == "AdamW"


def test_compiled_model_has_its_own_classes_only() -> None:
    """Functions cannot be seen in a graph: a warning names the weight; torch's own classes take FOP."""
    model = nn.Sequential(Own(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = FOP(model, **PLAIN)
    with pytest.warns(UserWarning, match="0.weight: functions are not seen under torch.compile"):
        train_step(compiled, optimizer, vectors(0), torch.zeros(8, 3, dtype=torch.float64))  # type: ignore[arg-type]
    assert [row.path for row in optimizer.summary().rows] == ["AdamW", "AdamW", "FOP", "FOP"]
    assert function_modes() == []


@pytest.mark.parametrize("rate", [nn.LSTM, nn.Bilinear])
def test_layers_of_torch_without_factors_do_not_warn(rate: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part: Any = nn.LSTM(5, 3, batch_first=True) if rate is nn.LSTM else nn.Bilinear(5, 5, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.part(x[:, None])[0][:, 0] if rate is nn.LSTM else self.part(x, x)
            return out

    assert steps_of(Net())[1] == []


class Phases(nn.Module):
    """Some heads take part only from a later step on."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads, self.head = Own(5, 4), nn.ModuleList(Own(4, 3) for _ in range(heads)), 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads[self.head](torch.tanh(self.trunk(x)))
        return out


@pytest.mark.parametrize("heads", [[0] * 3 + [1] * 3, [0] * 20 + [1] * 3, [*range(40)] * 3])
def test_parameter_that_is_used_later(heads: list[int]) -> None:
    """It is recognised when it is used, also after nobody looked any more; nobody is warned."""
    net = Phases(max(heads) + 1)
    optimizer = FOP(net, **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, head in enumerate(heads):
            net.head = head
            train_step(net, optimizer, vectors(step), torch.zeros(8, 3, dtype=torch.float64))
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}


def test_weight_that_is_thawed_later() -> None:
    """A part that is frozen, and not used, while the rest begins to train."""
    net = Phases(2)
    net.heads[1].requires_grad_(False)
    optimizer = FOP(net, **PLAIN)
    for step in range(5):
        if step == 3:
            net.heads[1].requires_grad_(True)
            net.head = 1
        train_step(net, optimizer, vectors(step), torch.zeros(8, 3, dtype=torch.float64))
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}


# --- what is no layer of samples, or is seen late ----------------------------------------------------------


class Routed(nn.Module):
    """Its second part sees some of the samples only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all, self.some = Own(5, 3), Own(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.all(x) + F.pad(self.some(x[:6]), (0, 0, 0, len(x) - 6))
        return out


class Attentive(nn.Module):
    """Products of activations, which positions are a part of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.position, self.key, self.head = nn.Parameter(torch.randn(8, 5)), Own(5, 4), Own(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x + self.position)
        out: Tensor = self.head(key @ key.T)
        return out


def test_parameter_in_a_product_of_activations_is_no_weight() -> None:
    optimizer, messages = steps_of(Attentive())
    assert messages == [] and optimizer.summary().rows[0].reason.endswith("used by add")


@pytest.mark.parametrize("bare", [False, True], ids=["model", "parameters"])
@pytest.mark.parametrize("told", [False, True])
def test_first_pass_knows_its_batch(bare: bool, told: bool) -> None:
    """Though no module's class told that anything must be recorded."""
    model = Routed()
    size = (lambda x: len(x)) if told else None
    optimizer = FOP(model.parameters() if bare else model, **PLAIN, batch_size=size)
    train_step(model, optimizer, vectors(0), torch.zeros(8, 3, dtype=torch.float64))
    found = optimizer.diagnostics().layers
    assert "for a batch of 8" in str(found["some"].why_kfac) and found["all"].kfac_steps == 0


class Adapted(nn.Module):
    """A weight with an adapter, merged in every pass."""

    def __init__(self, *sizes: int, trained: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(*sizes).requires_grad_(trained)
        inputs, outputs = sizes
        self.A, self.B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.B @ self.A, self.base.bias)


class Merged(nn.Module):
    """A parametrization that adds an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def merged() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(5, 3), "weight", Merged())


@pytest.mark.parametrize(
    ("build", "taken", "named"),
    [
        (lambda: Adapted(5, 3), set(), {"A", "B"}),
        (lambda: Adapted(5, 3, trained=True), {"base.weight"}, {"A", "B"}),
        (merged, {"parametrizations.weight.original"}, {"A", "B"}),
        (lambda: parametrizations.orthogonal(nn.Linear(5, 3)), set(), {"parametrizations.weight.original"}),
    ],
    ids=["adapter", "adapter of a trained weight", "parametrization", "orthogonal"],
)
def test_product_that_computes_a_weight_is_no_layer(build: Build, taken: set[str], named: set[str]) -> None:
    """What it is a product of takes AdamW, with one warning."""
    torch.manual_seed(0)
    optimizer, messages = steps_of(build().double(), 4)
    rows = {row.name: row for row in optimizer.summary().rows}
    frozen = {name for name, row in rows.items() if "frozen" in row.reason}
    assert {name for name, row in rows.items() if row.path == "FOP"} - frozen == taken
    assert len(messages) == 1 and all(f"{name}: " in messages[0] for name in named)
    assert all(layer.why_kfac is None for layer in optimizer.diagnostics().layers.values())


class Projected(nn.Module):
    """WavLM's attention: projections are modules, whose weights one function is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        weights = {f"{name}_proj_weight": getattr(self, f"{name}_proj").weight for name in "qkv"}
        out = self.out_proj.weight, self.out_proj.bias
        parts = (None, biases, None, None, False, 0.0, *out)
        use = {"use_separate_proj_weight": True, "need_weights": False, **weights}
        return F.multi_head_attention_forward(x, x, x, 4, 2, *parts, **use)[0].transpose(0, 1)


def test_modules_that_only_hold_weights() -> None:
    """From the step after that in which nobody saw them run; the biases are not the function's."""
    model = Projected()
    optimizer = FOP(model, **PLAIN)
    for step in range(4):
        x = torch.randn(8, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        train_step(model, optimizer, x, torch.zeros_like(x))
    rows = {row.name: (row.path, row.reason) for row in optimizer.summary().rows}
    for name in "qkv":
        assert rows[f"{name}_proj.weight"] == ("FOP", "F.linear in Projected")
        assert rows[f"{name}_proj.bias"] == ("AdamW", "not the bias of F.linear in Projected")
        assert optimizer.diagnostics().layers[f"{name}_proj"].kfac_steps == 0
    assert rows["out_proj.bias"][0] == "FOP"


def sliced(model: nn.Module, x: Tensor) -> Tensor:
    """Parts of a weight whose module is not called."""
    query, key = model[0].weight.chunk(2)  # type: ignore[index]
    return F.linear(x, query) * F.linear(x, key)


def replaced_by(scale: float) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        tensors = {name: param * scale for name, param in model.named_parameters()}
        out: Tensor = torch.func.functional_call(model, tensors, (x,))
        return out

    return call


def mapped(model: nn.Module, x: Tensor) -> Tensor:
    """One sample at a time, by torch.func."""
    return torch.func.vmap(model)(x)


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize(
    ("call", "bare"),
    [(sliced, False), *itertools.product((replaced_by(0.5), mapped), (False, True))],
)
def test_weight_that_nobody_sees_in_use(
    call: Callable[[nn.Module, Tensor], Tensor], kind: Build, bare: bool
) -> None:
    """AdamW, with one warning that names it, also where a module's class says that it is a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(5, 6)).double()
    optimizer = FOP(model.parameters() if bare else model, **PLAIN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            optimizer.zero_grad()
            call(model, vectors(step)).square().mean().backward()
            optimizer.step()
    assert optimizer.summary().rows[0].path == "AdamW"
    (message,) = [str(each.message) for each in caught if "may be weights" in str(each.message)]
    assert "0.weight: " in message or "a parameter (6, 5): belongs to no module" in message
    assert function_modes() == []


def test_pass_with_other_tensors_comes_first() -> None:
    """The owners of bare parameters are found in the first pass in which modules have them."""
    model = stack(Own)
    optimizer = FOP(model.parameters(), **PLAIN)
    replaced_by(0.5)(model, vectors(0))
    torch.func.vmap(lambda x: torch.func.functional_call(model, {}, (x,)))(vectors(0))
    train_step(model, optimizer, vectors(0), torch.zeros(8, 3, dtype=torch.float64))
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}


class Members(nn.Module):
    """An ensemble by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.members = nn.Parameter(torch.randn(4, 3, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda weight: F.linear(x, weight))(self.members).mean(0)


def test_what_gives_no_gradient_is_no_use() -> None:
    """Such as a look at the shape: the weight is named all the same."""
    _, messages = steps_of(Members())
    assert len(messages) == 1 and "members: no function that FOP knows" in messages[0]


class Loose(nn.Module):
    """A module that is never called, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.table = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))
        self.double()


def test_weight_of_a_module_that_is_never_called() -> None:
    model = Loose()
    optimizer = FOP(model.named_parameters(), **PLAIN)
    F.linear(model.part(vectors(0)), model.table).square().mean().backward()
    with pytest.warns(UserWarning, match="table: belongs to no module that was called"):
        optimizer.step()


@pytest.mark.parametrize("root", [False, True])
def test_scripted(root: bool) -> None:
    """What torch.jit.script runs takes no hooks: AdamW, with one warning."""
    torch.manual_seed(0)
    inner = torch.jit.script(nn.Sequential(nn.Linear(5, 4)).double())
    model = inner if root else nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = FOP(model, **PLAIN)
    with pytest.warns(UserWarning, match=r"0\.weight: ") as caught:
        for step in range(3):
            optimizer.zero_grad()
            model(vectors(step)).square().mean().backward()
            optimizer.step()
    assert sum("may be weights" in str(each.message) for each in caught) == 1
    rows = optimizer.summary().rows
    assert [row.path for row in rows] == ["AdamW"] * 2 + ([] if root else ["FOP"] * 2)
    assert "torch.jit.script runs its module" in rows[0].reason


class Turned(nn.Module):
    """A real weight in a product of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * 1j, self.weight.to(torch.complex128)).imag


def test_real_weight_in_a_complex_product() -> None:
    optimizer, messages = steps_of(Turned())
    assert optimizer.summary().rows[0].path == "AdamW"
    assert len(messages) == 1 and "weight: used by linear" in messages[0]


def test_replaced_parameter_of_a_function() -> None:
    """It is seen from the next pass on; nobody is warned."""
    model = stack(Own)
    optimizer = FOP(model, **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            if step == 2:
                model[4].weight = nn.Parameter(model[4].weight.detach().clone())  # type: ignore[index]
            train_step(model, optimizer, vectors(step), torch.zeros(8, 3, dtype=torch.float64))
    assert {row.path for row in optimizer.summary().rows} == {"FOP"}
    assert all(layer.why_kfac is None for layer in optimizer.diagnostics().layers.values())


# --- the way of a pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.block, self.head = (
                nn.Linear(5, 5),
                nn.Sequential(Own(5, 6), nn.Tanh()),
                Own(6, 3),
            )
            self.recompute = recompute
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.block, x, use_reentrant=reentrant) if self.recompute else self.block(x)
            out: Tensor = self.head(x)
            return out

    assert_trains_like(Net(True), Net(False), vectors)


class Recomputed(nn.Module):
    """It recomputes a function of its own, in which it uses its own weight."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.reentrant = nn.Linear(5, 5), Own(6, 3), reentrant
        self.table = nn.Parameter(torch.randn(6, 5))
        self.double()

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.table))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_without_the_call_of_a_module(reentrant: bool) -> None:
    """What is recomputed must be recorded in both passes, or in none."""
    optimizer, messages = steps_of(Recomputed(reentrant))
    assert {row.name: row.path for row in optimizer.summary().rows}["table"] == "AdamW"
    assert sum("table: " in message for message in messages) == 1
    assert reentrant or "table: used by checkpoint, linear" in messages[0]
    assert all(layer.why_kfac is None for layer in optimizer.diagnostics().layers.values())


def test_function_that_is_checkpointed_later() -> None:
    """Its layer has curvature by then, and takes K-FAC's step."""
    model = Recomputed(False)
    optimizer = FOP(model, **PLAIN)
    for step in range(4):
        if step < 2:
            model.forward = lambda x: model.head(model.block(model.first(x)))  # type: ignore[method-assign]
        elif step == 2:
            del model.forward
        train_step(model, optimizer, vectors(step), torch.zeros(8, 3, dtype=torch.float64))
    assert "no hook saw" in str(optimizer.diagnostics().layers["table"].why_kfac)


def test_state_goes_on_bit_for_bit() -> None:
    model = stack(Own)
    optimizer = FOP(model, **PLAIN)
    y = torch.zeros(8, 3, dtype=torch.float64)
    for step in range(3):
        train_step(model, optimizer, vectors(step), y)
    twin = copy.deepcopy(model)
    other = FOP(twin, **PLAIN)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        train_step(model, optimizer, vectors(step), y)
        train_step(twin, other, vectors(step), y)
    assert_equal(weights(model), weights(twin))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_feeds_nobody(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = stack(Own)
    optimizer = FOP(model, **PLAIN)
    y = torch.zeros(8, 3, dtype=torch.float64)
    for step in range(2):
        train_step(model, optimizer, vectors(step), y)
    twin = copied(model)
    optimizer.zero_grad()
    loss_of(twin, vectors(9), y).backward()
    assert function_modes() == [] and all(param.grad is None for param in model.parameters())
    train_step(model, optimizer, vectors(2), y)
    found, _ = trained(stack(Own), vectors, steps=1)
    assert found and optimizer.diagnostics().layers["0"].kfac_steps == 0


class Stop(BaseException):
    pass


STOPS = [KeyboardInterrupt, SystemExit, GeneratorExit, Stop, RuntimeError]


class Interrupted(Own):
    stop: type[BaseException] | None = None
    where = "before"

    def forward(self, x: Tensor) -> Tensor:
        if self.stop is not None and self.where == "before":
            raise self.stop
        out = F.linear(x, self.weight, self.bias)
        if self.stop is not None:
            raise self.stop
        return out


@pytest.mark.parametrize("first", [False, True], ids=["later pass", "first pass"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("stop", STOPS)
def test_interrupted_pass(stop: type[BaseException], where: str, first: bool) -> None:
    """Nothing is left of a pass that ends in any exception; the next batch, of another size, trains."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(5, 1, batch_first=True)
    model = nn.ModuleList([Interrupted(5, 5), attention, Interrupted(5, 3)]).double()
    model.forward = lambda x: model[2](model[1](*[model[0](x)[:, None]] * 3)[0][:, 0])  # type: ignore[method-assign]
    optimizer = FOP(model, **PLAIN)
    y = torch.zeros(8, 3, dtype=torch.float64)
    if not first:
        train_step(model, optimizer, vectors(0), y)
    for part in (model[0], model[2]):
        part.stop, part.where = stop, where
        with pytest.raises(stop):
            model(vectors(1))
        part.stop = None
        assert function_modes() == [] and function_watches() == 0
    train_step(model, optimizer, vectors(2)[:6], y[:6])
    train_step(model, optimizer, vectors(3), y)
    assert optimizer.diagnostics().layers["0"].why_kfac is None


def as_tree(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return torch.utils._pytree.tree_map(lambda arg: arg * 1.0, args)


def by_type(module: nn.Module, args: tuple[Any, ...]) -> Any:
    return args if type(args) is tuple else type(args)(*(arg * 1.0 for arg in args))


HOOKS: list[Callable[[nn.Module], Any]] = [
    lambda module: module.register_full_backward_hook(lambda *_: None),
    lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    lambda module: module.register_forward_pre_hook(as_tree),
    lambda module: module.register_forward_pre_hook(by_type),
]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_others_take_the_arguments_for_a_tuple(hook: Callable[[nn.Module], Any]) -> None:
    model, other = stack(Own), stack(nn.Linear)
    expected, _ = trained(other, vectors)
    torch.manual_seed(0)
    target = torch.randn_like(expected[0])
    optimizer = FOP(model, **{**PLAIN, "momentum": 0.5, "curvature_interval": 2})
    for step in range(len(expected)):
        train_step(model, optimizer, vectors(step).requires_grad_(), target)
        if step == 0:
            # After those that have recognised the layers.
            for part in model:  # type: ignore[attr-defined]
                hook(part)
        torch.testing.assert_close(model(vectors(99)), expected[step], rtol=1e-9, atol=1e-11)
    assert function_modes() == [] and function_watches() == 0


def test_hook_that_replaces_the_arguments() -> None:
    """The arguments that hold a watch go with it, and the call is still seen."""
    model, other = stack(Own), stack(nn.Linear)
    expected, _ = trained(other, vectors)
    optimizer_model = copy.deepcopy(model)
    torch.manual_seed(0)
    target = torch.randn_like(expected[0])
    optimizer = FOP(optimizer_model, **{**PLAIN, "momentum": 0.5, "curvature_interval": 2})
    for part in optimizer_model:  # type: ignore[attr-defined]
        part.register_forward_pre_hook(lambda _, args: tuple(arg * 1.0 for arg in args))
    for step in range(len(expected)):
        train_step(optimizer_model, optimizer, vectors(step), target)
        torch.testing.assert_close(optimizer_model(vectors(99)), expected[step], rtol=1e-9, atol=1e-11)
    assert function_modes() == [] and math.isfinite(float(expected[-1].sum()))
