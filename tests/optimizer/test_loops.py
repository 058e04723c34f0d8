"""Loops with more in them than forward, backward and step: the same updates, or a word why not.

Activation checkpointing and offloading are among them; no activation is kept that they let go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from contract import ours
from fop import FOP, KFAC
from models import PLAIN, batch, check_step, gradients, halves, kfac, mlp, weights
from reference import half_squared_error
from versions import knows_retained_graphs, requires_torch

Run = Callable[[nn.Module, Tensor], Tensor]
# From step 10 on, the curvature is renewed in every second step only.
STEPS = 13
OPTIONS: dict[str, Any] = {
    "step_length": "paper",
    "damping": 1e-2,
    "curvature_interval": 2,
    "layer_options": {"norm": {"path": "fop"}},
}


def directly(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = block(x)
    return out


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
    """Tokens through an embedding, attention, convolutions, a small MLP, a norm, and two linear heads.

    Args:
        run: how the blocks are run.
        dropout: in the attention block.
    """

    def __init__(self, run: Run = directly, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=dropout, batch_first=True)
        mlp = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.GELU())
        self.blocks = nn.ModuleList([layer, Convolutions(), mlp])
        self.up, self.norm = nn.ConvTranspose1d(6, 6, 2, stride=2), nn.GroupNorm(2, 6)
        self.mean, self.scale = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)
        self.run = run
        self.double()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return self.tail(self.embed(ids))

    def tail(self, h: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            h = self.run(block, h)
        h = self.norm(self.up(h.mT)).mT
        return {"mean": self.mean(h), "scale": self.scale(h)}


LAYERS = 13


def sentences(seed: int, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, 8, 3, dtype=torch.float64, generator=generator)
    return torch.randint(0, 9, (n, 4), generator=generator), y


def losses_of(model: nn.Module, seed: int, n: int = 5) -> tuple[Tensor, Tensor]:
    ids, y = sentences(seed, n)
    out = model(ids)
    return half_squared_error(out["mean"], y), 0.1 * out["scale"].square().flatten(1).sum(1).mean()


def loss_of(model: nn.Module, seed: int, n: int = 5) -> Tensor:
    """A number from several outputs."""
    return sum(losses_of(model, seed, n))  # type: ignore[return-value]


def plain(model: Net, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


# --- things done around the passes that must leave no trace ------------------------------------------------


def evaluated(model: Net, optimizer: FOP, step: int) -> None:
    """All ways to evaluate, between the two passes of a step."""
    optimizer.zero_grad()
    loss = loss_of(model, step)
    model.eval()
    with torch.no_grad():
        loss_of(model, 100 + step, 4)
    with torch.inference_mode():
        loss_of(model, 200 + step, 3)
    loss_of(model, 300 + step, 7)
    model.train()
    loss.backward()
    with torch.inference_mode():
        loss_of(model, 400 + step, 5)
    optimizer.step()


def never_backwarded(model: Net, optimizer: FOP, step: int) -> None:
    """Graphs of other batches stay alive all the time."""
    optimizer.zero_grad()
    before = loss_of(model, 100 + step, 3)
    loss = loss_of(model, step)
    after = loss_of(model, 200 + step, 4)
    loss.backward()
    optimizer.step()
    assert before.grad_fn is not None and after.grad_fn is not None


def reset_by_the_model(model: Net, optimizer: FOP, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    model.zero_grad()


def reset_to_zeros(model: Net, optimizer: FOP, step: int) -> None:
    (optimizer, model)[step % 2].zero_grad(set_to_none=False)
    loss_of(model, step).backward()
    optimizer.step()


def thrown_away(model: Net, optimizer: FOP, step: int) -> None:
    """A backward pass that no step follows, whose gradients are reset by hand."""
    loss_of(model, 100 + step, 4).backward()
    for param in model.parameters():
        param.grad = None
    loss_of(model, step).backward()
    optimizer.step()
    for param in model.parameters():
        param.grad = None


def closure_called_before(model: Net, optimizer: FOP, step: int) -> None:
    """As LBFGS would: several evaluations, of which the last counts."""

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    evaluate()
    evaluate()
    optimizer.step(evaluate)  # type: ignore[arg-type]


def gradient_of_the_embedded(model: Net, optimizer: FOP, step: int) -> None:
    """As saliency maps or adversarial training do, before the pass that counts."""
    h = model.embed(sentences(step)[0]).detach().requires_grad_()
    torch.autograd.grad(model.tail(h)["mean"].sum(), h)
    plain(model, optimizer, step)


def gradient_on_the_same_graph(model: Net, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    optimizer.step()


def with_a_graph_of_the_gradient(model: Net, optimizer: FOP, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def backwarded_for_some(model: Net, optimizer: FOP, step: int) -> None:
    """Gradients of the parameters are asked for one half after the other."""
    optimizer.zero_grad()
    loss = loss_of(model, step)
    heads = [*model.mean.parameters(), *model.scale.parameters()]
    rest = [p for p in model.parameters() if all(p is not head for head in heads)]
    loss.backward(inputs=heads, retain_graph=True)
    loss.backward(inputs=rest)
    optimizer.step()


def under_detection(model: Net, optimizer: FOP, step: int) -> None:
    with torch.autograd.set_detect_anomaly(True):
        plain(model, optimizer, step)


def without_multithreading(model: Net, optimizer: FOP, step: int) -> None:
    with torch.autograd.set_multithreading_enabled(False):
        plain(model, optimizer, step)


LOOPS: list[Callable[[Net, FOP, int], None]] = [
    evaluated,
    never_backwarded,
    reset_by_the_model,
    reset_to_zeros,
    thrown_away,
    closure_called_before,
    gradient_of_the_embedded,
    gradient_on_the_same_graph,
    with_a_graph_of_the_gradient,
    backwarded_for_some,
    under_detection,
    without_multithreading,
]


# --- activation checkpointing and offloading ---------------------------------------------------------------


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
    return non_reentrant(partial(non_reentrant, block), x)  # type: ignore[arg-type]


def nested_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return reentrant(partial(non_reentrant, block), x)  # type: ignore[arg-type]


def selective(block: nn.Module, x: Tensor) -> Tensor:
    """Matrix products are kept, the rest is computed again."""
    # Since torch 2.5.
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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
        return directly(block, x)


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
both = pytest.mark.parametrize("way", [reentrant, non_reentrant])


# --- the same updates --------------------------------------------------------------------------------------


def trained(
    loop: Callable[[Net, FOP, int], None] = plain,
    run: Run = directly,
    library: type[FOP] = FOP,
    dropout: float = 0.0,
    bare: bool = False,
    wrap: Callable[[Net], nn.Module] = lambda net: net,
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """Weights after a run in which every layer had its pair in every step."""
    net = Net(run, dropout)
    model: Any = wrap(net)
    optimizer = library(model.parameters() if bare else net, **OPTIONS)
    for step in range(steps):
        torch.manual_seed(step)
        loop(model, optimizer, step)
    layers = optimizer.diagnostics().layers
    assert len(layers) == LAYERS and not any(layer.kfac_steps for layer in layers.values())
    return weights(net)


@cache
def expected(library: type[FOP] = FOP) -> dict[str, Tensor]:
    return trained(library=library)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:Anomaly Detection")
@ours
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_that_change_nothing(loop: Callable[[Net, FOP, int], None], library: type[FOP]) -> None:
    assert_close(trained(loop, library=library), expected(library))


@ours
@pytest.mark.core
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=requires_torch("2.5", "it has selective checkpointing"))
        if way is selective
        else way
        for way in WAYS
    ],
)
def test_checkpointing_changes_nothing(way: Run, library: type[FOP]) -> None:
    assert_close(trained(run=way, library=library), expected(library))


@both
def test_checkpointing_from_bare_parameters(way: Run) -> None:
    assert_close(trained(run=way, bare=True), expected())


@both
def test_dropout_is_drawn_again(way: Run) -> None:
    assert_close(trained(run=way, dropout=0.2), trained(dropout=0.2))


@both
def test_an_embedding_that_is_computed_again(way: Run) -> None:
    """A reentrant region needs an input with a gradient, which token numbers have not."""

    class Region(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
            return self.net.tail(checkpoint(self._embed, ids, anchor, use_reentrant=way is reentrant))

        def _embed(self, ids: Tensor, anchor: Tensor) -> Tensor:
            return self.net.embed(ids) + anchor

    assert_close(trained(wrap=Region), expected())


def accumulated(model: Net, optimizer: FOP, step: int) -> None:
    """Several graphs are alive at a time, each of which recomputes its own part of the forward pass."""
    optimizer.zero_grad()
    losses = [loss_of(model, 10 * step + part) / 3 for part in range(3)]
    for loss in reversed(losses):
        loss.backward()
    optimizer.step()


@pytest.mark.slow
@both
def test_accumulation_of_checkpointed_passes(way: Run) -> None:
    assert_close(trained(accumulated, way), trained(accumulated))


@both
def test_a_block_that_is_checkpointed_twice_in_a_pass(way: Run) -> None:
    """Two uses of its weights on one batch, also where each region has a backward pass of its own."""
    once_more = [lambda block, x, run=run: run(block, run(block, x)) for run in (way, directly)]
    runs = []
    for run in once_more:
        model = Net(run)
        optimizer = FOP(model, **OPTIONS)
        for step in range(3):
            plain(model, optimizer, step)
        runs.append(weights(model))
    assert_close(*runs)


def test_curvature_asked_for_between_the_passes() -> None:
    """What is wanted of a backward pass is settled in its forward pass: both must save the same tensors."""
    model = Net(non_reentrant)
    optimizer = KFAC(model, **{**OPTIONS, "curvature_interval": 100})
    for step in range(13):
        plain(model, optimizer, step)
    assert not optimizer.curvature_due
    optimizer.zero_grad()
    loss = loss_of(model, 20)
    optimizer.request_curvature()
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in weights(model).values())


# --- several passes a step ---------------------------------------------------------------------------------


def test_losses_backwarded_one_by_one_have_the_pair_of_their_sum() -> None:
    """In a step without statistics, which would be of two passes, nothing tells them from one."""

    def two_at_last(model: Net, optimizer: FOP, step: int) -> None:
        if step < STEPS:
            plain(model, optimizer, step)
            return
        assert not optimizer.curvature_due
        optimizer.zero_grad()
        first, second = losses_of(model, step)
        first.backward(retain_graph=True)
        second.backward()
        optimizer.step()

    assert_close(trained(two_at_last, steps=STEPS + 1), trained(steps=STEPS + 1), 1e-10)


def assert_all_paired(optimizer: FOP) -> None:
    assert {name for name, d in optimizer.diagnostics().layers.items() if d.kfac_steps} == set()


@pytest.mark.core
@knows_retained_graphs
def test_the_same_graph_twice_is_twice_the_gradient() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(7)
    pairs = {name: (2 * a, 2 * d) for name, (a, d) in halves(twin, x, y).items()}
    loss = half_squared_error(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)
    assert_all_paired(optimizer)


def test_a_module_called_twice_in_a_pass() -> None:
    """Two views of each sample through one encoder, as in contrastive learning."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)

    def views(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return half_squared_error(model(x) - 0.5 * model(x.flip(1)), y)

    x, y = batch(7)
    pairs = halves(twin, x, y, views)
    views(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, pairs)
    assert_all_paired(optimizer)


# --- double backward ---------------------------------------------------------------------------------------


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """WGAN-GP: the slope at points between true and false samples."""
    between = (0.7 * x + 0.3 * x.flip(1)).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return half_squared_error(model(x), y) + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("interval", [1, 3])
def test_gradient_penalty_takes_the_right_gradient_and_says_that_there_is_no_pair(interval: int) -> None:
    model = critic()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **{**PLAIN, "curvature_interval": interval, "lr": 0.01})
    for step in range(4):
        x, y = batch(6, step, (2, 5))
        twin.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        penalised(model, x, y).backward()
        grads = torch.autograd.grad(penalised(twin, x, y), list(twin.parameters()))
        for param, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=1e-12, atol=1e-12)
        optimizer.step()
        layers = optimizer.diagnostics().layers
        assert layers.keys() == {"0", "3", "5"}
        for name in ("0", "3"):
            assert layers[name].kfac_steps == step + 1 and layers[name].why_kfac
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_gradient_penalty_step_is_kfac_with_the_whole_gradient() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FOP(model, **PLAIN)
    x, y = batch(6)
    whole = gradients(twin, penalised(twin, x, y))
    penalised(model, x, y).backward()
    optimizer.step()
    check_step(model, twin, optimizer, kfac({name: (average, None) for name, average in whole.items()}))


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


def alive_between(run: Run, driven: bool) -> tuple[set[str], set[str]]:
    """Names of the activations that live between forward and backward pass, and after the latter."""
    model = Net(run)
    optimizer = FOP(model, **OPTIONS) if driven else None
    with activations(model) as seen:
        loss = loss_of(model, 0)
        between = {name for name, storage in seen.items() if not storage.expired()}
    assert len(seen) >= 12
    with activations(model) as again:
        loss.backward()
    del loss
    after = {name for name, ref in {**seen, **again}.items() if not ref.expired()}
    del optimizer
    return between, after


@pytest.mark.core
@pytest.mark.parametrize("way", LETS_GO)
def test_no_activation_of_a_region_lives_between_the_passes(way: Run) -> None:
    assert alive_between(way, driven=True) == (set(), set())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in LETS_GO])
def test_other_ways_keep_what_they_keep_without_the_optimizer(way: Run) -> None:
    assert alive_between(way, driven=True) == alive_between(way, driven=False)


@pytest.mark.core
def test_without_checkpointing_no_activation_is_kept_that_autograd_would_not_keep() -> None:
    """This is also what makes the tests above able to fail."""
    between, after = alive_between(directly, driven=False)
    assert len(between) >= 6 and not after
    assert alive_between(directly, driven=True) == (between, after)


@pytest.mark.core
def test_saved_tensor_hooks_see_the_inputs() -> None:
    """All that our hooks keep goes through autograd: nothing is left when everything is packed away."""

    def packed_away(block: nn.Module, x: Tensor) -> Tensor:
        hooks = (lambda t: t.detach().numpy().copy(), torch.from_numpy)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            return directly(block, x)

    assert alive_between(packed_away, True) == alive_between(packed_away, False) == (set(), set())
