"""What goes wrong between ranks: death, NaN, disagreement, too few batches, requests that cannot be met."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed_cases import OPTIONS
from fop import FOP, KFAC
from fop.optim.agreement import check_devices
from models import batch, loss_of, mlp, weights
from ranks import alone, run_ranks


def step(model: nn.Module, optimizer: FOP, rank: int, number: int = 0, n: int = 6) -> None:
    optimizer.zero_grad()
    loss_of(model, *batch(n, 10 * number + rank)).backward()
    optimizer.step()


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


# --- a rank that dies --------------------------------------------------------------------------------


def dying(rank: int, when: str, mode: str) -> str:
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model, **OPTIONS, distributed={"mode": mode})
    for number in range(2):
        step(model, optimizer, rank, number)
    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        if rank == 1 and when == "before the forward pass":
            os._exit(7)
        loss_of(model, *batch(6, rank)).backward()
        if rank == 1 and when == "before the step":
            os._exit(7)
        optimizer.step()
    assert time.monotonic() - began < 20
    return message(error)


@pytest.mark.parametrize("mode", ["compatible", "lean"])
@pytest.mark.parametrize("when", ["before the forward pass", "before the step"])
def test_when_a_rank_dies_the_others_fail_and_do_not_hang(when: str, mode: str) -> None:
    # Afterwards the barrier at the end of the surviving process fails, too.
    said = run_ranks(dying, 2, when, mode, timeout=10, expected=(1, 7))[0]
    if when == "before the step":
        assert "rank 0 of 2" in said
        assert "start all ranks again from the last checkpoint" in said


# --- NaN ---------------------------------------------------------------------------------------------


def poisoned(rank: int, wrap: str, mode: str) -> tuple[Any, Any, list[str], Any]:
    model = nn.Sequential(mlp(), nn.LayerNorm(3)).double()
    wrapped: nn.Module = model
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrap == "fsdp":
        fully_shard(model)
    optimizer = FOP(wrapped, **OPTIONS, distributed={"mode": mode})
    for number in range(3):
        step(wrapped, optimizer, rank, number)
    before = {name: full(p) for name, p in model.named_parameters()}
    x, y = batch(6, rank)
    if rank == 1:
        x[2, 1] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        loss_of(wrapped, x, y).backward()
        optimizer.step()
    after = {name: full(p) for name, p in model.named_parameters()}
    step(wrapped, optimizer, rank, 4)
    return (
        before,
        after,
        sorted({str(w.message) for w in caught}),
        {n: full(p) for n, p in model.named_parameters()},
    )


def full(param: Tensor) -> Tensor:
    tensor = param.full_tensor() if hasattr(param, "full_tensor") else param
    return tensor.detach().clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("wrap", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("", "compatible"), ("fsdp", "compatible")]
)
def test_nan_on_one_rank_is_refused_on_all(wrap: str, mode: str) -> None:
    results = run_ranks(poisoned, 2, wrap, mode)
    for before, after, said, later in results:
        for name, value in before.items():
            assert torch.equal(after[name], value), name
            assert torch.isfinite(later[name]).all()
            assert not torch.equal(later[name], value), f"{name} never moved again"
        assert any("statistics of 0.0, 0.2 are not finite" in text for text in said)
        assert any("layer '0.0', layer '0.2' was not finite" in text for text in said)
        assert any("AdamW parameters of a group was not finite" in text for text in said)
        for name, value in results[0][3].items():
            assert torch.equal(later[name], value), name


# --- disagreement ------------------------------------------------------------------------------------


def disagreeing(rank: int, what: str) -> str:
    options: dict[str, Any] = dict(OPTIONS)
    model = mlp()
    if rank == 1:
        if what == "lr":
            options["lr"] = 0.1
        elif what == "model":
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
        elif what == "frozen":
            model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
        elif what == "mode":
            options["distributed"] = {"factor_dtype": torch.bfloat16}
    optimizer = FOP(model, **options)
    with pytest.raises(ValueError, match="the ranks disagree on") as error:
        step(model, optimizer, rank)
    return message(error)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("lr", "lr of parameter group 0: it is 0.05 on rank 0 and 0.1 on rank 1"),
        ("model", "the number of parameters of group 0: it is 4 on rank 0 and 3 on rank 1"),
        ("frozen", "whether 0.bias is trained: it is True on rank 0 and False on rank 1"),
        ("mode", "the options of distributed"),
    ],
)
def test_ranks_that_disagree_are_told_in_what(what: str, named: str) -> None:
    said = run_ranks(disagreeing, 2, what)
    assert said[0] == said[1]
    assert named in said[0]


# --- requests that cannot be met ---------------------------------------------------------------------


def refused(rank: int) -> list[str]:
    said = []
    everyone = dist.new_group([0, 1, 2])
    pair = dist.new_group([0, 1])
    with pytest.raises(ValueError, match="even number of ranks") as error:
        step(model := mlp(), FOP(model, distributed={"pair": "parity"}), rank)
    said.append(message(error))

    ddp = DistributedDataParallel(mlp(), process_group=everyone)
    if rank < 2:
        with pytest.raises(ValueError, match="give both the same process group") as error:
            FOP(ddp, distributed={"group": pair})
        said.append(message(error))
    else:
        with pytest.raises(ValueError, match="not in the process group") as error:
            FOP(ddp, distributed={"group": pair})

    ddp = DistributedDataParallel(mlp())
    ddp.register_comm_hook(None, plain_hook)
    with pytest.raises(ValueError, match="communication hook of its own"):
        FOP(ddp, distributed={"mode": "lean"})

    sharded = mlp()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(ValueError, match="fully_shard along dimension 0"):
        step(sharded, FOP(sharded), rank)

    scaled = FOP(model := mlp())
    scaled.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="wrap the model in DistributedDataParallel"):
        scaled.step()
    return said


def plain_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


plain_hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}  # type: ignore[attr-defined]


def test_requests_that_cannot_be_met() -> None:
    said = run_ranks(refused, 3)
    assert "there are 3" in said[0][0]
    assert "'group' has the ranks [0, 1], and DistributedDataParallel averages over [0, 1, 2]" in said[0][1]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"mode": "fast"}, ValueError, "mode='fast' must be 'compatible' or 'lean'"),
        ({"pair": "random"}, ValueError, "pair='random' must be 'parity' or 'halves'"),
        ({"modes": "lean"}, ValueError, "unknown option 'modes'; the options are mode, pair, group"),
        ({"factor_dtype": torch.int8}, ValueError, "factor_dtype=torch.int8 must be torch.bfloat16"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node=0 must be a whole number, 1 or more"),
        (
            {"group": [0, 1]},
            TypeError,
            "must be a process group, as torch.distributed.new_group(ranks) returns",
        ),
        (True, TypeError, "distributed=True must be a dict of options"),
    ],
)
def test_options_are_checked(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        FOP(mlp().parameters(), distributed=given)
    assert text in str(caught.value)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_inverse_delay_is_checked(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"inverse_delay=.* must be"):
        FOP(mlp().parameters(), inverse_delay=value)


def test_parameters_of_a_rank_are_on_one_device() -> None:
    here, there = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))
    check_devices([here, here], {})
    with pytest.raises(ValueError, match="head is on meta and stem on cpu: between ranks") as error:
        check_devices([here, there], {here: "stem", there: "head"})
    assert "give distributed=False" in message(error)


def test_one_rank_is_one_process() -> None:
    results = []
    with alone():
        model = DistributedDataParallel(mlp())
        optimizer = FOP(model.parameters(), **OPTIONS)
        for number in range(3):
            step(model, optimizer, 0, number)
        assert optimizer.plan is None
        assert optimizer.bytes_sent == {}
        results.append(weights(model.module))
    plain = mlp()
    optimizer = FOP(plain.parameters(), **OPTIONS)
    for number in range(3):
        step(plain, optimizer, 0, number)
    for name, value in weights(plain).items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-12, atol=1e-14)


def test_a_process_group_that_is_gone() -> None:
    run_ranks(gone, 2, expected=(3, 3))


def gone(rank: int) -> None:
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    step(model, optimizer, rank)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="the process group is gone"):
        step(model, optimizer, rank)
    os._exit(3)


def late_group(rank: int, folder: str) -> dict[str, Tensor]:
    """The optimizer is made first; only then do the ranks meet."""
    dist.destroy_process_group()
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model)
    for number in range(3):
        step(wrapped, optimizer, rank, number)
    return weights(model)


def test_a_process_group_that_comes_after_the_optimizer(tmp_path: Path) -> None:
    first, second = run_ranks(late_group, 2, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- ranks of their own ------------------------------------------------------------------------------


def apart(rank: int) -> dict[str, Tensor]:
    model = mlp()
    optimizer = FOP(model, **OPTIONS, distributed=False)
    for number in range(3 + rank):
        step(model, optimizer, rank, number)
    return weights(model)


def test_ranks_may_train_models_of_their_own() -> None:
    for rank, result in enumerate(run_ranks(apart, 2)):
        model = mlp()
        optimizer = FOP(model, **OPTIONS)
        for number in range(3 + rank):
            step(model, optimizer, rank, number)
        for name, value in weights(model).items():
            assert torch.equal(result[name], value)


# --- uneven numbers of batches -----------------------------------------------------------------------


def uneven(rank: int, how: str, mode: str) -> tuple[dict[str, Tensor], int]:
    model = DistributedDataParallel(mlp())
    optimizer = (KFAC if how == "kfac" else FOP)(model, **OPTIONS, distributed={"mode": mode})
    with Join([model, optimizer]) if how == "both" else model.join():  # type: ignore[list-item]
        for number in range(4 + 2 * rank):
            step(model, optimizer, rank, number)
    return weights(model.module), optimizer.param_groups[0]["step"]


@pytest.mark.parametrize(
    ("how", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("both", "compatible"), ("kfac", "compatible")]
)
def test_ranks_that_run_out_of_batches_step_along(how: str, mode: str) -> None:
    results = run_ranks(uneven, 3, how, mode)
    for values, steps in results:
        assert steps == 8
        for name, value in results[0][0].items():
            assert torch.equal(values[name], value)
            assert torch.isfinite(value).all()


def late(rank: int) -> str:
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model.parameters(), **OPTIONS)
    with pytest.raises(RuntimeError, match="inside of its join") as error, model.join():
        step(model, optimizer, rank)
    return message(error)


def test_an_optimizer_that_join_cannot_know_of() -> None:
    said = run_ranks(late, 2)
    assert "Join([ddp_model, optimizer])" in said[0]


# --- unused layers -----------------------------------------------------------------------------------


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


def forked(rank: int, used: list[set[int]], wrap: bool, mode: str) -> tuple[dict[str, Tensor], list[str]]:
    inner = Forked()
    model = DistributedDataParallel(inner, find_unused_parameters=True) if wrap else inner
    optimizer = FOP(model.parameters(), **OPTIONS, distributed={"mode": mode})
    for number, users in enumerate(used):
        x, y = batch(6, 10 * number + rank)
        optimizer.zero_grad()
        (model(x, rank in users) - y).square().mean().backward()
        optimizer.step()
    return weights(inner), [name for name, layer in optimizer.diagnostics().layers.items() if layer.why_kfac]


@pytest.mark.parametrize(("wrap", "mode"), [(True, "compatible"), (True, "lean"), (False, "compatible")])
def test_layers_that_only_some_ranks_use(wrap: bool, mode: str) -> None:
    used = [{0, 1}, {0}, set(), {0, 1}, {1}, {0, 1}, {0}]
    results = run_ranks(forked, 2, used, wrap, mode)
    start = weights(Forked())
    for values, _ in results:
        for name, value in results[0][0].items():
            assert torch.equal(values[name], value), name
            assert torch.isfinite(value).all()
            assert not torch.equal(value, start[name])
    if mode == "compatible" and wrap:
        assert results[0][1] == ["side"]
