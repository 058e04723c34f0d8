"""A model that is recorded or exported while an optimizer lives: nothing of ours in it, training goes on."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fop import FOP
from models import (
    Attentive,
    Mixed,
    assert_equal,
    batch,
    conv_net,
    loss_of,
    mlp,
    sentences,
    tokens,
    train_step,
    weights,
)


class Recurrent(nn.Module):
    """Time-major, so that the optimizer watches the sequences, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.LSTM(5, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(x.expand(3, *x.shape))[0][-1])
        return out


def by_jit(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Traces twice and compares the graphs; as TensorBoard's `add_graph` does."""
    traced: Any = torch.jit.trace(model, x)
    assert "Keep" not in str(traced.inlined_graph)
    torch.jit.save(traced, io.BytesIO())
    return traced  # type: ignore[no-any-return]


def by_trace_graph(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What torch.onnx records."""
    graph, *_ = torch.jit._get_trace_graph(model, (x,))
    assert "Keep" not in str(graph)
    return model


def by_export(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,), strict=False).module()


def by_strict_export(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,), strict=True).module()


def by_make_fx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return make_fx(lambda x: model(x))(x)  # type: ignore[no-any-return]


WAYS = (by_jit, by_trace_graph, by_export, by_make_fx, by_strict_export)
GIVEN = ("model", "parameters", "parameters, model called before")
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, batch),
    "convolutions": (conv_net, lambda n, seed: batch(n, seed, (2, 5, 6))),
    "attention": (Attentive, sentences),
    "embedding": (Mixed, tokens),
    "recurrent": (Recurrent, batch),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("way", "given"),
    [
        *itertools.product(WAYS[:-1], GIVEN[:-1]),
        (by_jit, GIVEN[-1]),
        *(pytest.param(way, GIVEN[-1], marks=pytest.mark.rest) for way in WAYS[1:-1]),
        pytest.param(by_strict_export, "model", marks=pytest.mark.slow),
    ],
)
def test_recorded_while_it_trains(way: Any, kind: str, given: str) -> None:
    """In the middle of a step, too: between backward pass and step, and before the first step."""
    if given == "parameters" and way is by_trace_graph:
        pytest.skip("the first module that runs is torch's wrapper, whose names the summary has")
    build, data = MODELS[kind]
    results = []
    for recorded in (False, True):
        model = build()
        optimizer = FOP(model if given == "model" else model.parameters(), momentum=0.5)
        if given.endswith("before"):
            model(data(6, 9)[0])
        x, _ = data(6, 0)
        for seed in range(3):
            optimizer.zero_grad()
            if recorded:
                recording = way(model, x)
            loss_of(model, *data(6, seed)).backward()
            if recorded:
                way(model, x)
            optimizer.step()
        results.append((weights(model), str(optimizer.summary()), str(optimizer.diagnostics())))
    assert_equal(*results)
    assert "FOP" in results[0][1]
    torch.testing.assert_close(recording(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "mlp" else pytest.mark.rest) for kind in MODELS]
)
def test_strict_export_of_a_model_whose_parameters_were_given(kind: str) -> None:
    """Called before: until then modules are looked for by a global hook, with which strict export fails."""
    test_recorded_while_it_trains(by_strict_export, kind, GIVEN[-1])


def test_a_recording_trains_by_its_own_optimizer() -> None:
    """Parameters of the recording are the model's: they have a gradient, of which no module of ours knows."""
    model = mlp()
    optimizer = FOP(model)
    train_step(model, optimizer, *batch())
    traced: Any = torch.jit.trace(model, batch()[0])
    before = weights(model)
    optimizer.zero_grad()
    loss_of(traced, *batch()).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(row.why_kfac for row in optimizer.diagnostics().layers.values())
