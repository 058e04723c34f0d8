"""What `fop.torch_internals` takes from behind torch's public names works on this version of torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fop import FOP, torch_internals
from fop.torch_internals import (
    after_backward,
    checkpointed_in,
    current_backward_pass,
    current_trace,
    current_transform,
    fsdp_group,
    graph_is_retained,
    group_timeout,
    has_compiled,
    is_exporting,
    is_joining,
    is_legacy_vmapped,
    is_vmapped,
    leaf_of,
    leaves_of,
    running_ddp,
    running_modules,
    runs_compiled,
    scale_of,
    top_function_mode,
    unwrapped,
    view_base,
    wrappers,
)
from versions import TORCH, fsdp_on_cpu, knows_retained_graphs, requires_torch

pytestmark = pytest.mark.core
SOURCE = Path(torch_internals.__file__).read_text()


def seen_in_backward(ask: Any, **options: Any) -> list[Any]:
    """What ``ask`` says of the gradient in a hook."""
    x, found = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda gradient: found.append(ask(gradient)))
    (x * x).sum().backward(**options)
    return found


def test_backward_passes_have_numbers() -> None:
    assert current_backward_pass() == -1
    one, other = (seen_in_backward(lambda _: current_backward_pass()) for _ in range(2))
    assert one != other and min(one + other) >= 0


@knows_retained_graphs
def test_a_retained_graph_is_known() -> None:
    assert seen_in_backward(lambda _: graph_is_retained()) == [False]
    assert seen_in_backward(lambda _: graph_is_retained(), retain_graph=True) == [True]


def test_transforms_and_batched_gradients() -> None:
    found: list[Any] = []

    def function(x: Tensor) -> Tensor:
        found.append(current_transform() is not None)
        return x * 2

    assert current_transform() is None
    torch.vmap(function)(torch.ones(3))
    assert found == [True]
    x, batched = torch.ones(2, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda g: batched.append(is_vmapped(g) or is_legacy_vmapped(g)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert batched == [True, False]


def test_views_know_their_base() -> None:
    x = torch.ones(4)
    assert view_base(x) is None and view_base(x.view(2, 2)) is x


@requires_torch("2.7", "before, torch.compiler has no flag for torch.export")
def test_exporting() -> None:
    found: list[bool] = []

    class Ask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append(is_exporting())
            return x + 1 if is_exporting() else x - 1

    program = torch.export.export(Ask(), (torch.ones(2),))
    assert bool((program.module()(torch.ones(2)) == 2).all())
    torch.compiler.reset()
    compiled: Any = torch.compile(lambda x: x + 1 if is_exporting() else x - 1, backend="eager")
    assert bool((compiled(torch.ones(2)) == 0).all())


def test_after_backward() -> None:
    order: list[str] = []

    def hook(gradient: Tensor) -> None:
        after_backward(lambda: order.append("over"))
        order.append("running")

    seen_in_backward(hook)
    assert order == ["running", "over"]


def test_ranks(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert group_timeout(dist.distributed_c10d._get_default_group()) is not None
        found: list[Any] = []

        class Ask(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                found.append(running_ddp())
                return super().forward(x)

        inner = Ask(2, 2)
        ddp = DistributedDataParallel(inner)
        ddp(torch.ones(1, 2)).sum().backward()
        assert found == [ddp] and running_ddp() is None
        assert wrappers(torch.compile(ddp))[1:] == [ddp, inner] and unwrapped(ddp) is inner
        assert not is_joining(ddp)
        with Join([ddp]):
            assert is_joining(ddp)
    finally:
        dist.destroy_process_group()


@fsdp_on_cpu
def test_fully_sharded(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 2))
        assert fsdp_group(model) is None
        fully_shard(model)
        assert fsdp_group(model) is not None and fsdp_group(model[0]) is None
    finally:
        dist.destroy_process_group()


def test_a_trace_is_known() -> None:
    found: list[bool] = []

    def function(x: Tensor) -> Tensor:
        found.append(current_trace() is not None)
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert found == [True] and current_trace() is None


def test_the_mode_that_sees_calls_first() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert top_function_mode() is None
    with Mode(), Mode() as inner:
        assert top_function_mode() is inner


def test_the_leaf_of_a_computed_tensor() -> None:
    weight, other = torch.ones(3, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    for copied in (weight.double(), weight.clone()):
        assert leaf_of(copied) == (weight, False)
    assert leaf_of(weight * other) == (weight, True)
    square = torch.ones(2, 2, requires_grad=True)
    for turned in (square.t(), square.transpose(0, 1), square.mT, square.permute(1, 0)):
        assert leaf_of(turned) is None
    assert leaf_of(weight + torch.ones(3, 2, requires_grad=True)) is None


def test_all_leaves_of_a_computed_tensor() -> None:
    one, other = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    leaves, names = leaves_of((one * 2.0).T @ other)
    assert {id(leaf) for leaf in leaves} == {id(one), id(other)}
    assert names is not None and {name.rstrip("0") for name in names} >= {"MmBackward", "MulBackward"}
    assert leaves_of(one) == ([], set()) and leaves_of(torch.ones(2)) == ([], set())
    for _ in range(70):
        one = one + 1
    assert leaves_of(one)[1] is None


def test_functions_that_are_checkpointed_in_a_module() -> None:
    found: list[bool] = []

    class Ask(nn.Module):
        def block(self, x: Tensor) -> Tensor:
            found.append(checkpointed_in(self))
            return x * 2.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, self.block(x), use_reentrant=False)
            return out

    model = Ask()
    checkpoint(model, torch.ones(1), use_reentrant=False)
    assert found == [False, True]


def test_modules_that_run() -> None:
    found: list[nn.Module] = []

    class Ask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.extend(running_modules())
            return x

    model = nn.Sequential(Ask())
    model(torch.ones(1))
    assert found == [model[0], model] and running_modules() == []


def test_compiled_modules() -> None:
    found: list[bool] = []

    class Ask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ask()
            return x + 1

    @torch.compiler.disable
    def ask() -> None:
        found.append(runs_compiled())

    model = Ask()
    model(torch.ones(1))
    assert found == [False] and not has_compiled(model)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1))
    assert found == [False, True] and has_compiled(compiled)
    model.compile(backend="eager")
    assert has_compiled(nn.Sequential(model))


def test_the_scale_of_a_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert scale_of(scaler) is None
    scaler.scale(torch.ones(()))
    assert float(scale_of(scaler)) == 4.0  # type: ignore[arg-type]


def test_hooks_are_traced_where_they_can_be() -> None:
    assert TORCH >= (2, 5) or torch_internals.untraced_hook(FOP) is not FOP
    assert TORCH < (2, 5) or torch_internals.untraced_hook(FOP) is FOP


def entries() -> dict[str, str]:
    """Names of the file, each with its docstring, or the comments above it."""
    lines = SOURCE.splitlines()
    found: dict[str, str] = {}
    comment = ""
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            above, number = [], node.lineno - 2
            while lines[number].startswith("#"):
                above.append(lines[number].removeprefix("# "))
                number -= 1
            # Two names in a row share their comment.
            comment = " ".join(reversed(above)) or comment
            found[ast.unparse(target)] = comment
    return found


@pytest.mark.parametrize("name", sorted(entries().keys() - {"Function"}))
def test_every_entry_says_where_it_was_seen_and_what_happens_without_it(name: str) -> None:
    assert re.search(
        r"Seen in 2\.\d+( to 2\.\d+)?[.,].*Without (it|them)\b[^:]*: \S", entries()[name], re.DOTALL
    )
