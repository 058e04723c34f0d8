"""All that reaches behind torch's public names, in one place.

Each entry says in which versions it was seen to work (tests/test_torch_internals.py, which tools/torch_matrix
runs on all of them), and what happens where torch has it no longer.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.overrides
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])

# The backward pass that is running in this thread; -1 if none is.
# Seen in 2.4 to 2.14. Without it: import fails, for nothing public numbers backward passes.
current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id

# Whether that pass was called with retain_graph=True.
# Seen in 2.5 to 2.14. Without it: a second pass through a graph has no sub-batch gradients.
graph_is_retained: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", bool
)

# The transformation of torch.func that is running, whose tensors stand for others; None if none is.
# Seen in 2.4 to 2.14. Without it: what runs under torch.func is recorded like any other pass.
current_transform: Callable[[], Any] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)

# What torch.jit.trace (TensorBoard, torch.onnx) is recording in this thread; None if nothing.
# Seen in 2.4 to 2.14. Without it: import fails.
current_trace: Callable[[], Any] = torch._C._get_tracing_state

# Whether a gradient is that of several backward passes that run as one (vectorized Jacobians); none of them
# reaches p.grad. Seen in 2.4 to 2.14. Without them: False; vectorized Jacobians may fail.
is_vmapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_batchedtensor", lambda _: False)
is_legacy_vmapped: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda _: False
)

# The tensor of which a tensor is a view; None if it is no view.
# Seen in 2.4 to 2.14. Without it: AttributeError at the first forward pass; nothing public tells.
view_base: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")

# Whether torch.compile traces our hooks. 2.4 cannot, and breaks the graph at each.
# Seen in 2.5 to 2.14. Without it: False, and hooks go through `untraced_hook`.
HOOKS_ARE_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)


def untraced_hook(function: Function) -> Function:
    """Let torch.compile break its graph at a function where it fails to trace it.

    Seen in 2.4, which alone needs it. Without it: torch.compile fails there.
    """
    if HOOKS_ARE_TRACED:
        return function
    return cast(Function, torch._disable_dynamo(function))  # type: ignore[attr-defined]


# The function mode that sees calls in this thread first; None if there is none.
# Seen in 2.4 to 2.14. Without it: import fails.
top_function_mode: Callable[[], Any] = torch.overrides._get_current_function_mode

# Names of backward nodes: of operations that give a copy of their input, and that transpose it.
# Seen in 2.4 to 2.14. Without them: a cast weight counts as a computed one, with the same numbers.
_COPIES = {"ToCopyBackward0", "CloneBackward0", "AliasBackward0"}
_TURNS = ("TBackward0", "TransposeBackward", "PermuteBackward0", "NumpyTBackward0")


def leaves_of(computed: Tensor) -> tuple[list[Tensor], set[str] | None]:
    """Return the leaves of a computed tensor, and the names of what computed it; None for a long way.

    Seen in 2.4 to 2.14. Without it (the nodes' ``variable``): no leaves.
    """
    leaves: dict[int, Tensor] = {}
    names: set[str] = set()
    waiting = [computed.grad_fn]
    for _ in range(64):
        if not waiting:
            break
        if (node := waiting.pop()) is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
            continue
        names.add(node.name())
        waiting += [each for each, _ in node.next_functions]
    return list(leaves.values()), None if waiting else names


def leaf_of(computed: Tensor) -> tuple[Tensor, bool] | None:
    """Return the one leaf of the shape of a computed tensor, and whether that is more than its copy.

    None if there is not exactly one, or if it may have been transposed. Seen in 2.4 to 2.14.
    Without it: as `leaves_of`.
    """
    leaves, names = leaves_of(computed)
    alike = [leaf for leaf in leaves if leaf.shape == computed.shape]
    if len(alike) != 1 or names is None or any(name.startswith(_TURNS) for name in names):
        return None
    return alike[0], not names <= _COPIES


def running_modules() -> list[nn.Module]:
    """Return the modules that are being called in this thread, the innermost first.

    Seen in 2.4 to 2.14. Without it (`Module._call_impl`): an error names it.
    """
    code, frame, found = nn.Module._call_impl.__code__, sys._getframe(1), []
    while frame is not None:
        if frame.f_code is code:
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return found


def checkpointed_in(module: nn.Module) -> bool:
    """Return whether torch.utils.checkpoint runs the caller, inside the running call of a module.

    The module is not called again then where its functions are recomputed. Seen in 2.4 to 2.14.
    Without it: the backward pass of torch.utils.checkpoint fails, as not the same tensors are kept again.
    """
    code, frame = nn.Module._call_impl.__code__, sys._getframe(1)
    while frame is not None and not (frame.f_code is code and frame.f_locals["self"] is module):
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def runs_compiled() -> bool:
    """Return whether torch.compile runs the caller's caller, or leads to it.

    Seen in 2.4 to 2.14. Without it: parts of a model are compiled twice.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # `torch.compiler.disable` has a frame there, too, but no model and no compiler.
        if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame" and (
            frame.f_locals.get("callback") or hasattr(frame.f_locals.get("self"), "_orig_mod")
        ):
            return True
        frame = frame.f_back
    return False


def has_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile has a part of a module.

    Seen in 2.4 to 2.14. Without it: parts of a model are compiled twice.
    """
    parts = module.modules()
    return any(hasattr(each, "_orig_mod") or getattr(each, "_compiled_call_impl", None) for each in parts)


def outside() -> int:
    """Return the ``stacklevel`` of the first caller outside this library and torch.

    Seen in 2.4 to 2.14. Without it (no names of torch; frames of Python): warnings name a line of ours.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fop", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def is_exporting() -> bool:
    """Return whether torch.export is tracing.

    Not by `torch.compiler.is_exporting`, which is True under torch.compile in 2.8.
    Seen in 2.8 to 2.14. Without it: the operators of the capture are in an exported graph.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward pass is over, and DistributedDataParallel has finished.

    Seen in 2.4 to 2.14. Without it: AttributeError in the first backward pass of several ranks.
    """
    engine = torch.autograd.Variable._execution_engine
    # Callbacks run in the order in which they were asked for, and may ask for more.
    engine.queue_callback(lambda: engine.queue_callback(function))


def running_ddp() -> Any:
    """Return the DistributedDataParallel whose forward pass is running, None if none is.

    Seen in 2.4 to 2.14. Without it: None, and a model given without its wrapper counts as plain.
    """
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def is_ddp(module: nn.Module) -> bool:
    """Return whether a module is a DistributedDataParallel.

    Seen in 2.4 to 2.14. Without it: nothing private.
    """
    return isinstance(module, nn.parallel.DistributedDataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the user's own module inside `torch.compile` and `DistributedDataParallel`, in any order.

    Seen in 2.4 to 2.14. Without it: as `wrappers`.
    """
    return wrappers(module)[-1]


def wrappers(module: nn.Module) -> list[nn.Module]:
    """Return a module, what it wraps, and so on; the last is the user's own.

    Seen in 2.4 to 2.14. Without it: the wrapper of torch.compile counts as the user's own module.
    """
    inner: Any = module
    found: list[nn.Module] = []
    while inner is not None:
        found.append(inner)
        outer, inner = inner, getattr(inner, "_orig_mod", None)
        if inner is None and is_ddp(outer):
            inner = outer.module
    return found


def fsdp_group(module: nn.Module) -> Any:
    """Return what fully_shard knows of the parameters of a module; None if it manages none there.

    Seen in 2.8 to 2.14. Without it: None, and a model of fully_shard counts as wrapped by nobody.
    """
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
    return None if state is None else state._fsdp_param_group


def is_joining(joinable: Any) -> bool:
    """Return whether an optimizer or a DistributedDataParallel is inside a `Join`.

    Seen in 2.4 to 2.14. Without it: False, and ranks with fewer batches make the others wait.
    """
    config = getattr(joinable, "_join_config", None)
    return config is not None and bool(config.enable)


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of a process group; None where it does not tell.

    Seen in 2.4 to 2.14. Without it: None, and the default of the process group holds.
    """
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return timeout
    return None


def scale_of(scaler: torch.amp.GradScaler) -> Tensor | None:
    """Return the loss scale of a GradScaler, 0-dim; None before its first use.

    Seen in 2.4 to 2.14. Without it: AttributeError in a step after ``scaler.unscale_``.
    """
    return scaler._scale
