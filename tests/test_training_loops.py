"""Loops with more in them than forward, backward and step: the same updates, or a word why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from models import PLAIN, batch, check_step, gradients, halves, kfac, mlp, weights
from reference import half_squared_error

OPTIONS: dict[str, Any] = {"damping": 1e-2, "curvature_interval": 2}
# From step 10 on, the curvature is renewed in every second step only.
STEPS = 13

Step = Callable[[nn.Module, FOP, int], Any]


class Everything(nn.Module):
    """Tokens through embedding, attention, convolution, transposed convolution, norm and two linear heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(4, 6, 2, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.mean, self.scale = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)
        self.double()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return self.tail(self.embed(ids))

    def tail(self, h: Tensor) -> dict[str, Tensor]:
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.norm(self.up(torch.tanh(self.conv(h.transpose(1, 2))))).transpose(1, 2)
        return {"mean": self.mean(h), "scale": self.scale(h)}


LAYERS = {"embed", "attention.in_proj", "attention.out_proj", "conv", "up", "norm", "mean", "scale"}


def sentences(seed: int, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, 8, 3, dtype=torch.float64, generator=generator)
    return torch.randint(0, 9, (n, 4), generator=generator), y


def loss_of(model: nn.Module, seed: int, n: int = 5) -> Tensor:
    """A number from several outputs."""
    ids, y = sentences(seed, n)
    out = model(ids)
    return half_squared_error(out["mean"], y) + 0.1 * out["scale"].square().flatten(1).sum(1).mean()


def make(model: nn.Module, kind: type[FOP] = FOP, **options: Any) -> FOP:
    return kind(model, layer_options={"norm": {"path": "fop"}}, **{**OPTIONS, **options})


def plain(model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def run(
    step: Step, kind: type[FOP] = FOP, steps: int = STEPS, **options: Any
) -> tuple[dict[str, Tensor], FOP]:
    model = Everything()
    optimizer = make(model, kind, **options)
    for number in range(steps):
        step(model, optimizer, number)
    assert optimizer.diagnostics().layers.keys() == LAYERS
    return weights(model), optimizer


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def assert_all_paired(optimizer: FOP) -> None:
    assert {name for name, d in optimizer.diagnostics().layers.items() if d.kfac_steps} == set()


@pytest.fixture(scope="module")
def expected() -> Callable[[type[FOP]], dict[str, Tensor]]:
    known: dict[type[FOP], dict[str, Tensor]] = {}

    def of(kind: type[FOP]) -> dict[str, Tensor]:
        if kind not in known:
            known[kind] = run(plain, kind)[0]
        return known[kind]

    return of


# --- things done between the passes that must leave no trace -----------------------------------------------


def evaluated(model: nn.Module, optimizer: FOP, step: int) -> None:
    """All ways to evaluate, between the two passes of a step."""
    optimizer.zero_grad()
    loss = loss_of(model, step)
    model.eval()
    with torch.no_grad():
        loss_of(model, 100 + step, 4)
    with torch.inference_mode():
        loss_of(model, 200 + step, 3)
    loss_of(model, 300 + step, 7)
    model.train()
    loss.backward()
    with torch.inference_mode():
        loss_of(model, 400 + step, 5)
    optimizer.step()


def never_backwarded(model: nn.Module, optimizer: FOP, step: int) -> None:
    """Graphs of other batches stay alive all the time."""
    optimizer.zero_grad()
    before = loss_of(model, 100 + step, 3)
    loss = loss_of(model, step)
    after = loss_of(model, 200 + step, 4)
    loss.backward()
    optimizer.step()
    assert before.grad_fn is not None and after.grad_fn is not None


def reset_by_the_model(model: nn.Module, optimizer: FOP, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    model.zero_grad()


def reset_to_zeros(model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, step).backward()
    optimizer.step()


def reset_to_zeros_by_the_model(model: nn.Module, optimizer: FOP, step: int) -> None:
    model.zero_grad(set_to_none=False)
    loss_of(model, step).backward()
    optimizer.step()


def reset_by_hand(model: nn.Module, optimizer: FOP, step: int) -> None:
    for param in model.parameters():
        param.grad = None
    loss_of(model, step).backward()
    optimizer.step()


def thrown_away(model: nn.Module, optimizer: FOP, step: int) -> None:
    """A backward pass that no step follows."""
    loss_of(model, 100 + step, 4).backward()
    for param in model.parameters():
        param.grad = None
    plain(model, optimizer, step)


def closure(model: nn.Module, optimizer: FOP, step: int) -> None:
    calls = []

    def evaluate() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    loss: Any = optimizer.step(evaluate)  # type: ignore[arg-type]
    assert calls == [True] and isinstance(loss, Tensor)


def closure_called_before(model: nn.Module, optimizer: FOP, step: int) -> None:
    """As LBFGS would: several evaluations, of which the last counts."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    evaluate()
    evaluate()
    optimizer.step(evaluate)  # type: ignore[arg-type]


def gradient_of_the_embedded(model: nn.Module, optimizer: FOP, step: int) -> None:
    """As saliency maps or adversarial training do, before the pass that counts."""
    h = model.embed(sentences(step)[0]).detach().requires_grad_()  # type: ignore[operator]
    torch.autograd.grad(model.tail(h)["mean"].sum(), h)  # type: ignore[operator]
    plain(model, optimizer, step)


def gradient_on_the_same_graph(model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    optimizer.step()


def with_a_graph_of_the_gradient(model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def backwarded_for_some(model: nn.Module, optimizer: FOP, step: int) -> None:
    """Gradients of the parameters are asked for one half after the other."""
    optimizer.zero_grad()
    loss = loss_of(model, step)
    heads = [*model.mean.parameters(), *model.scale.parameters()]  # type: ignore[union-attr, operator]
    rest = [p for p in model.parameters() if all(p is not head for head in heads)]
    loss.backward(inputs=heads, retain_graph=True)
    loss.backward(inputs=rest)
    optimizer.step()


def under_detection(model: nn.Module, optimizer: FOP, step: int) -> None:
    with torch.autograd.set_detect_anomaly(True):
        plain(model, optimizer, step)


def without_multithreading(model: nn.Module, optimizer: FOP, step: int) -> None:
    with torch.autograd.set_multithreading_enabled(False):
        plain(model, optimizer, step)


TRACELESS: list[Step] = [
    evaluated,
    never_backwarded,
    reset_by_the_model,
    reset_to_zeros,
    reset_to_zeros_by_the_model,
    reset_by_hand,
    thrown_away,
    closure,
    closure_called_before,
    gradient_of_the_embedded,
    gradient_on_the_same_graph,
    with_a_graph_of_the_gradient,
    backwarded_for_some,
    under_detection,
    without_multithreading,
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", [FOP, KFAC])
@pytest.mark.parametrize("step", TRACELESS)
def test_loops_that_change_nothing(
    step: Step, kind: type[FOP], expected: Callable[[type[FOP]], dict[str, Tensor]]
) -> None:
    actual, optimizer = run(step, kind)
    assert_close(actual, expected(kind))
    assert_all_paired(optimizer)


@pytest.mark.parametrize("kind", [FOP, KFAC])
def test_maximize(kind: type[FOP], expected: Callable[[type[FOP]], dict[str, Tensor]]) -> None:
    def negative(model: nn.Module, optimizer: FOP, step: int) -> None:
        optimizer.zero_grad()
        (-loss_of(model, step)).backward()
        optimizer.step()

    assert_close(run(negative, kind, maximize=True)[0], expected(kind))


# --- several passes a step ---------------------------------------------------------------------------------


def two_passes_of_two_losses(model: nn.Module, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    ids, y = sentences(step)
    out = model(ids)
    half_squared_error(out["mean"], y).backward(retain_graph=True)
    (0.1 * out["scale"].square().flatten(1).sum(1).mean()).backward()
    optimizer.step()


def test_losses_backwarded_one_by_one_have_the_pair_of_their_sum() -> None:
    """In a step without statistics, which would be of two passes, nothing tells them from one."""

    def then_two(model: nn.Module, optimizer: FOP, step: int) -> None:
        if step < STEPS:
            plain(model, optimizer, step)
        else:
            assert not optimizer.curvature_due
            two_passes_of_two_losses(model, optimizer, step)

    actual, optimizer = run(then_two, steps=STEPS + 1)
    assert_close(actual, run(plain, steps=STEPS + 1)[0], 1e-10)
    assert_all_paired(optimizer)


def test_the_same_graph_twice_is_twice_the_gradient() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(7)
    pairs = {name: (2 * a, 2 * d) for name, (a, d) in halves(twin, x, y).items()}
    loss = half_squared_error(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)
    assert_all_paired(optimizer)


def test_a_module_called_twice_in_a_pass() -> None:
    """Two views of each sample through one encoder, as in contrastive learning."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)

    def views(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return half_squared_error(model(x) - 0.5 * model(x.flip(1)), y)

    x, y = batch(7)
    pairs = halves(twin, x, y, views)
    views(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)
    assert_all_paired(optimizer)


# --- double backward ---------------------------------------------------------------------------------------


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """WGAN-GP: the slope at points between true and false samples."""
    between = (0.7 * x + 0.3 * x.flip(1)).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return half_squared_error(model(x), y) + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("interval", [1, 3])
def test_gradient_penalty_takes_the_right_gradient_and_says_that_there_is_no_pair(interval: int) -> None:
    model = critic()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **{**PLAIN, "curvature_interval": interval, "lr": 0.01})
    for step in range(4):
        x, y = batch(6, step, (2, 5))
        twin.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        penalised(model, x, y).backward()
        grads = torch.autograd.grad(penalised(twin, x, y), list(twin.parameters()))
        for param, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=1e-12, atol=1e-12)
        optimizer.step()
        layers = optimizer.diagnostics().layers
        assert layers.keys() == {"0", "3", "5"}
        for name in ("0", "3"):
            assert layers[name].kfac_steps == step + 1 and layers[name].why_kfac
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_gradient_penalty_step_is_kfac_with_the_whole_gradient() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(6)
    whole = gradients(twin, penalised(twin, x, y))
    penalised(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, kfac({name: (average, None) for name, average in whole.items()}))
