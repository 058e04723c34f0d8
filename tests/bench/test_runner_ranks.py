"""The runs of a study on two ranks, started by torchrun as users start them.

Run as a program, this file is several sittings of `fop-bench run`: each a process of its own on every rank.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fop_bench import execution, runner
from fop_bench.cli import main as command
from fop_bench.images import Augmentation
from fop_bench.recipes import RECIPES, Contender, Study
from fop_bench.runner import Record
from tiny_study import (
    HELD_OUT,
    STEPS,
    TEST,
    TINY,
    TRAIN,
    Clock,
    RandomImages,
    identity,
    lines,
    program,
    result,
)

RANKS = 2
# Limit for all sittings; alone they take about 8 s.
SECONDS = 600.0
RUNS, EPOCHS = 10, 2
# The first sitting stops after this many steps: in the third run, in the middle of an epoch.
FIRST = 2 * EPOCHS * STEPS + 2


def plain_network(classes: int) -> nn.Module:
    """Build a network of which every rank's part of a batch is told by its gradient alone."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, classes))


PLAIN = replace(
    TINY,
    name="plain",
    model=plain_network,
    studies={"comparison": Study({"sgd": Contender("sgd", {"lr": (0.1,)})}, {8: 3}, seeds=(1,), tuned=False)},
    augmentation=Augmentation(),
)
# Where to, which recipe, and for how many steps.
SITTINGS = [
    ("whole", "tiny", 1000),
    ("slices", "tiny", FIRST),
    ("slices", "tiny", 1000),
    ("plain", "plain", 1000),
]

pytestmark = [
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs os.fork and gloo on lo"),
]


def sitting(number: int, out: Path, recipe: str, steps: int) -> None:
    """Be `fop-bench run` on this rank, with the steps it has made for the seconds."""
    rank = int(os.environ["RANK"])
    if number:
        # Else it would read what the ranks of the sitting before told each other.
        agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"sitting {number}", agent)
        join = dist.init_process_group
        dist.init_process_group = partial(join, store=store, rank=rank, world_size=RANKS)
    # Only the first rank may decide when the time is over: on the other one it never passes.
    first = rank == 0
    clock = SimpleNamespace(monotonic=lambda: Clock.now if first else 0.0)
    runner.time = execution.time = clock
    execution.SECONDS_BETWEEN_SAVES = 5.0
    asked = [
        "run",
        recipe,
        "--task",
        "random",
        "--batch",
        "8",
        "--jobs",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    command([*asked, "--minutes", str(steps / 60)])
    written = {"steps": Clock.now, "unfinished": sorted(path.name for path in out.glob("unfinished/*"))}
    Path(f"{out}-{number}-{rank}.json").write_text(json.dumps(written))


def sittings(folder: Path) -> None:
    """Make all sittings, and end with the exit code of one that failed."""
    program()
    importlib.import_module("torch._dynamo")  # DDP needs it: once here, not in each sitting
    Clock.really = 0.0
    RECIPES["plain"] = PLAIN
    for number, (name, recipe, steps) in enumerate(SITTINGS):
        child = os.fork()
        if child == 0:
            signal.alarm(int(SECONDS))  # it ends then, though nobody is left to end it
            try:
                sitting(number, folder / name, recipe, steps)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"rank {os.environ['RANK']}, sitting {number}: exit code {code}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder with what all sittings wrote, and what was printed."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, *launch, __file__, str(folder)],
            env={**os.environ, **settings},
            stdout=printed,
            stderr=printed,
        )
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        # Told so, torchrun ends its ranks; killed, it would leave them.
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    # Zero only if every rank ended with zero.
    assert code == 0, (folder / "printed").read_text()
    return folder


def told(folder: Path, name: str, number: int) -> list[dict[str, object]]:
    """Give what each rank noted at the end of a sitting."""
    return [json.loads((folder / f"{name}-{number}-{rank}.json").read_text()) for rank in range(RANKS)]


def test_two_ranks_make_every_run_and_one_of_them_writes_it(folder: Path) -> None:
    records = lines(folder / "whole" / "comparison.jsonl")
    assert len(records) == len({identity(record) for record in records}) == RUNS
    assert Counter((record["contender"], record["phase"]) for record in records) == {
        (name, phase): count for name in ("sgd", "fop") for phase, count in (("tuning", 3), ("final", 2))
    }
    for record in records:
        assert record["ranks"] == RANKS
        assert (record["batch_size"], record["train_samples"]) == (8, TRAIN), "of all ranks together"
        assert record["evaluated_samples"] == (TEST if record["phase"] == "final" else HELD_OUT)
        assert not record["diverged"]
    # A rank makes as many steps as one process would, each on its half of the batch.
    assert [rank["steps"] for rank in told(folder, "whole", 0)] == [RUNS * EPOCHS * STEPS] * RANKS
    assert sorted(path.name for path in (folder / "whole").iterdir()) == ["comparison.jsonl", "unfinished"]
    assert not list((folder / "whole" / "unfinished").iterdir())
    printed = (folder / "printed").read_text()
    assert printed.count(f"{folder}/whole/comparison.jsonl: all that was asked for is there") == 1, printed


def test_minutes_end_all_ranks_at_one_step_and_the_next_sitting_goes_on(folder: Path) -> None:
    first, second = told(folder, "slices", 1), told(folder, "slices", 2)
    assert [rank["steps"] for rank in first] == [FIRST] * RANKS
    assert [rank["steps"] for rank in second] == [RUNS * EPOCHS * STEPS - FIRST] * RANKS, "none is made twice"
    assert all(any(f".{rank}-of-{RANKS}.pt" in name for name in first[rank]["unfinished"]) for rank in (0, 1))
    assert not list((folder / "slices" / "unfinished").iterdir())
    whole, slices = (lines(folder / name / "comparison.jsonl") for name in ("whole", "slices"))
    assert [result(record) for record in slices] == [result(record) for record in whole]
    printed = (folder / "printed").read_text()
    path = folder / "slices" / "comparison.jsonl"
    assert printed.count(f"{path}: {RUNS - 2} runs left; the same command goes on") == 1, printed
    assert printed.count(f"{path}: all that was asked for is there") == 1, printed


def by_hand(ranks: int) -> tuple[list[float], list[float]]:
    """Train as the plain recipe says, in one process and in double precision; give losses and accuracies."""
    train, test = RandomImages().load(None)["final"]
    pixels = train.pixels.double()
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2), correction=0)

    def inputs(of: Tensor) -> Tensor:
        return ((of.double() - mean) / std).permute(0, 3, 1, 2)

    torch.manual_seed(1)
    model = plain_network(3).double()
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    draw, step, steps = torch.Generator().manual_seed(1), 0, 3 * STEPS
    losses, accuracies = [], []
    for _ in range(3):
        # Every rank has each so many-th image, and all draw the same numbers.
        order, of_epoch = torch.randperm(TRAIN // ranks, generator=draw), []
        for part in order.split(8 // ranks):
            numbers = torch.cat([part * ranks + rank for rank in range(ranks)])
            loss = cross_entropy(model(inputs(train.pixels[numbers])), train.labels[numbers])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            lr = 0.05 * (1 + math.cos(math.pi * step / steps))
            with torch.no_grad():
                for p, g, m in zip(model.parameters(), gradients, momentum, strict=True):
                    m.mul_(0.9).add_(g)
                    p.sub_(lr * (g + 0.9 * m))
            of_epoch.append(loss.item())
            step += 1
        losses.append(sum(of_epoch) / STEPS)
        right = model(inputs(test.pixels)).argmax(1) == test.labels
        accuracies.append(right.double().mean().item())
    return losses, accuracies


def test_two_ranks_train_on_the_mean_gradient_of_the_whole_batch(folder: Path) -> None:
    record: Record
    (record,) = lines(folder / "plain" / "comparison.jsonl")
    got = [epoch["train_loss"] for epoch in record["curve"]]
    losses, accuracies = by_hand(RANKS)
    # Single precision rounds by 6e-8, a few times in each of nine steps.
    assert got == pytest.approx(losses, rel=3e-6)
    assert [epoch["accuracy"] for epoch in record["curve"]] == pytest.approx(accuracies)
    assert got != pytest.approx(by_hand(1)[0], rel=1e-3), "other batches would show"


if __name__ == "__main__":
    sittings(Path(sys.argv[1]))
