"""Tiny models, data and loops for the tests with Trainer, accelerate and Lightning."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fop import FOP

DOCS = Path(__file__).parents[1] / "docs" / "integrations.md"

# With these the curvature of step 10 is renewed in step 12: after 11 steps a run is between two updates.
STEPS_BETWEEN_UPDATES = 11
EPOCHS = 2
OPTIONS: dict[str, Any] = {"step_length": "paper", "lr": 0.05, "weight_decay": 0.01, "damping": 1e-2}


def net(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(8), nn.Linear(8, 3))


def images(samples: int = 44) -> TensorDataset:
    """Vectors of which the largest of the first three entries is the class."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))


def loader(batch_size: int = 4, samples: int = 44, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(images(samples), batch_size=batch_size, shuffle=shuffle)


def loss_of(model: nn.Module, batch: Iterable[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x).float(), y)


def windows(batches: Iterable[Any], size: int) -> list[list[Any]]:
    """Cut the batches of an epoch into windows of accumulation; the last may be shorter."""
    every = list(batches)
    return [every[start : start + size] for start in range(0, len(every), size)]


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)


def by_hand(
    model: nn.Module,
    optimizer: FOP,
    accumulate: int = 1,
    bf16: bool = False,
    epochs: int = EPOCHS,
    left_out: Collection[int] = (),
) -> None:
    """The loop that accelerate and Lightning run, written out; batches ``left_out`` make no gradients."""
    schedule = cosine(optimizer)
    for _ in range(epochs):
        for index, window in enumerate(windows(loader(), accumulate)):
            for batch in window if index not in left_out else ():
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = loss_of(model, batch)
                (loss / accumulate).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


class Sentences(Dataset[dict[str, Tensor]]):
    """Token sequences that count upwards, every third cut short; -100 where nothing is to be predicted."""

    def __init__(self, samples: int = 22, length: int = 8, vocabulary: int = 20) -> None:
        start = torch.randint(vocabulary, (samples, 1), generator=torch.Generator().manual_seed(2))
        self.tokens = (start + torch.arange(length)) % (vocabulary - 1) + 1
        self.labels = self.tokens.clone()
        self.labels[:, 0] = -100
        self.labels[::3, length // 2 :] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: param.detach() for name, param in model.named_parameters()})


def assert_same_weights(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit: the same operations in the same order on one thread."""
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def assert_trained(actual: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> None:
    """Every parameter has moved, and is finite."""
    still = [name for name, value in actual.items() if torch.equal(value, initial[name])]
    assert not still
    assert all(torch.isfinite(value).all() for value in actual.values())


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean distance of all weights together."""
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def run_block(title: str, page: Path = DOCS, **stubs: Any) -> dict[str, Any]:
    """Run the Python block below a heading of a page, by default docs/integrations.md; return its names.

    Args:
        title: the heading.
        page: the page.
        stubs: the names that the block takes for granted.
    """
    section = re.search(
        rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert section is not None, f"no heading {title!r}"
    (block,) = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    lines = [line for line in block.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 10, f"{len(lines)} lines of use"
    names = {**stubs, "__name__": page.stem}
    exec(compile(block, f"{page.name}: {title}", "exec"), names)
    return names
