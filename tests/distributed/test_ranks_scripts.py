"""Scripts of several ranks beyond the plain loop, each a bug once: all ranks end with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import OPTIONS, Weights, steps, whole
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fop import FOP, KFAC
from models import batch, loss_of, mlp, weights
from ranks import run_ranks

STEPS = 6


def why_kfac(optimizer: FOP) -> dict[str, str]:
    return {name: layer.why_kfac for name, layer in optimizer.diagnostics().layers.items() if layer.why_kfac}


def two_models(rank: int, mode: str) -> Weights:
    """Optimizers from bare parameters must tell their own DistributedDataParallel from that of others."""
    models = nn.ModuleList([DistributedDataParallel(mlp(seed)) for seed in (0, 1)])
    optimizers = [FOP(model.parameters(), **OPTIONS, distributed={"mode": mode}) for model in models]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            steps(model, optimizer, rank, step, step + 1)
    return weights(models)


def made_again(rank: int) -> Weights:
    """An optimizer for a model that another one has driven before; and a copy of that model is its own."""
    model = DistributedDataParallel(mlp())
    for mode in ("lean", "compatible", "lean"):
        optimizer = FOP(model, **OPTIONS, distributed={"mode": mode})
        steps(model, optimizer, rank, 0, 3)
        assert why_kfac(optimizer) == {}
        twin = copy.deepcopy(model.module)
        with model.join():
            pass
        loss_of(twin, *batch(6, rank)).backward()
        del optimizer
    return weights(model)


def taken_over(rank: int, mode: str) -> Weights:
    """The newest of several live optimizers trains as the only one; the last one before has stepped half."""
    model = DistributedDataParallel(mlp())
    start, kept = copy.deepcopy(model.module.state_dict()), []
    for earlier in ("lean", "compatible", "lean"):
        kept.append(FOP(model, **OPTIONS, distributed={"mode": earlier}))
        steps(model, kept[-1], rank, 0, 3)
        loss_of(model, *batch(6, rank)).backward()
    model.module.load_state_dict(start)
    model.zero_grad()
    optimizer = FOP(model.parameters(), **OPTIONS, distributed={"mode": mode})
    steps(model, optimizer, rank, 0, STEPS)
    assert why_kfac(optimizer) == {}
    with model.join():
        pass
    for old in kept:
        with pytest.raises(RuntimeError, match="was replaced"):
            old.step()
        with pytest.raises(RuntimeError, match="was replaced"):
            old.step_without_batch()
    return weights(model.module)


def partly_sharded(rank: int) -> Weights:
    """What nobody averages the optimizer averages."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    model.double()
    fully_shard(model[2])
    optimizer = FOP(model, **OPTIONS)
    steps(model, optimizer, rank, 0, STEPS)
    assert why_kfac(optimizer) == {}
    return whole(model)


def replaced(rank: int) -> Weights:
    """Parameters may be replaced in mid-training."""
    model = mlp()
    optimizer = FOP(DistributedDataParallel(model).module, **OPTIONS)
    for first in (0, 3):
        steps(DistributedDataParallel(model), optimizer, rank, first, first + 3)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    return weights(model)


def late_group(rank: int, folder: str) -> Weights:
    """The optimizer is made first; only then do the ranks meet."""
    dist.destroy_process_group()
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=2)
    steps(DistributedDataParallel(model), optimizer, rank, 0, 3)
    return weights(model)


def uneven(rank: int, kind: type[FOP], joined: str, mode: str) -> Weights:
    """Ranks that have run out of batches step along."""
    model = DistributedDataParallel(mlp())
    optimizer = kind(model, **OPTIONS, distributed={"mode": mode})
    with Join([model, optimizer]) if joined == "both" else model.join():  # type: ignore[list-item]
        steps(model, optimizer, rank, 0, 4 + 2 * rank)
    assert optimizer.param_groups[0]["step"] == 8
    return weights(model)


def changed(rank: int) -> Weights:
    """A change of p.grad that is no scaling: the pair is not believed, K-FAC's step is taken and reported."""
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model, **OPTIONS)
    steps(model, optimizer, rank, 0, 3)
    assert why_kfac(optimizer) == {}
    optimizer.zero_grad()
    loss_of(model, *batch(6, 30 + rank)).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()
    assert why_kfac(optimizer).keys() == {"0", "2"}
    return weights(model)


def scaled(rank: int) -> Weights:
    """Without a wrapper p.grad is sent in the step: the halves follow what was done to it since the pass."""
    trained: list[Weights] = []
    for scale in (1.0, 2.0**-16):
        model = mlp()
        optimizer = FOP(model, distributed={"pair": "halves"})
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, *batch(6, 10 * step + rank)).backward()
            torch._foreach_mul_([param.grad for param in model.parameters()], scale)
            optimizer.step()
        assert why_kfac(optimizer) == {}
        trained.append(weights(model))
    one, other = trained
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-10, atol=0.0)
    return other


class Forked(nn.Module):
    """A layer that each rank uses or does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.side, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, use: bool) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.last(torch.tanh(self.side(hidden)) if use else hidden)
        return out


def forked(rank: int, wrap: bool, mode: str) -> Weights:
    inner = Forked()
    start = weights(inner)
    model = DistributedDataParallel(inner, find_unused_parameters=True) if wrap else inner
    optimizer = FOP(model.parameters(), **OPTIONS, distributed={"mode": mode})
    for number, users in enumerate([{0, 1}, {0}, set(), {0, 1}, {1}, {0, 1}, {0}]):
        x, y = batch(6, 10 * number + rank)
        optimizer.zero_grad()
        (model(x, rank in users) - y).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(value, start[name]) for name, value in weights(inner).items())
    if mode == "compatible" and wrap:
        assert why_kfac(optimizer).keys() == {"side"}
    return weights(inner)


SCRIPTS: dict[str, tuple[int, Callable[[int], Weights]]] = {
    "two-models": (2, partial(two_models, mode="compatible")),
    "two-models-lean": (2, partial(two_models, mode="lean")),
    "made-again": (2, made_again),
    "taken-over": (2, partial(taken_over, mode="compatible")),
    "taken-over-lean": (2, partial(taken_over, mode="lean")),
    "partly-sharded": (2, partly_sharded),
    "replaced": (2, replaced),
    "uneven": (3, partial(uneven, kind=FOP, joined="ddp", mode="compatible")),
    "uneven-lean": (3, partial(uneven, kind=FOP, joined="ddp", mode="lean")),
    "uneven-both-joined": (3, partial(uneven, kind=FOP, joined="both", mode="compatible")),
    "uneven-kfac": (3, partial(uneven, kind=KFAC, joined="ddp", mode="compatible")),
    "changed": (2, changed),
    "scaled": (3, scaled),
    "forked": (2, partial(forked, wrap=True, mode="compatible")),
    "forked-lean": (2, partial(forked, wrap=True, mode="lean")),
    "forked-plain": (2, partial(forked, wrap=False, mode="compatible")),
}


def assert_same(results: list[Weights]) -> None:
    for name, value in results[0].items():
        assert torch.isfinite(value).all()
        for other in results[1:]:
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_ranks_end_with_the_same_weights(script: str) -> None:
    ranks, function = SCRIPTS[script]
    results = run_ranks(function, ranks)
    assert_same(results)
    of_one = {"two-models": ["0.module.", "1.module."], "taken-over": [""]}
    for seed, prefix in enumerate(of_one.get(script.removesuffix("-lean"), [])):
        for name, value in alone(mlp(seed)).items():
            error = results[0][f"{prefix}{name}"] - value
            assert error.norm() < 1e-10 * value.norm()


def alone(model: nn.Module) -> Weights:
    """The training of `steps` in one process that is given each rank's batch as a sub-batch."""
    optimizer = FOP(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in (0, 1):
            with optimizer.sub_batch(rank):
                (loss_of(model, *batch(6, 10 * step + rank)) / 2).backward()
        optimizer.step()
    return weights(model)


def test_a_process_group_that_comes_after_the_optimizer(tmp_path: Path) -> None:
    assert_same(run_ranks(late_group, 2, str(tmp_path)))
