"""The fallback below the oracle: where theory says that A ⊗ G is the exact Gauss–Newton matrix, it is.

For f(x) = W x + b and the loss ½‖y − f(x)‖² (mean over samples) the Gauss–Newton matrix is
(1/N Σ ā āᵀ) ⊗ I, and it is the Hessian, because f is linear in its weights. A is its left factor always. G is
1/N Σ r rᵀ with the residuals r = f(x) − y, so A ⊗ G is the Gauss–Newton matrix exactly when the residuals
are white: 1/N Σ r rᵀ = I. Targets drawn from the model's own unit Gaussian give that in expectation; the
designs below give it exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import reference
from fop import FOP, KFAC
from reference import half_squared_error

DTYPE = torch.float64
IN, OUT = 4, 3


def paired_design(inputs: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """(x, r): every input meets every residual ±√out·q, q the columns of an orthogonal matrix.

    So 1/N Σ r rᵀ = I, and residuals are independent of inputs by construction.
    """
    q, _ = torch.linalg.qr(torch.randn(out, out, dtype=inputs.dtype))
    residuals = out**0.5 * torch.cat([q.T, -q.T])
    return inputs.repeat_interleave(len(residuals), dim=0), residuals.repeat(len(inputs), 1)


def whitened(residuals: Tensor) -> Tensor:
    """Rotate and scale residuals (N, out) until 1/N Σ r rᵀ = I; they stay correlated with the inputs."""
    L = torch.linalg.cholesky(residuals.T @ residuals / len(residuals))
    return torch.linalg.solve_triangular(L, residuals.T, upper=False).T


def blocks(model: nn.Sequential, jacobian: dict[str, Tensor]) -> dict[str, Tensor]:
    """Jacobians (N, out) + parameter shape, to one (N·out, vec of the layer's matrix) per layer."""
    result = {}
    for name, layer in reference.layers_of(model).items():
        weight, bias = jacobian[f"{name}.weight"].flatten(0, 1), jacobian.get(f"{name}.bias")
        matrix = weight if bias is None else torch.cat([weight, bias.flatten(0, 1).unsqueeze(2)], dim=2)
        result[name] = torch.stack([reference.vec(m.unsqueeze(0)) for m in matrix])
        assert result[name].shape[1] == sum(p.numel() for p in layer.parameters())
    return result


def exact_gauss_newton(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """Each layer's diagonal block of 1/N Σ JᵀJ; the loss has the identity as its Hessian in the outputs."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    return {name: J.T @ J / len(x) for name, J in blocks(model, jacobian).items()}


def library_block(model: nn.Sequential, x: Tensor, y: Tensor, library: type[FOP]) -> dict[str, Tensor]:
    """A ⊗ G of each layer from the state that one step of the library leaves."""
    # The state is that of the weights before the step, so the step may go anywhere.
    optimizer = library(model, lr=0.1, curvature_interval=1)
    half_squared_error(model(x), y).backward()
    optimizer.step()
    held = {name: optimizer.state[layer.weight] for name, layer in reference.layers_of(model).items()}
    return {name: reference.dense_fisher(state["A"], state["G"]) for name, state in held.items()}


def observed(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, reference.Block]:
    twin = copy.deepcopy(model)
    blocks = reference.observe(twin, reference.Tape(twin), (x,), y, half_squared_error)
    return {block.weight.removesuffix(".weight"): block for block in blocks.values()}


def oracle_block(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    held = {name: reference.estimate(block) for name, block in observed(model, x, y).items()}
    return {name: reference.dense_fisher(state["A"], state["G"]) for name, state in held.items()}


def linear_model(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias=bias)).to(DTYPE)


def deep_linear_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, OUT)).to(DTYPE)


MODELS = {
    "bias": lambda: linear_model(True),
    "no-bias": lambda: linear_model(False),
    "deep": deep_linear_model,
}


def design(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the paired design around what the model predicts now."""
    x, residuals = paired_design(torch.randn(6, IN, dtype=DTYPE), OUT)
    return x, model(x).detach() - residuals


def assert_blocks_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, block in expected.items():
        error = (actual[name] - block).norm() / block.norm()
        assert error < 1e-10, f"layer {name}: relative error {error:.1e}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_exact_matrix_is_the_hessian_and_factors(bias: bool) -> None:
    """The yardstick itself: Jacobians, the Hessian of the loss and (1/N Σ ā āᵀ) ⊗ I are one matrix."""
    model = linear_model(bias)
    x, y = design(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    exact = exact_gauss_newton(model, x)["0"]
    a = torch.cat([x, torch.ones(len(x), 1, dtype=DTYPE)], dim=1) if bias else x
    torch.testing.assert_close(exact, torch.kron(a.T @ a / len(x), torch.eye(OUT, dtype=DTYPE)))

    def loss(vector: Tensor) -> Tensor:
        matrix = reference.unvec(vector, like=torch.empty(1, OUT, a.shape[1]))
        named = dict(zip(parameters, reference.from_matrix(model[0], matrix), strict=True))
        return half_squared_error(functional_call(model, named, (x,)), y)

    vector = reference.vec(reference.to_matrix(model[0], parameters["0.weight"], parameters.get("0.bias")))
    torch.testing.assert_close(hessian(loss)(vector), exact)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_blocks_are_gauss_newton(build: Callable[[], nn.Sequential]) -> None:
    """In a deep linear net layer by layer: the Jacobian from a hidden layer to the output is a constant."""
    model = build()
    x, y = design(model)
    exact = exact_gauss_newton(model, x)
    assert_blocks_equal(oracle_block(model, x, y), exact)
    for library in (FOP, KFAC):
        assert_blocks_equal(library_block(build(), x, y, library), exact)


@pytest.mark.parametrize("optimizer_name", ["oracle", "KFAC"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_one_newton_step_solves_least_squares(bias: bool, optimizer_name: str) -> None:
    """White residuals, lr = 1, next to no damping: K-FAC's step is Newton's and ends at the minimum."""
    model = linear_model(bias)
    x = torch.randn(20, IN, dtype=DTYPE)
    y = model(x).detach() - whitened(torch.randn(20, OUT, dtype=DTYPE) + x[:, :OUT])
    a = torch.cat([x, torch.ones(20, 1, dtype=DTYPE)], dim=1) if bias else x
    expected = torch.linalg.lstsq(a, y).solution.T
    damping = 1e-24  # γ = 1e-12 beside factors of order one
    if optimizer_name == "oracle":
        oracle = reference.ReferenceFOP(model, 1.0, damping=damping, beta=0.0, eta=1.0)
        oracle.step(x, y, half_squared_error)
        model = oracle.model
    else:
        optimizer = KFAC(
            model, 1.0, step_length="paper", momentum=0.0, weight_decay=0.0, damping=damping, kl_clip=None
        )
        half_squared_error(model(x), y).backward()
        optimizer.step()
    layer = model[0]
    actual = reference.to_matrix(layer, layer.weight, layer.bias).detach()[0]
    start = linear_model(bias)[0]
    moved = (expected - reference.to_matrix(start, start.weight, start.bias).detach()[0]).norm()
    assert moved > 0.3, "the start must not be the solution"
    assert (actual - expected).norm() < 1e-10 * moved
