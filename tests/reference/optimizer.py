"""Whole runs of FOP and K-FAC on a float64 copy of a model, with curvature updated at every step."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.equations import (
    Correction,
    Mixing,
    correct,
    correct_in_sizes,
    dense_damped_fisher,
    dense_fisher,
    dense_relative_fisher,
    momentum_step,
    sizes,
    split,
    turned,
    unvec,
    vec,
)
from reference.observe import Block, LossFn, Tape, estimate, observe

Layer = nn.Linear | nn.Conv2d


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """½‖output − target‖², summed over everything but the samples, mean over the samples."""
    return 0.5 * (output - target).flatten(1).square().sum(dim=1).mean()


def layers_of(model: nn.Module) -> dict[str, Layer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def to_matrix(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(groups, out, in) from tensors shaped like the layer's weight and bias."""
    groups = getattr(layer, "groups", 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)


def from_matrix(layer: Layer, matrix: Tensor) -> list[Tensor]:
    """[weight] or [weight, bias] from (groups, out, in)."""
    if layer.bias is None:
        return [matrix.reshape(layer.weight.shape)]
    return [matrix[:, :, :-1].reshape(layer.weight.shape), matrix[:, :, -1].reshape(layer.bias.shape)]


@dataclass
class LayerState:
    """What the oracle remembers of a layer between steps, and `correction` to look at."""

    A: Tensor | None = None
    G: Tensor | None = None
    estimates: list[dict[str, Tensor]] = field(default_factory=list)
    buffer: Tensor | None = None
    slope: float = 0.0  # ⟨buffer, Ga⟩ of the last step
    radius: float = 1.0  # by which share of its length the layer moves
    sizes: Tensor | None = None
    reference: float = 0.0  # the norm that stands for that of a weight which was 0
    # ⟨Gd/2, F̂⁻¹ Gd/2⟩ and ⟨Ga, F̂⁻¹ Ga⟩ of every step that had two sub-batches, the newest first
    noises: list[tuple[float, float]] = field(default_factory=list)
    correction: Correction | None = field(default=None, repr=False)

    @property
    def noise_share(self) -> float:
        weights = [0.9**age for age in range(len(self.noises))]
        noise, whole = (
            sum(w * each[i] for w, each in zip(weights, self.noises, strict=True)) for i in (0, 1)
        )
        return min(0.99, noise / whole) if whole > 0 else 1.0  # all counts as noise


class ReferenceFOP:
    """beta=0.0 with eta=1.0 is K-FAC. Only Linear, Conv2d and modules without parameters are understood."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: Mixing = 1e-2,
        stat_decay: float = 0.9,
        beta: Mixing = "adaptive",
        eta: Mixing = "adaptive",
        kl_clip: float | None = None,
        step_length: str = "paper",
        damping_kind: str = "absolute",
        anneal: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.tape = Tape(self.model)
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay
        self.damping, self.stat_decay, self.beta, self.eta = damping, stat_decay, beta, eta
        self.kl_clip, self.anneal = kl_clip, anneal
        self.by_weight, self.relative = step_length == "weight", damping_kind == "relative"
        self.kl_scale, self.steps = 1.0, 0
        self.state = {name: LayerState() for name in layers_of(self.model)}

    def step(self, x: Tensor, y: Tensor, loss_fn: LossFn) -> None:
        """One step on the mean of loss_fn over the samples of the batch (dim 0 of x and y)."""
        x, y = x.double(), y.double() if y.is_floating_point() else y
        blocks = observe(self.model, self.tape, (x,), y, loss_fn)
        layers = {block.weight.removesuffix(".weight"): block for block in blocks.values()}
        Ga = {name: block.mean_gradient(range(len(x))) for name, block in layers.items()}
        directions = {name: self._direction(name, block, vec(Ga[name])) for name, block in layers.items()}
        self.kl_scale = self._kl_scale(sum(float(d @ vec(Ga[name])) for name, d in directions.items()))
        for name, d in directions.items():
            self._apply(name, unvec(self.kl_scale * d, like=Ga[name]), Ga[name])
        self.steps += 1

    def _direction(self, name: str, block: Block, Ga: Tensor) -> Tensor:
        state, N = self.state[name], len(block.samples)
        fresh = estimate(block)
        A, G = fresh["A"], fresh["G"]
        if self.by_weight:
            state.estimates.insert(0, fresh)
            weights = [self.stat_decay**age for age in range(len(state.estimates))]
            A, G = (
                sum(w * each[key] for w, each in zip(weights, state.estimates, strict=True)) / sum(weights)
                for key in "AG"
            )
            state.A, state.G = A, G
        else:
            state.A = A if state.A is None else self.stat_decay * state.A + (1 - self.stat_decay) * A
            state.G = G if state.G is None else self.stat_decay * state.G + (1 - self.stat_decay) * G
        Gd = None
        if N > 1:
            g1, g2 = map(block.mean_gradient, split(N))
            Gd = vec(g1 - g2)  # (2), (3)
        F = dense_fisher(state.A, state.G)
        damping = self._damping(state)
        if self.relative:
            bias = layers_of(self.model)[name].bias is not None
            F_hat = dense_relative_fisher(state.A, state.G, damping, bias=bias)
        else:
            F_hat = dense_damped_fisher(state.A, state.G, damping)
        # beta=0 is K-FAC, which has no sub-batches.
        if Gd is not None and self.beta != 0:
            pair = tuple(float(V @ torch.linalg.solve(F_hat, V)) for V in (Gd / 2, Ga))
            state.noises.insert(0, (pair[0], pair[1]))
        if self.by_weight:
            like = block.mean_gradient(range(N))
            state.sizes = sizes(like, state.A, bias=layers_of(self.model)[name].bias is not None)
            own = vec(state.sizes)
            state.correction = correct_in_sizes(own, F, F_hat, Ga, Gd, self.beta, self.eta)
        else:
            state.correction = correct(F, F_hat, Ga, Gd, self.beta, self.eta)
        return state.correction.direction

    def _damping(self, state: LayerState) -> float:
        if self.damping != "adaptive":
            return float(self.damping)
        if state.noise_share == 1.0:  # none was measured
            return 0.01
        share = (1 - 0.9**self.steps) * state.noise_share
        # The mean eigenvalue of F̂ is that of F over 1 - ν; each factor's grows by the root.
        return max(math.sqrt(1 / (1 - share)) - 1, 0.1) ** 2

    def _kl_scale(self, product: float) -> float:
        """ν, from the sum over all layers of ⟨direction, gradient⟩."""
        if self.by_weight or self.kl_clip is None or product <= 0:
            return 1.0
        return min(1.0, math.sqrt(self.kl_clip / (self.lr**2 * product)))

    def _look_back(self, state: LayerState, slope: float) -> None:
        """Start momentum anew, and move less far, where the last step went too far."""
        # Without sub-batches all counts as noise.
        noise = 1.0 if self.beta == 0 else state.noise_share
        if slope < 0 and slope < -2 * state.slope:
            assert state.buffer is not None
            state.buffer = noise * state.buffer
            state.radius = max(0.05, state.radius * 0.5 ** (1 - noise))
        else:
            state.radius = min(1.0, 1.02 * state.radius)

    def _apply(self, name: str, direction: Tensor, Ga: Tensor) -> None:
        layer, state = layers_of(self.model)[name], self.state[name]
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(1 - self.lr * self.weight_decay)
        if self.by_weight and self.momentum and state.buffer is not None:
            self._look_back(state, float((state.buffer * Ga).sum()))
        step, state.buffer = momentum_step(direction, state.buffer, self.momentum, self.nesterov)
        state.slope = float((state.buffer * Ga).sum())
        if self.by_weight:
            assert state.sizes is not None
            norm = float(layer.weight.detach().norm())
            if norm == 0:
                # All outputs of size 1: (out, in) weights times inputs of the size of the bias'.
                state.reference = math.sqrt(len(layer.weight)) / float(state.sizes[0, 0, -1])
            step = step * state.radius * max(norm, state.reference) / (step / state.sizes).norm()
            if self.anneal:
                # An average with weights μ^k has (1 - μ)/(1 + μ) of the variance of one.
                noise = 0.0 if self.beta == 0 else min(0.99, state.noise_share)
                step = step * (1 - noise) / (1 - noise + noise * (1 - self.momentum) / (1 + self.momentum))
        changes = [self.lr * change for change in from_matrix(layer, step)]
        with torch.no_grad():
            for p, change in zip(layer.parameters(), changes, strict=True):
                if self.by_weight and p is layer.weight and float(p.norm()) >= state.reference:
                    gradient = from_matrix(layer, Ga)[0]
                    along = float((p * gradient).sum() / (p.norm() * gradient.norm()))
                    signal = 0.0 if self.beta == 0 else 1 - state.noise_share
                    p.copy_(turned(p, change, along, signal, p.numel()))
                else:
                    p.sub_(change)
