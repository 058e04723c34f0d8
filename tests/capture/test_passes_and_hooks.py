"""One forward and one backward pass give the right pair, whatever else runs and whoever else has hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]

from fop import FOP
from models import (
    PLAIN,
    assert_equal,
    batch,
    check_kept_pair,
    check_lost_pair,
    check_step,
    conv_net,
    halves,
    loss_of,
    mlp,
    snapshot,
    started,
    train_step,
    weights,
)
from reference import ReferenceFOP, half_squared_error

# --- passes that no step follows ---------------------------------------------------------------------------


def no_grad_forward(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(batch(4, seed=7)[0])
    model.train()


def eval_forward(model: nn.Module) -> None:
    model.eval()
    model(batch(4, seed=7)[0])
    model.train()


def second_forward(model: nn.Module) -> None:
    model.kept = loss_of(model, *batch(6, seed=7))  # type: ignore[assignment]  # its graph stays alive


def gradient_of_inputs(model: nn.Module) -> None:
    x = batch(6, seed=7)[0].requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)


def gradient_of_weights(model: nn.Module) -> None:
    torch.autograd.grad(model(batch(6, seed=7)[0]).square().sum(), list(model.parameters()))


def nothing(model: nn.Module) -> None:
    pass


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize(
    ("disturb", "options"),
    [
        *((disturb, {}) for disturb in (no_grad_forward, eval_forward, second_forward)),
        *((disturb, {}) for disturb in (gradient_of_inputs, gradient_of_weights)),
        (nothing, {"create_graph": True}),
        (nothing, {"retain_graph": True}),
    ],
)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_only_the_backwarded_forward_counts(
    disturb: Callable[[nn.Module], None], options: dict[str, bool], when: str
) -> None:
    """Nor do gradients of the inputs from the same graph."""
    model, _, optimizer = started()
    oracle = ReferenceFOP(model, **{k: v for k, v in PLAIN.items() if k != "curvature_interval"})
    for seed in range(2):
        x, y = batch(6, seed)
        oracle.step(x, y, half_squared_error)
        optimizer.zero_grad()
        if when == "before":
            disturb(model)
        x.requires_grad_("retain_graph" in options)
        loss = loss_of(model, x, y)
        if when == "between":
            disturb(model)
            if x.requires_grad:
                torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward(**options)
        if when == "after":
            disturb(model)
            if x.requires_grad:
                torch.autograd.grad(loss, x)
        optimizer.step()
        torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-10, atol=1e-11)


class Tied(nn.Module):
    """One weight and bias in two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out


def test_use_of_a_weight_by_only_one_of_its_modules() -> None:
    """An auxiliary head that is left out of some steps."""
    model, twin, optimizer = started(Tied)
    train_step(model, optimizer, *batch())
    twin.load_state_dict(model.state_dict())

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return half_squared_error(model.head(torch.tanh(model.a(x))), y)

    pairs = halves(twin, *batch(6, seed=2), loss_fn)
    optimizer.zero_grad()
    loss_fn(model, *batch(6, seed=2)).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)


def test_layer_unused_in_a_step() -> None:
    model, twin, optimizer = started()
    train_step(model, optimizer, *batch())
    used, state = weights(model), snapshot(optimizer)["state"]
    optimizer.zero_grad()
    half_squared_error(model[2](batch(6, seed=3, shape=(6,))[0]), batch()[1]).backward()
    assert model[0].weight.grad is None
    optimizer.step()
    assert torch.equal(model[0].weight, used["0.weight"])
    assert not torch.equal(model[2].weight, used["2.weight"])
    assert_equal(snapshot(optimizer)["state"][0], state[0])
    twin.load_state_dict(model.state_dict())
    pairs = halves(twin, *batch(6, seed=4))
    train_step(model, optimizer, *batch(6, seed=4))
    check_step(model, twin, optimizer, pairs)


# --- hooks of the user's on modules and tensors ------------------------------------------------------------


def by_keyword(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (), {"input": args[0] + 0.5}


def doubled_inputs(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(g if g is None else 2 * g for g in grad_input)


HOOKS: dict[str, tuple[str, Callable[..., Any], dict[str, bool]]] = {
    "triple output": ("register_forward_hook", lambda module, args, output: 3 * output, {}),
    "overwrite output": ("register_forward_hook", lambda module, args, output: output.mul_(3), {}),
    "shift input": ("register_forward_pre_hook", lambda module, args: (args[0] + 0.5,), {}),
    "shift by keyword": ("register_forward_pre_hook", by_keyword, {"with_kwargs": True}),
    "look": ("register_full_backward_hook", lambda module, grad_input, grad_output: None, {}),
    "double input gradient": ("register_full_backward_hook", doubled_inputs, {}),
    "double output gradient": ("register_full_backward_pre_hook", lambda module, g: (2 * g[0],), {}),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")
@pytest.mark.parametrize("first", ["hook", "optimizer"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("build", "shape"), [(mlp, (5,)), (conv_net, (2, 5, 6))])
def test_module_hooks(
    build: Callable[[], nn.Sequential], shape: tuple[int, ...], hook: str, first: str
) -> None:
    """The pair is that of two backward passes of a model with the same hooks."""
    model, twin = build(), build()
    register, function, options = HOOKS[hook]
    optimizer = FOP(model, **PLAIN) if first == "optimizer" else None
    for net in (model, twin):
        # A full backward hook forbids overwriting what it wraps.
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        for name in ("0", "2"):
            getattr(net.get_submodule(name), register)(function, **options)
    optimizer = optimizer or FOP(model, **PLAIN)
    for seed in range(2):
        twin.load_state_dict(model.state_dict())
        pairs = halves(twin, *batch(7, seed, shape))
        train_step(model, optimizer, *batch(7, seed, shape))
        check_step(model, twin, optimizer, pairs)


class Reversed(nn.Module):
    """A hook on a tensor between two layers, as gradient reversal is often written.

    Args:
        where: 0 for the output of the first layer, 1 for what comes of it.
    """

    def __init__(self, where: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.where = where
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out = torch.tanh(h)
        (h, out)[self.where].register_hook(lambda gradient: -0.5 * gradient)
        result: Tensor = self.second(out)
        return result


@pytest.mark.parametrize("where", [0, 1])
def test_tensor_hooks(where: int) -> None:
    model, twin, optimizer = started(lambda: Reversed(where))
    pairs = halves(twin, *batch())
    loss_of(model, *batch()).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)


def test_retained_gradients_are_there() -> None:
    model, _, optimizer = started()
    x, y = batch()
    h = model[0](x)
    h.retain_grad()
    half_squared_error(model[2](torch.tanh(h)), y).backward()
    optimizer.step()
    assert h.grad is not None and h.grad.shape == h.shape
    check_kept_pair(optimizer)


class First(nn.Module):
    """The first of what its layer gives, if a hook makes it give several."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, int] = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("late", [False, True])
def test_hook_that_makes_a_tuple_of_the_output(late: bool) -> None:
    model, twin = First(), First()
    optimizer = FOP(model, **PLAIN) if late else None
    handle = model.layer.register_forward_hook(lambda module, args, output: (output, 1), prepend=True)
    optimizer = optimizer or FOP(model, **PLAIN)
    for _ in range(2):
        before = weights(model)
        train_step(model, optimizer, *batch())
        assert all(p.isfinite().all() for p in model.parameters())
        assert not torch.equal(model.layer.weight, before["layer.weight"])
    handle.remove()
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        train_step(model, optimizer, *batch())
    check_step(model, twin, optimizer, halves(twin, *batch()))


# --- odd ways to call a model ------------------------------------------------------------------------------


class Keyword(nn.Module):
    """Calls its layer by keywords, or not."""

    def __init__(self, layer: nn.Module, keyword: bool, **options: Any) -> None:
        super().__init__()
        self.layer, self.keyword, self.options = layer, keyword, options

    def forward(self, x: Tensor) -> Tensor:
        args, kwargs = (
            ((), {**self.options, "input": x}) if self.keyword else ((x, *self.options.values()), {})
        )
        out: Tensor = self.layer(*args, **kwargs)
        return out.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("layer", "shape", "options"),
    [
        (lambda: nn.Linear(5, 3), (5,), {}),
        (lambda: nn.Conv2d(2, 3, (4, 6)), (2, 5, 6), {}),
        (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 3), {"output_size": [8, 8]}),
    ],
)
def test_input_by_keyword(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    runs = []
    for keyword in (False, True):
        torch.manual_seed(0)
        model = Keyword(layer(), keyword, **options).double()
        optimizer = FOP(model, **PLAIN)
        for seed in range(3):
            train_step(model, optimizer, *batch(6, seed, shape))
        check_kept_pair(optimizer)
        runs.append(weights(model))
    assert_equal(*runs)


class GraphNet(nn.Module):
    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.adjacency = adjacency
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.second(torch.tanh(self.adjacency @ self.first(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_adjacency(sparse: Callable[[Tensor], Tensor]) -> None:
    """Takes the same steps as with a dense one."""
    dense, found = torch.eye(6).double() + 0.1, []
    for adjacency in (dense, sparse(dense)):
        model = GraphNet(adjacency)
        optimizer = FOP(model, **{**PLAIN, "curvature_interval": 2})
        for _ in range(3):
            train_step(model, optimizer, *batch())
        check_kept_pair(optimizer)
        found.append(weights(model))
    torch.testing.assert_close(*found)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [nested, Tensor.to_sparse])
def test_layer_on_an_input_that_is_not_strided(form: Callable[[Tensor], Tensor]) -> None:
    model, _, optimizer = started()
    train_step(model, optimizer, *batch())
    for _ in range(2):
        before = weights(model)
        optimizer.zero_grad()
        out = model(form(batch()[0]))
        (out.values() if out.is_nested else out).square().mean().backward()
        optimizer.step()
        for name, value in weights(model).items():
            assert value.isfinite().all() and not torch.equal(value, before[name])
    check_lost_pair(optimizer, ["0"], 2, "sparse or nested")


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.head = nn.Linear(4, 4), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.project(x))
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].flatten(-2))
        return out


def _gradients_by_sample(model: nn.Module, x: Tensor) -> Any:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, params, (x,)).square().sum()
        return out

    params = {name: p.detach() for name, p in model.named_parameters()}
    return torch.vmap(torch.func.grad(loss), (None, 0))(params, x)


def _other_parameters(model: nn.Module, x: Tensor) -> Any:
    params = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, params, (x,))
    return torch.autograd.grad(out.square().sum(), list(params.values()))


def _batched(model: nn.Module, x: Tensor) -> Any:
    out = model(x)
    seeds = torch.eye(3, dtype=x.dtype)[:, None].expand(3, *out.shape)
    return torch.autograd.grad(out, list(model.parameters()), seeds, is_grads_batched=True)


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "vmap": lambda model, x: torch.vmap(model)(x).detach(),
    "by sample": _gradients_by_sample,
    "functional_call": _other_parameters,
    "jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "batched": _batched,
}


def attending_run(between: Callable[[nn.Module, Tensor], None] | None = None) -> Any:
    """Where three steps lead."""
    model, _, optimizer = started(Attending, curvature_interval=2)
    x, y = batch(6, 1, (3, 4))
    for _ in range(3):
        train_step(model, optimizer, x, y)
        if between:
            between(model, x[:4])
    check_kept_pair(optimizer)
    return weights(model), snapshot(optimizer)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_transformations_between_steps(kind: str) -> None:
    """They give what they give for a model without hooks, to rounding, and the run does not notice them."""

    def between(model: nn.Module, x: Tensor) -> None:
        plain = Attending()
        plain.load_state_dict(model.state_dict())
        # Batched products of another order may have other kernels.
        both = FUNCTIONS[kind](model, x), FUNCTIONS[kind](plain, x)
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-14)

    assert_equal(attending_run(between), attending_run())


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_in_a_thread_while_attention_trains(grad: bool) -> None:
    """The thread runs the model from beginning to end while the training is inside its attention."""
    x, y = batch(6, 1, (3, 4))
    errors: list[Exception] = []
    depths: list[int] = []
    # Once the optimizer's own hooks are there.
    model, _, optimizer = started(Attending, curvature_interval=2)

    def evaluate() -> None:
        try:
            with torch.set_grad_enabled(grad):
                model(x[:4])
        except Exception as error:
            errors.append(error)
        depths.append(_len_torch_function_stack())

    def start(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()

    model.attention.register_forward_pre_hook(start)
    for _ in range(3):
        train_step(model, optimizer, x, y)
        depths.append(_len_torch_function_stack())
    assert (errors, depths) == ([], [0] * 6)
    assert_equal((weights(model), snapshot(optimizer)), attending_run())
