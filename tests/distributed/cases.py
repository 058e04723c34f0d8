"""Small trainings that ranks run together and one process runs alone, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from fop import FOP, KFAC
from models import Attentive, batch, conv_net, mlp, sentences, train_step
from reference import half_squared_error, joined

STEPS = 10
OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.05,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "damping": 1e-2,
    "curvature_interval": 3,
    "kl_clip": 1e-2,
}
NORMS = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}}
Weights = dict[str, Tensor]


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
    """One training script.

    Attributes:
        wrap: "ddp", "fsdp" (the model), "fsdp-layers" (every layer, too), or "" for plain torch.distributed.
        distributed: the option of that name.
        labels: whether two passes a step are labelled with ``sub_batch``.
        passes: backward passes a step; "synced" if each averages gradients.
        clip: norm that the script clips gradients to.
        reset: how it clears gradients: "optimizer", "model", or "zeros" left by the model.
        discards: whether every step begins with a pass whose gradients are cleared.
        evaluates: whether a pass without gradients comes between forward and backward pass.
        idles: whether a step without gradients follows every step.
    """

    optimizer: type[FOP] = FOP
    model: Callable[[], nn.Module] = Attentive
    data: Callable[[int, int], tuple[Tensor, Tensor]] = sentences
    wrap: str = "ddp"
    distributed: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    groups: bool = False
    labels: bool = False
    passes: int = 1
    synced: bool = False
    clip: float | None = None
    reset: str = "optimizer"
    discards: bool = False
    evaluates: bool = False
    idles: bool = False

    @property
    def sums(self) -> bool:
        return self.options.get("loss_reduction") == "sum"


LEAN: dict[str, Any] = {"distributed": {"mode": "lean"}}
CONV: dict[str, Any] = {"model": conv_net, "data": images}
MLP: dict[str, Any] = {"model": mlp, "data": batch}
WRAPS: dict[str, dict[str, Any]] = {"": {}, "-lean": LEAN, "-plain": {"wrap": ""}, "-fsdp": {"wrap": "fsdp"}}
SCRIPTS: dict[str, dict[str, Any]] = {
    "accumulated": {"passes": 3},
    "evaluates": {"evaluates": True, **MLP},
    "discards": {"discards": True, **MLP},
    "idles": {"idles": True, "discards": True, **MLP},
    "reset-by-model": {"reset": "model", "discards": True, **MLP},
    "reset-to-zeros": {"reset": "zeros", "discards": True, **MLP},
}
# Lean layers have no gradient that model.zero_grad() could reset; zeros of FSDP take K-FAC's step.
LEFT_OUT = {"reset-by-model-lean", "reset-to-zeros-lean", "reset-to-zeros-fsdp"}
CASES = {
    "ddp": Case(options={"layer_options": NORMS}),
    "lean": Case(options={"layer_options": NORMS}, **LEAN),
    "plain": Case(options={"layer_options": NORMS}, wrap=""),
    "fsdp": Case(options={"layer_options": NORMS}, wrap="fsdp"),
    "blocks": Case(options={"layer_options": {"*": {"block_dim": 5}}}),
    "blocks-tied-lean": Case(model=Tied, options={"layer_options": {"*": {"block_dim": 5}}}, **LEAN),
    "blocks-conv": Case(options={"layer_options": {"*": {"block_dim": 7}}}, **CONV),
    "fsdp-layers": Case(wrap="fsdp-layers", **CONV),
    "kfac": Case(optimizer=KFAC),
    "kfac-lean": Case(optimizer=KFAC, **LEAN),
    "sum": Case(options={"loss_reduction": "sum"}, **CONV),
    "sum-lean": Case(options={"loss_reduction": "sum"}, **LEAN, **CONV),
    "groups": Case(groups=True, **CONV),
    "groups-lean": Case(groups=True, **LEAN, **CONV),
    "clip": Case(clip=0.05),
    "max-norm": Case(options={"max_grad_norm": 0.05}),
    "max-norm-lean": Case(options={"max_grad_norm": 0.05}, **LEAN),
    "max-norm-fsdp": Case(options={"max_grad_norm": 0.05}, wrap="fsdp"),
    "synced": Case(passes=3, synced=True),
    "synced-lean": Case(passes=3, synced=True, **LEAN),
    "labels": Case(labels=True),
    "tied": Case(model=Tied),
    "tied-lean": Case(model=Tied, **LEAN),
    "later": Case(options={"inverse_delay": 1}),
    "rounded": Case(distributed={"factor_dtype": torch.bfloat16}),
    **{
        script + wrap: Case(**options, **how)
        for script, options in SCRIPTS.items()
        for wrap, how in WRAPS.items()
        if script + wrap not in LEFT_OUT
    },
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


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model as ranks call it."""
    if how.startswith("fsdp"):
        # Since torch 2.6.
        from torch.distributed.fsdp import fully_shard
    if how == "fsdp-layers":
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
    if how.startswith("fsdp"):
        fully_shard(model)
    return DistributedDataParallel(model) if how == "ddp" else model


def whole(model: nn.Module) -> Weights:
    """Copies of all weights, the shards of other ranks included."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _run(case: Case, model: nn.Module, optimizer: FOP, backward: Callable[[int, int], None]) -> None:
    """The script; ``backward(step, index)`` is one pass of a step."""

    def reset() -> None:
        if case.reset == "optimizer":
            optimizer.zero_grad()
        else:
            model.zero_grad(set_to_none=case.reset == "model")

    for step in range(STEPS):
        reset()
        if case.discards:
            backward(step + 100, case.passes - 1)
            reset()
        for index in range(case.passes):
            backward(step, index)
        if case.clip is not None:
            clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        if case.idles:
            optimizer.zero_grad()
            optimizer.step()


def _loss(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = half_squared_error(model(x), y)
    if case.evaluates:
        with torch.no_grad():
            model(x)
    return loss * len(x) if case.sums else loss


def _half(case: Case, step: int, index: int, rank: int, half: int) -> tuple[Tensor, Tensor]:
    """Half of a rank's batch in one pass."""
    return case.data(3, 1000 * step + 100 * index + 2 * rank + half)


def _batch(case: Case, step: int, index: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = (joined(*each) for each in zip(*(_half(case, step, index, rank, h) for h in (0, 1)), strict=True))
    return x, y


def train_together(rank: int, name: str) -> tuple[Weights, list[str | None], dict[str, float]]:
    """Train a case as one of the ranks; weights, why layers lacked a pair, and bytes sent by category."""
    case = CASES[name]
    inner = case.model()
    model = wrapped(inner, case.wrap)
    optimizer = make(case, model, distributed=case.distributed)

    def backward(step: int, index: int) -> None:
        with _averaging(model, case, index == case.passes - 1 or case.synced):
            if not case.labels:
                (_loss(case, model, *_batch(case, step, index, rank)) / case.passes).backward()
                return
            for label in (0, 1):
                with optimizer.sub_batch(label):
                    (_loss(case, model, *_half(case, step, index, rank, label)) / 2).backward()

    _run(case, model, optimizer, backward)
    why = [layer.why_kfac for layer in optimizer.diagnostics().layers.values()]
    return whole(inner), why, optimizer.bytes_sent


def _averaging(model: nn.Module, case: Case, averages: bool) -> Any:
    if case.wrap == "ddp" and not averages:
        return model.no_sync()  # type: ignore[operator]
    if case.wrap == "fsdp":
        model.set_requires_gradient_sync(averages)  # type: ignore[operator]
    return contextlib.nullcontext()


def train_alone(name: str, ranks: int, parity: bool) -> Weights:
    """The same training in one process: each rank's batch is a sub-batch by parity, or its halves are."""
    case = CASES[name]
    model = case.model()
    optimizer = make(case, model)

    def backward(step: int, index: int) -> None:
        for rank in range(ranks):
            labelled = (
                [(rank % 2, _batch(case, step, index, rank))]
                if parity
                else [(half, _half(case, step, index, rank, half)) for half in (0, 1)]
            )
            for label, (x, y) in labelled:
                # A loss that is a mean weighs each pass by its share of the samples.
                share = 1 if case.sums else case.passes * ranks * len(labelled)
                with optimizer.sub_batch(label):
                    (_loss(case, model, x, y) / share).backward()

    _run(case, model, optimizer, backward)
    return whole(model)


def steps(model: nn.Module, optimizer: FOP, rank: int, first: int, last: int) -> None:
    """Plain steps of a rank, each on a batch of its own, for models as `mlp`."""
    for number in range(first, last):
        train_step(model, optimizer, *batch(6, 10 * number + rank))
