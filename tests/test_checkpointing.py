"""Activation checkpointing and offloading: the same updates, and no activation is kept that they let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from fop import FOP, KFAC
from models import batch, loss_of, train_step, weights

Run = Callable[[nn.Module, Tensor], Tensor]

# From step 10 on, the curvature is renewed in every second step only.
STEPS = 13
OPTIONS: dict[str, Any] = {"damping": 1e-2, "curvature_interval": 2}


def plain(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = block(x)
    return out


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=True)
    return out


def non_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=False)
    return out


def to_the_end(block: nn.Module, x: Tensor) -> Tensor:
    """Without stopping at the last tensor that is needed."""
    with set_checkpoint_early_stop(False):
        return non_reentrant(block, x)


def nested(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(partial(non_reentrant, block), x, use_reentrant=False)
    return out


def nested_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(partial(non_reentrant, block), x, use_reentrant=True)
    return out


def selective(block: nn.Module, x: Tensor) -> Tensor:
    """Matrix products are kept, the rest is computed again."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return out


def in_segments(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint_sequential(nn.Sequential(block, nn.Identity()), 2, x, use_reentrant=False)
    return out


def offloaded(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(block, x)


WAYS: list[Run] = [
    reentrant,
    non_reentrant,
    to_the_end,
    nested,
    nested_reentrant,
    selective,
    in_segments,
    offloaded,
]
LETS_GO: list[Run] = [non_reentrant, to_the_end, nested, in_segments]


class Convolutions(nn.Sequential):
    """A block with convolutions over the sequence and in-place activations."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 4, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv1d(4, 4, 1, bias=False),
            nn.Tanh(),
        )


class Net(nn.Module):
    """Tokens through an embedding, an attention block, convolutions and a small MLP.

    Args:
        run: how the blocks are run.
        dropout: in the attention block.
    """

    def __init__(self, run: Run, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=dropout, batch_first=True)
        mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.GELU())
        self.blocks = nn.ModuleList([layer, Convolutions(), mlp])
        self.head = nn.Linear(6, 3)
        self.run = run
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = self.run(block, h)
        out: Tensor = self.head(h.mean(1))
        return out


def sentences(seed: int, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (n, 4), generator=generator), batch(n, seed)[1]


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-12, atol=1e-12)


def trained(
    run: Run, make: Callable[..., FOP] = FOP, dropout: float = 0.0, bare: bool = False
) -> tuple[nn.Module, FOP]:
    model = Net(run, dropout)
    optimizer = make(model.parameters() if bare else model, **OPTIONS)
    for step in range(STEPS):
        torch.manual_seed(step)
        train_step(model, optimizer, *sentences(step))
    return model, optimizer


@pytest.fixture(scope="module")
def expected() -> Callable[[type[FOP]], nn.Module]:
    """The model trained without checkpointing."""
    known: dict[type[FOP], nn.Module] = {}

    def of(make: type[FOP]) -> nn.Module:
        if make not in known:
            known[make], optimizer = trained(plain, make)
            assert all(d.kfac_steps == 0 for d in optimizer.diagnostics().layers.values())
        return known[make]

    return of


# --- the same updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [FOP, KFAC])
@pytest.mark.parametrize("way", WAYS)
def test_updates_are_the_same(way: Run, make: type[FOP], expected: Callable[[type[FOP]], nn.Module]) -> None:
    model, optimizer = trained(way, make)
    assert_same(model, expected(make))
    layers = optimizer.diagnostics().layers
    assert len(layers) == 10 and all(d.kfac_steps == 0 for d in layers.values())


@pytest.mark.parametrize("way", [reentrant, non_reentrant])
def test_updates_are_the_same_from_bare_parameters(
    way: Run, expected: Callable[[type[FOP]], nn.Module]
) -> None:
    assert_same(trained(way, bare=True)[0], expected(FOP))


@pytest.mark.parametrize("way", [reentrant, non_reentrant])
def test_dropout_is_drawn_again(way: Run) -> None:
    assert_same(trained(way, dropout=0.2)[0], trained(plain, dropout=0.2)[0])


@pytest.mark.parametrize("way", [reentrant, non_reentrant])
def test_an_embedding_that_is_computed_again(way: Run, expected: Callable[[type[FOP]], nn.Module]) -> None:
    """A reentrant region needs an input with a gradient, which token numbers have not."""

    class Region(nn.Module):
        def __init__(self, model: Net) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
            h: Tensor = checkpoint(self._embed, ids, anchor, use_reentrant=way is reentrant)
            for block in self.model.blocks:
                h = block(h)
            out: Tensor = self.model.head(h.mean(1))
            return out

        def _embed(self, ids: Tensor, anchor: Tensor) -> Tensor:
            return self.model.embed(ids) + anchor

    model = Region(Net(plain))
    optimizer = FOP(model, **OPTIONS)
    for step in range(STEPS):
        train_step(model, optimizer, *sentences(step))
    assert_same(model.model, expected(FOP))


@pytest.mark.parametrize("way", [reentrant, non_reentrant])
def test_accumulation_of_checkpointed_passes(way: Run) -> None:
    """Several graphs are alive at a time, each of which recomputes its own part of the forward pass."""
    runs = []
    for run in (plain, way):
        model = Net(run)
        optimizer = FOP(model, **OPTIONS)
        for step in range(3):
            optimizer.zero_grad()
            losses = [loss_of(model, *sentences(10 * step + part)) / 3 for part in range(3)]
            for loss in reversed(losses):
                loss.backward()
            optimizer.step()
        assert all(d.kfac_steps == 0 for d in optimizer.diagnostics().layers.values())
        runs.append(model)
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("way", [reentrant, non_reentrant])
def test_a_block_that_is_checkpointed_twice_in_a_pass(way: Run) -> None:
    """Two uses of its weights on one batch, also where each region has a backward pass of its own."""
    runs = []
    for run in (plain, way):
        model = Net(lambda block, x, run=run: run(block, run(block, x)))  # type: ignore[misc]
        optimizer = FOP(model, **OPTIONS)
        for step in range(3):
            train_step(model, optimizer, *sentences(step))
        runs.append(model)
    assert_same(runs[1], runs[0])


def test_curvature_asked_for_between_the_passes() -> None:
    """What is wanted of a backward pass is settled in its forward pass: both must save the same tensors."""
    model = Net(non_reentrant)
    optimizer = KFAC(model, **{**OPTIONS, "curvature_interval": 100})
    for step in range(13):
        train_step(model, optimizer, *sentences(step))
    assert not optimizer.curvature_due
    optimizer.zero_grad()
    loss = loss_of(model, *sentences(20))
    optimizer.request_curvature()
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in weights(model).values())


# --- memory ------------------------------------------------------------------------------------------------


@contextmanager
def activations(model: Net) -> Iterator[dict[str, StorageWeakRef]]:
    """Collect the storage of every module's output inside the blocks, without keeping it alive."""
    seen: dict[str, StorageWeakRef] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        seen[name] = StorageWeakRef(tensor.untyped_storage())

    handles = []
    for index, block in enumerate(model.blocks):
        for name, module in block.named_modules():
            # The output of a block is the input of the next, which checkpointing keeps.
            if name and name not in ("norm2", "3") and next(module.children(), None) is None:
                handles.append(module.register_forward_hook(partial(note, f"{index}.{name}")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def alive_between(run: Run, make: Callable[[nn.Module], Any]) -> tuple[set[str], set[str]]:
    """Names of the activations that live between forward and backward pass, and after the latter."""
    model = Net(run)
    optimizer = make(model)
    with activations(model) as seen:
        loss = loss_of(model, *sentences(0))
        between = {name for name, storage in seen.items() if not storage.expired()}
    assert len(seen) >= 12
    with activations(model) as again:
        loss.backward()
    del loss
    after = {name for name, ref in {**seen, **again}.items() if not ref.expired()}
    del optimizer
    return between, after


def nothing(model: nn.Module) -> None:
    """No optimizer."""


def first_step(model: nn.Module) -> FOP:
    return FOP(model, **OPTIONS)


@pytest.mark.parametrize("way", LETS_GO)
def test_no_activation_of_a_region_lives_between_the_passes(way: Run) -> None:
    assert alive_between(way, first_step) == (set(), set())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in LETS_GO])
def test_other_ways_keep_what_they_keep_without_the_optimizer(way: Run) -> None:
    assert alive_between(way, first_step) == alive_between(way, nothing)


def test_without_checkpointing_no_activation_is_kept_that_autograd_would_not_keep() -> None:
    """This is also what makes the tests above able to fail."""
    between, after = alive_between(plain, nothing)
    assert len(between) >= 6 and not after
    assert alive_between(plain, first_step) == (between, after)


def test_saved_tensor_hooks_see_the_inputs() -> None:
    """All that our hooks keep goes through autograd: nothing is left when everything is packed away."""
    assert alive_between(_packed_away, first_step) == alive_between(_packed_away, nothing) == (set(), set())


def _packed_away(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return plain(block, x)
