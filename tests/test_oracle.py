"""The library's steps against the dense oracle in reference, and the oracle against what is below it."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from reference import ReferenceFOP, half_squared_error

# A float32 run loses up to cond(F̂) · 6e-8, so 1e-5 can only be asked where F̂ is well conditioned. With these
# dampings cond(F̂) stays below 100 in every case, and below 400 for a single sample, whose factors have a rank
# near one and need more (`test_damped_fisher_is_well_conditioned`). Smaller damping is tested in float64
# (`test_small_damping`), which has digits to spare.
DAMPING, DAMPING_ONE_SAMPLE = 0.1, 1.0
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LR = 0.5  # large, so that rounding of the new weight itself is small beside the update

Model = Callable[[], nn.Sequential]


def one(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


def conv(*args: Any, **kwargs: Any) -> Model:
    return lambda: one(nn.Conv2d(*args, **kwargs))


IMAGE = (4, 5, 6)
CASES: dict[str, tuple[Model, tuple[int, ...]]] = {
    "linear": (lambda: one(nn.Linear(5, 4)), (5,)),
    "linear-no-bias": (lambda: one(nn.Linear(5, 4, bias=False)), (5,)),
    "linear-one-output": (lambda: one(nn.Linear(5, 1)), (5,)),
    "linear-3d": (lambda: one(nn.Linear(5, 4)), (3, 5)),
    "linear-3d-no-bias": (lambda: one(nn.Linear(5, 4, bias=False)), (3, 5)),
    "linear-4d": (lambda: one(nn.Linear(5, 4)), (2, 3, 5)),
    "conv": (conv(4, 3, 3), IMAGE),
    "conv-no-bias": (conv(4, 3, 3, bias=False), IMAGE),
    "conv-1x1": (conv(4, 3, 1), IMAGE),
    "conv-stride": (conv(4, 3, 3, stride=2), IMAGE),
    "conv-stride-leftover": (conv(4, 3, 2, stride=(3, 2), bias=False), IMAGE),
    "conv-padding": (conv(4, 3, 3, padding=1), IMAGE),
    "conv-padding-uneven": (conv(4, 3, 3, padding=(2, 1), stride=(1, 2)), IMAGE),
    "conv-valid": (conv(4, 3, 3, padding="valid"), IMAGE),
    "conv-same": (conv(4, 3, 3, padding="same"), IMAGE),
    "conv-same-even-kernel": (conv(4, 3, (2, 4), padding="same", bias=False), IMAGE),
    "conv-same-dilated": (conv(4, 3, (2, 3), padding="same", dilation=(3, 2)), IMAGE),
    "conv-reflect": (conv(4, 3, 3, padding=2, padding_mode="reflect"), IMAGE),
    "conv-circular": (conv(4, 3, 3, padding=(1, 2), padding_mode="circular"), IMAGE),
    "conv-replicate": (conv(4, 3, 3, padding=2, padding_mode="replicate", bias=False), IMAGE),
    "conv-same-reflect": (conv(4, 3, (2, 3), padding="same", padding_mode="reflect"), IMAGE),
    "conv-dilation": (conv(4, 3, 2, dilation=(2, 3)), IMAGE),
    "conv-dilation-stride-padding": (conv(4, 3, 3, dilation=2, stride=2, padding=2), IMAGE),
    "conv-groups": (conv(4, 6, 3, groups=2), IMAGE),
    "conv-groups-no-bias": (conv(4, 6, 3, groups=2, bias=False, stride=2, padding=1), IMAGE),
    "conv-depthwise": (conv(4, 4, 3, groups=4), IMAGE),
    "conv-depthwise-multiplier": (conv(4, 8, 2, groups=4, bias=False, dilation=2), IMAGE),
    "conv-kernel": (conv(4, 3, (1, 3)), IMAGE),
    "conv-kernel-tall": (conv(4, 3, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
}
NETS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)), (3, 5)),
    "conv-linear": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 5, 6),
    ),
    "conv-conv-inplace": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (2, 3), groups=2, padding="same"),
            nn.Flatten(),
        ),
        (2, 5, 6),
    ),
}
ALL = {**CASES, **NETS}
SUBSET = ["linear", "linear-3d-no-bias", "conv-stride", "conv-groups", "conv-linear"]


def make(case: str, dtype: torch.dtype, N: int, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model, and a batch whose targets have the shape of the model's output."""
    torch.manual_seed(seed)
    build, shape = ALL[case]
    model = build().to(dtype)
    x = torch.randn(N, *shape, dtype=dtype)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    return model, x, y


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, loss_fn: reference.LossFn
) -> None:
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def check(model: nn.Module, oracle: ReferenceFOP, before: dict[str, Tensor], tolerance: float) -> None:
    """Every parameter within tolerance, relative to how far it moved and to its own size."""
    new, expected = weights(model), weights(oracle.model)
    assert new.keys() == expected.keys()
    for name, old in before.items():
        error = (new[name] - expected[name]).norm()
        moved, size = (expected[name] - old).norm(), expected[name].norm()
        assert moved > 1e-3 * size, f"{name} did not move: the case cannot fail"
        assert error < tolerance * moved, f"{name}: error {error / moved:.2e} of the update"
        assert error < tolerance * size, f"{name}: error {error / size:.2e} of the weight"


def compare(
    model: nn.Sequential,
    batches: list[tuple[Tensor, Tensor]],
    *,
    tolerance: float,
    loss_fn: reference.LossFn = half_squared_error,
    library: str = "FOP",
    **options: Any,
) -> ReferenceFOP:
    """Take the same steps with the library and with the oracle; check weights after every step."""
    import fop

    fixed = {"beta": 0.0, "eta": 1.0} if library == "KFAC" else {}
    damping = DAMPING if len(batches[0][0]) > 1 else DAMPING_ONE_SAMPLE
    plain = {"lr": LR, "momentum": 0.0, "weight_decay": 0.0, "stat_decay": 0.9, "kl_clip": None}
    options = {**plain, "damping": damping, **options}
    oracle = ReferenceFOP(model, **options, **fixed)
    optimizer = getattr(fop, library)(model, curvature_interval=1, **options)
    for x, y in batches:
        before = weights(oracle.model)
        train_step(model, optimizer, x, y, loss_fn)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("N", [6, 5, 1])
@pytest.mark.parametrize("case", ALL)
def test_one_step(case: str, N: int, dtype: torch.dtype) -> None:
    model, x, y = make(case, dtype, N)
    oracle = compare(model, [(x, y)], tolerance=TOLERANCE[dtype])
    betas = [state.correction.beta for state in oracle.state.values()]
    assert all(beta == 0.0 for beta in betas) if N == 1 else all(beta != 0.0 for beta in betas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("N", [6, 1])
@pytest.mark.parametrize("case", SUBSET)
def test_kfac_step(case: str, N: int, dtype: torch.dtype) -> None:
    model, x, y = make(case, dtype, N)
    compare(model, [(x, y)], tolerance=TOLERANCE[dtype], library="KFAC")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    "mixing",
    [
        {"beta": 0.1, "eta": "adaptive"},
        {"beta": 0.1, "eta": 1.0},
        {"beta": "adaptive", "eta": 0.7},
        {"beta": 0.01, "eta": 0.7},
        {"beta": 0.0, "eta": 1.0},
    ],
    ids=lambda mixing: f"beta={mixing['beta']},eta={mixing['eta']}",
)
@pytest.mark.parametrize("case", ["linear", "conv-groups", "conv-linear"])
def test_fixed_mixing(case: str, mixing: dict[str, Any], dtype: torch.dtype) -> None:
    model, x, y = make(case, dtype, N=5)
    compare(model, [(x, y)], tolerance=TOLERANCE[dtype], **mixing)


@pytest.mark.parametrize("library", ["FOP", "KFAC"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", [*SUBSET, "mlp", "conv-conv-inplace"])
def test_ten_steps(case: str, dtype: torch.dtype, nesterov: bool, library: str) -> None:
    """Momentum, decay, EMA and KL clip together, on batches of changing size (even, odd and one)."""
    model, _, _ = make(case, dtype, N=1)
    batches = [make(case, dtype, N, seed=i)[1:] for i, N in enumerate([6, 5, 6, 3, 1, 6, 2, 5, 6, 6])]
    start = weights(model)
    oracle = compare(
        model,
        batches,
        # Each step is taken from weights that already differ by rounding, and is held to the size of this one
        # update; the bound is asked of the whole way below.
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_cross_entropy_and_idle_kl_clip(dtype: torch.dtype) -> None:
    model, x, _ = make("conv-linear", dtype, N=6)
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    oracle = compare(
        model,
        [(x, y)] * 3,
        tolerance=10 * TOLERANCE[dtype],
        loss_fn=nn.functional.cross_entropy,
        lr=0.1,
        kl_clip=100.0,
    )
    assert oracle.kl_scale == 1.0


@pytest.mark.parametrize("case", ["linear", "linear-3d", "conv-padding", "conv-groups", "conv-linear"])
def test_small_damping(case: str) -> None:
    """The dampings people use; only float64 has the digits to compare them (see DAMPING)."""
    for damping in (1e-3, 1e-5):
        model, x, y = make(case, torch.float64, N=6)
        compare(model, [(x, y)], tolerance=TOLERANCE[torch.float64], damping=damping)


@pytest.mark.parametrize("case", ["linear", "linear-3d", "conv-same", "conv-groups", "conv-depthwise"])
def test_factors_follow_the_conventions(case: str) -> None:
    """A sums over positions, G averages over them; the EMA starts from the first estimate."""
    from fop import FOP

    model, x, y = make(case, torch.float64, N=5)
    optimizer = FOP(model, lr=0.1, curvature_interval=1, stat_decay=0.8)
    expected_A = expected_G = None
    for _ in range(3):
        A, G = reference.factors(reference.per_sample(model, x, y, half_squared_error)["0"])
        expected_A = A if expected_A is None else 0.8 * expected_A + 0.2 * A
        expected_G = G if expected_G is None else 0.8 * expected_G + 0.2 * G
        train_step(model, optimizer, x, y, half_squared_error)
        state = optimizer.state[model[0].weight]
        torch.testing.assert_close(state["A"], expected_A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["G"], expected_G, rtol=1e-12, atol=1e-12)


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
    from fop import FOP

    torch.manual_seed(0)
    model = one(nn.Linear(5, 4)).to(dtype)
    x, residual = torch.randn(3, 5, dtype=dtype).repeat(2, 1), torch.randn(3, 4, dtype=dtype)
    with torch.no_grad():
        y = model(x) - torch.cat([residual, ratio * residual])
    oracle = ReferenceFOP(model, LR, damping=DAMPING, beta=0.0, eta=1.0)
    optimizer = FOP(model, LR, momentum=0.0, weight_decay=0.0, damping=DAMPING, kl_clip=None)
    before = weights(model)
    train_step(model, optimizer, x, y, half_squared_error)
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


@pytest.mark.parametrize("case", ALL)
def test_per_sample_quantities(case: str) -> None:
    """Gradients average to autograd's, rows multiply to gradients, patches multiply to the layer's output."""
    model, x, y = make(case, torch.float64, N=5)
    samples = reference.per_sample(model, x, y, half_squared_error)
    half_squared_error(model(x), y).backward()
    for name, layer in reference.layers_of(model).items():
        bias = None if layer.bias is None else layer.bias.grad
        torch.testing.assert_close(
            reference.mean_gradient(samples[name]), reference.to_matrix(layer, layer.weight.grad, bias)
        )
        for sample in samples[name]:
            torch.testing.assert_close(sample.outputs.mT @ sample.inputs, sample.gradient)
    first = reference.layers_of(model)["0"]
    matrix = reference.to_matrix(first, first.weight, first.bias).detach()
    rows = matrix @ samples["0"][0].inputs.mT  # (groups, out, R)
    output = first(x[:1]).detach()[0]
    expected = output if isinstance(first, nn.Conv2d) else output.reshape(-1, output.shape[-1]).T
    torch.testing.assert_close(rows.reshape(-1), expected.reshape(-1))


def test_dense_fisher_is_the_kronecker_operator() -> None:
    torch.manual_seed(0)
    A, G = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    A, G, V = A @ A.mT, G @ G.mT, torch.randn(2, 3, 4, dtype=torch.float64)
    dense = reference.dense_fisher(A, G)
    torch.testing.assert_close(reference.unvec(dense @ reference.vec(V), like=V), G @ V @ A)
    damped = reference.dense_damped_fisher(A, G, damping=0.0)
    torch.testing.assert_close(damped, dense)


@pytest.mark.parametrize("case", ["linear", "linear-no-bias"])
def test_one_sample_block_is_the_empirical_fisher(case: str) -> None:
    """One sample, one row: A ⊗ G = vec(g) vec(g)ᵀ exactly."""
    model, x, y = make(case, torch.float64, N=1)
    samples = reference.per_sample(model, x, y, half_squared_error)["0"]
    g = reference.vec(samples[0].gradient)
    torch.testing.assert_close(reference.dense_fisher(*reference.factors(samples)), torch.outer(g, g))


@pytest.mark.parametrize("case", ["linear", "linear-3d", "conv-same", "conv-groups"])
def test_oracle_keeps_the_papers_identities(case: str) -> None:
    """Lemma 1, η* = (1+ρ)/(1+3ρ), and β* as the minimiser that (13)–(16) say it is."""
    model, x, y = make(case, torch.float64, N=6)
    samples = reference.per_sample(model, x, y, half_squared_error)["0"]
    A, G = reference.factors(samples)
    F_dense, F_hat = reference.dense_fisher(A, G), reference.dense_damped_fisher(A, G, DAMPING)
    g1, g2 = (reference.vec(reference.mean_gradient(half)) for half in (samples[:3], samples[3:]))
    Ga, Gd = (g1 + g2) / 2, g1 - g2
    c = reference.correct(F_dense, F_hat, Ga, Gd, "adaptive", "adaptive")
    assert abs(Ga @ F_dense @ c.perpendicular) < 1e-12 * (Ga @ F_dense @ Ga)
    assert 0 < c.rho < 1
    assert c.eta == pytest.approx((1 + c.rho) / (1 + 3 * c.rho), rel=1e-10)
    swapped = reference.correct(F_dense, F_hat, Ga, -Gd, "adaptive", "adaptive")
    torch.testing.assert_close(swapped.direction, c.direction)
    equal = reference.correct(F_dense, F_hat, Ga, 0 * Gd, "adaptive", "adaptive")
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


def test_damped_fisher_is_well_conditioned() -> None:
    """The ground under the float32 tolerance."""
    for case, (N, damping, bound) in itertools.product(
        ALL, [(6, DAMPING, 100), (5, DAMPING, 100), (1, DAMPING_ONE_SAMPLE, 400)]
    ):
        model, x, y = make(case, torch.float64, N)
        for name, samples in reference.per_sample(model, x, y, half_squared_error).items():
            F_hat = reference.dense_damped_fisher(*reference.factors(samples), damping)
            condition = torch.linalg.cond(F_hat)
            assert condition < bound, f"{case}, {N} samples, layer {name}: {condition:.0f}"
