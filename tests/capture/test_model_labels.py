"""`fisher="model"`: statistics of sampled labels, against expectations over all labels in float64."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import reference
from fop import FOP, KFAC
from internals import LinearLayer
from models import assert_equal, mlp, snapshot, weights
from reference import cases

DRAWS = 200
Loss = Callable[[Tensor, Tensor], Tensor]
cross_entropy, mse = F.cross_entropy, F.mse_loss


class Tokens(nn.Module):
    """Token numbers (N, T) to logits (N, T, C); every position sees all others, and one layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.twice, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.embedding(ids))))
        logits: Tensor = self.head(torch.tanh(h + h.mean(1, keepdim=True)))
        return logits


def images() -> nn.Sequential:
    """Classes in dimension 1 of (N, C, height, width)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 1, bias=False)).double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ids(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(1))


# Model, input, likelihood, and the dimension of classes or features.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str, int | None]] = {
    "mlp": (mlp, inputs(6, 5), "categorical", None),
    "mlp squares": (mlp, inputs(6, 5), "gaussian", None),
    "tokens": (Tokens, ids(4, 3), "categorical", -1),
    "tokens squares": (Tokens, ids(4, 3), "gaussian", -1),
    "images": (images, inputs(3, 2, 3, 3), "categorical", 1),
}


def learn(optimizer: FOP, model: nn.Module, x: Tensor, likelihood: str, dim: int | None) -> None:
    """A forward and a backward pass; the data's labels do not matter, but in the gradient."""
    outputs = optimizer.sample_labels(model(x), likelihood, dim=dim)  # type: ignore[arg-type]
    rows = outputs.movedim(-1 if dim is None else dim, -1).flatten(0, -2)
    if likelihood == "gaussian":
        (0.5 * rows.square().sum(1)).mean().backward()
    else:
        cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long)).backward()


def still(model: nn.Module, library: type[FOP] = FOP, **options: Any) -> FOP:
    """An optimizer whose state has the factors of the last step's statistics, and whose weights stay."""
    options = {"fisher": "model", "statistics_rows": None, "stat_decay": 0.0, **options}
    return library(model, lr=1e-300, adamw_lr=1e-300, **options)


def factors(optimizer: FOP, layer: nn.Module) -> tuple[Tensor, Tensor]:
    state = optimizer.state[layer.weight]
    return state["A"].clone(), state["G"].clone()


def drawn(name: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """A and G of every layer in many steps, each with labels of its own."""
    build, x, likelihood, dim = CASES[name]
    model = build()
    optimizer = still(model)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _ in range(DRAWS):
        optimizer.zero_grad()
        learn(optimizer, model, x, likelihood, dim)
        optimizer.step()
        for path, layer in model.named_modules():
            if hasattr(layer, "weight"):
                found.setdefault(path, []).append(factors(optimizer, layer))
    return found


def expectation(name: str) -> dict[str, Tensor]:
    """Σ over rows r and labels c of p(c | r)·Σ (N b)(N b)ᵀ / rows of the layer, with b of that label alone.

    Labels of different rows are independent, and the mean of b over labels is 0: mixed terms drop out.
    """
    build, x, likelihood, dim = CASES[name]
    model, taped = build(), {}
    for path, layer in model.named_modules():
        if hasattr(layer, "weight"):
            taped[path] = taped.get(path, [])
            layer.register_forward_hook(lambda *args, path=path: taped[path].append(args[-1]))
    outputs = model(x)
    rows = outputs.movedim(-1 if dim is None else dim, -1).flatten(0, -2)
    N, (R, C) = len(x), rows.shape
    found: dict[str, Tensor] = {}
    for r in range(R):
        p = rows[r].softmax(0).detach() if likelihood == "categorical" else torch.ones(C)
        for c in range(C):
            label = F.one_hot(torch.tensor(c), C).to(rows)
            gradient = torch.zeros_like(rows)
            gradient[r] = (p - label if likelihood == "categorical" else label) / R
            for path, uses in taped.items():
                b = torch.cat(
                    [
                        each.movedim(1, -1).flatten(0, -2) if each.dim() == 4 else each.flatten(0, -2)
                        for each in torch.autograd.grad(rows, uses, gradient, retain_graph=True)
                    ]
                )
                found[path] = found.get(path, 0) + p[c] * (N * b).T @ (N * b) / len(b)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mean_of_drawn_factors_is_the_expectation_over_all_labels(name: str) -> None:
    """Within three standard errors, for every layer; A does not depend on labels."""
    exact, found = expectation(name), drawn(name)
    assert exact.keys() == found.keys()
    for path, pairs in found.items():
        As, Gs = (torch.stack(each) for each in zip(*pairs, strict=True))
        assert torch.equal(As, As[:1].expand_as(As))
        error = (Gs.var(0).sum() / DRAWS).sqrt()
        assert 0 < error < 0.2 * exact[path].norm()
        assert (Gs.mean(0)[0] - exact[path]).norm() < 3 * error, path


def test_labels_of_the_data_have_another_mean() -> None:
    """Else the test above could not tell the two."""
    model, x = mlp(), CASES["mlp"][1]
    optimizer = still(model, fisher="empirical")
    learn(optimizer, model, x, "categorical", None)
    optimizer.step()
    exact = expectation("mlp")
    assert (factors(optimizer, model[0])[1][0] - exact["0"]).norm() > 0.3 * exact["0"].norm()


def mean_cross_entropy(outputs: Tensor) -> Tensor:
    return cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long))


def half_squares(outputs: Tensor) -> Tensor:
    return 0.5 * outputs.square().sum(1).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "loss"), [("categorical", mean_cross_entropy), ("gaussian", half_squares)]
)
def test_mean_of_drawn_blocks_is_the_gauss_newton_matrix(
    likelihood: str, loss: Callable[[Tensor], Tensor]
) -> None:
    """Of one sample A ⊗ G is no approximation: its mean is JᵀHJ, H the Hessian of the loss in the outputs."""
    model, x = mlp(), inputs(1, 5)
    parameters = {name: param.detach() for name, param in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,))[0])(parameters)
    H = hessian(lambda row: loss(row[None]))(model(x)[0].detach())
    optimizer, blocks = still(model), {"0": [], "2": []}
    for _ in range(DRAWS):
        optimizer.zero_grad()
        outputs = optimizer.sample_labels(model(x), likelihood)  # type: ignore[arg-type]
        loss(outputs).backward()
        optimizer.step()
        for name, each in blocks.items():
            each.append(reference.dense_fisher(*factors(optimizer, model[int(name)])))
    for name, each in blocks.items():
        matrix = torch.cat([jacobian[f"{name}.weight"], jacobian[f"{name}.bias"][..., None]], dim=2)
        J = torch.stack([reference.vec(one[None]) for one in matrix])
        drawn = torch.stack(each)
        error = (drawn.var(0).sum() / DRAWS).sqrt()
        assert 0 < error < 0.2 * (J.T @ H @ J).norm()
        assert (drawn.mean(0) - J.T @ H @ J).norm() < 3 * error


class Functional(nn.Module):
    """Weights that functions tell about, one of them computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.normed = weight_norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.normed(torch.tanh(F.linear(x, self.weight)))
        return out


EVERY: dict[str, reference.Case] = {
    "functional": reference.Case(Functional, reference.double(4), {"weight"}),
    **{
        f"{kind.lower()} {name}": case
        for kind in cases.__all__
        if isinstance(found := getattr(cases, kind), dict)
        for name, case in found.items()
    },
}


@pytest.mark.parametrize("name", EVERY)
def test_statistics_of_every_kind_are_those_of_a_loss_of_the_drawn_labels(name: str) -> None:
    """As another optimizer takes them from that loss; p.grad is of the loss that trains."""
    case, drawn = EVERY[name], []
    x, y = case.batch(6)
    model, twin, plain = (case.model() for _ in range(3))
    optimizer, expected = still(model, **case.options), still(twin, fisher="empirical", **case.options)
    of_plain = FOP(plain, **case.options)
    outputs = model(*x)
    outputs.register_hook(drawn.append)
    reference.half_squared_error(optimizer.sample_labels(outputs, "gaussian", dim=-1), y).backward()
    reference.half_squared_error(plain(*x), y).backward()
    assert of_plain.curvature_due
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_equal(param.grad, other.grad)
    twin(*x).backward(drawn[0] / (y.numel() // y.shape[-1]))
    optimizer.step()
    expected.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        actual, wanted = optimizer.state[param], expected.state[other]
        assert ("A" in actual) == ("A" in wanted)
        for key in {"A", "G"} & actual.keys():
            torch.testing.assert_close(actual[key], wanted[key], rtol=1e-9, atol=1e-12)


# --- what stays as it is ---------------------------------------------------------------------------------


def gradients_of(
    name: str, fisher: str, library: type[FOP] = FOP, create_graph: bool = False
) -> tuple[list[Tensor], FOP]:
    build, x, likelihood, dim = CASES[name]
    model = build()
    optimizer = library(model, fisher=fisher)
    outputs = model(x)
    if fisher == "model":
        outputs = optimizer.sample_labels(outputs, likelihood, dim=dim)  # type: ignore[arg-type]
    outputs.sin().sum().backward(create_graph=create_graph)
    return [param.grad.detach().clone() for param in model.parameters() if param.grad is not None], optimizer


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_bit_for_bit(name: str, library: type[FOP], create_graph: bool) -> None:
    before = torch.get_rng_state()
    expected, _ = gradients_of(name, "empirical", library, create_graph)
    torch.set_rng_state(before)
    actual, optimizer = gradients_of(name, "model", library, create_graph)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    CASES[name][0]()
    assert torch.equal(after, torch.get_rng_state()), "torch's own generator was used"
    assert_equal(actual, expected)
    optimizer.step()
    layers = optimizer.diagnostics().layers.values()
    assert all(layer.kfac_steps == 0 for layer in layers) or library is KFAC


def test_a_gradient_of_a_gradient_goes_through() -> None:
    model, x = mlp(), inputs(6, 5).requires_grad_()
    optimizer = FOP(model, fisher="model")
    (of_x,) = torch.autograd.grad(
        optimizer.sample_labels(model(x), "categorical").square().sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(of_x.square().sum(), x)
    plain = mlp()
    (of_x,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(of_x.square().sum(), x)[0])


def test_without_the_option_and_without_gradients_outputs_are_returned_as_they_are() -> None:
    model = mlp()
    optimizer = FOP(model)
    outputs = model(inputs(6, 5))
    assert optimizer.sample_labels(outputs, "categorical") is outputs
    optimizer = FOP(model, fisher="model")
    with torch.no_grad():
        outputs = model(inputs(6, 5))
    assert optimizer.sample_labels(outputs, "categorical") is outputs


def test_a_replaced_or_dropped_optimizer_is_not_held_by_a_graph() -> None:
    model = mlp()
    optimizer = FOP(model, fisher="model")
    loss = optimizer.sample_labels(model(inputs(6, 5)), "categorical").sum()
    ref = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ref() is None
    loss.backward()
    assert all(param.grad is not None for param in model.parameters())


# --- draws -----------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    optimizer: FOP,
    steps: range,
    passes: int = 1,
    compiled: Callable[..., Any] | None = None,
) -> None:
    """``compiled`` is what the function of the loss goes through."""

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(optimizer.sample_labels(model(x), "categorical"), y)

    function = loss_of if compiled is None else compiled(loss_of)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model.zero_grad()
        for _ in range(passes):
            x = torch.randn(8, 5, dtype=torch.float64, generator=generator)
            y = torch.randint(3, (8,), generator=generator)
            (function(x, y) / passes).backward()
        optimizer.step()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_resumed_training_draws_the_same_labels(passes: int) -> None:
    """Also after a step that the script has skipped without a word to the optimizer."""
    model = mlp()
    optimizer = FOP(model, fisher="model")
    train(model, optimizer, range(3), passes)
    optimizer.zero_grad()
    optimizer.sample_labels(model(inputs(7, 5)), "categorical").sum().backward()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    train(model, optimizer, range(3, 6), passes)

    file.seek(0)
    state, start = torch.load(file, weights_only=True)
    again = mlp()
    again.load_state_dict(start)
    resumed = FOP(again, fisher="model")
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6), passes)
    assert_equal(weights(again), weights(model))
    assert_equal(snapshot(resumed), snapshot(optimizer))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_labels_differ_between_steps_passes_and_outputs() -> None:
    """The smallest entry of a row's gradient tells which class was drawn."""
    found = []
    x = inputs(1, 5).expand(40, 5)

    def classes(module: nn.Module, b: tuple[Tensor, ...]) -> None:
        found.append(b[0].argmin(1))

    model = mlp()
    optimizer = FOP(model, fisher="model", lr=1e-300, adamw_lr=1e-300)
    model.register_full_backward_pre_hook(classes)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            one, two = model(x), model(x)
            outputs = (optimizer.sample_labels(each, "categorical") for each in (one, two))
            sum(each.mean() for each in outputs).backward()
        optimizer.step()
    # The pass of a constant gradient has the smallest entry first.
    sampled = {tuple(each.tolist()) for each in found if each.unique().numel() > 1}
    assert len(sampled) == 8


# --- losses, passes and scales ---------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_factors(passes: int, reduction: str, scaled: bool, dtype: torch.dtype) -> None:
    """G of the last layer under squared errors is the identity, whatever the loss is multiplied with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = still(model, loss_reduction=reduction)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=scaled)
    for _ in range(passes):
        x = torch.randn(900, 3)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            outputs = optimizer.sample_labels(model(x), "gaussian")
        loss = 0.5 * outputs.float().square().sum(1)
        scaler.scale(loss.sum() if reduction == "sum" else loss.mean() / passes).backward()
    scaler.step(optimizer)
    G = factors(optimizer, model[0])[1][0]
    assert (G - torch.eye(4)).abs().max() < 0.2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_that_share_a_sample_have_their_share_of_its_loss(reduction: str) -> None:
    """Of a sum each row has all, and G is the identity; of a mean over three rows a third, squared in G."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    optimizer = still(model, loss_reduction=reduction)
    rows = optimizer.sample_labels(model(inputs(300, 3, 3)), "gaussian", dim=-1).square().sum(-1)
    (rows.sum() if reduction == "sum" else rows.mean()).backward()
    optimizer.step()
    expected = torch.eye(4) / (1 if reduction == "sum" else 9)
    assert (factors(optimizer, model[0])[1][0] - expected).norm() < 0.2 * expected.norm()


def test_labels_of_a_part_of_the_model_and_of_all_of_it() -> None:
    """The pass of the one does not sample the other's again: as many rows as outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False)).double()
    nn.init.eye_(model[1].weight)
    optimizer = still(model)
    hidden = optimizer.sample_labels(model[0](inputs(900, 3)), "gaussian")
    optimizer.sample_labels(model[1](hidden), "gaussian").square().mean().backward()
    optimizer.step()
    A, G = factors(optimizer, model[0])
    # Two uses: A adds up, and G is a mean over all rows.
    assert abs(float(A[0, -1, -1]) - 2) < 1e-9
    assert (G[0] - torch.eye(4)).abs().max() < 0.2


def test_statistics_of_a_norm_are_the_squares_of_sampled_gradients() -> None:
    """Its curvature is the mean of squared gradients of samples, which are sampled labels' here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4)).double()
    x = inputs(3000, 4)
    optimizer = still(model, layer_options={nn.LayerNorm: {"path": "fop"}})
    learn(optimizer, model, x, "gaussian", None)
    optimizer.step()
    with torch.no_grad():
        normal = F.layer_norm(x, (4,))
    # Var of noise·x̂ for the weight and of noise for the bias, by sample.
    expected = torch.stack([normal.square().mean(0), torch.ones(4)])
    actual = optimizer.state[model[0].weight]["A"].reshape(-1)
    torch.testing.assert_close(actual.sort()[0], expected.reshape(-1).double().sort()[0], atol=0.2, rtol=0)


def test_float16_gradients_of_many_rows_do_not_vanish() -> None:
    """The gradient of a mean over 40,000 rows is below float16's range after a layer of small weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(1e-2)
    optimizer = still(model)
    with torch.autocast("cpu", torch.float16):
        outputs = optimizer.sample_labels(model(torch.randn(40_000, 2)), "gaussian")
    (2.0**16 * outputs.float().square().mean()).backward()
    optimizer.step()
    W = model[1].weight.detach()
    G = factors(optimizer, model[0])[1][0]
    assert (G - W.T @ W).norm() < 0.05 * (W.T @ W).norm()


def test_labelled_sub_batches() -> None:
    model, x, y = mlp(), inputs(12, 5), ids(12) % 3
    optimizer = still(model)
    for index in (0, 1):
        with optimizer.sub_batch(index):
            outputs = optimizer.sample_labels(model(x[index::2]), "categorical")
            (cross_entropy(outputs, y[index::2]) / 2).backward()
    optimizer.step()
    assert optimizer.diagnostics().layers["0"].kfac_steps == 0
    A = torch.cat([x, torch.ones(12, 1)], 1)
    torch.testing.assert_close(factors(optimizer, model[0])[0][0], A.T @ A / 12)


class Checkpointed(nn.Module):
    """Its hidden layers are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inner(x)  # type: ignore[no-any-return]
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def test_activation_checkpointing() -> None:
    models = [Checkpointed(None), Checkpointed(False)]
    for model in models:
        train(model, FOP(model, fisher="model"), range(3), passes=2)
    assert_equal(weights(models[0]), weights(models[1]))


def test_reentrant_checkpointing_is_refused() -> None:
    """Its layers are outside of the graph that a pass to chosen weights can go through."""
    model = Checkpointed(True)
    optimizer = FOP(model, fisher="model")
    outputs = optimizer.sample_labels(model(inputs(8, 5).requires_grad_()), "categorical")
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step()
    model.reentrant = False
    train(model, optimizer, range(1))


@pytest.mark.parametrize("compiled", ["model", "loss"])
def test_torch_compile(compiled: str) -> None:
    found = []
    for how in ("", compiled):
        torch.compiler.reset()
        model, run = mlp(), torch.compile(backend="aot_eager")
        optimizer = FOP(model, fisher="model")
        train(run(model) if how == "model" else model, optimizer, range(3), 1, run if how == "loss" else None)
        found.append(weights(model))
        assert all(layer.kfac_steps == 0 for layer in optimizer.diagnostics().layers.values())
    for one, other in zip(*(each.values() for each in found), strict=True):
        torch.testing.assert_close(one, other)


# --- steps without labels --------------------------------------------------------------------------------


def test_a_step_without_labels_is_refused_and_changes_nothing() -> None:
    model, x, y = mlp(), inputs(8, 5), ids(8) % 3
    optimizer = FOP(model, fisher="model")
    train(model, optimizer, range(2))
    before = snapshot(optimizer), weights(model)
    optimizer.zero_grad()
    optimizer.sample_labels(model(x), "categorical")
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="layer '0' has a gradient but no sampled labels"):
        optimizer.step()
    assert_equal((snapshot(optimizer), weights(model)), before)
    train(model, optimizer, range(2, 4))

    expected = mlp()
    train(expected, FOP(expected, fisher="model"), range(4))
    assert_equal(weights(model), weights(expected))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.main, self.side = (nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2))
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.main(h), self.side(h)


def test_every_output_with_a_loss_needs_labels_or_the_empirical_fisher() -> None:
    x = inputs(8, 5)

    def loss(model: Heads, optimizer: FOP, labelled: bool) -> Tensor:
        main, side = model(x)
        if labelled:
            side = optimizer.sample_labels(side, "gaussian")
        return optimizer.sample_labels(main, "categorical").square().mean() + side.square().mean()

    model = Heads()
    optimizer = FOP(model, fisher="model")
    loss(model, optimizer, False).backward()
    with pytest.raises(RuntimeError, match="layer 'side'"):
        optimizer.step()
    optimizer.zero_grad()
    loss(model, optimizer, True).backward()
    optimizer.step()
    assert all("G" in optimizer.state[layer.weight] for layer in (model.body, model.main, model.side))
    assert model.unused.weight not in optimizer.state

    model = Heads()
    rest = [param for name, param in model.named_parameters() if "side" not in name]
    groups = [{"params": rest, "fisher": "model"}, {"params": model.side.parameters()}]
    optimizer = FOP(groups)
    loss(model, optimizer, False).backward()
    optimizer.step()
    assert "G" in optimizer.state[model.side.weight]


def test_a_step_without_statistics_needs_no_labels() -> None:
    model = mlp()
    optimizer = FOP(model, fisher="model", curvature_interval=100)
    for _ in range(20):
        optimizer.zero_grad()
        outputs = model(inputs(8, 5))
        if optimizer.curvature_due:
            outputs = optimizer.sample_labels(outputs, "categorical")
        outputs.square().mean().backward()
        optimizer.step()
    assert optimizer.state[model[0].weight]["refreshed_at"] < 19


def test_frozen_layer() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = FOP(model, fisher="model")
    train(model, optimizer, range(2))
    model[0].requires_grad_(True)
    train(model, optimizer, range(2, 4))
    assert "G" in optimizer.state[model[0].weight]


@pytest.mark.parametrize("bad", ["loss", "outputs"])
def test_a_loss_that_is_not_finite_leaves_the_curvature_alone(bad: str) -> None:
    model, x = mlp(), inputs(8, 5)
    optimizer = FOP(model, fisher="model")
    train(model, optimizer, range(2))
    before = [factors(optimizer, layer) for layer in (model[0], model[2])], weights(model)
    optimizer.zero_grad()
    outputs = model(x) * (float("nan") if bad == "outputs" else 1)
    loss = optimizer.sample_labels(outputs, "categorical").square().mean()
    (loss * float("nan")).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert_equal(([factors(optimizer, layer) for layer in (model[0], model[2])], weights(model)), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(3, 5))


def test_an_overflowing_step_of_a_scaler_leaves_everything_as_it_is() -> None:
    model, x = mlp(), inputs(8, 5)
    optimizer = FOP(model, fisher="model")
    train(model, optimizer, range(2))
    before = snapshot(optimizer), weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    outputs = optimizer.sample_labels(model(x), "categorical")
    (scaler.scale(outputs.square().mean()) * float("inf")).backward()
    scaler.step(optimizer)
    assert_equal((snapshot(optimizer), weights(model)), before)


# --- arguments -------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[FOP], Any], type[Exception], str]] = {
    "list": (lambda o: o.sample_labels([1.0], "gaussian"), TypeError, "got list"),  # type: ignore[arg-type]
    "integers": (lambda o: o.sample_labels(ids(3, 2), "gaussian"), TypeError, r"got torch\.int64"),
    "likelihood": (
        lambda o: o.sample_labels(inputs(3, 2), "poisson"),  # type: ignore[arg-type]
        ValueError,
        "likelihood='poisson' must be 'categorical' or 'gaussian'",
    ),
    "tokens": (lambda o: o.sample_labels(inputs(4, 3, 2), "categorical"), ValueError, "dim=-1 for"),
    "one class": (lambda o: o.sample_labels(inputs(4), "categorical"), ValueError, r"shape \(4,\)"),
    "dim": (lambda o: o.sample_labels(inputs(4, 3), "gaussian", dim=2), ValueError, "dim=2 must be one of"),
    "dim True": (lambda o: o.sample_labels(inputs(4, 3), "gaussian", dim=True), ValueError, "dim=True"),
}


@pytest.mark.parametrize("fisher", ["empirical", "model"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, fisher: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(FOP(mlp(), fisher=fisher))  # type: ignore[arg-type]


def test_one_number_for_each_sample() -> None:
    """Outputs (N,): every entry is a row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1)).double()
    optimizer = still(model)
    outputs = optimizer.sample_labels(model(inputs(900, 3)).squeeze(1), "gaussian")
    outputs.square().mean().backward()
    optimizer.step()
    assert abs(float(factors(optimizer, model[0])[1]) - 1) < 0.2


def test_no_rows_with_labels() -> None:
    """All of a batch is masked out: nothing of it is in G."""
    model = mlp()
    optimizer = still(model)
    outputs = optimizer.sample_labels(model(inputs(8, 5))[:0], "categorical")
    outputs.sum().backward()
    optimizer.step()
    assert not factors(optimizer, model[2])[1].any()


def test_the_pass_of_sampled_labels_computes_no_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> int:
        seen.clear()
        loss = cross_entropy(optimizer.sample_labels(model(inputs(8, 5)), "categorical"), ids(8) % 3)
        loss.backward()
        return sum(seen)

    seen: list[int] = []
    original = LinearLayer.gradients
    monkeypatch.setattr(
        LinearLayer,
        "gradients",
        lambda layer, x, b, *, bias: (seen.append(len(x)), original(layer, x, b, bias=bias))[1],
    )
    model = mlp()
    optimizer = FOP(model, fisher="model")
    assert any(p.dim() == 1 for p in model.parameters())
    sampled = rows()
    optimizer = FOP(model)
    assert sampled == rows() > 0


@pytest.mark.parametrize("bad", ["data", None, True])
def test_option_is_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"fisher=.* must be 'empirical' or 'model'"):
        FOP(mlp(), fisher=bad)


def test_vectorized_jacobians_are_left_alone() -> None:
    model, x = mlp(), inputs(6, 5)
    optimizer = FOP(model, fisher="model")
    outputs = partial(optimizer.sample_labels, likelihood="categorical")
    jacobian = partial(torch.autograd.functional.jacobian, inputs=x, vectorize=True)
    torch.testing.assert_close(jacobian(lambda x: outputs(model(x))), jacobian(model))
