"""Odd ways to call a model: part by part, packed, nested, under torch.func, from threads, with odd hooks."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]

import models
from fop import FOP
from reference import half_squared_error
from test_batch_dimension import E, SelfAttention, check, check_factors, permuted, sequences


def run(model: nn.Module, loss: Callable[[], Tensor], between: Callable[[], None] = lambda: None) -> Any:
    """Three FOP steps; returns where they lead."""
    optimizer = FOP(model, **{**models.PLAIN, "curvature_interval": 2})
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        between()
    assert all(layer.kfac_steps == 0 for layer in optimizer.diagnostics().layers.values())
    return models.weights(model), models.snapshot(optimizer)


class Parts(nn.Module):
    """Layers with the batch in dim 1, called one by one or as one."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(E, E)
        self.encoder = nn.TransformerEncoderLayer(E, 2, 6, dropout=0.0)
        self.head = nn.Linear(E, 3)

    def outputs(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.project(x.transpose(0, 1)))).transpose(0, 1)
        return out

    forward = outputs


class Trained(nn.Module):
    """As a LightningModule: the optimizer gets it, and nobody calls its forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def outputs(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


METHODS: dict[str, Callable[[], nn.Module]] = {
    "parts": Parts,
    "step of attention": lambda: Trained(Parts()),
    "step of permuted": lambda: Trained(permuted()),
}


@pytest.mark.parametrize(("n", "length"), [(6, 3), (3, 7), (7, 5)])
@pytest.mark.parametrize("kind", METHODS)
def test_parts_called_one_by_one(kind: str, n: int, length: int) -> None:
    optimizer = check(METHODS[kind], sequences(n, length), call=lambda model, x: model.outputs(x))
    check_factors(optimizer, optimizer.param_groups[0]["params"][0], length)


class Permuting(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.transpose(0, 1)).transpose(0, 1)
        return out


def test_part_was_run_alone_before_its_model() -> None:
    """The model knows where the samples are; its part, once a model of its own, did not."""
    parts = []

    def call(model: nn.Module, x: Tensor) -> Tensor:
        if not parts:
            assert isinstance(model, Permuting)
            parts.append(nn.Sequential(*list(model)[:2]))
            with torch.no_grad():
                parts[0](x[:2, 0])
        out: Tensor = model(x)
        return out

    build = lambda: Permuting(nn.Linear(E, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    optimizer = check(build, sequences(6, 4), call=call, bare=True)
    check_factors(optimizer, optimizer.param_groups[0]["params"][0], 4)


class Packed(nn.Module):
    """Sentences of several lengths through an LSTM with the batch in dim 1, (length, N)."""

    def __init__(self, head_on_data: bool) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(7, E), nn.LSTM(E, 5), nn.Linear(5, 3)
        self.head_on_data = head_on_data

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(0).clamp(min=1)
        hidden, _ = self.lstm(pack_padded_sequence(self.embed(ids), lengths, enforce_sorted=False))
        if self.head_on_data:
            hidden = PackedSequence(self.head(hidden.data), *hidden[1:])
            return pad_packed_sequence(hidden, total_length=len(ids))[0]
        out: Tensor = self.head(pad_packed_sequence(hidden, total_length=len(ids))[0])
        return out


@pytest.mark.parametrize("head_on_data", [False, True])
@pytest.mark.parametrize(("n", "length"), [(8, 5), (4, 6), (5, 5)])
def test_packed_sequences_are_not_split_by_token(n: int, length: int, head_on_data: bool) -> None:
    ids = torch.randint(0, 7, (n, length), generator=torch.Generator().manual_seed(1))
    check(lambda: Packed(head_on_data), ids, call=lambda model, x: model(x.T).transpose(0, 1), either=True)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second(torch.tanh(adjacency @ self.first(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_adjacency(sparse: Callable[[Tensor], Tensor]) -> None:
    """Takes the same steps as with a dense one."""
    (x, y), dense, found = models.batch(), torch.eye(6).double() + 0.1, []
    for adjacency in (dense, sparse(dense)):
        torch.manual_seed(0)
        model = GraphNet().double()
        run(model, lambda m=model, a=adjacency: half_squared_error(m(x, a), y))  # type: ignore[misc]
        found.append(models.weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [nested, Tensor.to_sparse])
def test_layer_on_an_input_that_is_not_strided(form: Callable[[Tensor], Tensor]) -> None:
    model = models.mlp()
    optimizer = FOP(model, **models.PLAIN)
    models.train_step(model, optimizer, *models.batch())
    for _ in range(2):
        before = models.weights(model)
        optimizer.zero_grad()
        out = model(form(models.batch()[0]))
        (out.values() if out.is_nested else out).square().mean().backward()
        optimizer.step()
        for name, value in models.weights(model).items():
            assert value.isfinite().all() and not torch.equal(value, before[name])
    assert "sparse or nested" in str(optimizer.diagnostics().layers["0"].why_kfac)


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("scale", [0.1, 0.0])
def test_gradient_replaced_between_passes(scale: float, due: bool) -> None:
    model = models.mlp()
    optimizer = FOP(model, **{**models.PLAIN, "curvature_interval": 1 if due else 50})
    models.train_step(model, optimizer, *models.batch())
    while optimizer.curvature_due is not due:
        models.train_step(model, optimizer, *models.batch())
    before, twin = optimizer.diagnostics().layers, copy.deepcopy(model)
    optimizer.zero_grad()
    models.loss_of(model, *models.batch(seed=7)).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * scale if scale else torch.zeros_like(p)
    models.loss_of(model, *models.batch(seed=8)).backward()
    optimizer.step()
    after = optimizer.diagnostics().layers
    first, second = (
        models.gradients(twin, models.loss_of(twin, *models.batch(seed=seed))) for seed in (7, 8)
    )
    d1, d2 = (models.halves(twin, *models.batch(seed=seed)) for seed in (7, 8))
    pairs: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in first:
        paired = after[name].kfac_steps == before[name].kfac_steps
        assert paired is (after[name].why_kfac is None)
        difference = scale * d1[name][1] + d2[name][1] if paired else None
        pairs[name] = (scale * first[name] + second[name], difference)
    models.check_step(model, twin, optimizer, pairs)


def _net() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(3 * E, 3)
    return nn.Sequential(nn.Linear(E, E), nn.Tanh(), SelfAttention(), nn.Flatten(-2), head).double()


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_transformations_between_steps(kind: str) -> None:
    """They give what they give for a copy without hooks, and the run does not notice them."""
    (x, y), f = (sequences(6, 3), models.batch()[1]), FUNCTIONS[kind]
    plain, model = _net(), _net()
    end = run(
        model,
        lambda: models.loss_of(model, x, y),
        lambda: models.assert_equal(f(model, x[:4]), f(copy.deepcopy(model), x[:4])),
    )
    models.assert_equal(end, run(plain, lambda: models.loss_of(plain, x, y)))


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_in_a_thread_while_attention_trains(grad: bool) -> None:
    """The thread runs the model from beginning to end while the training is inside its attention."""
    x, y = sequences(6, 3), models.batch()[1]
    errors: list[Exception] = []
    depths: list[int] = []
    plain, model = _net(), _net()

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

    # Once the optimizer's own hooks are there.
    optimizer = FOP(model, **{**models.PLAIN, "curvature_interval": 2})
    model.get_submodule("2.attention").register_forward_pre_hook(start)
    for _ in range(3):
        models.train_step(model, optimizer, x, y)
        depths.append(_len_torch_function_stack())
    assert (errors, depths) == ([], [0] * 6)
    models.assert_equal(
        (models.weights(model), models.snapshot(optimizer)), run(plain, lambda: models.loss_of(plain, x, y))
    )


def test_transposed_convolution_called_by_keywords() -> None:
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    one, two = nn.ConvTranspose2d(2, 3, 3, stride=2), nn.ConvTranspose2d(2, 3, 3, stride=2)
    two.load_state_dict(one.state_dict())
    by_keyword = run(one, lambda: one(output_size=[8, 8], input=x).square().mean())
    models.assert_equal(by_keyword, run(two, lambda: two(x, [8, 8]).square().mean()))


class First(nn.Module):
    """The first of what its layer gives, if a hook makes it give several."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, int] = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("late", [False, True])
def test_hook_that_makes_a_tuple_of_the_output(late: bool) -> None:
    model = First().double()
    optimizer = FOP(model, **models.PLAIN) if late else None
    handle = model.layer.register_forward_hook(lambda module, args, output: (output, 1), prepend=True)
    optimizer = optimizer or FOP(model, **models.PLAIN)
    for _ in range(2):
        before = models.weights(model)
        models.train_step(model, optimizer, *models.batch())
        assert all(p.isfinite().all() for p in model.parameters())
        assert not torch.equal(model.layer.weight, before["layer.weight"])
    handle.remove()
    for _ in range(2):
        twin = copy.deepcopy(model)
        models.train_step(model, optimizer, *models.batch())
    models.check_step(model, twin, optimizer, models.halves(twin, *models.batch()))


def test_hooks_put_on_another_module_without_keywords() -> None:
    """As quantisation-aware training does with the hooks of the modules that it swaps."""
    model = models.mlp()
    optimizer = FOP(model, **models.PLAIN)
    models.train_step(model, optimizer, *models.batch())
    old, new = model[0], nn.Linear(5, 6)
    new.weight, new.bias = old.weight, old.bias
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    model[0] = new
    for _ in range(3):
        twin = copy.deepcopy(model)
        models.train_step(model, optimizer, *models.batch())
    models.check_step(model, twin, optimizer, models.halves(twin, *models.batch()))


def test_module_replaced_by_one_with_new_parameters() -> None:
    model = models.mlp()
    optimizer = FOP(model, **models.PLAIN)
    models.train_step(model, optimizer, *models.batch())
    model[0] = nn.Linear(5, 6).double()
    for _ in range(2):
        models.train_step(model, optimizer, *models.batch())
    rows = optimizer.summary().rows
    assert [row.reason for row in rows[:2]] == ["belongs to no module any more"] * 2
    assert [row.path for row in rows[2:]] == ["FOP", "FOP"]


def test_tiny_gradients() -> None:
    model = models.mlp().float()
    optimizer = FOP(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            (1e-20 * model(models.batch()[0].float())).sum().backward()
            optimizer.step()
    for layer in optimizer.diagnostics().layers.values():
        assert layer.steps_since_curvature is not None and not sum(layer.rescues.values())
    assert all(p.isfinite().all() for p in model.parameters())
