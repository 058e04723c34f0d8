"""The measurement behind the default options: small real tasks, each at a small batch and at full batch."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fop import FOP, KFAC
from fop_bench.cifar import cifar_subset
from fop_bench.defaults_report import read_runs
from fop_bench.digits import digits
from fop_bench.environment import environment
from fop_bench.models import DigitsTransformer, ResNet, digits_cnn, mlp
from fop_bench.training import Samples, train


@dataclass(frozen=True)
class Task:
    """A data set, a network, a batch size (None for the full training set) and a number of epochs."""

    data: str
    model: Callable[[], nn.Module]
    batch_size: int | None
    epochs: int


def _digits_mlp() -> nn.Module:
    return mlp((64, 64, 64, 10))


def _cifar_resnet() -> nn.Module:
    return ResNet(width=8, blocks=(1, 1, 1))


TASKS = {
    "digits-mlp, batch 64": Task("digits", _digits_mlp, 64, 8),
    "digits-mlp, full batch": Task("digits", _digits_mlp, None, 40),
    "digits-cnn, batch 64": Task("digits", digits_cnn, 64, 8),
    "digits-cnn, full batch": Task("digits", digits_cnn, None, 40),
    "digits-transformer, batch 64": Task("digits", DigitsTransformer, 64, 12),
    "digits-transformer, full batch": Task("digits", DigitsTransformer, None, 60),
    "cifar-small, batch 100": Task("cifar", _cifar_resnet, 100, 4),
    "cifar-small, full batch": Task("cifar", _cifar_resnet, None, 30),
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"fop": FOP, "kfac": KFAC, "sgd": SGD, "adamw": AdamW}


def _grid(optimizer: str, seeds: Sequence[int], **values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*values.values()):
        for seed in seeds:
            options = dict(zip(values, combination, strict=True))
            yield {"optimizer": optimizer, "options": options, "seed": seed}


def _studies() -> dict[str, list[dict[str, Any]]]:
    rates = (0.01, 0.03, 0.1, 0.3)
    second_order = ("fop", "kfac")
    return {
        "trust": list(
            _grid(
                "fop",
                (0,),
                lr=(0.03, 0.1),
                damping=(1e-5, 1e-4, 1e-3),
                kl_clip=(1e-3, 1e-2),
                momentum=(0.0, 0.9),
            )
        ),
        "clip": list(_grid("fop", (0, 1), lr=rates, damping=(1e-5, 1e-3), kl_clip=(None, 1e-3, 1e-2))),
        "momentum": list(
            _grid("fop", (0, 1), lr=(0.05,), kl_clip=(1e-5, 1e-4, 1e-3), momentum=(0.0, 0.5, 0.9))
        ),
        "freshness": list(
            _grid("fop", (0, 1), lr=(0.05,), curvature_interval=(1, 10, 100), stat_decay=(0.0, 0.5, 0.9))
        ),
        "comparison": [
            run
            for runs in (
                *(_grid(name, (1, 2, 3), lr=rates) for name in second_order),
                _grid("sgd", (1, 2, 3), lr=(0.03, 0.1, 0.3, 1.0), momentum=(0.9,), nesterov=(True,)),
                _grid("adamw", (1, 2, 3), lr=(0.001, 0.003, 0.01, 0.03)),
            )
            for run in runs
        ],
    }


# Every study by name: the runs that it makes on each task.
STUDIES = _studies()


@cache
def _data(name: str, device: str, folder: Path | None) -> tuple[Samples, Samples]:
    place = torch.device(device)
    if name == "digits":
        loaded = digits(place)
        return loaded.train, loaded.validation
    if folder is None:
        raise ValueError("the cifar-small tasks need --data FOLDER with CIFAR-10 as train/<class>/* images")
    train_set, validation = cifar_subset(folder)
    return train_set.to(place), validation.to(place)


@cache
def _where(device: str) -> dict[str, Any]:
    where = environment(torch.device(device))
    return {key: where[key] for key in ("device", "torch", "fop", "git", "threads")}


def run_one(task_name: str, run: dict[str, Any], device: str, folder: Path | None) -> dict[str, Any]:
    """Train once and return the run with its curve."""
    torch.set_num_threads(1)
    task = TASKS[task_name]
    train_set, validation = _data(task.data, device, folder)
    options = {key: value for key, value in run["options"].items() if key != "lr"}
    build = OPTIMIZERS[run["optimizer"]]
    result = train(
        task.model,
        lambda model, lr: build(model.parameters(), lr=lr, **options),
        train_set,
        validation,
        learning_rate=run["options"]["lr"],
        batch_size=task.batch_size or len(train_set),
        epochs=task.epochs,
        seed=run["seed"],
    )
    last = result.curve[-1] if result.curve and not result.diverged else None
    return {
        "task": task_name,
        **run,
        "diverged": result.diverged,
        "accuracy": last.accuracy if last else None,
        "train_loss": last.train_loss if last else None,
        "seconds": last.seconds if last else None,
        "warnings": result.warnings,
        "environment": _where(device),
    }


def measure(
    study: str,
    tasks: Sequence[str],
    *,
    device: str,
    folder: Path | None,
    out: Path,
    jobs: int,
    minutes: float,
    on_run: Callable[[int, int], None] = lambda done, left: None,
) -> int:
    """Make the runs of a study that ``out`` (one JSON line a run) does not hold yet; return what is left.

    Stops taking new runs after ``minutes``; calling again goes on where it was. ``on_run`` is told after
    every run how many are done and how many are left.
    """
    if folder is not None and any(TASKS[task].data == "cifar" for task in tasks):
        cifar_subset(folder)  # a missing image is an error here, not in every worker
    deadline = time.monotonic() + 60 * minutes
    done = {_key(run) for run in read_runs(out)} if out.exists() else set()
    todo = [(t, run) for run in STUDIES[study] for t in tasks if _key({"task": t, **run}) not in done]
    with (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
        out.open("a") as file,
    ):
        running: set[Future[dict[str, Any]]] = set()
        made = len(done)
        while running or (todo and time.monotonic() < deadline):
            while todo and len(running) < jobs and time.monotonic() < deadline:
                task, run = todo.pop(0)
                running.add(pool.submit(run_one, task, run, device, folder))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
                made += 1
            on_run(made, len(todo) + len(running))
    return len(todo)


def _key(run: dict[str, Any]) -> str:
    return json.dumps([run["task"], run["optimizer"], run["options"], run["seed"]], sort_keys=True)
