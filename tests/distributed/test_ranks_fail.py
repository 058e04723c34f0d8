"""What goes wrong between ranks: death, NaN, disagreement, requests that cannot be met."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import OPTIONS, Weights, steps, whole, wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fop import FOP
from models import batch, loss_of, mlp, weights
from ranks import run_ranks

# --- a rank that dies --------------------------------------------------------------------------------


def dying(rank: int, when: str, mode: str) -> str:
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model, **OPTIONS, distributed={"mode": mode})
    steps(model, optimizer, rank, 0, 2)
    with pytest.raises(RuntimeError) as error:
        if rank == 1 and when == "before the forward pass":
            os._exit(7)
        loss_of(model, *batch(6, rank)).backward()
        if rank == 1 and when == "before the step":
            os._exit(7)
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("mode", ["compatible", "lean"])
@pytest.mark.parametrize("when", ["before the forward pass", "before the step"])
def test_when_a_rank_dies_the_others_fail_and_do_not_hang(when: str, mode: str) -> None:
    # Afterwards the barrier at the end of the surviving process fails, too.
    said = run_ranks(dying, 2, when, mode, expected=(1, 7))[0]
    if when == "before the step":
        assert "rank 0 of 2" in said
        assert "start all ranks again from the last checkpoint" in said


def gone(rank: int) -> None:
    model = mlp()
    optimizer = FOP(model, **OPTIONS)
    steps(model, optimizer, rank, 0, 1)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="the process group is gone"):
        steps(model, optimizer, rank, 0, 1)
    os._exit(3)


def test_a_process_group_that_is_gone() -> None:
    run_ranks(gone, 2, expected=(3, 3))


# --- NaN ---------------------------------------------------------------------------------------------


def poisoned(rank: int, wrap: str, mode: str) -> tuple[Weights, Weights, Weights, set[str]]:
    inner = nn.Sequential(mlp(), nn.LayerNorm(3)).double()
    model = wrapped(inner, wrap)
    optimizer = FOP(model, **OPTIONS, distributed={"mode": mode})
    steps(model, optimizer, rank, 0, 4)
    assert optimizer.curvature_due
    before = whole(inner)
    x, y = batch(6, rank)
    if rank == 1:
        x[2, 1] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    after = whole(inner)
    steps(model, optimizer, rank, 4, 5)
    return before, after, whole(inner), {str(warning.message) for warning in caught}


@pytest.mark.parametrize(
    ("wrap", "mode"), [("ddp", "compatible"), ("ddp", "lean"), ("", "compatible"), ("fsdp", "compatible")]
)
def test_nan_on_one_rank_is_refused_on_all(wrap: str, mode: str) -> None:
    results = run_ranks(poisoned, 2, wrap, mode)
    for before, after, later, said in results:
        for name, value in before.items():
            assert torch.equal(after[name], value), name
            assert torch.isfinite(later[name]).all()
            assert not torch.equal(later[name], value), f"{name} never moved again"
            assert torch.equal(later[name], results[0][2][name]), name
        for text in (
            "statistics of 0.0, 0.2 are not finite",
            "the update of layer '0.0', layer '0.2', all",
            "AdamW parameters of a group was not finite",
        ):
            assert any(text in warning for warning in said)


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
        steps(model, optimizer, rank, 0, 1)
    return str(error.value)


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
        steps(model := mlp(), FOP(model, distributed={"pair": "parity"}), rank, 0, 1)
    said.append(str(error.value))

    ddp = DistributedDataParallel(mlp(), process_group=everyone)
    message = "give both the same process group" if rank < 2 else "not in the process group"
    with pytest.raises(ValueError, match=message) as error:
        FOP(ddp, distributed={"group": pair})
    said.append(str(error.value))

    ddp = DistributedDataParallel(mlp())
    ddp.register_comm_hook(None, plain_hook)
    with pytest.raises(ValueError, match="communication hook of its own"):
        FOP(ddp, distributed={"mode": "lean"})

    sharded = mlp()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(ValueError, match="fully_shard along dimension 0"):
        steps(sharded, FOP(sharded), rank, 0, 1)

    split = nn.ParameterDict({"stem": torch.zeros(2), "head": torch.zeros(2, device="meta")})
    for param in split.values():
        param.grad = torch.ones_like(param)
    with pytest.raises(
        ValueError, match=r"stem is on cpu and head on meta: between .* give distributed=False"
    ):
        FOP(split).step()

    scaled = FOP(mlp())
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


def late(rank: int) -> str:
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model.parameters(), **OPTIONS)
    with pytest.raises(RuntimeError, match="inside of its join") as error, model.join():
        steps(model, optimizer, rank, 0, 1)
    return str(error.value)


def test_an_optimizer_that_join_cannot_know_of() -> None:
    assert "Join([ddp_model, optimizer])" in run_ranks(late, 2)[0]


DISTRIBUTED: list[tuple[Any, type[Exception], str]] = [
    ({"mode": "fast"}, ValueError, "mode='fast' must be 'compatible' or 'lean'"),
    ({"pair": "random"}, ValueError, "pair='random' must be 'parity' or 'halves'"),
    ({"modes": "lean"}, ValueError, "unknown option 'modes'; the options are mode, pair, group"),
    ({"factor_dtype": torch.int8}, ValueError, "factor_dtype=torch.int8 must be torch.bfloat16"),
    ({"ranks_per_node": 0}, ValueError, "ranks_per_node=0 must be a whole number, 1 or more"),
    ({"group": [0, 1]}, TypeError, "must be a process group, as torch.distributed.new_group(ranks) returns"),
    (True, TypeError, "distributed=True must be a dict of options"),
]


@pytest.mark.parametrize(("given", "error", "text"), DISTRIBUTED)
def test_options_are_checked(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        FOP(mlp().parameters(), distributed=given)
    assert text in str(caught.value)


# --- ranks of their own ------------------------------------------------------------------------------


def apart(rank: int) -> Weights:
    model = mlp()
    steps(model, FOP(model, **OPTIONS, distributed=False), rank, 0, 3 + rank)
    return weights(model)


def test_ranks_may_train_models_of_their_own() -> None:
    for rank, result in enumerate(run_ranks(apart, 2)):
        model = mlp()
        steps(model, FOP(model, **OPTIONS), rank, 0, 3 + rank)
        for name, value in weights(model).items():
            assert torch.equal(result[name], value)


def single(rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(mlp())
    optimizer = FOP(model.parameters(), **OPTIONS)
    steps(model, optimizer, rank, 0, 3)
    assert optimizer.plan is None
    assert optimizer.bytes_sent == {}
    return weights(model.module)


def test_one_rank_is_one_process() -> None:
    model = mlp()
    steps(model, FOP(model.parameters(), **OPTIONS), 0, 0, 3)
    torch.testing.assert_close(run_ranks(single, 1)[0], weights(model), rtol=1e-12, atol=1e-14)


def sharded_alone(rank: int) -> list[str]:
    said = []
    for make in (lambda model: model, lambda model: model.parameters()):
        model = mlp()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError) as error:
            steps(model, FOP(make(model), **OPTIONS), rank, 0, 1)
        said.append(str(error.value))
    return said


def test_shards_of_one_rank_are_refused() -> None:
    for said in run_ranks(sharded_alone, 1)[0]:
        assert "the weight of '0' is a DTensor" in said and "leave fully_shard out on one rank" in said


# --- what the others say ------------------------------------------------------------------------------


def not_met(rank: int, mode: str) -> tuple[str, str]:
    """Rank 1 ends where rank 0 waits for it; the message, and the type of what torch has said."""
    model = mlp()
    net = DistributedDataParallel(model) if mode == "lean" else model
    optimizer = FOP(net, **OPTIONS, distributed={"mode": mode})
    steps(net, optimizer, rank, 0, 2)
    optimizer.zero_grad()
    loss_of(net, *batch(6, rank)).backward()
    if rank == 1:
        os._exit(7)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value), type(error.value.__cause__).__name__


@pytest.mark.parametrize("mode", ["compatible", "lean"])
def test_the_message_says_which_exchange_and_what_to_check(mode: str) -> None:
    said, cause = run_ranks(not_met, 2, mode, expected=(1, 7))[0]
    assert "rank 0 of 2: the exchange of " in said
    assert any(f"({name})" in said for name in ("all_reduce", "reduce", "broadcast", "send and receive"))
    assert "Look at its own output, then start all ranks again from the last checkpoint" in said
    assert cause == "RuntimeError"
