"""Steps of an optimizer on any small model, held to the dense equations with the oracle's own factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.equations import (
    correct,
    correct_in_sizes,
    dense_damped_fisher,
    dense_fisher,
    dense_relative_fisher,
    full,
    sizes,
    split,
    turned,
    unvec,
    vec,
)
from reference.kinds import Lookup
from reference.observe import Block, Inputs, Tape, estimate, observe
from reference.optimizer import half_squared_error

Pair = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and what is expected of it.

    Attributes:
        build: makes the model; its forward takes the tensors of a batch, with the samples in dim 0.
        inputs: makes the tensors of a batch of the given size.
        blocks: names of the weights that take the FOP step. Every other parameter must have no curvature.
        whole: whether the samples of a batch depend on each other (BatchNorm in train mode).
        estimates: options of `estimate` by weight; those of "" hold for all others.
        options: options of the optimizer for this case.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    blocks: set[str]
    whole: bool = False
    estimates: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().double()

    def batch(self, N: int, seed: int = 1) -> tuple[Inputs, Tensor]:
        """Inputs, and targets with the shape of the output."""
        model = self.model()
        torch.manual_seed(seed)
        inputs = self.inputs(N)
        with torch.no_grad():
            return inputs, torch.randn_like(model(*inputs))


def double(*shape: int) -> Callable[[int], Inputs]:
    """Batches of one random tensor with samples of this shape."""
    return lambda N: (torch.randn(N, *shape, dtype=torch.float64),)


def gradients(model: nn.Module, inputs: Inputs, y: Tensor) -> Tensors:
    """Plain autograd, by name of the parameter; parameters that are not used get zeros."""
    named = dict(model.named_parameters())
    loss = half_squared_error(model(*inputs), y)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def check_rows(case: Case, N: int = 5) -> None:
    """The rows of the oracle reproduce the gradients of plain autograd, and its model is the model.

    Without this the oracle could be wrong in the same way as the library.
    """
    model = case.model()
    inputs, y = case.batch(N)
    twin = copy.deepcopy(model)
    tape = Tape(twin)
    torch.testing.assert_close(twin(*inputs), model(*inputs))
    blocks = observe(twin, tape, inputs, y, half_squared_error, whole=case.whole)
    assert case.blocks <= blocks.keys()
    batch = gradients(model, inputs, y)
    for block in blocks.values():
        _assert_near(block.mean_gradient(range(N)), block.matrix(batch), f"gradient of {block.weight}")
        for n in () if case.whole else range(N):
            own = gradients(model, tuple(t[n : n + 1] for t in inputs), y[n : n + 1])
            _assert_near(
                block.sample_gradient(n), block.matrix(own), f"gradient of {block.weight}, sample {n}"
            )


def check_steps(
    case: Case,
    optimizer_of: Callable[..., Any],
    plain: Mapping[str, Any],
    *,
    sizes: Sequence[int] = (6, 5),
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> None:
    """Curvature and weights after every step, one batch a step, of the given sizes.

    Args:
        case: the model.
        optimizer_of: makes the optimizer from the model and its options.
        plain: options that leave η F̂⁻¹ (Ga + β G⊥) alone of the step, as long as ``step_length`` says; the
            case's own are added.
        sizes: numbers of samples, each two or more, so that every step has a gradient pair.
        dtype: of the model; the oracle always has float64.
        tolerance: allowed error of factors and updates, relative to their norm.
    """
    model = case.model().to(dtype)
    twin = copy.deepcopy(model).double()
    tape = Tape(twin)
    options = {**plain, **case.options}
    optimizer = optimizer_of(model, **options)
    curvature: dict[str, Tensors] = {}
    estimates: dict[str, list[Tensors]] = {}
    for step, N in enumerate(sizes):
        inputs, y = case.batch(N, seed=step + 1)
        twin.load_state_dict(model.state_dict())
        blocks = observe(twin, tape, inputs, y, half_squared_error, whole=case.whole)
        pairs = {name: _pair(twin, blocks[name], inputs, y, case.whole) for name in case.blocks}
        for name in case.blocks:
            fresh = estimate(blocks[name], **case.estimates.get(name, case.estimates.get("", {})))
            estimates.setdefault(name, []).append(fresh)
            curvature[name] = _averaged(estimates[name], options)

        optimizer.zero_grad()
        loss = half_squared_error(model(*(t.to(dtype) if t.is_floating_point() else t for t in inputs)), y)
        (loss * N if options.get("loss_reduction") == "sum" else loss).backward()
        optimizer.step()

        check_curvature(model, optimizer, curvature, tolerance)
        for name, (average, difference) in pairs.items():
            check_direction(
                name,
                _moved(model, twin, blocks[name], options["lr"]),
                curvature[name],
                average,
                difference,
                options,
                tolerance,
                _weighted(name, twin, blocks[name], curvature[name], average, model, optimizer, options),
                bias=blocks[name].bias is not None,
            )


def check_curvature(
    model: nn.Module, optimizer: Any, curvature: Mapping[str, Tensors], tolerance: float
) -> None:
    """The optimizer holds exactly these factors, for exactly these weights."""
    for name, param in model.named_parameters():
        held, expected = optimizer.state[param], curvature.get(name, {})
        assert {key for key in ("A", "G") if key in held} == expected.keys(), f"{name}: {list(held)}"
        for key, value in expected.items():
            factor = held[key]
            if factor.dim() == value.dim() == 3 and len(factor) > len(value):
                groups = [torch.block_diag(*blocks) for blocks in factor.chunk(len(value))]
                size = value.shape[-1]
                assert not any(group[size:].any() or group[:, size:].any() for group in groups)
                factor = torch.stack([group[:size, :size] for group in groups])
            _assert_near(factor, value, f"{key} of {name}", tolerance)


def check_direction(
    name: str,
    moved: Tensor,
    held: Tensors,
    average: Tensor,
    difference: Tensor,
    options: Mapping[str, Any],
    tolerance: float,
    weighted: Weighted | None = None,
    *,
    bias: bool = False,
) -> None:
    """``moved`` is η F̂⁻¹ (Ga + β G⊥), and is not the step without the second gradient.

    Options without β and η are K-FAC's: β = 0 and η = 1. ``weighted`` says how long a step is.
    """
    F, F_hat = _dense(held, options, bias=bias)
    as_moved = weighted.lengthened if weighted else (lambda matrix: matrix)
    Ga, Gd = vec(average), vec(difference)
    beta, eta = options.get("beta", 0.0), options.get("eta", 1.0)
    kfac = torch.linalg.solve(F_hat, Ga)
    if beta == 0.0:
        _assert_near(moved, as_moved(unvec(kfac, like=average)), f"step of {name}", tolerance)
        return
    if weighted:
        own = vec(weighted.sizes(average))
        expected = correct_in_sizes(own, F, F_hat, Ga, Gd, beta, eta).direction
    else:
        expected = correct(F, F_hat, Ga, Gd, beta, eta).direction
    _assert_near(moved, as_moved(unvec(expected, like=average)), f"step of {name}", tolerance)
    # A fixed η stays without a second gradient: it is the caller's own scale.
    without = kfac if eta == "adaptive" else eta * kfac
    assert (without - expected).norm() > 1e-4 * expected.norm(), f"{name}: the case cannot fail"


def _weighted(
    name: str,
    twin: nn.Module,
    block: Block,
    held: Tensors,
    average: Tensor,
    model: nn.Module,
    optimizer: Any,
    options: Mapping[str, Any],
) -> Weighted | None:
    if not by_weight(options):
        return None
    noise, whole = optimizer.state[dict(model.named_parameters())[name]]["noise"].tolist()
    signal = 1 - min(0.99, noise / whole) if options.get("beta", 0.0) != 0.0 and whole else 0.0
    return Weighted(twin, block, held, average, signal, options["lr"])


@dataclass(frozen=True)
class Weighted:
    """A step that is as long as its weight; ``twin`` has the old weights, and ``held`` the factors.

    ``signal`` is the share of signal in ``average``, the gradient, as the optimizer has it.
    """

    twin: nn.Module
    block: Block
    held: Tensors
    average: Tensor
    signal: float
    lr: float

    def sizes(self, like: Tensor) -> Tensor:
        A = self.held["A"]
        if not self.block.diagonal:
            return sizes(like, A, bias=self.block.bias is not None)
        # The rows of a norm are weight and bias, and its curvature is that of the gradients themselves.
        return (A[:, :1].mean() / A.mean(2, keepdim=True)).sqrt().expand_as(like)

    def lengthened(self, direction: Tensor) -> Tensor:
        weight = dict(self.twin.named_parameters())[self.block.weight].detach()
        length = weight.norm()
        if isinstance(self.block.kind, Lookup):
            # Tokens that take part: n if n move equally far and the others not.
            far = direction[0].norm(dim=0)
            length = length * (far.sum() ** 2 / far.square().sum() / len(far)).sqrt()
        return self._turned(direction * length / (direction / self.sizes(direction)).norm())

    def _turned(self, change: Tensor) -> Tensor:
        """What the weight moves by, over the rate, if it turns."""
        block, params = self.block, {n: p.detach() for n, p in self.twin.named_parameters()}
        ours = torch.ones_like(change)
        if block.bias is not None:
            ours[(slice(None), 1) if block.diagonal else (..., -1)] = 0
        weight, gradient, step = block.matrix(params) * ours, self.average * ours, self.lr * change * ours
        along = float((weight * gradient).sum() / (weight.norm() * gradient.norm()))
        by_token = isinstance(block.kind, Lookup)
        pieces = zip(weight.unbind(2), step.unbind(2), strict=True) if by_token else [(weight, step)]
        entries = int(ours.sum())
        after = [turned(*piece, along, self.signal, entries) for piece in pieces]
        moved = weight - (torch.stack(after, 2) if by_token else after[0])
        return moved / self.lr + change * (1 - ours)


def by_weight(options: Mapping[str, Any]) -> bool:
    """Whether steps are as long as the weights are, times the rate."""
    return bool(options["step_length"] == "weight")


def _dense(held: Tensors, options: Mapping[str, Any], *, bias: bool) -> tuple[Tensor, Tensor]:
    """F and F̂ as matrices on `vec`."""
    damping, relative = options["damping"], options.get("damping_kind") == "relative"
    if "G" in held:
        A, G = full(held["A"]), full(held["G"])
        if relative:
            return dense_fisher(A, G), dense_relative_fisher(A, G, damping, bias=bias)
        return dense_fisher(A, G), dense_damped_fisher(A, G, damping)
    F = held["A"]
    # Of weight and bias, the rows of (1, 2, size), each by itself.
    added = damping * F.mean(2, keepdim=True).expand_as(F) if relative else torch.full_like(F, damping)
    return torch.diag(vec(F)), torch.diag(vec(F + added))


def _pair(twin: nn.Module, block: Block, inputs: Inputs, y: Tensor, whole: bool) -> Pair:
    """Ga, and Gd from separate backward passes over the two sub-batches.

    Where these would see other statistics than the batch, both are sums over the rows of the batch.
    """
    parts = split(len(y))
    average = block.matrix(gradients(twin, inputs, y))
    if whole:
        g1, g2 = map(block.mean_gradient, parts)
    else:
        g1, g2 = (block.matrix(gradients(twin, tuple(t[part] for t in inputs), y[part])) for part in parts)
    return average, g1 - g2


def _averaged(estimates: Sequence[Tensors], options: Mapping[str, Any]) -> Tensors:
    decay, average = options["stat_decay"], estimates[0]
    if by_weight(options):
        weights = [decay ** (len(estimates) - 1 - i) for i in range(len(estimates))]
        return {
            key: sum((w * each[key] for w, each in zip(weights, estimates, strict=True)), torch.zeros(()))
            / sum(weights)
            for key in average
        }
    for new in estimates[1:]:
        average = {key: decay * average[key] + (1 - decay) * value for key, value in new.items()}
    return average


def _moved(model: nn.Module, twin: nn.Module, block: Block, lr: float) -> Tensor:
    """(old − new) / lr as gradient matrix; ``twin`` has the old weights."""
    new = dict(model.named_parameters())
    parts = {name: (old - new[name]).detach() / lr for name, old in twin.named_parameters()}
    return block.matrix(parts)


def _assert_near(value: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    assert value.shape == expected.shape, f"{what}: {tuple(value.shape)}, not {tuple(expected.shape)}"
    assert expected.norm() > 0, f"{what} is zero: the case cannot fail"
    error = float((value.detach() - expected).norm() / expected.norm())
    assert error < tolerance, f"{what} differs by {error:.1e}"
