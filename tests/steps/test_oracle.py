"""Whole runs of Linear and Conv2d nets against `ReferenceFOP`, and the oracle against what is below it."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fop import FOP, KFAC
from reference import Case, ReferenceFOP, Tape, double, estimate, half_squared_error, observe
from reference.cases import CONV2D, LINEAR

# Each case is a kind of its own.
pytestmark = pytest.mark.whole

# A float32 run loses up to cond(F̂) · 6e-8, so 1e-5 can only be asked where F̂ is well conditioned. With these
# dampings cond(F̂) stays below 100 in every case, and below 400 for a single sample, whose factors have a rank
# near one and need more (`test_damped_fisher_is_well_conditioned`). Smaller damping is tested in float64
# (`test_small_damping`), which has digits to spare.
DAMPING, DAMPING_ONE_SAMPLE = 0.1, 1.0
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Twice cond(F̂) · 6e-8; which of the digits are right depends on the processor's kernels.
TOLERANCE_ONE_SAMPLE = {torch.float32: 5e-5, torch.float64: 1e-10}
PLAIN: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.5,  # large, so that rounding of the new weight itself is small beside the update
    "momentum": 0.0,
    "weight_decay": 0.0,
    "stat_decay": 0.9,
    "kl_clip": None,
}
NETS: dict[str, Case] = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), double(5), set()),
    "sequence": Case(
        lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)), double(3, 5), set()
    ),
    "conv-linear": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        double(2, 5, 6),
        set(),
    ),
    "conv-conv-inplace": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (2, 3), groups=2, padding="same"),
            nn.Flatten(),
        ),
        double(2, 5, 6),
        set(),
    ),
}
CASES = {
    **{name: case for name, case in LINEAR.items() if name.startswith("linear")},
    **{name: case for name, case in CONV2D.items() if name != "conv-inplace"},
    **NETS,
}
SUBSET = ["linear", "linear-3d-no-bias", "conv-stride", "conv-groups", "conv-linear"]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def make(case: str, dtype: torch.dtype, N: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and a batch whose targets have the shape of the model's output."""
    torch.manual_seed(seed)
    model = CASES[case].build().double()
    (x,) = CASES[case].inputs(N)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    return model.to(dtype), x.to(dtype), y.to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def check(model: nn.Module, oracle: ReferenceFOP, before: dict[str, Tensor], tolerance: float) -> None:
    """Every parameter within tolerance, relative to how far it moved and to its own size."""
    new, expected = weights(model), weights(oracle.model)
    for name, old in before.items():
        error = (new[name] - expected[name]).norm()
        moved, size = (expected[name] - old).norm(), expected[name].norm()
        assert moved > 1e-3 * size, f"{name} did not move: the case cannot fail"
        assert error < tolerance * moved, f"{name}: error {error / moved:.2e} of the update"
        assert error < tolerance * size, f"{name}: error {error / size:.2e} of the weight"


def compare(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    *,
    tolerance: float,
    loss_fn: reference.LossFn = half_squared_error,
    library: type[FOP] = FOP,
    **options: Any,
) -> ReferenceFOP:
    """Take the same steps with the library and with the oracle; check weights after every step."""
    fixed = {"beta": 0.0, "eta": 1.0} if library is KFAC else {}
    damping = DAMPING if len(batches[0][0]) > 1 else DAMPING_ONE_SAMPLE
    options = {**PLAIN, "damping": damping, **options}
    oracle = ReferenceFOP(model, **options, **fixed)
    optimizer = library(model, curvature_interval=1, **options)
    for x, y in batches:
        before = weights(oracle.model)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        oracle.step(x, y, loss_fn)
        check(model, oracle, before, tolerance)
        diagnosed = optimizer.diagnostics().layers
        for name, state in oracle.state.items():
            # ρ compares two gradients; β = 0 (K-FAC) has no use for the second.
            for key in ("beta", "eta") if oracle.beta == 0.0 else ("beta", "eta", "rho"):
                # Scalars of the step: looser than the step, whose parts they are.
                assert getattr(diagnosed[name], key) == pytest.approx(
                    getattr(state.correction, key), rel=100 * tolerance, abs=10 * tolerance
                ), f"{name}: {key}"
    return oracle


# --- the library against the oracle --------------------------------------------------------------------


@pytest.mark.core
@dtypes
@pytest.mark.parametrize("N", [6, 5, 1])
@pytest.mark.parametrize("case", CASES)
def test_one_step(case: str, N: int, dtype: torch.dtype) -> None:
    model, x, y = make(case, dtype, N)
    oracle = compare(model, [(x, y)], tolerance=(TOLERANCE if N > 1 else TOLERANCE_ONE_SAMPLE)[dtype])
    betas = [state.correction.beta for state in oracle.state.values() if state.correction]
    assert all(beta == 0.0 for beta in betas) if N == 1 else all(beta != 0.0 for beta in betas)


MIXING: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.1},
    "beta and eta": {"beta": 0.01, "eta": 0.7},
    "eta": {"eta": 0.7},
    "no correction": {"beta": 0.0, "eta": 1.0},
    "KFAC": {"library": KFAC},
}


@dtypes
@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("case", SUBSET)
def test_fixed_mixing(case: str, mixing: str, dtype: torch.dtype) -> None:
    model, x, y = make(case, dtype, N=5)
    compare(model, [(x, y)], tolerance=TOLERANCE[dtype], **MIXING[mixing])


@pytest.mark.core
@dtypes
@pytest.mark.parametrize(
    ("case", "library", "nesterov"),
    [
        *itertools.product(("linear-3d-no-bias", "conv-linear"), (FOP, KFAC), (False, True)),
        ("conv-groups", FOP, True),
        ("mlp", FOP, False),
        ("conv-conv-inplace", FOP, False),
    ],
)
def test_ten_steps(case: str, library: type[FOP], nesterov: bool, dtype: torch.dtype) -> None:
    """Momentum, decay, EMA and KL clip together, on batches of changing size (even, odd and one)."""
    model, _, _ = make(case, dtype, N=1)
    batches = [make(case, dtype, N, seed=i)[1:] for i, N in enumerate([6, 5, 6, 3, 1, 6, 2, 5, 6, 6])]
    start = weights(model)
    oracle = compare(
        model,
        batches,
        # Each step is taken from weights that already differ by rounding, and is held to the size of this one
        # update; the bound of a single step is asked of the whole way below.
        tolerance=10 * TOLERANCE[dtype],
        library=library,
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.05,
        stat_decay=0.8,
        kl_clip=0.01,
    )
    check(model, oracle, start, TOLERANCE[dtype])
    assert oracle.kl_scale < 1.0, "the KL clip was not active"


BY_WEIGHT: dict[str, Any] = {"step_length": "weight", "damping_kind": "relative", "anneal": False}


@pytest.mark.core
@dtypes
@pytest.mark.parametrize(
    ("case", "library", "nesterov"),
    [
        *itertools.product(("linear-3d-no-bias", "conv-linear"), (FOP, KFAC), (False, True)),
        ("conv-groups", FOP, True),
        ("mlp", FOP, True),
        ("conv-conv-inplace", FOP, False),
    ],
)
def test_ten_steps_as_long_as_the_weight(
    case: str, library: type[FOP], nesterov: bool, dtype: torch.dtype
) -> None:
    """Momentum, then the length, decay and averages without bias together."""
    model, _, _ = make(case, dtype, N=1)
    batches = [make(case, dtype, N, seed=i)[1:] for i, N in enumerate([6, 5, 6, 3, 1, 6, 2, 5, 6, 6])]
    start = weights(model)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.6, "nesterov": nesterov, "weight_decay": 0.05}
    oracle = compare(
        model,
        batches,
        tolerance=10 * TOLERANCE[dtype],
        library=library,
        stat_decay=0.8,
        **BY_WEIGHT,
        **options,
    )
    check(model, oracle, start, 10 * TOLERANCE[dtype])


@pytest.mark.core
@dtypes
@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize(
    ("case", "momentum"),
    # The bias of conv-linear hardly moves without momentum.
    [*itertools.product(("linear-3d-no-bias", "conv-groups", "mlp"), (0.0, 0.6)), ("conv-linear", 0.6)],
)
def test_ten_steps_with_damping_and_length_by_noise(
    case: str, momentum: float, library: type[FOP], dtype: torch.dtype
) -> None:
    """The noise of earlier steps stands in for that of batches that have none to show."""
    model, _, _ = make(case, dtype, N=1)
    batches = [make(case, dtype, N, seed=i)[1:] for i, N in enumerate([6, 5, 6, 3, 1, 6, 2, 5, 6, 6])]
    options: dict[str, Any] = {**BY_WEIGHT, "damping": "adaptive", "anneal": True}
    options |= {"lr": 0.5, "momentum": momentum, "nesterov": False, "stat_decay": 0.8, "library": library}
    oracle = compare(model, batches, tolerance=20 * TOLERANCE[dtype], **options)
    shares = [state.noise_share for state in oracle.state.values()]
    # 1 where none was measured.
    assert all(0 < share <= (0.99 if library is FOP else 1) for share in shares), shares
    assert library is FOP or min(shares) == 1


@dtypes
@pytest.mark.parametrize("library", [FOP, KFAC])
@pytest.mark.parametrize("case", ["linear-3d-no-bias", "conv-linear", "conv-groups", "mlp"])
def test_steps_that_go_too_far(case: str, library: type[FOP], dtype: torch.dtype) -> None:
    """At such a rate the loss rises; without noise to know, K-FAC does not look back."""
    model, _, _ = make(case, dtype, N=1)
    batches = [make(case, dtype, 6, seed=i)[1:] for i in range(8)]
    options: dict[str, Any] = {**BY_WEIGHT, "damping": "adaptive", "stat_decay": 0.8}
    options |= {"lr": 4.0, "momentum": 0.9, "nesterov": True}
    oracle = compare(model, batches, tolerance=100 * TOLERANCE[dtype], library=library, **options)
    assert (min(state.radius for state in oracle.state.values()) < 1.0) is (library is FOP)


@dtypes
@pytest.mark.parametrize("anneal", [False, True])
def test_batches_of_one_sample_before_any_noise_was_measured(anneal: bool, dtype: torch.dtype) -> None:
    model, _, _ = make("linear-3d-no-bias", dtype, N=1)
    batches = [make("linear-3d-no-bias", dtype, N, seed=i)[1:] for i, N in enumerate([1, 1, 6, 1])]
    options: dict[str, Any] = {**BY_WEIGHT, "damping": "adaptive", "anneal": anneal, "lr": 0.5}
    compare(model, batches, tolerance=20 * TOLERANCE[dtype], **options)


@dtypes
@pytest.mark.parametrize("case", ["linear", "conv-stride", "conv-groups"])
def test_weights_that_start_at_zero(case: str, dtype: torch.dtype) -> None:
    model, _, _ = make(case, dtype, N=1)
    (layer,) = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    nn.init.zeros_(layer.weight)
    batches = [make(case, dtype, 6, seed=i)[1:] for i in range(4)]
    oracle = compare(model, batches, tolerance=10 * TOLERANCE[dtype], lr=0.1, **BY_WEIGHT)
    (state,) = oracle.state.values()
    assert state.reference > float(layer.weight.detach().norm())


@dtypes
def test_cross_entropy_and_idle_kl_clip(dtype: torch.dtype) -> None:
    model, x, _ = make("conv-linear", dtype, N=6)
    batches = [(x, torch.tensor([0, 2, 1, 1, 0, 2]))] * 3
    options: dict[str, Any] = {"loss_fn": nn.functional.cross_entropy, "lr": 0.1, "kl_clip": 100.0}
    assert compare(model, batches, tolerance=10 * TOLERANCE[dtype], **options).kl_scale == 1.0


@pytest.mark.parametrize("damping", [1e-3, 1e-5])
@pytest.mark.parametrize("case", ["linear", "linear-3d", "conv-padding", "conv-groups", "conv-linear"])
def test_small_damping(case: str, damping: float) -> None:
    """The dampings people use; only float64 has the digits to compare them (see DAMPING)."""
    model, x, y = make(case, torch.float64, N=6)
    compare(model, [(x, y)], tolerance=TOLERANCE[torch.float64], damping=damping)


@pytest.mark.parametrize(
    ("ratio", "dtype"),
    [
        *itertools.product((1.0, 3.0, 0.0, -0.8), (torch.float32, torch.float64)),
        (30.0, torch.float64),  # cond(F̂) is 3e4: out of float32's reach, see DAMPING
    ],
)
def test_no_disagreement_is_kfac(ratio: float, dtype: torch.dtype) -> None:
    """g2 = g1, or g2 a multiple of g1: G⊥ is zero in exact arithmetic, so E = 0 and the step is K-FAC's.

    In floating point G⊥ is rounding noise. Taken at face value D/E would mix in an arbitrary direction.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).to(dtype)
    half, residual = torch.randn(3, 5, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    x = reference.joined(half, half)
    with torch.no_grad():
        y = model(x) - reference.joined(residual, ratio * residual)
    oracle = ReferenceFOP(model, **PLAIN, damping=DAMPING, beta=0.0, eta=1.0)
    optimizer = FOP(model, **PLAIN, damping=DAMPING)
    before = weights(model)
    half_squared_error(model(x), y).backward()
    optimizer.step()
    oracle.step(x, y, half_squared_error)
    check(model, oracle, before, TOLERANCE[dtype])


# --- the oracle against what is below it ---------------------------------------------------------------


def test_reference_never_imports_the_library() -> None:
    files = sorted(Path(reference.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import could reach anything"
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"reference", "torch", *sys.stdlib_module_names}
    assert "importlib" not in imported


def observed(case: str, N: int) -> dict[str, reference.Block]:
    model, x, y = make(case, torch.float64, N)
    return observe(model, Tape(model), (x,), y, half_squared_error)


def test_dense_fisher_is_the_kronecker_operator() -> None:
    torch.manual_seed(0)
    A, G = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    A, G, V = A @ A.mT, G @ G.mT, torch.randn(2, 3, 4, dtype=torch.float64)
    dense = reference.dense_fisher(A, G)
    torch.testing.assert_close(reference.unvec(dense @ reference.vec(V), like=V), G @ V @ A)
    torch.testing.assert_close(reference.dense_damped_fisher(A, G, damping=0.0), dense)


@pytest.mark.parametrize("case", ["linear", "linear-3d", "conv-same", "conv-groups"])
def test_oracle_keeps_the_papers_identities(case: str) -> None:
    """Lemma 1, η* = (1+ρ)/(1+3ρ), and β* as the minimiser that (13)–(16) say it is."""
    (block,) = observed(case, 6).values()
    A, G = (estimate(block)[key] for key in "AG")
    F, F_hat = reference.dense_fisher(A, G), reference.dense_damped_fisher(A, G, DAMPING)
    g1, g2 = (reference.vec(block.mean_gradient(part)) for part in reference.split(6))
    Ga, Gd = (g1 + g2) / 2, g1 - g2
    c = reference.correct(F, F_hat, Ga, Gd, "adaptive", "adaptive")
    assert abs(Ga @ F @ c.perpendicular) < 1e-12 * (Ga @ F @ Ga)
    assert 0 < c.rho < 1
    assert c.eta == pytest.approx((1 + c.rho) / (1 + 3 * c.rho), rel=1e-10)
    swapped = reference.correct(F, F_hat, Ga, -Gd, "adaptive", "adaptive")
    torch.testing.assert_close(swapped.direction, c.direction)
    equal = reference.correct(F, F_hat, Ga, 0 * Gd, "adaptive", "adaptive")
    torch.testing.assert_close(equal.direction, torch.linalg.solve(F_hat, Ga))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_rule_is_sgds(nesterov: bool) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=nesterov)
    expected, buffer = p.detach().clone(), None
    for _ in range(5):
        p.grad = torch.randn_like(p)
        step, buffer = reference.momentum_step(p.grad, buffer, 0.9, nesterov)
        expected -= 0.1 * step
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(
    ("N", "damping", "bound"), [(6, DAMPING, 100), (5, DAMPING, 100), (1, DAMPING_ONE_SAMPLE, 400)]
)
def test_damped_fisher_is_well_conditioned(N: int, damping: float, bound: float) -> None:
    """The ground under the float32 tolerance."""
    for case in CASES:
        for name, block in observed(case, N).items():
            held = estimate(block)
            condition = torch.linalg.cond(reference.dense_damped_fisher(held["A"], held["G"], damping))
            assert condition < bound, f"{case}, layer {name}: {condition:.0f}"
