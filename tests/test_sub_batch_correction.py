"""The correction from K sub-batches: the paper for K = 2, K-FAC for K = 1, and no order among the K."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from fop.correction import SubBatchGradients, contrasts, helmert
from fop.curvature.inversion import damped_inverses, mean_eigenvalue
from fop.curvature.kronecker import damping_split
from internals import Direction, direction
from models import assert_equal, batch, conv_net, loss_of, mlp, weights
from reference import correct, dense_damped_fisher, dense_fisher, unvec, vec

DAMPING = 1e-2
OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.05,
    "damping": DAMPING,
    "curvature_interval": 2,
    "kl_clip": 1e-2,
}


class Kronecker:
    """F and F̂⁻¹ of random factors, and the same as dense matrices for the oracle."""

    def __init__(self, groups: int = 2, out: int = 3, columns: int = 4, seed: int = 0) -> None:
        torch.manual_seed(seed)
        roots = [torch.randn(groups, d, d + 2, dtype=torch.float64) for d in (columns, out)]
        self.A, self.G = (root @ root.mT / root.shape[-1] for root in roots)
        shifts = list(damping_split(mean_eigenvalue(self.A), mean_eigenvalue(self.G), DAMPING))
        self.inverses = [each.inverse for each in damped_inverses([self.A, self.G], shifts)]
        self.dense, self.damped = dense_fisher(self.A, self.G), dense_damped_fisher(self.A, self.G, DAMPING)
        self.shape, self.trace = (groups, out, columns), self.dense.trace()

    def fisher(self, V: Tensor) -> Tensor:
        return self.G @ V @ self.A

    def solve(self, V: Tensor) -> Tensor:
        A_inv, G_inv = self.inverses
        assert A_inv is not None and G_inv is not None
        return G_inv @ V @ A_inv

    def gradients(self, count: int, seed: int = 1) -> Tensor:
        torch.manual_seed(seed)
        return torch.randn(1, *self.shape, dtype=torch.float64) + torch.randn(
            count, *self.shape, dtype=torch.float64
        )


def direction_of(curvature: Kronecker, gradients: Tensor, shares: list[float] | None = None) -> Direction:
    """The direction of sub-batches with these gradients; each has the given share of the batch."""
    shares = shares or [1 / len(gradients)] * len(gradients)
    sums = [gradient * share for gradient, share in zip(gradients, shares, strict=True)]
    average = torch.stack(sums).sum(0)
    differences = contrasts(sums[:-1], shares, average)
    return direction(curvature, SubBatchGradients(average, differences, torch.tensor(True)))


def oracle(curvature: Kronecker, gradients: Tensor) -> tuple[Tensor, float]:
    """F̂⁻¹ (Ga + Σ β_k G⊥_k) and ρ: the part of Ga in the span of all G⊥_k, by dense least squares."""
    F, F_hat = curvature.dense, curvature.damped
    g = torch.stack([vec(gradient) for gradient in gradients])
    Ga = g.mean(0)
    rest = g - Ga
    perpendicular = rest - torch.outer(rest @ F @ Ga / (Ga @ F @ Ga), Ga)
    # Σ β_k G⊥_k is the nearest point to Ga in the metric of F̂⁻¹: whiten with its root.
    eigenvalues, Q = torch.linalg.eigh(F_hat)
    root = Q * eigenvalues.rsqrt() @ Q.T
    beta = torch.linalg.lstsq(root @ perpendicular.T, (root @ Ga)[:, None], driver="gelsd").solution[:, 0]
    part = beta @ perpendicular
    rho = float((root @ part).square().sum() / (root @ Ga).square().sum())
    return unvec(torch.linalg.solve(F_hat, Ga + part), gradients[0]), rho


@pytest.mark.parametrize("seed", range(5))
def test_two_sub_batches_are_the_paper(seed: int) -> None:
    curvature = Kronecker(seed=seed)
    g1, g2 = curvature.gradients(2, seed)
    actual = direction_of(curvature, torch.stack([g1, g2]))
    expected = correct(curvature.dense, curvature.damped, vec((g1 + g2) / 2), vec(g1 - g2), "adaptive", 1.0)
    torch.testing.assert_close(
        actual.update, unvec(expected.direction, g1), rtol=1e-12, atol=1e-12 * float(g1.norm())
    )
    assert float(actual.beta) == pytest.approx(expected.beta, rel=1e-12)
    assert float(actual.rho) == pytest.approx(expected.rho, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_agrees_for_any_number(count: int, seed: int) -> None:
    curvature = Kronecker(seed=seed)
    gradients = curvature.gradients(count, seed)
    actual = direction_of(curvature, gradients)
    expected, rho = oracle(curvature, gradients)
    torch.testing.assert_close(actual.update, expected, rtol=1e-9, atol=1e-10)
    assert float(actual.rho) == pytest.approx(rho, rel=1e-9)


@pytest.mark.parametrize("count", [3, 4])
def test_any_order_gives_the_same(count: int) -> None:
    curvature = Kronecker()
    gradients = curvature.gradients(count)
    first = direction_of(curvature, gradients)
    for order in itertools.permutations(range(count)):
        other = direction_of(curvature, gradients[list(order)])
        for one, two in zip(first, other, strict=True):
            if one is first.beta:
                one, two = one.abs(), two.abs()
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_gradients_give_kfac(count: int) -> None:
    curvature = Kronecker()
    gradient = curvature.gradients(1)
    actual = direction_of(curvature, gradient.expand(count, *curvature.shape))
    torch.testing.assert_close(actual.update, curvature.solve(gradient[0]), rtol=1e-12, atol=1e-12)
    assert float(actual.beta) == 0
    assert float(actual.rho) == 0


def test_equal_sub_batches_count_once() -> None:
    """Of four sub-batches two pairs are equal: the contrasts span one direction only, that of the two."""
    curvature = Kronecker()
    pair = curvature.gradients(2)
    four = pair[[0, 1, 0, 1]]
    expected, actual = direction_of(curvature, pair), direction_of(curvature, four)
    torch.testing.assert_close(actual.update, expected.update, rtol=1e-9, atol=1e-10)


def test_contrasts_of_uneven_sub_batches_are_those_of_their_own_means() -> None:
    gradients = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = [0.5, 0.2, 0.3]
    sums = [gradient * share for gradient, share in zip(gradients, shares, strict=True)]
    actual = contrasts(sums[:-1], shares, torch.stack(sums).sum(0))
    for row, contrast in zip(helmert(3), actual, strict=True):
        expected = sum(h * gradient for h, gradient in zip(row, gradients, strict=True))
        torch.testing.assert_close(contrast, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_helmert_rows_are_orthogonal_contrasts(count: int) -> None:
    rows = torch.tensor(helmert(count), dtype=torch.float64).reshape(count - 1, count)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(count - 1, dtype=torch.float64))
    torch.testing.assert_close(rows.sum(1), torch.zeros(count - 1, dtype=torch.float64))


# --- the option ---------------------------------------------------------------------------------------


def train(optimizer_of: Any, model: nn.Module, n: int = 12, steps: int = 6) -> dict[str, Tensor]:
    optimizer = optimizer_of(model)
    for seed in range(steps):
        x, y = batch(n, seed, (2, 5, 6) if isinstance(model[0], nn.Conv2d) else (5,))  # type: ignore[index]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("build", [mlp, conv_net])
def test_one_sub_batch_is_kfac(build: Any) -> None:
    model = build()
    expected = train(lambda m: KFAC(m, **OPTIONS), copy.deepcopy(model))
    actual = train(lambda m: FOP(m, sub_batches=1, **OPTIONS), model)
    assert_equal([*actual.values()], [*expected.values()])


def test_one_sub_batch_accumulates() -> None:
    model, other = mlp(), mlp()
    for net, optimizer in ((model, FOP(model, sub_batches=1, **OPTIONS)), (other, KFAC(other, **OPTIONS))):
        for seed in range(3):
            optimizer.zero_grad()
            for part in range(3):
                x, y = batch(4 + part, 10 * seed + part)
                nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    assert_equal([*weights(model).values()], [*weights(other).values()])


# Which sub-batch the samples of a batch of 12 belong to.
RUNS = {3: "ABCBCACCAABB", 4: "BCDACDABDABC"}


@pytest.mark.parametrize("count", [3, 4])
def test_a_batch_is_split_by_sample(count: int) -> None:
    """A step with K sub-batches equals one whose backward passes are labelled as these sub-batches."""
    n = 12
    split, labelled = mlp(), mlp()
    first = FOP(split, sub_batches=count, **OPTIONS)
    second = FOP(labelled, sub_batches=count, **OPTIONS)
    for seed in range(6):
        x, y = batch(n, seed)
        first.zero_grad()
        nn.functional.mse_loss(split(x), y).backward()
        first.step()
        second.zero_grad()
        for k in range(count):
            part = [sample for sample in range(n) if RUNS[count][sample] == "ABCD"[k]]
            with second.sub_batch(k):
                (nn.functional.mse_loss(labelled(x[part]), y[part]) / count).backward()
        second.step()
    for one, two in zip(weights(split).values(), weights(labelled).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    assert all(layer.kfac_steps == 0 for layer in first.diagnostics().layers.values())
    assert all(0 < layer.rho <= 1 for layer in first.diagnostics().layers.values())  # type: ignore[operator]


def test_three_sub_batches_differ_from_two() -> None:
    two = train(lambda m: FOP(m, sub_batches=2, **OPTIONS), mlp())
    three = train(lambda m: FOP(m, sub_batches=3, **OPTIONS), mlp())
    assert any(not torch.equal(one, other) for one, other in zip(two.values(), three.values(), strict=True))


def test_a_batch_smaller_than_k_takes_kfacs_step() -> None:
    model = mlp()
    optimizer = FOP(model, sub_batches=4, **OPTIONS)
    x, y = batch(3)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    reasons = {layer.why_kfac for layer in optimizer.diagnostics().layers.values()}
    assert reasons == {"a batch of 3 cannot be split in 4"}


def test_labels_that_leave_one_out_say_so() -> None:
    model = mlp()
    optimizer = FOP(model, sub_batches=3, **OPTIONS)
    for index in (0, 2):
        with optimizer.sub_batch(index):
            x, y = batch(4, index)
            nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    reasons = {layer.why_kfac for layer in optimizer.diagnostics().layers.values()}
    assert reasons == {"it had no backward pass of some sub-batches"}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sub_batches": 0}, ValueError, "sub_batches=0 must be 1 or more"),
        ({"sub_batches": 2.5}, TypeError, "sub_batches=2.5 must be a whole number"),
        ({"sub_batches": True}, TypeError, "sub_batches=True must be a whole number"),
        ({"sub_batches": 3, "beta": 0.1}, ValueError, "sub_batches=3; use beta='adaptive'"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FOP(mlp(), **options)


def test_one_number_for_all_groups() -> None:
    model = mlp()
    first, *rest = model.parameters()
    optimizer = FOP([first], sub_batches=3)
    with pytest.raises(ValueError, match="one for the whole step"):
        optimizer.add_param_group({"params": rest, "sub_batches": 2})
    with (
        pytest.raises(ValueError, match=r"sub_batch\(3\): the sub-batches are 0 to 2"),
        optimizer.sub_batch(3),
    ):
        pass


@pytest.mark.parametrize("saved, made", [(1, 2), (2, 1), (3, 2), (2, 4)])
def test_the_number_comes_with_the_state(saved: int, made: int) -> None:
    """As every option of a group does: the training goes on with the number that it had."""
    model = mlp()
    optimizer = FOP(model, sub_batches=saved, **OPTIONS)
    step_once(model, optimizer, 0)
    other = copy.deepcopy(model)
    resumed = FOP(other, sub_batches=made, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(1, 4):
        step_once(model, optimizer, seed)
        step_once(other, resumed, seed)
    assert_equal(weights(other), weights(model))
    with pytest.raises(ValueError, match="sub_batch"), resumed.sub_batch(saved):
        pass


def step_once(model: nn.Module, optimizer: FOP, seed: int) -> None:
    x, y = batch(12, seed, (5,))
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_correction_of_a_gradient_that_was_split(count: int) -> None:
    """``beta=0.0`` is set between backward pass and step: the step is K-FAC's."""
    models = mlp(), mlp()
    optimizer, kfac = FOP(models[0], sub_batches=count, **OPTIONS), KFAC(models[1], **OPTIONS)
    for model in models:
        loss_of(model, *batch(12, 0)).backward()
    optimizer.param_groups[0]["beta"] = 0.0
    optimizer.step()
    kfac.step()
    for name, value in weights(models[1]).items():
        torch.testing.assert_close(weights(models[0])[name], value, rtol=1e-12, atol=1e-14)
