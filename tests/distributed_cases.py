"""Small trainings that ranks run together and one process runs alone, in float64."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from fop import FOP, KFAC
from models import Attentive, batch, conv_net, sentences
from reference import half_squared_error

STEPS = 10
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "damping": 1e-2,
    "curvature_interval": 3,
    "kl_clip": 1e-2,
}
NORMS = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}}
Data = Callable[[int, int], tuple[Tensor, Tensor]]


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return batch(n, seed, (2, 5, 6))


class Tied(nn.Module):
    """An embedding that shares its weight with the output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.head = nn.Linear(7, 3)
        self.out.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.out(torch.tanh(self.hidden(self.embed(ids))))).mean(1))
        return out


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        wrap: "ddp", "fsdp" (the model), "fsdp-layers" (every layer, too), or "" for plain torch.distributed.
        distributed: the option of that name.
        labels: whether two passes a step are labelled with ``sub_batch``.
        passes: backward passes a step; "synced" if each averages gradients.
        clip: norm that the script clips gradients to.
    """

    optimizer: type[FOP] = FOP
    model: Callable[[], nn.Module] = Attentive
    data: Data = sentences
    wrap: str = "ddp"
    distributed: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    groups: bool = False
    labels: bool = False
    passes: int = 1
    synced: bool = False
    clip: float | None = None

    @property
    def sums(self) -> bool:
        return self.options.get("loss_reduction") == "sum"


LEAN = {"mode": "lean"}
CONV: dict[str, Any] = {"model": conv_net, "data": images}
CASES = {
    "ddp": Case(options={"layer_options": NORMS}),
    "lean": Case(options={"layer_options": NORMS}, distributed=LEAN),
    "plain": Case(options={"layer_options": NORMS}, wrap=""),
    "fsdp": Case(options={"layer_options": NORMS}, wrap="fsdp"),
    "fsdp-layers": Case(wrap="fsdp-layers", **CONV),
    "kfac": Case(optimizer=KFAC),
    "kfac-lean": Case(optimizer=KFAC, distributed=LEAN),
    "sum": Case(options={"loss_reduction": "sum"}, **CONV),
    "sum-lean": Case(options={"loss_reduction": "sum"}, distributed=LEAN, **CONV),
    "groups": Case(groups=True, **CONV),
    "groups-lean": Case(groups=True, distributed=LEAN, **CONV),
    "clip": Case(clip=0.05),
    "max-norm": Case(options={"max_grad_norm": 0.05}),
    "max-norm-lean": Case(options={"max_grad_norm": 0.05}, distributed=LEAN),
    "max-norm-fsdp": Case(options={"max_grad_norm": 0.05}, wrap="fsdp"),
    "accumulated": Case(passes=3),
    "accumulated-lean": Case(passes=3, distributed=LEAN),
    "accumulated-plain": Case(passes=3, wrap=""),
    "accumulated-fsdp": Case(passes=3, wrap="fsdp"),
    "synced": Case(passes=3, synced=True),
    "synced-lean": Case(passes=3, synced=True, distributed=LEAN),
    "labels": Case(labels=True),
    "tied": Case(model=Tied),
    "tied-lean": Case(model=Tied, distributed=LEAN),
    "later": Case(options={"inverse_delay": 1}),
}


def make(case: Case, model: nn.Module, **more: Any) -> FOP:
    """The optimizer, from bare parameters (or groups of them)."""
    params: Any = model.parameters()
    if case.groups:
        named = list(model.named_parameters())
        params = [
            {"params": [p for name, p in named if "bias" not in name]},
            {"params": [p for name, p in named if "bias" in name], "lr": 0.02},
        ]
    return case.optimizer(params, **{**OPTIONS, **case.options}, **more)


def loss_of(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = half_squared_error(model(x), y)
    return loss * len(x) if case.sums else loss


def train_together(rank: int, names: list[str], ranks: int) -> dict[str, Any]:
    """Train every case as one of ``ranks``; weights, and the optimizer's bytes by category."""
    return {name: _train(CASES[name], rank, ranks) for name in names}


def _train(case: Case, rank: int, ranks: int) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    inner = case.model()
    model: nn.Module = DistributedDataParallel(inner) if case.wrap == "ddp" else inner
    if case.wrap == "fsdp-layers":
        for child in inner.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
    if case.wrap.startswith("fsdp"):
        fully_shard(inner)
    optimizer = make(case, model, distributed=case.distributed)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(case.passes):
            last = index == case.passes - 1
            with _without_averaging(model, case, last or case.synced):
                if case.labels:
                    for label in (0, 1):
                        with optimizer.sub_batch(label):
                            x, y = part(case, step, index, rank, ranks, label)
                            (loss_of(case, model, x, y) / 2).backward()
                else:
                    halves = [part(case, step, index, rank, ranks, label) for label in (0, 1)]
                    x, y = (torch.cat(each) for each in zip(*halves, strict=True))
                    (loss_of(case, model, x, y) / case.passes).backward()
        if case.clip is not None:
            clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
    why = [layer.why_kfac for layer in optimizer.diagnostics().layers.values()]
    return {name: _whole(p) for name, p in inner.named_parameters()}, optimizer.bytes_sent, why


def _without_averaging(model: nn.Module, case: Case, averages: bool) -> Any:
    if case.wrap == "ddp" and not averages:
        return model.no_sync()  # type: ignore[operator]
    if case.wrap == "fsdp":
        model.set_requires_gradient_sync(averages)  # type: ignore[operator]
    return contextlib.nullcontext()


def _whole(param: Tensor) -> Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param.detach()  # type: ignore[no-any-return]


def part(case: Case, step: int, index: int, rank: int, ranks: int, half: int) -> tuple[Tensor, Tensor]:
    """Half of a rank's batch in one pass."""
    return case.data(3, 1000 * step + 100 * index + 2 * rank + half)


def train_alone(name: str, ranks: int, parity: bool) -> dict[str, Tensor]:
    """The same training in one process that is given the pair as labelled sub-batches."""
    case = CASES[name]
    model = case.model()
    optimizer = make(case, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(case.passes):
            for rank in range(ranks):
                halves = [part(case, step, index, rank, ranks, half) for half in (0, 1)]
                if parity:
                    whole = tuple(torch.cat(each) for each in zip(*halves, strict=True))
                    labelled = [(rank % 2, whole)]
                else:
                    labelled = list(enumerate(halves))
                for label, (x, y) in labelled:
                    # A loss that is a mean weighs each pass by its share of the samples.
                    share = 1 if case.sums else case.passes * ranks * len(labelled)
                    with optimizer.sub_batch(label):
                        (loss_of(case, model, x, y) / share).backward()
        if case.clip is not None:
            clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def quiet() -> None:
    """Leave out warnings of torch's own."""
    warnings.simplefilter("ignore", FutureWarning)
