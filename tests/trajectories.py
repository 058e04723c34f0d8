"""Short trainings with everything that the optimizer supports, to show that a change of it changes no number.

`TRAININGS` names them: 40 steps each, and 100 random networks of 10 steps, all in float64.
`tools/record_trajectories.py` writes what they give to `data/`, `test_trajectories.py` compares. Batches are
split in contiguous halves, as they were when `data/` was recorded.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from fop import FOP, KFAC
from internals import as_when_recorded
from ranks import run_ranks

OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "lr": 0.05,
    "momentum": 0.5,
    "weight_decay": 0.01,
    "damping": 1e-2,
    "curvature_interval": 3,
    "kl_clip": 1e-2,
}
VOCABULARY = 11

Batch = tuple[Tensor, Tensor]


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).flatten(1).square().sum(1).mean()


def token_error(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), target.flatten())


# --- tasks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model and its data: ``batch(n, seed)`` gives n inputs (float64 or int64) and targets."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = half_squared_error


def vectors(n: int, seed: int, *, shape: tuple[int, ...] = (5,)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    y = torch.stack([x.flatten(1).sum(1), x.flatten(1).square().mean(1), x.flatten(1)[:, 0]], 1)
    return x, torch.sin(y) + 0.3 * torch.randn(n, 3, dtype=torch.float64, generator=generator)


def sentences(n: int, seed: int) -> Batch:
    """Token sequences (n, 5), the last token of every second one is padding (0), and targets (n, 3)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, 5), generator=generator)
    ids[::2, -1] = 0
    y = torch.stack([ids.double().mean(1) / 5 - 1, ids[:, 0] / 5 - 1, ids[:, -1] / 5], 1)
    return ids, y + 0.3 * torch.randn(n, 3, dtype=torch.float64, generator=generator)


def next_tokens(n: int, seed: int) -> Batch:
    """Token sequences (n, 5) and the tokens that follow, three in ten of them random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (n, 5), generator=generator)
    noise = torch.randint(0, VOCABULARY, (n, 5), generator=generator)
    kept = torch.rand(n, 5, generator=generator) < 0.7
    return ids, torch.where(kept, (3 * ids + 1) % VOCABULARY, noise)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.SiLU(),
        nn.Conv2d(4, 4, (1, 3), groups=2, padding="same"),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2, bias=False),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 5, stride=5),
        nn.SiLU(),
        nn.ConvTranspose1d(3, 2, 2),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class Transformer(nn.Module):
    def __init__(self, recompute: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=batch_first)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.recompute, self.batch_first = recompute, batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids if self.batch_first else ids.T)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        keys = x[..., :4]
        x = self.norm(x + self.attention(x, keys, keys, need_weights=False)[0])
        out: Tensor = self.head(x.mean(1 if self.batch_first else 0))
        return out


class Tied(nn.Module):
    """A language model whose embedding and output head share their weight, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.hidden = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids)) + self.shift))
        return out


class Everything(nn.Module):
    """One of every kind of layer, in little, for trainings on several ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.down = nn.Conv1d(4, 3, 2, stride=2)
        self.up = nn.ConvTranspose1d(3, 4, 3, stride=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.group(x.mT + self.up(torch.tanh(self.down(x.mT))))
        out: Tensor = self.head(x.mean(-1))
        return out


MLP = Task(mlp, vectors)
CNN = Task(cnn, partial(vectors, shape=(2, 7, 6)))
CONVOLUTIONS = Task(convolutions, partial(vectors, shape=(2, 7, 6)))
TRANSFORMER = Task(Transformer, sentences)
BATCH_SECOND = Task(partial(Transformer, batch_first=False), sentences)
TIED = Task(Tied, next_tokens, token_error)
EVERYTHING = Task(Everything, sentences)
NORMS = {norm: {"path": "fop"} for norm in (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.BatchNorm1d)}


# --- one training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What is trained and how.

    Attributes:
        make: the optimizer from a model; `FOP` of the module with ``OPTIONS`` and ``options`` if not given.
        step: one turn of the training loop, and what is done between turns.
        samples: of a batch, and of each rank's batch.
        wrap: "ddp", "fsdp" or "" for none.
        ranks: 0 for a training without torch.distributed.
        slow: takes seconds.
        rest: is left to `make test-every`.
    """

    task: Task = MLP
    options: dict[str, Any] = field(default_factory=dict)
    kind: type[FOP] = FOP
    make: Callable[[nn.Module, dict[str, Any]], FOP] | None = None
    step: Callable[[Run, int], None] | None = None
    samples: int = 6
    steps: int = 40
    wrap: str = ""
    ranks: int = 0
    slow: bool = False
    rest: bool = False


class Run:
    """A training that has been set up; ``model`` is what is called, ``inner`` the model without wrapper."""

    def __init__(self, training: Training, rank: int = 0) -> None:
        self.training, self.rank = training, rank
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
        self.scheduler: Any = None
        self.build()

    def build(self) -> None:
        """Make model and optimizer, the same ones every time."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            self.inner = self.training.task.model()
        finally:
            torch.set_default_dtype(before)
        self.model: nn.Module = self.inner
        if self.training.wrap == "ddp":
            self.model = DistributedDataParallel(self.inner)
        elif self.training.wrap == "fsdp":
            fully_shard(self.inner)
        options = {**OPTIONS, **self.training.options}
        make = self.training.make
        self.optimizer = make(self.model, options) if make else self.training.kind(self.model, **options)

    def batch(self, step: int, part: int = 0, samples: int | None = None) -> Batch:
        n = self.training.samples if samples is None else samples
        return self.training.task.batch(n, 1 + part + 10 * self.rank + 100 * step)

    def loss(self, batch: Batch, share: float = 1.0) -> Tensor:
        """The loss of a batch that is this share of a step's samples."""
        x, y = batch
        loss = self.training.task.loss(self.model(x), y)
        total = self.training.options.get("loss_reduction") == "sum"
        return loss * (len(x) if total else share)


def plain(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    run.loss(run.batch(step)).backward()
    run.optimizer.step()


def accumulate(run: Run, step: int, sizes: Sequence[int], synchronise: bool = True) -> None:
    run.optimizer.zero_grad()
    for index, size in enumerate(sizes):
        waits = run.training.wrap == "ddp" and not synchronise and index < len(sizes) - 1
        with run.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            run.loss(run.batch(step, index, size), size / sum(sizes)).backward()
    run.optimizer.step()


def labelled(run: Run, step: int, passes: int = 1) -> None:
    run.optimizer.zero_grad()
    for part in range(2 * passes):
        with run.optimizer.sub_batch(part % 2):
            run.loss(run.batch(step, part, 3), 0.5 / passes).backward()
    run.optimizer.step()


def clipped(run: Run, step: int, norm: float = 0.3) -> None:
    run.optimizer.zero_grad()
    run.loss(run.batch(step)).backward()
    clip_grad_norm_(run.model.parameters(), norm)
    run.optimizer.step()


def changed(run: Run, step: int) -> None:
    """Every third step changes the gradient of one layer between backward pass and step."""
    run.optimizer.zero_grad()
    run.loss(run.batch(step)).backward()
    if step % 3 == 0:
        run.inner[2].weight.grad.add_(0.01)  # type: ignore[index,union-attr]
    run.optimizer.step()


def not_finite(run: Run, step: int) -> None:
    """One step in ten has an infinite loss."""
    run.optimizer.zero_grad()
    (run.loss(run.batch(step)) * (torch.inf if step % 10 == 7 else 1)).backward()
    run.optimizer.step()


def frozen(run: Run, step: int) -> None:
    """The first layer is frozen up to step 12, the last one from step 6 to step 21."""
    run.inner[0].requires_grad_(step >= 12)  # type: ignore[index]
    run.inner[-1].requires_grad_(not 6 <= step < 21)  # type: ignore[index]
    plain(run, step)


def scaled(run: Run, step: int, clip: float | None = None) -> None:
    """`GradScaler`; one step in ten overflows."""
    run.optimizer.zero_grad()
    factor = torch.inf if step % 10 == 7 else 1
    (run.scaler.scale(run.loss(run.batch(step))) * factor).backward()
    if clip is not None:
        run.scaler.unscale_(run.optimizer)
        clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def with_closure(run: Run, step: int) -> None:
    def closure() -> float:
        run.optimizer.zero_grad()
        loss = run.loss(run.batch(step))
        loss.backward()
        return float(loss)

    run.optimizer.step(closure)


def two_losses(run: Run, step: int) -> None:
    """Two backward passes through one graph."""
    run.optimizer.zero_grad()
    x, y = run.batch(step)
    out = run.model(x)
    half_squared_error(out, y).backward(retain_graph=True)
    (0.1 * out.abs().sum(1).mean()).backward()
    run.optimizer.step()


def varied(run: Run, step: int) -> None:
    """Batches of 1 to 7 samples, odd ones and single ones among them."""
    run.optimizer.zero_grad()
    run.loss(run.batch(step, samples=1 + (5 * step) % 7)).backward()
    run.optimizer.step()


def evaluated(run: Run, step: int) -> None:
    """A validation pass before every step, and one in training mode that is thrown away."""
    run.inner.eval()
    with torch.no_grad():
        run.loss(run.batch(step, 1))
    run.inner.train()
    run.loss(run.batch(step, 2)).backward()
    plain(run, step)


def scheduled(run: Run, step: int, kind: Callable[[FOP], Any]) -> None:
    run.scheduler = run.scheduler or kind(run.optimizer)
    plain(run, step)
    run.scheduler.step()


def regrouped(run: Run, step: int) -> None:
    """The last layer joins, in a group of its own, after step 14."""
    if step == 15:
        run.optimizer.add_param_group({"params": list(run.inner[-1].parameters()), "lr": 0.02})  # type: ignore[index]
    plain(run, step)


def requested(run: Run, step: int) -> None:
    if step in (17, 18, 30):
        run.optimizer.request_curvature()
    plain(run, step)


def resumed(run: Run, step: int) -> None:
    """After 20 steps new objects go on from what `torch.save` wrote."""
    if step == 20:
        file = io.BytesIO()
        torch.save((run.inner.state_dict(), run.optimizer.state_dict()), file)
        del run.optimizer
        run.build()
        with torch.no_grad():
            for param in run.inner.parameters():
                param.zero_()
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        run.inner.load_state_dict(weights)
        run.optimizer.load_state_dict(state)
    plain(run, step)


# --- optimizers that are made in other ways -----------------------------------------------------------------


def from_parameters(model: nn.Module, options: dict[str, Any]) -> FOP:
    return FOP(model.parameters(), **options)


def from_names(model: nn.Module, options: dict[str, Any]) -> FOP:
    return FOP(model.named_parameters(), **options)


def from_groups(model: nn.Module, options: dict[str, Any]) -> FOP:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.startswith("0")], "lr": 0.02, "momentum": 0.9},
        {"params": [p for name, p in named if name.endswith("bias") and not name.startswith("0")], "lr": 0.1},
        {
            "params": [p for name, p in named if name.endswith("weight") and not name.startswith("0")],
            "damping": 0.1,
            "weight_decay": 0.0,
        },
    ]
    return FOP(groups, **options)


def without_last_layer(model: nn.Module, options: dict[str, Any]) -> FOP:
    return FOP([p for name, p in model.named_parameters() if not name.startswith("4")], **options)


def compiled(model: nn.Module, options: dict[str, Any], kind: type[FOP] = FOP) -> FOP:
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    return kind(model, **options)


# --- all of them -------------------------------------------------------------------------------------------

UNEQUAL = partial(accumulate, sizes=(5, 2, 1))
EQUAL = partial(accumulate, sizes=(4, 4, 4))
LEAN = {"mode": "lean"}
HALVES = {"pair": "halves"}
DDP = Training(EVERYTHING, {"layer_options": NORMS}, wrap="ddp", ranks=2, slow=True)

NAMED: dict[str, Training] = {
    "mlp": Training(),
    "mlp-defaults": Training(
        options={"lr": 0.05, "damping": 1e-3, "kl_clip": 1e-3, "curvature_interval": 100}
    ),
    "mlp-kfac": Training(kind=KFAC),
    "mlp-parameters": Training(make=from_parameters),
    "mlp-names": Training(make=from_names),
    "cnn": Training(CNN),
    "cnn-norms-fop": Training(CNN, {"layer_options": NORMS}),
    "cnn-kfac": Training(CNN, {"layer_options": NORMS}, KFAC),
    "convolutions": Training(CONVOLUTIONS),
    "convolutions-kfac": Training(CONVOLUTIONS, kind=KFAC),
    "transformer": Training(TRANSFORMER),
    "transformer-norms-fop": Training(TRANSFORMER, {"layer_options": NORMS}),
    "transformer-kfac": Training(TRANSFORMER, kind=KFAC),
    "transformer-recompute": Training(Task(partial(Transformer, recompute=True), sentences)),
    "everything": Training(EVERYTHING, {"layer_options": NORMS}),
    "tied": Training(TIED),
    "tied-kfac": Training(TIED, kind=KFAC),
    "accumulate-equal": Training(step=EQUAL),
    "accumulate-unequal": Training(step=UNEQUAL),
    "accumulate-cnn": Training(CNN, step=UNEQUAL),
    "accumulate-tied": Training(TIED, step=EQUAL),
    "sub-batch": Training(step=labelled),
    "sub-batch-twice": Training(CNN, step=partial(labelled, passes=2)),
    "sub-batch-transformer": Training(TRANSFORMER, step=labelled),
    "clip": Training(step=clipped),
    "clip-transformer": Training(TRANSFORMER, step=clipped),
    "max-grad-norm": Training(options={"max_grad_norm": 0.3}),
    "max-grad-norm-cnn": Training(CNN, {"max_grad_norm": 0.3}),
    "changed-gradients": Training(step=changed),
    "not-finite": Training(step=not_finite),
    "frozen": Training(step=frozen),
    "frozen-parameters": Training(step=frozen, make=from_parameters),
    "scaler": Training(step=scaled),
    "scaler-clip": Training(CNN, step=partial(scaled, clip=0.3)),
    "nesterov": Training(options={"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "nesterov-transformer": Training(
        TRANSFORMER, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ),
    "no-momentum": Training(options={"momentum": 0.0, "weight_decay": 0.0}),
    "sum": Training(options={"loss_reduction": "sum"}),
    "sum-accumulate": Training(CNN, {"loss_reduction": "sum"}, step=UNEQUAL),
    "fixed-beta": Training(options={"beta": 0.5, "eta": 0.75}),
    "fixed-beta-alone": Training(options={"beta": 0.3}),
    "fixed-eta-alone": Training(CNN, {"eta": 0.5}),
    "no-kl-clip": Training(options={"kl_clip": None}),
    "no-kl-clip-transformer": Training(TRANSFORMER, {"kl_clip": None, "damping": 0.1}),
    "maximize": Training(options={"maximize": True, "lr": 0.005}),
    "adamw-options": Training(CNN, {"adamw_lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    "stat-decay": Training(options={"stat_decay": 0.5, "curvature_interval": 1}),
    "layer-adamw": Training(options={"layer_options": {"2": {"path": "adamw"}}}),
    # Not the attention: a key's gradients add up to rounding error alone.
    "layer-reduce": Training(TRANSFORMER, {"layer_options": {nn.Linear: {"weight_sharing": "reduce"}}}),
    "layer-reduce-cnn": Training(CNN, {"layer_options": {nn.Conv2d: {"weight_sharing": "reduce"}}}),
    "layer-diagonal": Training(options={"layer_options": {"*": {"max_factor_dim": 6}}}),
    "layer-diagonal-all": Training(CONVOLUTIONS, {"layer_options": {"*": {"max_factor_dim": 1}}}),
    # As many samples as tokens: only the option can tell them apart.
    "layer-batch-dim": Training(
        BATCH_SECOND, {"layer_options": {"*": {"batch_dim": 1}, "head": {"batch_dim": 0}}}, samples=5
    ),
    "batch-unknown": Training(BATCH_SECOND, samples=5),
    "batch-second": Training(BATCH_SECOND),
    "groups": Training(make=from_groups),
    "groups-cnn": Training(CNN, make=from_groups),
    "group-added": Training(make=without_last_layer, step=regrouped),
    "damping-schedule": Training(options={"damping": lambda step: 0.1 * 0.9**step}),
    "interval-schedule": Training(options={"curvature_interval": lambda step: 1 + step // 8}),
    "scheduler": Training(
        step=partial(scheduled, kind=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=41))
    ),
    "scheduler-cosine": Training(
        CNN, step=partial(scheduled, kind=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40))
    ),
    "closure": Training(step=with_closure),
    "two-losses": Training(step=two_losses),
    "varied-batches": Training(step=varied),
    "evaluated": Training(CNN, step=evaluated),
    "request-curvature": Training(options={"curvature_interval": 50}, step=requested),
    "resume": Training(step=resumed),
    "resume-parameters": Training(step=resumed, make=from_parameters),
    "resume-groups": Training(step=resumed, make=from_groups),
    "resume-cnn": Training(CNN, {"layer_options": NORMS}, step=resumed),
    "resume-transformer": Training(TRANSFORMER, {"curvature_interval": 7}, step=resumed),
    "resume-tied": Training(TIED, step=resumed),
    "resume-kfac": Training(kind=KFAC, step=resumed),
    "compile": Training(make=compiled, slow=True),
    "compile-cnn": Training(CNN, make=compiled, slow=True),
    "compile-tied": Training(TIED, make=compiled, slow=True),
    "compile-kfac": Training(make=partial(compiled, kind=KFAC), slow=True),
    # More that ranks must do as one process does is compared in distributed/test_ranks_train.py.
    "ranks2-ddp": DDP,
    "ranks2-ddp-cnn": replace(DDP, task=CNN, rest=True),
    "ranks2-ddp-halves": replace(DDP, options={"distributed": HALVES}, rest=True),
    "ranks2-ddp-accumulate": replace(DDP, step=partial(accumulate, sizes=(4, 3), synchronise=False)),
    "ranks2-groups": replace(DDP, task=MLP, make=from_groups, wrap="", options={}),
    "ranks2-ddp-scaler": replace(DDP, task=MLP, options={}, step=scaled),
    "ranks2-frozen": replace(DDP, task=MLP, options={}, step=frozen, wrap=""),
    "ranks2-ddp-resume": replace(DDP, task=MLP, options={}, step=resumed),
    "ranks2-ddp-delay": replace(DDP, options={"inverse_delay": 2}, rest=True),
    "ranks2-lean": replace(DDP, options={"distributed": LEAN, "layer_options": NORMS}, rest=True),
    "ranks2-lean-halves": replace(DDP, options={"distributed": {**LEAN, **HALVES}}, rest=True),
    "ranks2-lean-accumulate": replace(
        DDP,
        options={"distributed": LEAN},
        step=partial(accumulate, sizes=(4, 3), synchronise=False),
        rest=True,
    ),
    "ranks2-lean-delay": replace(DDP, options={"distributed": LEAN, "inverse_delay": 2}),
    "ranks2-plain": replace(DDP, wrap="", rest=True),
    "ranks2-plain-halves": replace(DDP, wrap="", options={"distributed": HALVES}),
    "ranks2-fsdp": replace(DDP, wrap="fsdp"),
    "ranks2-fsdp-cnn": replace(DDP, wrap="fsdp", task=CONVOLUTIONS, options={}),
    "ranks2-fsdp-kfac": replace(DDP, wrap="fsdp", kind=KFAC, rest=True),
    "ranks4-ddp-halves": replace(DDP, ranks=4, options={"distributed": HALVES}, rest=True),
    "ranks4-lean-halves": replace(DDP, ranks=4, options={"distributed": {**LEAN, **HALVES}}),
}


# --- random networks ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + f(x); f may be an attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.MultiheadAttention):
            return x + self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        return x + self.inner(x)  # type: ignore[no-any-return]


class Sequences(nn.Module):
    """Embedding, blocks over (n, tokens, width), and a head; the mean over tokens, or next tokens."""

    def __init__(self, embed: nn.Module, blocks: list[nn.Module], head: nn.Module, tied: bool) -> None:
        super().__init__()
        self.embed, self.blocks, self.head, self.tied = embed, nn.Sequential(*blocks), head, tied
        if tied:
            head.weight = embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embed(ids))
        out: Tensor = self.head(x if self.tied else x.mean(1))
        return out


class Channels(nn.Module):
    """A convolution over tokens."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.mT).mT
        return out


ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)


def random_vectors(draw: random.Random) -> tuple[list[nn.Module], bool]:
    width, layers, batch_norm = 5, [], False
    for _ in range(draw.randint(0, 3)):
        new, norm = draw.randint(2, 8), draw.choice(("none", "none", "layer", "batch"))
        # The gradient of a bias before BatchNorm is rounding error alone.
        layers.append(nn.Linear(width, new, bias=norm != "batch" and draw.random() < 0.7))
        if norm != "none":
            layers.append(nn.LayerNorm(new) if norm == "layer" else nn.BatchNorm1d(new))
        batch_norm |= norm == "batch"
        layers.append(draw.choice(ACTIVATIONS)())
        width = new
    return [*layers, nn.Linear(width, 3, bias=draw.random() < 0.7)], batch_norm


def random_images(draw: random.Random) -> list[nn.Module]:
    width, layers = 2, []
    for _ in range(draw.randint(1, 3)):
        new, norm = draw.choice((2, 4, 6)), draw.choice(("none", "none", "group", "batch"))
        options: dict[str, Any] = {
            "kernel_size": draw.randint(1, 3),
            "stride": draw.choice((1, 1, 2)),
            "padding": draw.randint(0, 1),
            "groups": draw.choice((1, 1, 2)),
            "bias": norm != "batch" and draw.random() < 0.7,
        }
        if draw.random() < 0.25:
            options["padding"] = 0
            layers.append(nn.ConvTranspose2d(width, new, **options))
        else:
            mode = draw.choice(("zeros", "zeros", "circular", "replicate"))
            layers.append(nn.Conv2d(width, new, padding_mode=mode, dilation=1, **options))
        # One row and column more, so that the image never becomes too small.
        layers.append(nn.ZeroPad2d((1, 1, 1, 1)))
        if norm != "none":
            layers.append(nn.GroupNorm(draw.choice((1, 2)), new) if norm == "group" else nn.BatchNorm2d(new))
        layers.append(draw.choice(ACTIVATIONS)())
        width = new
    return [*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3)]


def random_sequences(draw: random.Random, tied: bool) -> nn.Module:
    width = draw.choice((4, 6, 8))
    embed = nn.Embedding(VOCABULARY, width, padding_idx=draw.choice((None, 0)))
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(("linear", "attention", "transformer", "conv", "norm"))
        if kind == "linear":
            inner = nn.Sequential(
                nn.Linear(width, width, bias=draw.random() < 0.5), draw.choice(ACTIVATIONS)()
            )
            blocks.append(Residual(inner))
        elif kind == "attention":
            blocks.append(
                Residual(nn.MultiheadAttention(width, 2, bias=draw.random() < 0.7, batch_first=True))
            )
        elif kind == "transformer":
            blocks.append(nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True))
        elif kind == "conv":
            blocks.append(Channels(nn.Conv1d(width, width, 3, padding=1, groups=draw.choice((1, 2)))))
        else:
            blocks.append(nn.LayerNorm(width))
    head = nn.Linear(width, VOCABULARY if tied else 3, bias=not tied)
    return Sequences(embed, blocks, head, tied)


def random_options(draw: random.Random, kind: type[FOP]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "lr": draw.choice((0.01, 0.03, 0.1)),
        "momentum": draw.choice((0.0, 0.5, 0.9)),
        "weight_decay": draw.choice((0.0, 0.01, 0.1)),
        "damping": draw.choice((1e-3, 1e-2, 0.1)),
        "stat_decay": draw.choice((0.0, 0.5, 0.9)),
        "curvature_interval": draw.randint(1, 4),
        "kl_clip": draw.choice((None, 1e-3, 1e-2)),
        "adamw_lr": draw.choice((1e-3, 1e-2)),
        "loss_reduction": draw.choice(("mean", "mean", "sum")),
        "max_grad_norm": draw.choice((None, None, 0.5)),
    }
    options["nesterov"] = options["momentum"] > 0 and draw.random() < 0.3
    if kind is FOP and draw.random() < 0.3:
        options |= {"beta": draw.choice((0.0, 0.3, 0.7)), "eta": draw.choice((0.5, 1.0, "adaptive"))}
    choices: dict[Any, dict[str, Any]] = {}
    if draw.random() < 0.4:
        choices |= NORMS
    if draw.random() < 0.3:
        choices["*"] = {"max_factor_dim": draw.choice((1, 4, 6))}
    if draw.random() < 0.2:
        choices[nn.Conv2d] = choices[nn.Linear] = {"weight_sharing": "reduce"}
    return {**options, "layer_options": choices}


def random_training(index: int) -> Training:
    """The random network of this number, always the same one."""
    draw = random.Random(index)
    family = draw.choice(("vectors", "images", "sequences", "tokens"))
    structure = draw.random()
    kind = draw.choice((FOP, FOP, FOP, KFAC))
    options = random_options(draw, kind)
    batch_norm = False
    task: Task
    if family == "vectors":
        batch_norm = random_vectors(random.Random(structure))[1]
        task = Task(lambda: nn.Sequential(*random_vectors(random.Random(structure))[0]), vectors)
    elif family == "images":
        task = Task(
            lambda: nn.Sequential(*random_images(random.Random(structure))), partial(vectors, shape=(2, 5, 4))
        )
    elif family == "sequences":
        task = Task(lambda: random_sequences(random.Random(structure), False), sentences)
    else:
        task = Task(lambda: random_sequences(random.Random(structure), True), next_tokens, token_error)
    steps = [
        plain,
        plain,
        EQUAL,
        partial(accumulate, sizes=(4, 3, 2)),
        labelled,
        clipped,
        resumed_early,
        with_closure,
    ]
    return Training(
        task,
        options,
        kind,
        step=draw.choice(steps),
        samples=draw.randint(2 if batch_norm else 1, 9),
        steps=10,
        slow=True,
    )


def resumed_early(run: Run, step: int) -> None:
    """As `resumed`, in a training of 10 steps."""
    resumed(run, 20) if step == 5 else plain(run, step)


TRAININGS = {**NAMED, **{f"random-{index:03}": random_training(index) for index in range(100)}}


# --- running -----------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(rank: int, name: str) -> dict[str, Tensor]:
    """Run a training in this process, and return the parameters."""
    training = TRAININGS[name]
    with as_when_recorded(), warnings.catch_warnings():
        # Steps without a pair and steps that are refused are meant here.
        warnings.simplefilter("ignore")
        run = Run(training, rank)
        start = {key: whole(p) for key, p in run.inner.named_parameters()}
        for step in range(training.steps):
            (training.step or plain)(run, step)
    end = {key: whole(p) for key, p in run.inner.named_parameters()}
    assert not all(torch.equal(start[key], value) for key, value in end.items()), "nothing was trained"
    return end


def result_of(name: str) -> dict[str, Tensor]:
    """Run a training on as many ranks as it needs, and return the parameters.

    Raises:
        AssertionError: ranks ended with different weights.
    """
    if not (ranks := TRAININGS[name].ranks):
        return train(0, name)
    first, *others = run_ranks(train, ranks, name)
    for other in others:
        assert all(torch.equal(value, other[key]) for key, value in first.items()), f"{name}: ranks differ"
    return first


def differences(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the distance of each parameter from what it should be, relative to the norm of that."""
    return {key: float((actual[key] - value).norm() / value.norm()) for key, value in expected.items()}
