"""Tiny models and batches, and what several test files compare the library with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from fop import FOP
from reference import half_squared_error

LossFn = Callable[[nn.Module, Tensor, Tensor], Tensor]
Pairs = Mapping[str, tuple[Tensor, Tensor | None]]

# β and η are fixed: with adaptive ones a step is the same for every multiple of g1 − g2, so it could not tell
# a pair of the wrong size. Nothing but η F̂⁻¹ (Ga + β G⊥) is left of the step.
PLAIN: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.5,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "damping": 0.1,
    "stat_decay": 0.8,
    "beta": 0.5,
    "eta": 0.75,
    "kl_clip": None,
    "curvature_interval": 1,
}
# After `late` there are no statistics until the next curvature update, a hundred steps later.
BETWEEN: dict[str, Any] = {"curvature_interval": 100, "lr": 0.02}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def conv_net(seed: int = 0) -> nn.Sequential:
    """Linear and (grouped) convolution with and without bias, in-place activation, image of 2×5×6."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (1, 3), groups=2, padding="same"),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()


class Mixed(nn.Module):
    """Both paths: embedding and two linear layers take FOP; a norm and a bare parameter take AdamW."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3, bias=False)
        self.shift = nn.Parameter(torch.randn(3))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.norm(self.embed(tokens))))) + self.shift
        return out


class Attentive(nn.Module):
    """Every further kind of layer in little: embedding, attention, (transposed) convolutions, norms."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.down = nn.Conv1d(4, 3, 2, stride=2)
        self.up = nn.ConvTranspose1d(3, 4, 2, stride=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, sentences: Tensor) -> Tensor:
        x = self.embed(sentences)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.group(x.mT + self.up(torch.tanh(self.down(x.mT))))
        out: Tensor = self.head(x.mean(-1))
        return out


class Own(nn.Module):
    """A linear layer that no class of torch's tells about."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        inner = nn.Linear(*sizes)
        self.weight, self.bias = nn.Parameter(inner.weight.data), nn.Parameter(inner.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def batch(n: int = 6, seed: int = 1, shape: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    """Inputs (n, *shape) and targets (n, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randn(n, 3, dtype=torch.float64, generator=generator)


def tokens(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token inputs for `Mixed`, with targets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (n,), generator=generator), batch(n, seed)[1]


def sentences(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token inputs for `Attentive`, (n, 4), the last often padding; with targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 7, (n, 4), generator=generator)
    ids[::2, -1] = 0
    return ids, batch(n, seed)[1]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return half_squared_error(model(x), y)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(left: Any, right: Any) -> None:
    """Bit for bit, through dicts, lists and tensors."""
    assert type(left) is type(right)
    if isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_equal(value, right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    else:
        assert left == right


def assert_differs(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    for name, value in left.items():
        assert not torch.equal(value, right[name]), f"{name} is the same"


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def layers(model: nn.Module) -> dict[str, reference.Layer]:
    return reference.layers_of(model)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient matrices by layer, of plain autograd."""
    found = {}
    for name, layer in layers(model).items():
        grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        found[name] = reference.to_matrix(layer, grads[0], None if layer.bias is None else grads[1])
    return found


def halves(
    twin: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn = loss_of
) -> dict[str, tuple[Tensor, Tensor]]:
    """(Ga, Gd) by layer from separate backward passes over the whole batch and its two sub-batches.

    ``twin`` is a copy that no optimizer knows. Ga is the gradient of the whole batch, which for an odd
    batch is not the plain mean of g1 and g2.
    """
    whole = gradients(twin, loss_fn(twin, x, y))
    g1, g2 = (gradients(twin, loss_fn(twin, x[part], y[part])) for part in reference.split(len(x)))
    return {name: (whole[name], g1[name] - g2[name]) for name in whole}


def started(build: Callable[[], nn.Module] = mlp, due: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """A model, a copy that no optimizer knows, and an optimizer whose next step has statistics or not."""
    model = build()
    optimizer = FOP(model, **{**PLAIN, **({} if due else BETWEEN), **options})
    if not due:
        late(optimizer, lambda: train_step(model, optimizer, *batch()))
        optimizer.zero_grad()
    assert optimizer.curvature_due is due
    twin = build()
    twin.load_state_dict(model.state_dict())
    return model, twin, optimizer


def late(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Take a first step, and one as in a long run, where the curvature interval is in full."""
    step()
    for group in optimizer.param_groups:
        group["step"] = 500
    step()


def matrix_of(layer: Any, parts: Any) -> Tensor:
    """A layer's (groups, out, in) of [weight] or [weight, bias]."""
    return reference.to_matrix(layer, *parts, *[None] * (2 - len(parts)))


def current(model: nn.Module) -> dict[str, tuple[Tensor, None]]:
    """What is in ``p.grad`` now, without a second gradient."""
    found = {name: [p.grad for p in layer.parameters()] for name, layer in layers(model).items()}
    return {name: (matrix_of(layers(model)[name], parts).clone(), None) for name, parts in found.items()}


def scaled(pairs: Pairs, factor: float | Tensor) -> Pairs:
    """Both gradients of each pair times a number."""
    return {name: (factor * Ga, None if Gd is None else factor * Gd) for name, (Ga, Gd) in pairs.items()}


def check_kept_pair(optimizer: Any, names: Any = None, steps: int = 0) -> None:
    """These layers (or all) had the pair in the last step, and missed it ``steps`` times so far."""
    found = optimizer.diagnostics().layers
    assert found
    for name in found if names is None else names:
        assert (found[name].kfac_steps, found[name].why_kfac) == (steps, None), name


def check_lost_pair(optimizer: Any, names: Any = None, steps: int = 1, why: str = "") -> None:
    """These layers (or all) had no pair in the last step, said why, and missed it ``steps`` times so far."""
    found = optimizer.diagnostics().layers
    assert found
    for name in found if names is None else names:
        assert found[name].kfac_steps == steps, name
        assert found[name].why_kfac and why in found[name].why_kfac, (name, found[name].why_kfac)
        assert f"{name} took K-FAC's step" in str(optimizer.diagnostics())


def check_as_told(model: nn.Module, twin: nn.Module, optimizer: Any, pairs: Pairs) -> None:
    """Every layer took the step of this pair, or K-FAC's if it says why."""
    for name, layer in optimizer.diagnostics().layers.items():
        told = kfac({name: pairs[name]}) if layer.why_kfac else {name: pairs[name]}
        check_step(model, twin, optimizer, told)


def kfac(pairs: Pairs) -> dict[str, tuple[Tensor, None]]:
    """The same averages without a second gradient."""
    return {name: (average, None) for name, (average, _) in pairs.items()}


def moved(model: nn.Module, twin: nn.Module, name: str, lr: float) -> Tensor:
    """(old − new) / lr of one layer as gradient matrix; ``twin`` has the old weights."""
    new, old = layers(model)[name], layers(twin)[name]
    parts = [(was - now).detach() / lr for was, now in zip(old.parameters(), new.parameters(), strict=True)]
    return reference.to_matrix(new, parts[0], None if new.bias is None else parts[1])


def direction(optimizer: Any, weight: Tensor, average: Tensor, difference: Tensor | None) -> Tensor:
    """η F̂⁻¹ (Ga + β G⊥) by the dense equations, with A and G as the optimizer holds them."""
    state, group = optimizer.state[weight], optimizer.param_groups[0]
    F = reference.dense_fisher(state["A"], state["G"])
    F_hat = reference.dense_damped_fisher(state["A"], state["G"], group["damping"])
    if difference is None:
        # β = 0. A fixed η stays: it is the caller's own scale.
        eta = 1.0 if group["eta"] == "adaptive" else group["eta"]
        return eta * reference.unvec(torch.linalg.solve(F_hat, reference.vec(average)), like=average)
    mixed = reference.correct(
        F, F_hat, reference.vec(average), reference.vec(difference), group["beta"], group["eta"]
    )
    return reference.unvec(mixed.direction, like=average)


def check_step(model: nn.Module, twin: nn.Module, optimizer: Any, pairs: Pairs) -> None:
    """The step from ``twin`` to ``model`` used exactly these gradients (options as in `PLAIN`)."""
    lr = optimizer.param_groups[0]["lr"]
    for name, (average, difference) in pairs.items():
        expected = direction(optimizer, layers(model)[name].weight, average, difference)
        taken = moved(model, twin, name, lr)
        error = float((taken - expected).norm() / expected.norm())
        assert error < 1e-9, f"{name}: the step differs by {error:.1e}"
        if difference is not None:
            without = direction(optimizer, layers(model)[name].weight, average, None)
            assert float((without - expected).norm() / expected.norm()) > 1e-4, (
                f"{name}: the case cannot fail"
            )
