"""Prints how AdamW and FOP fine-tune small pre-trained networks, by their rates (records/fine-tuning).

`OMP_NUM_THREADS=1 python tools/fine_tuning.py images --data FOLDER`, or `text`: minutes of one core each.
Needs the extra `bench`, and for images CIFAR-10 as a folder, or from the hub without `--data`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fop import FOP
from fop_bench.images import Images, load
from fop_bench.models import small_gpt
from fop_bench.race import schedule
from fop_bench.recipes import CIFAR10

# The best setting on the first seeds is judged by the others.
TUNING, JUDGING = (0, 1), (2, 3, 4, 5, 6)
FOP_RATES, ADAMW_RATES = (0.01, 0.02, 0.05, 0.1, 0.2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

Draw = Callable[[Generator], tuple[Tensor, Tensor]]
Settings = dict[str, list[dict[str, Any]]]


@dataclass
class Task:
    """A pre-trained network, and what it is to learn.

    Attributes:
        start: a copy of the network, given a seed.
        samples: draws batches of the few samples that a seed is given.
        judge: accuracy in percent, or nats a byte, on data that were held out.
        head: the name that parameters of a new last layer begin with.
        settings: of each optimizer, what to try at every rate.
        longer: so many times the steps, AdamW takes about as many seconds as FOP.
    """

    start: Callable[[int], nn.Module]
    samples: Callable[[Generator], Draw]
    judge: Callable[[nn.Module], float]
    steps: int
    head: str
    highest: bool
    settings: Settings
    longer: int


def fit(model: nn.Module, optimizer: Optimizer, draw: Draw, steps: int, seed: Generator) -> None:
    """Train with warm-up over 15 % of the steps and linear decay."""
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        x, y = draw(seed)
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        scheduler.step()


def images(data: str | None) -> Task:
    """Pre-train on five classes of CIFAR-10 at 16×16; tell the others apart, by 100 images of each."""
    train, test = load(CIFAR10, data), load(CIFAR10, data, test=True)

    def of(part: Images, first: int) -> tuple[Tensor, Tensor]:
        chosen = (part.labels >= first) & (part.labels < first + 5)
        x = part.pixels[chosen].permute(0, 3, 1, 2).float() / 64 - 2
        return avg_pool2d(x, 2), part.labels[chosen] - first

    def batches(x: Tensor, y: Tensor, size: int) -> Draw:
        def draw(seed: Generator) -> tuple[Tensor, Tensor]:
            chosen = torch.randperm(len(y), generator=seed)[:size]
            flipped = torch.rand(size, 1, 1, 1, generator=seed) < 0.5
            return torch.where(flipped, x[chosen].flip(3), x[chosen]), y[chosen]

        return draw

    new, held_out = of(train, 5), of(test, 5)

    def samples(seed: Generator) -> Draw:
        classes = [(new[1] == label).nonzero().squeeze(1) for label in range(5)]
        few = torch.cat([each[torch.randperm(len(each), generator=seed)[:100]] for each in classes])
        return batches(new[0][few], new[1][few], 100)

    def part(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    torch.manual_seed(0)
    model = nn.Sequential(*part(3, 32), *part(32, 64), *part(64, 64), nn.Flatten(), nn.Linear(256, 5))
    adamw = AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    fit(model, adamw, batches(*of(train, 0), 250), 500, Generator().manual_seed(0))

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model[-1].reset_parameters()
        return copy.deepcopy(model).train()

    settings: Settings = {
        "AdamW": [{"head": times} for times in (1, 5, 20)],
        "FOP": [{}, {"adamw_lr": 1e-3}, {"head": 5}],
    }
    return Task(start, samples, lambda model: accuracy(model, *held_out), 100, "13.", True, settings, 4)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the percentage of right answers."""
    return 100 * float((model.eval()(x).argmax(1) == y).double().mean())


def text(_: str | None) -> Task:
    """Pre-train a byte-level GPT on the sources of Python's library; go on with 50 kB of its help."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in folder.rglob("*.py") if not {"site-packages", "pydoc_data"} & {*p.parts})
    names = sorted(topics)
    texts = [b"".join(map(Path.read_bytes, files))]
    texts += ["".join(topics[name] for name in names[half::2]).encode() for half in (0, 1)]
    sources, new, rest = (torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in texts)

    def windows(of: Tensor) -> Draw:
        def draw(seed: Generator) -> tuple[Tensor, Tensor]:
            starts = torch.randint(len(of) - 64, (64, 1), generator=seed)
            rows = of[starts + torch.arange(65)].long()
            return rows[:, :-1], rows[:, 1:]

        return draw

    def samples(seed: Generator) -> Draw:
        first = int(torch.randint(len(new) - 50_000, (), generator=seed))
        return windows(new[first : first + 50_000])

    held_out = rest[: len(rest) // 65 * 65].view(-1, 65)[::4].long()

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        return float(cross_entropy(model.eval()(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()))

    torch.manual_seed(0)
    model = small_gpt(dim=64)
    fit(model, AdamW(model.parameters(), lr=4e-3), windows(sources), 1200, Generator().manual_seed(0))
    print(f"Before: {judge(model):.3f} nats a byte.\n", flush=True)
    settings: Settings = {"AdamW": [{}], "FOP": [{}, {"adamw_lr": 1e-3}]}
    return Task(lambda _: copy.deepcopy(model).train(), samples, judge, 60, "", False, settings, 2)


def tune(
    task: Task, name: str, lr: float, seed: int, *, steps: int = 0, head: int = 1, **options: Any
) -> tuple[float, float]:
    """Return how good the network is after a training, and the seconds of the processor that it took."""
    model, draw = task.start(seed), Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if head != 1:
        named = list(model.named_parameters())
        groups = [
            {"params": [p for key, p in named if not key.startswith(task.head)]},
            {"params": [p for key, p in named if key.startswith(task.head)], "lr": head * lr},
        ]
    if name == "FOP":
        optimizer: Optimizer = FOP(groups, lr, **options)
    else:
        optimizer = AdamW(groups, lr, weight_decay=0.0, **options)
    samples, begun = task.samples(draw), time.process_time()
    fit(model, optimizer, samples, steps or task.steps, draw)
    seconds = time.process_time() - begun
    return task.judge(model), seconds


def main() -> None:
    """Pre-train, search, judge, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("images", "text"))
    parser.add_argument("--data", help="CIFAR-10: train/<class>/* and test/<class>/*; or a name on the hub")
    given = parser.parse_args()
    task = {"images": images, "text": text}[given.task](given.data)
    rates = {"AdamW": ADAMW_RATES, "FOP": FOP_RATES}
    best: dict[str, dict[str, Any]] = {}
    for name, settings in task.settings.items():
        print(f"| {name}, n = {len(TUNING)} | " + " | ".join(f"{rate:g}" for rate in rates[name]) + " |")
        print("|---|" + "---|" * len(rates[name]))
        found = []
        for setting in settings:
            cells = []
            for rate in rates[name]:
                values = [tune(task, name, rate, seed, **setting)[0] for seed in TUNING]
                cells.append(f"{statistics.mean(values):.{1 if task.highest else 3}f}")
                found.append((statistics.mean(values), {"lr": rate, **setting}))
            label = ", ".join(f"{key}={value}" for key, value in setting.items()) or "defaults"
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        best[name] = (max if task.highest else min)(found, key=lambda pair: pair[0])[1]
        print()
    more = {**best["AdamW"], "steps": task.longer * task.steps}
    last = {"AdamW": best["AdamW"], f"AdamW, {task.longer} times the steps": more, "FOP": best["FOP"]}
    print(f"| best, n = {len(JUDGING)} | setting | mean ± standard deviation | seconds |\n|---|---|---|---|")
    for title, setting in last.items():
        runs = [tune(task, title.partition(",")[0], seed=seed, **setting) for seed in JUDGING]
        values, digits = [value for value, _ in runs], 1 if task.highest else 3
        spread = f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        label = ", ".join(f"{key}={value}" for key, value in setting.items())
        print(f"| {title} | {label} | {spread} | {statistics.mean(s for _, s in runs):.1f} |", flush=True)


if __name__ == "__main__":
    main()
