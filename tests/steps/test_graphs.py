"""Captured steps: a recording of every operation of a step, replayed, takes the same steps.

A CUDA graph holds which kernels run on which memory, and none of Python; so does `Recording`, on the CPU.
What a GPU would refuse to capture is in `test_host_reads`, which captures a real graph where there is a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fop import FOP, KFAC


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Let torch say that a CUDA graph is being captured."""
    names = "cuda.is_current_stream_capturing", "cuda.is_initialized", "backends.cuda.is_built"
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"torch.{name}", lambda: True))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True, create=True))
        # Of tensors on the CPU torch would read the rate itself; on a GPU the kernel does.
        stack.enter_context(mock.patch("torch._fused_adamw_", torch.ops.aten._fused_adamw_.tensor_lr))
        yield


class Recording(TorchDispatchMode):
    """Runs operations and can run them again, on the same tensors, as often as wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []

    @classmethod
    def of(cls, step: Callable[[], None], model: nn.Module, optimizer: FOP) -> Recording:
        """Return the recording of a step, which leaves all as it was, as a capture does."""
        kept = [*model.parameters(), *model.buffers()]
        kept += [each for each in tree_leaves(list(optimizer.state.values())) if isinstance(each, Tensor)]
        before = [each.detach().clone() for each in kept]
        with as_captured(), cls() as recording:
            step()
        with torch.no_grad():
            for each, old in zip(kept, before, strict=True):
                each.copy_(old)
        return recording

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self._calls:
            aliases = [each.alias_info for each in function._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view of what is there
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class Network(nn.Module):
    """Layers of several kinds, and parameters that take AdamW, of which some are matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.out = nn.Linear(36, 8), nn.Linear(8, 3, bias=False)
        self.mix = nn.Parameter(torch.eye(8) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(self.norm(self.conv(x)).relu().flatten(1)).tanh()
        logits: Tensor = self.out(hidden @ self.mix)
        return logits


BATCH = torch.randn(12, 16, 2, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (12, 16), generator=torch.Generator().manual_seed(2))
# The curvature is renewed in steps 0, 1, 2, 4, 8, 12 and so on.
INTERVAL, STEPS = 4, 30

Make = Callable[..., FOP]


def by_groups(model: nn.Module, **options: Any) -> FOP:
    """Biases have a group of their own."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    return FOP([{"params": rest}, {"params": biases, "lr": 0.1}], **options)


def train(make: Make, *, replayed: bool, scheduled: bool, **options: Any) -> list[tuple[Tensor, str]]:
    """Return all tensors after every step, and the diagnostics; plain steps are replays if wanted."""
    torch.manual_seed(0)
    model = Network()
    optimizer = make(model, curvature_interval=INTERVAL, capturable=True, **options)
    # The schedule of all steps; annealing is then the schedule's.
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8) if scheduled else None
    x, y = BATCH[0].clone(), LABELS[0].clone()
    recording: Recording | None = None
    history, replays = [], 0

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()

    for n in range(STEPS):
        x.copy_(BATCH[n % len(BATCH)])
        y.copy_(LABELS[n % len(LABELS)])
        if optimizer.curvature_due or n < 10 or not replayed:
            step()
        else:
            recording = recording or Recording.of(step, model, optimizer)
            optimizer.replay(recording)  # type: ignore[arg-type]
            replays += 1
        if scheduler is not None:
            scheduler.step()
        tensors = [*model.parameters(), *tree_leaves(list(optimizer.state.values()))]
        flat = [each.detach().double().flatten() for each in tensors if isinstance(each, Tensor)]
        history.append((torch.cat(flat), str(optimizer.diagnostics())))
    assert replays == (15 if replayed else 0)
    return history


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (FOP, {}),
        (KFAC, {}),
        (FOP, {"weight_decay": 0.1, "momentum": 0.0}),
        (FOP, {"maximize": True, "sub_batches": 3}),
        (FOP, {"max_grad_norm": 0.1, "loss_reduction": "sum"}),
        (by_groups, {"weight_decay": 0.1, "damping": lambda step: 0.1 + 0.01 * step}),
        (FOP, {"layer_options": {"*": {"max_factor_dim": 5}, nn.BatchNorm2d: {"path": "fop"}}}),
    ],
)
def test_replayed_steps_are_the_same(make: Make, options: dict[str, Any], scheduled: bool) -> None:
    eager, replayed = (train(make, replayed=which, scheduled=scheduled, **options) for which in (False, True))
    for n, ((one, told), (two, told_of_replay)) in enumerate(zip(eager, replayed, strict=True)):
        assert torch.equal(one, two), f"step {n}"
        assert told == told_of_replay, f"step {n}"


@pytest.mark.parametrize("make", [FOP, by_groups])
def test_steps_are_those_of_another_optimizer(make: Make) -> None:
    """Rates on the device round as those on the host, but for sums with them."""

    def last(**options: Any) -> Tensor:
        torch.manual_seed(0)
        model = Network().double()
        optimizer = make(model, weight_decay=0.1, **options)
        for x, y in zip(BATCH.double(), LABELS, strict=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(last(capturable=True), last(), rtol=1e-12, atol=1e-14)


def steps_of(model: nn.Module, optimizer: FOP, x: Tensor) -> Callable[[], None]:
    """Return what takes a step, on one batch."""

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def plain_step() -> tuple[nn.Module, FOP, Recording]:
    """Return a recorded step of a small network."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = FOP(model, curvature_interval=1000, capturable=True)
    step = steps_of(model, optimizer, x)
    while optimizer.curvature_due:
        step()
    return model, optimizer, Recording.of(step, model, optimizer)


def test_replays_count_as_steps() -> None:
    _, optimizer, recording = plain_step()
    (before,) = optimizer.diagnostics().layers.values()
    step = optimizer.param_groups[0]["step"]
    while not optimizer.curvature_due:
        optimizer.replay(recording)  # type: ignore[arg-type]
    (after,) = optimizer.diagnostics().layers.values()
    taken = optimizer.param_groups[0]["step"] - step
    assert taken > 0
    assert before.steps_since_curvature is not None
    assert after.steps_since_curvature == before.steps_since_curvature + taken
    assert after.kfac_steps == before.kfac_steps


def test_curvature_that_is_due_is_not_replayed() -> None:
    model, optimizer, recording = plain_step()
    optimizer.request_curvature()
    before = deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"backward\(\) and step\(\)"):
        optimizer.replay(recording)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def load(model: nn.Module, optimizer: FOP) -> None:
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))


def freeze(model: nn.Module, optimizer: FOP) -> None:
    next(model.parameters()).requires_grad_(False)


def add(model: nn.Module, optimizer: FOP) -> None:
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})


def set_momentum(model: nn.Module, optimizer: FOP) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


def double(model: nn.Module, optimizer: FOP) -> None:
    model.double()


def give_other_memory(model: nn.Module, optimizer: FOP) -> None:
    """As `torch.nn.utils.vector_to_parameters` does."""
    for param in model.parameters():
        param.data = param.data.clone()


def assign(model: nn.Module, optimizer: FOP) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


CHANGES = {
    load: "state",
    freeze: "parameters",
    add: "parameters",
    set_momentum: "options",
    double: "parameters",
    give_other_memory: "parameters",
    assign: "parameters",
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_a_step_must_be_captured_again(change: Callable[[nn.Module, FOP], None]) -> None:
    model, optimizer, recording = plain_step()
    change(model, optimizer)
    before, step = deepcopy(model.state_dict()), optimizer.param_groups[0]["step"]
    with pytest.raises(RuntimeError, match=rf"change of .*{CHANGES[change]}.*; capture a step again"):
        optimizer.replay(recording)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["step"] == step


def test_a_part_of_the_model_may_be_cast_before_the_capture() -> None:
    """Then curvatures compute anew what follows from their averages."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).tanh() * self.scale.float())
            return out

    def last(replayed: bool) -> Tensor:
        torch.manual_seed(0)
        model, x, recording = Scaled(), torch.randn(8, 3), None
        optimizer = FOP(model, curvature_interval=4, capturable=True)
        step = steps_of(model, optimizer, x)
        for n in range(32):
            if n == 17:
                model.scale.data = model.scale.data.bfloat16()
            if n < 18 or optimizer.curvature_due or not replayed:
                step()
            else:
                recording = recording or Recording.of(step, model, optimizer)
                optimizer.replay(recording)  # type: ignore[arg-type]
        return torch.cat([p.detach().flatten().float() for p in model.parameters()])

    assert torch.equal(last(True), last(False))


def test_a_capture_after_a_load_lasts() -> None:
    model, optimizer, _ = plain_step()
    load(model, optimizer)
    step = steps_of(model, optimizer, torch.ones(8, 3))
    recording = Recording.of(step, model, optimizer)
    optimizer.replay(recording)  # type: ignore[arg-type]
    optimizer.request_curvature()
    step()
    assert not optimizer.curvature_due
    optimizer.replay(recording)  # type: ignore[arg-type]


def test_only_the_last_capture_is_replayed() -> None:
    _, optimizer, recording = plain_step()
    optimizer.replay(recording)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="only that of the last capture"):
        optimizer.replay(Recording())  # type: ignore[arg-type]


def test_a_capture_leaves_the_diagnostics() -> None:
    model, optimizer, _ = plain_step()
    before = str(optimizer.diagnostics())
    Recording.of(steps_of(model, optimizer, 3 + torch.randn(8, 3)), model, optimizer)
    assert str(optimizer.diagnostics()) == before


def test_a_rate_that_begins_at_zero() -> None:
    """The AdamW path then has its own, from the first step at which lr is more."""
    ends = []
    for capturable in (False, True):
        param = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = FOP([param], lr=0.0, capturable=capturable)
        optimizer.param_groups[0]["lr"] = 0.1
        param.square().sum().backward()
        optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_damping_may_change() -> None:
    _, optimizer, recording = plain_step()
    optimizer.param_groups[0].update(damping=0.1, curvature_interval=3)
    optimizer.replay(recording)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [float("nan"), -5.0])
def test_rates_out_of_range_are_not_replayed(rate: float) -> None:
    model, optimizer, recording = plain_step()
    before = deepcopy(model.state_dict())
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ValueError, match="lr="):
        optimizer.replay(recording)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_graph_without_a_step_of_the_optimizer() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    optimizer = FOP(model, curvature_interval=1000, capturable=True)
    with pytest.raises(RuntimeError, match="no step of this optimizer was captured"):
        optimizer.replay(Recording())  # type: ignore[arg-type]


def test_state_is_not_made_in_a_capture() -> None:
    """A replay would make it again: momentum would be 0 before every step."""
    model = nn.Linear(3, 2)
    optimizer = FOP(model, momentum=0.0, curvature_interval=1000, capturable=True)
    step = steps_of(model, optimizer, torch.ones(8, 3))
    while optimizer.curvature_due:
        step()
    optimizer.param_groups[0]["momentum"] = 0.6
    before = {name: set(state) for name, state in zip("wb", optimizer.state.values(), strict=True)}
    with pytest.raises(RuntimeError, match="this step makes state"):
        Recording.of(step, model, optimizer)
    assert {name: set(state) for name, state in zip("wb", optimizer.state.values(), strict=True)} == before
    step()
    assert "momentum_buffer" in optimizer.state[model.weight]
    while optimizer.curvature_due:
        step()
    Recording.of(step, model, optimizer)


def test_a_new_group_takes_a_usual_step_first() -> None:
    model, optimizer, _ = plain_step()
    add(model, optimizer)
    model(torch.randn(8, 3)).square().mean().backward()
    with as_captured(), pytest.raises(RuntimeError, match="not captured before the capture"):
        optimizer.step()


def test_a_frozen_layer_does_not_keep_the_curvature_due() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = FOP(model, curvature_interval=1000, capturable=True)
    for _ in range(3):  # the curvature is renewed in steps 0, 1, 2 and 4
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    assert not optimizer.curvature_due


def test_a_group_without_parameters() -> None:
    model = nn.Linear(3, 2)
    optimizer = FOP([{"params": list(model.parameters())}, {"params": []}], capturable=True)
    before = model.weight.detach().clone()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    FOP([{"params": []}], capturable=True).step()
    FOP([{"params": []}]).step()


def test_one_process_only() -> None:
    class Several(type(FOP(nn.Linear(3, 2))._distributor)):  # type: ignore[misc]
        """Stands for that of several ranks."""

    model = nn.Linear(3, 2)
    optimizer = FOP(model, capturable=True)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer._distributor = Several(None, optimizer)
    with pytest.raises(ValueError, match="capturable=True is for one process"):
        optimizer.step()


def test_replay_needs_the_option() -> None:
    with pytest.raises(RuntimeError, match="capturable=True"):
        FOP(nn.Linear(3, 2)).replay(Recording())  # type: ignore[arg-type]


def test_a_replaced_optimizer_does_not_replay() -> None:
    model, optimizer, recording = plain_step()
    FOP(model)
    with pytest.raises(RuntimeError, match="was replaced"):
        optimizer.replay(recording)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"step_length": "paper"}, "step_length='paper'"),
        ({"inverse_delay": 2}, "inverse_delay=2"),
    ],
)
def test_options_that_cannot_be_captured(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FOP(nn.Linear(3, 2), capturable=True, **options)


def test_an_option_set_later_that_cannot_be_captured() -> None:
    model, optimizer, _ = plain_step()
    before = deepcopy(model.state_dict())
    optimizer.param_groups[0]["inverse_delay"] = 3
    model(torch.randn(8, 3)).square().mean().backward()
    with pytest.raises(ValueError, match="inverse_delay=3"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrong_type_of_the_option() -> None:
    with pytest.raises(TypeError, match="capturable=1 "):
        FOP(nn.Linear(3, 2), capturable=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capturable", "hint"), [(False, "capturable=True"), (True, "curvature_due is False")]
)
def test_steps_that_cannot_be_captured(capturable: bool, hint: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = FOP(model, capturable=capturable)
    model(torch.randn(8, 3)).square().mean().backward()
    before = deepcopy(model.state_dict())
    with as_captured(), pytest.raises(RuntimeError, match=hint):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_can_be_captured_too() -> None:
    optimizer = FOP(nn.Linear(3, 2), capturable=True)
    assert deepcopy(optimizer)._rates is not None
    assert deepcopy(FOP(nn.Linear(3, 2)))._rates is None


def test_moved_models_go_on() -> None:
    """Tensors that are elsewhere, or of another dtype, have a new place."""
    model, optimizer, _ = plain_step()
    model.double()
    optimizer.request_curvature()
    step = steps_of(model, optimizer, torch.randn(8, 3, dtype=torch.float64))
    for _ in range(3):
        step()
    state = optimizer.state[model.weight]
    assert {state[name].dtype for name in ("A", "G", "A_inv", "G_inv")} == {torch.float64}


def test_the_option_is_of_the_constructor() -> None:
    with pytest.raises(ValueError, match="capturable is an argument of the constructor"):
        FOP([{"params": nn.Linear(3, 2).parameters(), "capturable": True}])


def test_parameters_of_two_devices() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).to("meta"))
    optimizer = FOP(model, capturable=True)
    model[0](torch.randn(8, 3)).square().mean().backward()
    with pytest.raises(ValueError, match="on cpu, meta; a graph is of one device"):
        optimizer.step()


def test_scalers_and_complex_parameters_cannot_be_captured() -> None:
    _, optimizer, _ = plain_step()
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    with as_captured(), pytest.raises(RuntimeError, match="GradScaler cannot be captured"):
        optimizer.step()
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = FOP([param], capturable=True)
    param.square().abs().sum().backward()
    optimizer.step()
    with as_captured(), pytest.raises(RuntimeError, match="complex parameters cannot be captured"):
        optimizer.step()


def test_usual_steps_of_complex_parameters() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = FOP([param], capturable=True)
    param.abs().square().sum().backward()
    optimizer.step()
    assert bool((param.detach().abs() < 1).all())
