"""The same numbers in another form make the same step: strides, memory formats, dimensions, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fop import FOP, KFAC
from internals import ConvLayer, LayerOptions
from models import weights
from reference import half_squared_error
from reference.cases import AFFINE, ATTENTION, CONV2D, CONVOLUTIONS, LINEAR, TRANSPOSED, Conv1D

# Kinds of one layer that take one tensor.
KINDS = {
    name: case
    for name, case in {**CONVOLUTIONS, **CONV2D, **TRANSPOSED, **LINEAR, **ATTENTION, **AFFINE}.items()
    if name
    in {
        "linear", "linear-3d", "linear-3d-no-bias", "transformers-conv1d-sequence", "conv1d-groups",
        "conv3d", "conv-reflect", "transposed1d", "transposed2d-groups", "transposed3d", "self-no-weights",
        "self-bias-kv", "layer-norm-sequence", "rms-norm-sequence-eps", "group-norm-image", "batch-norm2d",
    }
}  # fmt: skip
assert len(KINDS) == 16


class Overwrite(nn.Module):
    """Changes what it is given, and not only by a function of the value."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 1.5
        x += 0.25
        return x.sin_()


class Copying(nn.Module):
    """The same as `Overwrite` out of place."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * 1.5 + 0.25)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


# What the inputs go through on either side, and what comes after the layer: (inputs, end), (inputs, end).
# A sum gives its gradient as one number that is expanded over the output of the layer.
Side = tuple[Callable[[Tensor], Tensor], type[nn.Module]]
SAME = torch.Tensor.contiguous
VARIANTS: dict[str, tuple[Side, Side]] = {
    "in place": ((SAME, Overwrite), (SAME, Copying)),
    "expanded gradient": ((SAME, nn.Identity), (SAME, Doubled)),
    "transposed": ((lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), Copying), (SAME, Copying)),
    "every second": ((lambda x: x.repeat_interleave(2, dim=0)[::2], Copying), (SAME, Copying)),
    "offset": ((lambda x: torch.cat([x[:1], x])[1:], Copying), (SAME, Copying)),
    "expanded": ((lambda x: x[:1].expand_as(x), Copying), (lambda x: x[:1].repeat_interleave(6, 0), Copying)),
    "inner": ((strided, Copying), (SAME, Copying)),
}  # fmt: skip


def trained(
    build: Callable[[], nn.Module], inputs: list[Tensor], kind: type[FOP] = FOP, **options: object
) -> dict[str, Tensor]:
    """Weights after a step on each input; every weight takes the FOP step and has a pair where it can."""
    torch.manual_seed(0)
    model = build().double()
    norms = {type(m): {"path": "fop"} for m in model.modules() if hasattr(m, "eps")}
    optimizer = kind(model, damping=1e-2, curvature_interval=2, layer_options=norms, **options)
    for x in inputs:
        optimizer.zero_grad()
        out = model(x)
        # The mean over dim 0, so that either end of "expanded gradient" has the same loss.
        (out.sum() / len(x) / (2 if isinstance(getattr(model, "1", None), Doubled) else 1)).backward()
        optimizer.step()
    paths = {row.name: row.path for row in optimizer.summary().rows if "bias_" not in row.name}
    assert set(paths.values()) == {"FOP" if kind is FOP else "K-FAC"}
    layers = optimizer.diagnostics().layers
    assert layers and all(d.kfac_steps == 0 or len(inputs[0]) < 2 for d in layers.values())
    return weights(model)


# FOP's layers make their gradients themselves, and K-FAC watches those of autograd.
@pytest.mark.parametrize("kind", [FOP, KFAC])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KINDS)
def test_form_of_inputs_outputs_and_gradients(name: str, variant: str, kind: type[FOP]) -> None:
    case, runs = KINDS[name], []
    for change, end in VARIANTS[variant]:
        torch.manual_seed(1)
        inputs = [change(case.inputs(6)[0]) for _ in range(3)]
        runs.append(trained(lambda end=end: nn.Sequential(case.build(), end()), inputs, kind))
    tolerance = 1e-12 if variant == "in place" else 1e-10
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


# --- dimensions ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention on (L, 4) or on a batch of (N, L, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x)[0].sin()
        return out


def linear() -> nn.Module:
    return nn.Linear(4, 3)


# A layer, the shape of an input, and how the same numbers are shaped otherwise.
DIMENSIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one vector": (linear, (4,), lambda x: x[None]),
    "no bias": (partial(nn.Linear, 4, 3, bias=False), (4,), lambda x: x[None]),
    "conv": (partial(nn.Conv2d, 4, 3, 2), (4, 3, 3), lambda x: x[None]),
    "conv groups": (partial(nn.Conv2d, 4, 6, 2, groups=2, bias=False), (4, 3, 3), lambda x: x[None]),
    "conv1d": (partial(nn.Conv1d, 4, 3, 2), (4, 3), lambda x: x[None]),
    "conv3d": (partial(nn.Conv3d, 2, 3, 2), (2, 2, 3, 2), lambda x: x[None]),
    "transposed": (partial(nn.ConvTranspose2d, 4, 2, 2, stride=2), (4, 2, 2), lambda x: x[None]),
    "attention": (Attention, (3, 4), lambda x: x[None]),
    "leading ones": (linear, (6, 4), lambda x: x[:, None, None]),
    "folded rows": (linear, (6, 2, 3, 5, 4), lambda x: x.flatten(1, 3)),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimensions_of_an_input(name: str) -> None:
    build, shape, change = DIMENSIONS[name]

    def run(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = build().double()
        optimizer = FOP(model, lr=0.1, damping=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(change(torch.randn(shape, dtype=torch.float64))).sin().sum().backward()
            optimizer.step()
        rows = optimizer.summary().rows
        assert {row.path for row in rows} == {"FOP"}
        assert not any("no curvature" in row.reason for row in rows)
        return weights(model)

    torch.testing.assert_close(run(lambda x: x), run(change), rtol=1e-12, atol=1e-14)


EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (linear, (5, 4), (0, 4)),
    "sequence": (linear, (5, 2, 4), (0, 2, 4)),
    "without rows": (linear, (5, 2, 4), (5, 0, 4)),
    "transformers conv1d": (lambda: Conv1D(3, 4), (5, 2, 4), (0, 2, 4)),
    "conv1d": (partial(nn.Conv1d, 4, 3, 2), (5, 4, 3), (0, 4, 3)),
    "transposed": (partial(nn.ConvTranspose1d, 4, 3, 2), (5, 4, 3), (0, 4, 3)),
    "conv": (partial(nn.Conv2d, 4, 3, 2), (5, 4, 3, 3), (0, 4, 3, 3)),
    "reflect": (
        partial(nn.Conv2d, 4, 3, 2, padding=1, padding_mode="reflect", bias=False),
        (5, 4, 3, 3),
        (0, 4, 3, 3),
    ),
}


@pytest.mark.parametrize("empty_step", [0, 2])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_a_step_of_nothing(name: str, empty_step: int) -> None:
    """Before there is any curvature, and later, in a step in which curvature is due."""
    build, shape, empty = EMPTY[name]
    torch.manual_seed(0)
    module = build()
    optimizer = FOP(module, lr=0.1, momentum=0.0, curvature_interval=1)
    for step in range(4):
        before = weights(module)
        held = {
            k: v.clone()
            for k, v in optimizer.state[module.weight].items()
            if k in ("A", "G", "A_inv", "G_inv")
        }
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an empty batch is no reason to warn
            module(torch.randn(empty if step == empty_step else shape)).square().sum().backward()
            optimizer.step()
        for key, p in weights(module).items():
            assert torch.isfinite(p).all()
            assert torch.equal(p, before[key]) == (step == empty_step)
        if step == empty_step:
            assert all(torch.equal(optimizer.state[module.weight][key], value) for key, value in held.items())
            assert len(held) == (4 if step else 0)
    A, G = (optimizer.state[module.weight][key] for key in ("A", "G"))
    assert torch.isfinite(A).all() and torch.isfinite(G).all()
    # Nothing came in from the empty batch: the trace of A is the mean of real samples, not pulled to 0.
    assert A.diagonal(dim1=1, dim2=2).sum() > 1


# --- channels_last ---------------------------------------------------------------------------------


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Conv2d(2, 3, 1),
        nn.Flatten(),
        nn.Linear(3 * 8 * 6, 3),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 4, 2, groups=2),
        nn.ConvTranspose3d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 3 * 2 * 3, 3),
    )


@pytest.mark.parametrize("kind", [FOP, KFAC])
@pytest.mark.parametrize("part", ["model", "inputs", "both"])
@pytest.mark.parametrize(
    ("build", "shape", "memory"),
    [(images, (6, 2, 6, 5), torch.channels_last), (volumes, (6, 2, 4, 3, 4), torch.channels_last_3d)],
)
def test_channels_last(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    memory: torch.memory_format,
    part: str,
    kind: type[FOP],
) -> None:
    runs = []
    for changed in (False, True):
        torch.manual_seed(0)
        model = build().double()
        if changed and part != "inputs":
            model.to(memory_format=memory)  # type: ignore[call-overload]
        strides = {name: p.stride() for name, p in model.named_parameters()}
        norms = {type(m): {"path": "fop"} for m in model.modules() if hasattr(m, "eps")}
        optimizer = kind(model, damping=1e-2, curvature_interval=2, layer_options=norms)
        for _ in range(3):
            x, y = torch.randn(shape, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
            optimizer.zero_grad()
            half_squared_error(
                model(x.contiguous(memory_format=memory) if changed and part != "model" else x), y
            ).backward()
            optimizer.step()
        assert {name: p.stride() for name, p in model.named_parameters()} == strides
        assert kind is KFAC or not any(d.kfac_steps for d in optimizer.diagnostics().layers.values())
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_a_table_of_taps_may_be_replaced_by_another_thread() -> None:
    class Raced(ConvLayer):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "_table" and (rival := self.__dict__.get("rival")) is not None:
                # At once, as backward passes of other devices may.
                super().__setattr__(name, rival)

    layer = Raced(nn.Conv1d(1, 1, 2), bias=False, options=LayerOptions())
    short, long = torch.randn(2, 1, 4), torch.randn(2, 1, 6)
    expected = layer.input_rows(long, torch.Size([2, 1, 5]), None)
    layer.input_rows(short, torch.Size([2, 1, 3]), None)
    layer.rival = layer._table
    assert torch.equal(layer.input_rows(long, torch.Size([2, 1, 5]), None), expected)
