"""A dense float64 oracle for FOP and K-FAC, written from the paper's equations alone.

It never imports the library, and takes the slow road wherever the library could take a fast one: samples one
at a time through autograd, patches by index loops, the Kronecker block as one full matrix, the inverse by a
dense solve, every inner product as a dot product of long vectors.

A gradient "matrix" of a layer has shape (groups, out, in), with the bias as last column; a Linear layer is
one group. `vec` stacks the columns of each group, which makes the printed F = A ⊗ G act as
F·vec(V) = vec(G V A).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

LossFn = Callable[[Tensor, Tensor], Tensor]
Layer = nn.Linear | nn.Conv2d
Mixing = float | Literal["adaptive"]

# The ε of equation (4): a guard against 0/0 and nothing else, so far below any real denominator.
TINY = 1e-300


@dataclass(frozen=True)
class LayerSample:
    """What one sample does in one layer; R is the number of rows (positions) of the sample."""

    inputs: Tensor  # (groups, R, in)    ā: input rows, with 1 appended where there is a bias
    outputs: Tensor  # (groups, R, out)  gradient of this sample's loss with respect to the layer's output
    gradient: Tensor  # (groups, out, in) gradient of this sample's loss with respect to weight and bias


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """½‖output − target‖², summed over everything but the samples, mean over the samples."""
    return 0.5 * (output - target).flatten(1).square().sum(dim=1).mean()


# --- weights and vectors ---------------------------------------------------------------------------


def groups_of(layer: Layer) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def to_matrix(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(groups, out, in) from tensors shaped like the layer's weight and bias."""
    groups = groups_of(layer)
    out = weight.shape[0] // groups
    matrix = weight.reshape(groups, out, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, out, 1)], dim=2)


def from_matrix(layer: Layer, matrix: Tensor) -> list[Tensor]:
    """[weight] or [weight, bias] from (groups, out, in)."""
    if layer.bias is None:
        return [matrix.reshape(layer.weight.shape)]
    return [matrix[:, :, :-1].reshape(layer.weight.shape), matrix[:, :, -1].reshape(layer.bias.shape)]


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns of every group."""
    return matrix.transpose(1, 2).reshape(-1)


def unvec(vector: Tensor, like: Tensor) -> Tensor:
    groups, out, in_ = like.shape
    return vector.reshape(groups, in_, out).transpose(1, 2)


# --- what one sample does in one layer -------------------------------------------------------------


def _padding(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """(before, after) for height and width."""
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]  # an odd total pads one more after than before
    return [(int(p), int(p)) for p in conv.padding]


def _source(index: int, size: int, mode: str) -> int | None:
    """The pixel a padded coordinate stands for; None means zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    if mode == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    raise NotImplementedError(mode)


def patches(conv: nn.Conv2d, image: Tensor) -> Tensor:
    """(groups, T, in/groups·kh·kw) from one image (in, height, width), by explicit index loops."""
    pixels = image.detach().tolist()
    channels, *size = image.shape
    padding, per_group = _padding(conv), channels // conv.groups
    count = [
        (size[i] + sum(padding[i]) - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i in range(2)
    ]

    def pixel(channel: int, position: Sequence[int], tap: Sequence[int]) -> float:
        at = [
            _source(
                position[i] * conv.stride[i] + tap[i] * conv.dilation[i] - padding[i][0],
                size[i],
                conv.padding_mode,
            )
            for i in range(2)
        ]
        return 0.0 if at[0] is None or at[1] is None else pixels[channel][at[0]][at[1]]

    positions = list(itertools.product(range(count[0]), range(count[1])))
    taps = list(itertools.product(range(conv.kernel_size[0]), range(conv.kernel_size[1])))
    rows = [
        [
            [pixel(g * per_group + c, position, tap) for c in range(per_group) for tap in taps]
            for position in positions
        ]
        for g in range(conv.groups)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _input_rows(layer: Layer, x: Tensor) -> Tensor:
    """ā rows (groups, R, in) of one sample; x has a batch dimension of one."""
    if isinstance(layer, nn.Conv2d):
        rows = patches(layer, x[0])
    else:
        rows = x.detach().reshape(1, -1, layer.in_features)
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :, :1])], dim=2)


def _output_rows(layer: Layer, b: Tensor) -> Tensor:
    """Output-gradient rows (groups, R, out) of one sample; b has a batch dimension of one."""
    if isinstance(layer, nn.Conv2d):
        return b[0].reshape(layer.groups, layer.out_channels // layer.groups, -1).transpose(1, 2)
    return b.reshape(1, -1, layer.out_features)


def layers_of(model: nn.Sequential) -> dict[str, Layer]:
    return {name: m for name, m in model.named_children() if isinstance(m, nn.Linear | nn.Conv2d)}


def sample_quantities(model: nn.Sequential, x: Tensor, y: Tensor, loss_fn: LossFn) -> dict[str, LayerSample]:
    """Per layer, the rows and the gradient of a batch that holds a single sample.

    For one sample the mean-reduced loss is the sample's own loss, so its output gradient is the batch's N·b.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    layers = layers_of(model)
    for name, module in model.named_children():
        if name in layers:
            inputs[name] = x
            outputs[name] = module(x)
            x = outputs[name].clone()  # an in-place activation must not overwrite what is differentiated
        else:
            x = module(x)
    loss = loss_fn(x, y)
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    grads = torch.autograd.grad(loss, [*outputs.values(), *parameters])
    by_parameter = dict(zip(parameters, grads[len(layers) :], strict=True))
    return {
        name: LayerSample(
            inputs=_input_rows(layer, inputs[name]),
            outputs=_output_rows(layer, b),
            gradient=to_matrix(
                layer, by_parameter[layer.weight], None if layer.bias is None else by_parameter[layer.bias]
            ),
        )
        for (name, layer), b in zip(layers.items(), grads[: len(layers)], strict=True)
    }


def per_sample(model: nn.Sequential, x: Tensor, y: Tensor, loss_fn: LossFn) -> dict[str, list[LayerSample]]:
    """`sample_quantities` of every sample of the batch, by layer."""
    samples = [sample_quantities(model, x[n : n + 1], y[n : n + 1], loss_fn) for n in range(len(x))]
    return {name: [sample[name] for sample in samples] for name in layers_of(model)}


# --- curvature -------------------------------------------------------------------------------------


def factors(samples: Sequence[LayerSample]) -> tuple[Tensor, Tensor]:
    """A (groups, in, in) and G (groups, out, out): A sums over positions, G averages over them."""
    N, R = len(samples), samples[0].inputs.shape[1]
    A = sum(sample.inputs.mT @ sample.inputs for sample in samples) / N
    G = sum(sample.outputs.mT @ sample.outputs for sample in samples) / (N * R)
    return torch.as_tensor(A), torch.as_tensor(G)


def dense_fisher(A: Tensor, G: Tensor) -> Tensor:
    """F = A ⊗ G as one matrix, block diagonal over the groups."""
    return torch.block_diag(*[torch.kron(A_g, G_g) for A_g, G_g in zip(A, G, strict=True)])


def dense_damped_fisher(A: Tensor, G: Tensor, damping: float) -> Tensor:
    """F̂ = (A + πγ I) ⊗ (G + γ/π I), with π of each group's own factors."""
    gamma = math.sqrt(damping)
    A_hat, G_hat = [], []
    for A_g, G_g in zip(A, G, strict=True):
        a, g = float(A_g.trace()) / len(A_g), float(G_g.trace()) / len(G_g)
        pi = math.sqrt(a / g) if a > 0 and g > 0 else 1.0
        A_hat.append(A_g + pi * gamma * torch.eye(len(A_g), dtype=A_g.dtype))
        G_hat.append(G_g + gamma / pi * torch.eye(len(G_g), dtype=G_g.dtype))
    return dense_fisher(torch.stack(A_hat), torch.stack(G_hat))


# --- equations -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correction:
    """Equations (4) to (17) for one layer; vectors are `vec` of gradient matrices."""

    direction: Tensor  # η F̂⁻¹ Gc
    perpendicular: Tensor  # G⊥
    beta: float
    eta: float
    rho: float


def correct(F: Tensor, F_hat: Tensor, Ga: Tensor, Gd: Tensor | None, beta: Mixing, eta: Mixing) -> Correction:
    """The direction η F̂⁻¹ (Ga + β G⊥); without a second gradient it is K-FAC's, whatever the options."""
    if Gd is None:
        return Correction(torch.linalg.solve(F_hat, Ga), torch.zeros_like(Ga), beta=0.0, eta=1.0, rho=0.0)
    s = (Gd @ F @ Ga) / (Ga @ F @ Ga + TINY)  # (4)
    perp = Gd - s * Ga  # (5)
    solved_perp = torch.linalg.solve(F_hat, perp)
    D, E = Ga @ solved_perp, perp @ solved_perp  # (13)
    B = Ga @ torch.linalg.solve(F_hat, Ga)
    rho = float(D**2 / (E * B + TINY))
    beta = float(D / (E + TINY)) if beta == "adaptive" else beta  # (16)
    Gc = Ga + beta * perp  # (6)
    solved = torch.linalg.solve(F_hat, Gc)
    eta = float((Ga @ solved) / (Gc @ solved + TINY)) if eta == "adaptive" else eta  # (17), with g_tot = Ga
    return Correction(eta * solved, perp, beta=beta, eta=eta, rho=rho)


def momentum_step(
    direction: Tensor, buffer: Tensor | None, momentum: float, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """(step, new buffer) with the rule of torch.optim.SGD without dampening."""
    buffer = direction if buffer is None else momentum * buffer + direction
    return (direction + momentum * buffer if nesterov else buffer), buffer


# --- optimizer -------------------------------------------------------------------------------------


@dataclass
class LayerState:
    """What the oracle remembers of a layer between steps, and `correction` to look at."""

    A: Tensor | None = None
    G: Tensor | None = None
    buffer: Tensor | None = None
    correction: Correction | None = field(default=None, repr=False)


class ReferenceFOP:
    """FOP with curvature refreshed at every step, on a float64 copy of an `nn.Sequential`.

    beta=0.0 with eta=1.0 is K-FAC. Only Linear, Conv2d and parameter-free modules are understood.
    """

    def __init__(
        self,
        model: nn.Sequential,
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1e-2,
        stat_decay: float = 0.9,
        beta: Mixing = "adaptive",
        eta: Mixing = "adaptive",
        kl_clip: float | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.damping, self.stat_decay, self.beta, self.eta = damping, stat_decay, beta, eta
        self.kl_clip = kl_clip
        self.kl_scale = 1.0
        self.layers = layers_of(self.model)
        self.state = {name: LayerState() for name in self.layers}

    def step(self, x: Tensor, y: Tensor, loss_fn: LossFn) -> None:
        """One step on the mean of loss_fn over the samples of the batch (dim 0 of x and y)."""
        x, y = x.double(), y.double() if y.is_floating_point() else y
        samples = per_sample(self.model, x, y, loss_fn)
        Ga = {name: mean_gradient(samples[name]) for name in self.layers}
        directions = {name: self._direction(name, samples[name], vec(Ga[name])) for name in self.layers}
        self.kl_scale = self._kl_scale(sum(float(d @ vec(Ga[name])) for name, d in directions.items()))
        for name, d in directions.items():
            self._apply(name, unvec(self.kl_scale * d, like=Ga[name]))

    def _direction(self, name: str, samples: list[LayerSample], Ga: Tensor) -> Tensor:
        state, half = self.state[name], len(samples) // 2
        A, G = factors(samples)
        state.A = A if state.A is None else self.stat_decay * state.A + (1 - self.stat_decay) * A
        state.G = G if state.G is None else self.stat_decay * state.G + (1 - self.stat_decay) * G
        Gd = None
        if half > 0:
            Gd = vec(mean_gradient(samples[:half]) - mean_gradient(samples[half:]))  # (2), (3)
        F, F_hat = dense_fisher(state.A, state.G), dense_damped_fisher(state.A, state.G, self.damping)
        state.correction = correct(F, F_hat, Ga, Gd, self.beta, self.eta)
        return state.correction.direction

    def _kl_scale(self, product: float) -> float:
        """ν, from the sum over all layers of ⟨direction, gradient⟩."""
        if self.kl_clip is None or product <= 0:
            return 1.0
        return min(1.0, math.sqrt(self.kl_clip / (self.lr**2 * product)))

    def _apply(self, name: str, direction: Tensor) -> None:
        layer, state = self.layers[name], self.state[name]
        step, state.buffer = momentum_step(direction, state.buffer, self.momentum, self.nesterov)
        with torch.no_grad():
            for p, change in zip(layer.parameters(), from_matrix(layer, step), strict=True):
                p.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * change)


def mean_gradient(samples: Sequence[LayerSample]) -> Tensor:
    """(groups, out, in), the gradient of the mean loss of these samples."""
    return torch.stack([sample.gradient for sample in samples]).mean(dim=0)
