"""FOP and K-FAC on an `nn.Sequential` of Linear and Conv2d layers, samples one at a time through autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.equations import (
    Correction,
    Mixing,
    correct,
    dense_damped_fisher,
    dense_fisher,
    momentum_step,
    unvec,
    vec,
)
from reference.patches import patches

LossFn = Callable[[Tensor, Tensor], Tensor]
Layer = nn.Linear | nn.Conv2d


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


# --- what one sample does in one layer -------------------------------------------------------------


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
