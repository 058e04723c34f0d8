"""Well-known architectures train, warn of nothing, and leave no weight to AdamW unless they say why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from fop import FOP
from zoo import LENGTH, ZOO, Task

STEPS = 20
# Of its few samples the halves share nothing: that is taken for noise, though steps along it fit them.
OPTIONS: dict[str, dict[str, Any]] = {"lstm": {"anneal": False}}
# Two batches in turn: every loss is compared with an earlier one of the same batch.
BATCHES = 2

NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)

# What takes AdamW, apart from norms, and what `summary()` must say of it.
BY_ADAMW: dict[str, dict[str, str]] = {
    "convnext": {
        f"convnext.encoder.stages.{stage}.layers.0.layer_scale_parameter": "ConvNextLayer" for stage in (0, 1)
    },
    "vit": {
        "vit.embeddings.cls_token": "ViTEmbeddings",
        "vit.embeddings.position_embeddings": "ViTEmbeddings",
    },
    "swin": {
        f"swin.encoder.layers.{block}.attention.relative_position_bias.relative_position_bias_table": "Swin"
        for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0")
    },
    "bert": {"cls.predictions.bias": "BertLMPredictionHead"},
    "lstm": {f"lstm.{kind}_{gate}_l0": "LSTM" for kind in ("weight", "bias") for gate in ("ih", "hh")},
}

# Layers whose input is the same for all samples: nothing to split, and what `diagnostics()` must say of it.
NO_PAIR: dict[str, dict[str, str]] = {
    "gpt": {"transformer.wpe": "positions"},
    "bert": {"bert.embeddings.position_embeddings": "positions"},
}

# Whose kinds of layer and block the others have too.
SLOW = {"mobilenet", "unet", "vit", "seq2seq"}
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ZOO]
)


@dataclass(frozen=True)
class Outcome:
    """What the tests look at after training."""

    model: nn.Module
    losses: list[float]
    moved: dict[str, bool]
    rows: dict[str, Any]
    diagnostics: Any


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(param, before[name]) for name, param in model.named_parameters()}


def train(task: Task, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    batches = [task.batch(seed) for seed in range(BATCHES)]
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(task.model, batches[step % BATCHES])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@cache
def trained(name: str) -> Outcome:
    """Train a model of the zoo with the defaults; every warning is an error."""
    torch.manual_seed(0)
    task = ZOO[name]()
    before = weights(task.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = FOP(task.model.parameters(), lr=0.05, **OPTIONS.get(name, {}))
        losses = train(task, optimizer)
        rows = {row.name: row for row in optimizer.summary().rows}
        return Outcome(task.model, losses, moved(task.model, before), rows, optimizer.diagnostics())


def norm_parameters(model: nn.Module) -> dict[str, str]:
    """Kind of norm by the name of the parameter."""
    return {
        f"{name}.{key}": type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for key in module._parameters
    }


def assert_finite(tensors: Iterable[Tensor]) -> None:
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.slow
@every_model
def test_trains(name: str) -> None:
    outcome = trained(name)
    first, last = sum(outcome.losses[:BATCHES]), sum(outcome.losses[-BATCHES:])
    # What takes AdamW could not do it alone: if nothing else trains, the ratio is 0.83 to 1.02.
    assert last < 0.7 * first
    assert_finite(outcome.model.state_dict().values())
    assert all(outcome.moved.values()), [which for which, has in outcome.moved.items() if not has]


@every_model
def test_only_the_expected_parameters_take_adamw_and_each_says_why(name: str) -> None:
    """All others have curvature."""
    outcome = trained(name)
    expected = BY_ADAMW.get(name, {}) | norm_parameters(outcome.model)
    assert outcome.rows.keys() == dict(outcome.model.named_parameters()).keys()
    assert {which for which, row in outcome.rows.items() if row.path != "FOP"} == expected.keys()
    for which, row in outcome.rows.items():
        if which in expected:
            assert row.path == "AdamW" and expected[which] in row.reason, row
        else:
            assert "no curvature yet" not in row.reason


@every_model
def test_every_step_has_a_pair_unless_the_layer_says_why(name: str) -> None:
    layers = trained(name).diagnostics.layers
    expected = NO_PAIR.get(name, {})
    assert {which for which, layer in layers.items() if layer.kfac_steps} == expected.keys()
    for which, why in expected.items():
        assert layers[which].kfac_steps == STEPS
        assert why in str(layers[which].why_kfac)


@pytest.mark.parametrize("name", ["swin", "gpt", "bert", "seq2seq_length_first", "lstm"])
def test_first_steps_are_the_same_from_bare_parameters_and_from_the_model(name: str) -> None:
    """Models whose batch cannot be told from a layer's input alone, which is all that is known too late."""
    torch.manual_seed(0)
    task = ZOO[name]()
    assert train(task, FOP(task.model, lr=0.05, **OPTIONS.get(name, {})), 3) == pytest.approx(
        trained(name).losses[:3], rel=1e-6
    )


@pytest.mark.slow
def test_order_of_dimensions_makes_no_difference() -> None:
    first, second = trained("seq2seq").losses[:5], trained("seq2seq_length_first").losses[:5]
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(("name", "layer"), [(name, *layers) for name, layers in NO_PAIR.items()])
def test_positions_are_no_samples_even_where_there_are_as_many(name: str, layer: str) -> None:
    task = ZOO[name]()
    optimizer = FOP(task.model, lr=0.05)
    batch = tuple(torch.cat(parts)[:LENGTH] for parts in zip(task.batch(0), task.batch(1), strict=True))
    assert batch[0].shape == (LENGTH, LENGTH)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()
    layers = optimizer.diagnostics().layers
    assert {which for which, found in layers.items() if found.kfac_steps} == {layer}


def test_gan_trains() -> None:
    """Two optimizers; the discriminator sees two batches in a pass, and passes in which it is not trained."""
    torch.manual_seed(1)
    maker, judge = zoo.generator(), zoo.discriminator()
    before = weights(maker), weights(judge)
    distances, losses = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Little momentum, as in most recipes for GANs: each model is a moving target of the other. For the
        # same reason noise is no sign of an end.
        optimizers = [FOP(model.parameters(), momentum=0.0, anneal=False) for model in (maker, judge)]
        for step in range(STEPS):
            images, fakes = zoo.real(step), maker(zoo.noise(step))
            optimizers[1].zero_grad()
            loss = zoo.verdict(judge, images, is_real=True) + zoo.verdict(
                judge, fakes.detach(), is_real=False
            )
            loss.backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            zoo.verdict(judge, fakes, is_real=True).backward()
            optimizers[0].step()
            distances.append(float((fakes - images).detach().mean(0).norm()))
            losses.append(loss.item())
    assert min(distances[-5:]) < 0.8 * distances[0]
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]
    for model, optimizer, old in zip((maker, judge), optimizers, before, strict=True):
        assert_finite(model.state_dict().values())
        assert all(moved(model, old).values())
        norms = norm_parameters(model)
        for row in optimizer.summary().rows:
            assert row.path == ("AdamW" if row.name in norms else "FOP")
            assert norms.get(row.name, "") in row.reason
            assert "no curvature yet" not in row.reason
        assert not any(layer.kfac_steps for layer in optimizer.diagnostics().layers.values())
