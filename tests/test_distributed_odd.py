"""What training scripts do between and around the passes of several ranks; each was a bug once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed_cases import OPTIONS
from fop import FOP
from models import batch, loss_of, mlp, weights
from ranks import run_ranks

pytestmark = pytest.mark.timeout(180)
STEPS = 6
# One backward pass, on each rank or with its batch: a function of the model and of the batch.
Pass = Callable[[Callable[[nn.Module, Tensor, Tensor], Tensor], int], None]
Script = Callable[[nn.Module, FOP, Pass, int], None]


def evaluate_before_backward(model: nn.Module, optimizer: FOP, backward: Pass, step: int) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = loss_of(model, x, y)
        with torch.no_grad():
            model(x)
        return value

    optimizer.zero_grad()
    backward(loss, step)
    optimizer.step()


def discard_a_pass(model: nn.Module, optimizer: FOP, backward: Pass, step: int) -> None:
    model.zero_grad()
    backward(loss_of, step + 100)
    model.zero_grad()
    backward(loss_of, step)
    optimizer.step()


def discard_by_zeros(model: nn.Module, optimizer: FOP, backward: Pass, step: int) -> None:
    model.zero_grad(set_to_none=False)
    backward(loss_of, step + 100)
    model.zero_grad(set_to_none=False)
    backward(loss_of, step)
    optimizer.step()


def discard_by_optimizer(model: nn.Module, optimizer: FOP, backward: Pass, step: int) -> None:
    optimizer.zero_grad()
    backward(loss_of, step + 100)
    optimizer.zero_grad()
    backward(loss_of, step)
    optimizer.step()


def step_without_a_pass(model: nn.Module, optimizer: FOP, backward: Pass, step: int) -> None:
    discard_by_optimizer(model, optimizer, backward, step)
    optimizer.zero_grad()
    optimizer.step()


SCRIPTS: dict[str, Script] = {
    each.__name__: each
    for each in (
        evaluate_before_backward,
        discard_a_pass,
        discard_by_zeros,
        discard_by_optimizer,
        step_without_a_pass,
    )
}
WRAPS = ("ddp", "lean", "", "fsdp")
# Lean layers have no gradient that model.zero_grad() could zero; FSDP's zeros take K-FAC's step.
LEFT_OUT = {("discard_a_pass", "lean"), ("discard_by_zeros", "lean"), ("discard_by_zeros", "fsdp")}
EACH = [(script, wrap) for script in SCRIPTS for wrap in WRAPS if (script, wrap) not in LEFT_OUT]


def run_scripts(rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    return {(script, wrap): together(rank, SCRIPTS[script], wrap) for script, wrap in EACH}


def together(rank: int, script: Script, wrap: str) -> dict[str, Tensor]:
    inner = mlp()
    model: nn.Module = DistributedDataParallel(inner) if wrap in ("ddp", "lean") else inner
    if wrap == "fsdp":
        fully_shard(inner)
    optimizer = FOP(model.parameters(), **OPTIONS, distributed={"mode": "lean"} if wrap == "lean" else None)
    for step in range(STEPS):
        script(model, optimizer, lambda loss, s: loss(model, *batch(6, 10 * s + rank)).backward(), step)
    return {name: whole(p) for name, p in inner.named_parameters()}


def whole(param: Tensor) -> Tensor:
    tensor = param.full_tensor() if hasattr(param, "full_tensor") else param
    return tensor.detach().clone()  # type: ignore[no-any-return]


def alone(script: Script) -> dict[str, Tensor]:
    model = mlp()
    optimizer = FOP(model.parameters(), **OPTIONS)

    def backward(loss: Callable[..., Tensor], s: int) -> None:
        for rank in (0, 1):
            with optimizer.sub_batch(rank):
                (loss(model, *batch(6, 10 * s + rank)) / 2).backward()

    for step in range(STEPS):
        script(model, optimizer, backward, step)
    return weights(model)


@cache
def results() -> list[Any]:
    return run_ranks(run_scripts, 2, seconds=150)


@pytest.mark.parametrize(("script", "wrap"), EACH)
def test_scripts_do_on_ranks_what_they_do_alone(script: str, wrap: str) -> None:
    expected = alone(SCRIPTS[script])
    for result in results():
        for name, value in result[(script, wrap)].items():
            assert torch.equal(value, results()[0][(script, wrap)][name])
            assert (value - expected[name]).norm() < 1e-10 * expected[name].norm(), name


# --- several models, several optimizers --------------------------------------------------------------


def two_models(rank: int, mode: str) -> list[dict[str, Tensor]]:
    """Optimizers from bare parameters must tell their own DistributedDataParallel from that of others."""
    models = [DistributedDataParallel(mlp(seed)) for seed in (0, 1)]
    optimizers = [FOP(model.parameters(), **OPTIONS, distributed={"mode": mode}) for model in models]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, *batch(6, 10 * step + rank)).backward()
            optimizer.step()
    return [weights(model.module) for model in models]


def made_again(rank: int, *modes: str) -> list[str]:
    """An optimizer for a model that another one has driven before; and a copy of that model is its own."""
    model = DistributedDataParallel(mlp())
    said = []
    for mode in modes:
        optimizer = FOP(model, **OPTIONS, distributed={"mode": mode})
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, *batch(6, 10 * step + rank)).backward()
            optimizer.step()
        said += [layer.why_kfac for layer in optimizer.diagnostics().layers.values()]
        twin = copy.deepcopy(model.module)
        with model.join():
            pass
        loss_of(twin, *batch(6, rank)).backward()
        del optimizer
    return said


@pytest.mark.parametrize("mode", ["compatible", "lean"])
def test_every_optimizer_has_its_own_model(mode: str) -> None:
    both = run_ranks(two_models, 2, mode)
    for index, seed in enumerate((0, 1)):
        model = mlp(seed)
        optimizer = FOP(model.parameters(), **OPTIONS)
        for step in range(STEPS):
            optimizer.zero_grad()
            for rank in (0, 1):
                with optimizer.sub_batch(rank):
                    (loss_of(model, *batch(6, 10 * step + rank)) / 2).backward()
            optimizer.step()
        for name, value in weights(model).items():
            assert (both[0][index][name] - value).norm() < 1e-10 * value.norm()


def test_a_model_may_get_another_optimizer() -> None:
    assert set(run_ranks(made_again, 2, "lean", "compatible", "lean")[0]) == {None}


# --- parts of models ---------------------------------------------------------------------------------


def partly_sharded(rank: int) -> dict[str, Tensor]:
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    model.double()
    fully_shard(model[2])
    optimizer = FOP(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *batch(6, 10 * step + rank)).backward()
        optimizer.step()
    assert {layer.why_kfac for layer in optimizer.diagnostics().layers.values()} == {None}
    return {name: whole(p) for name, p in model.named_parameters()}


def test_what_nobody_averages_the_optimizer_averages() -> None:
    first, second = run_ranks(partly_sharded, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def replaced(rank: int) -> bool:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = FOP(wrapped.module, **OPTIONS)
    for step in range(STEPS):
        if step == 3:
            state = {key: value.clone() for key, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
            wrapped = DistributedDataParallel(model)
        optimizer.zero_grad()
        loss_of(wrapped, *batch(6, 10 * step + rank)).backward()
        optimizer.step()
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_parameters_may_be_replaced() -> None:
    assert run_ranks(replaced, 2) == [True, True]


# --- checkpoints -------------------------------------------------------------------------------------


def test_a_checkpoint_of_torch_continues_bit_for_bit(tmp_path: Path) -> None:
    """torch.distributed.checkpoint keeps no strides, and reads only what is there to read into."""
    warnings.simplefilter("ignore")

    model, twin = mlp().float(), mlp(1).float()
    optimizer = FOP(model, **OPTIONS)

    def train(model: nn.Module, first: int, last: int, optimizer: FOP) -> None:
        for step in range(first, last):
            x, y = (t.float() for t in batch(6, step))
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()

    train(model, 0, 13, optimizer)
    model_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path)
    other = FOP(twin, **OPTIONS)
    model_state, state = get_state_dict(twin, other)
    loaded = {"model": model_state, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for param, copied in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[param].keys() == other.state[copied].keys()
    train(model, 13, 20, optimizer)
    train(twin, 13, 20, other)
    for name, value in weights(model).items():
        assert torch.equal(weights(twin)[name], value), name
