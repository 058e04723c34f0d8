"""A long run interrupted in every way a real one is: it learns, stays finite, and holds no more memory.

The interruptions come at random (seeded), several at a time. Afterwards their counts are asserted, so that
the run cannot quietly become an undisturbed one.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import random
import resource
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import lr_scheduler

from fop import FOP
from models import assert_equal, snapshot, weights

WORDS, LENGTH, DIM = 12, 6, 8
STEPS, SETTLED, ADDED = 800, 300, 200

HARMLESS = {
    "evaluate",
    "copy",
    "train a copy",
    "backward without step",
    "gradient of an input",
    "overflow",
    "resume",
}
KINDS = HARMLESS | {
    "accumulate",
    "add group",
    "batch: empty",
    "batch: odd",
    "batch: one",
    "clip norm",
    "clip value",
    "freeze",
    "nan",
    "scaled",
    "thaw",
    "toggle",
    "unused layer",
    "zeros",
}


class Translator(nn.Module):
    """Says what the previous word means: convolution, attention, norms, tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, DIM)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.before_attention = nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.expert = nn.Linear(DIM, DIM)
        self.adapter = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.use_expert = True

    def forward(self, words: Tensor) -> Tensor:
        h = self.embed(words)
        h = h + torch.relu_(self.conv(h.transpose(1, 2))).transpose(1, 2)
        normed = self.before_attention(h)
        h = h + self.attention(normed, normed, normed, need_weights=False)[0]
        if self.use_expert:
            h = h + torch.tanh(self.expert(h))
        out: Tensor = self.head(self.norm(h + self.adapter(h)))
        return out


def words(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, WORDS, (n, LENGTH), generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    target = (5 * x.roll(1, dims=1) + 3) % WORDS
    total = nn.functional.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum")
    return total / max(1, x.numel())


class Run:
    """A training run with its interruptions; ``harmless`` are those that must leave no trace."""

    def __init__(self, harmful: float, harmless: float) -> None:
        self.harmful, self.harmless = harmful, harmless
        # Two sources of chance: a run without the harmless interruptions draws the same harmful ones.
        self.chance, self.harmless_chance = random.Random(0), random.Random(1)
        self.data = torch.Generator().manual_seed(0)
        self.other_data = torch.Generator().manual_seed(1)
        self.counts: Counter[str] = Counter()
        self.dead: list[weakref.ref[Any]] = []
        self.copies: list[nn.Module] = []
        self.added = False
        self.steps = 0
        self.make(Translator())

    def make(self, model: Translator) -> None:
        """Set up as a script does, at the start and after every resume."""
        self.model = model
        adapter = list(model.adapter.requires_grad_(self.added).parameters())
        rest = [p for p in model.parameters() if all(p is not own for own in adapter)]
        self.optimizer = FOP(rest, lr=0.05, weight_decay=1e-3, curvature_interval=20)
        if self.added:
            self.optimizer.add_param_group({"params": adapter, "lr": 0.02})
        self.scheduler = lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 200, eta_min=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)

    def happens(self, name: str, probability: float) -> bool:
        happened = self.chance.random() < probability * self.harmful
        self.counts[name] += happened
        return happened

    def happens_harmlessly(self, name: str, probability: float) -> bool:
        happened = self.harmless_chance.random() < probability * self.harmless
        self.counts[name] += happened
        return happened

    # Interruptions between steps

    def resume(self) -> None:
        parts = (self.model, self.optimizer, self.scheduler, self.scaler)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        model = Translator()
        for old, new in zip(self.model.parameters(), model.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        self.dead += [weakref.ref(part) for part in (self.model, self.optimizer)]
        del self.optimizer, parts
        self.make(model)
        new_parts = (self.model, self.optimizer, self.scheduler, self.scaler)
        for part, state in zip(new_parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)

    def add_group(self) -> None:
        self.model.adapter.requires_grad_(True)
        self.optimizer.add_param_group({"params": self.model.adapter.parameters(), "lr": 0.02})
        # torch's schedulers do not notice a new group: scripts make them anew.
        state = self.scheduler.state_dict()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.scheduler = lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 200, eta_min=1e-3)
        self.scheduler.load_state_dict({**state, "base_lrs": [*state["base_lrs"], 0.02]})
        self.added = True
        self.counts["add group"] += 1

    def freeze_or_thaw(self) -> None:
        layers = [self.model.conv, self.model.attention, self.model.expert, self.model.norm]
        layer = self.chance.choice([*layers, self.model.expert.bias])
        params = [layer] if isinstance(layer, Tensor) else list(layer.parameters())
        frozen = not params[0].requires_grad
        self.counts["thaw" if frozen else "freeze"] += 1
        for p in params:
            p.requires_grad_(frozen)

    def disturb(self) -> None:
        """What reads the model without training it."""
        x = words(3, self.other_data)
        if self.happens_harmlessly("evaluate", 0.1):
            self.model.eval()
            with self.harmless_chance.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])():
                loss_of(self.model, x)
            self.model.train()
        if self.happens_harmlessly("copy", 0.05):
            self.copies = [*self.copies[-1:], copy.deepcopy(self.model)]
        if self.copies and self.happens_harmlessly("train a copy", 0.05):
            loss_of(self.copies[0], x).backward()
            torch.optim.SGD(self.copies[0].parameters(), lr=0.1).step()
        if self.happens_harmlessly("backward without step", 0.05):
            self.optimizer.zero_grad(set_to_none=self.harmless_chance.random() < 0.5)
            loss_of(self.model, x).backward()
        if self.happens_harmlessly("gradient of an input", 0.05):
            rows = torch.ones(2, DIM, requires_grad=True)
            torch.autograd.grad(self.model.expert(rows).sum(), rows)
        if self.happens_harmlessly("overflow", 0.05):
            self.optimizer.zero_grad()
            (self.scaler.scale(loss_of(self.model, x)) * 1e38).backward()
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update(scale)
        # Later one optimizer lives for 1,500 steps: a resume would hide what it piles up.
        if self.steps < SETTLED and self.happens_harmlessly("resume", 0.06):
            self.resume()

    # One step

    def batch(self) -> Tensor:
        for name, size, probability in (("one", 1, 0.05), ("odd", 7, 0.1), ("empty", 0, 0.03)):
            if self.happens(f"batch: {name}", probability):
                return words(size, self.data)
        return words(16, self.data)

    def step(self) -> None:
        self.disturb()
        self.model.use_expert = not self.happens("unused layer", 0.2)
        if self.happens("toggle", 0.05):
            self.freeze_or_thaw()
        self.optimizer.zero_grad()
        if self.happens("zeros", 0.2):
            # For all of them, whatever had one before: zeros move a layer by its momentum, None does not.
            for p in self.model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            self.optimizer.zero_grad(set_to_none=False)
        scaled, passes = self.happens("scaled", 0.1), 1
        if self.happens("accumulate", 0.1):
            passes = self.chance.choice([2, 3, 4])
        factor = 1.0
        if self.happens("nan", 0.02):
            factor = self.chance.choice([float("nan"), float("inf")])
        for _ in range(passes):
            loss = factor * loss_of(self.model, self.batch()) / passes
            (self.scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        if self.happens("clip norm", 0.2):
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        if self.happens("clip value", 0.05):
            nn.utils.clip_grad_value_(self.model.parameters(), 0.05)
        if scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.steps += 1

    def held(self) -> dict[str, Any]:
        """What must be the same at two times of a run that has settled."""
        self.copies.clear()
        self.model.use_expert = True
        for step in range(25):  # past a curvature update of every layer; a bias without its weight at the end
            self.model.requires_grad_(True)
            self.model.expert.weight.requires_grad_(step < 24)
            self.optimizer.zero_grad()
            loss_of(self.model, words(16, self.data)).backward()
            self.optimizer.step()
        self.model.requires_grad_(True)
        self.optimizer.zero_grad()
        self.scaler.scale(torch.zeros(()))  # it lays out its own tensors late
        gc.collect()
        # By storage: a view of an inverse may or may not have its base beside it.
        storages = {
            storage.data_ptr(): storage.nbytes()
            for each in gc.get_objects()
            if type(each) in (Tensor, nn.Parameter) and (storage := each.untyped_storage()).nbytes()
        }
        state = self.optimizer.state_dict()["state"]
        return {
            "tensors": len(storages),
            "bytes": sum(storages.values()),
            "state": {index: sorted(entry) for index, entry in state.items()},
            "hooks": hooks(self.model),
        }


def hooks(model: nn.Module) -> int:
    """Hooks on modules, on parameters, and for all modules of the process."""
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for p in model.parameters():
        count += len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ())
    return count + len(torch_module._global_forward_pre_hooks) + len(torch_module._global_forward_hooks)


def resident() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * resource.getpagesize() if file.exists() else 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not finite:RuntimeWarning")
def test_interrupted_steps() -> None:
    run = Run(harmful=1.0, harmless=1.0)
    examples = words(64, torch.Generator().manual_seed(9))
    with torch.no_grad():
        start = loss_of(run.model, examples)
    for step in range(STEPS):
        if step == ADDED:
            run.add_group()
        if step == SETTLED:
            before, objects, memory = run.held(), sys.getallocatedblocks(), resident()
        run.step()

    assert run.held() == before
    # Noise is a few hundred objects; one more a step would be the smallest leak there is.
    assert sys.getallocatedblocks() - objects < STEPS - SETTLED
    # The activations of one forward pass take about 50 KiB.
    assert resident() - memory < 16 * 2**20
    run.resume()
    assert run.held() == before
    gc.collect()
    assert not any(ref() for ref in run.dead)

    assert run.counts.keys() == KINDS
    assert run.counts.pop("add group") == 1
    assert min(run.counts.values()) >= 10, run.counts
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    for entry in run.optimizer.state.values():
        assert all(bool(v.isfinite().all()) for v in entry.values() if isinstance(v, Tensor))
    with torch.no_grad():
        end = loss_of(run.model, examples)
    assert end < math.log(WORDS) / 2 < start


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not finite:RuntimeWarning")
def test_harmless_interruptions_leave_no_trace() -> None:
    """Resuming, evaluating, copying, skipped steps: bit for bit the run without them."""
    ends = []
    for harmless in (0.0, 2.0):
        run = Run(harmful=1.0, harmless=harmless)
        for step in range(200):
            if step == 100:
                run.add_group()
            run.step()
        ends.append((weights(run.model), snapshot(run.optimizer)["state"]))
        happened = {kind for kind in HARMLESS if run.counts[kind] > 3}
        assert happened == (HARMLESS if harmless else set())
    assert_equal(*ends)
