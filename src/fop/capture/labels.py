"""Labels drawn from the model's own distribution: a backward pass of their own gives the statistics."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fop.layers import keyed_generator
from fop.torch_internals import current_backward_pass, is_legacy_vmapped, is_vmapped

if TYPE_CHECKING:
    from fop.capture.recorder import Recorder, RunningPass

Likelihood: TypeAlias = Literal["categorical", "gaussian"]


class SampledPass(NamedTuple):
    """A backward pass from sampled labels; ``rows`` of the outputs have a label each.

    ``outer`` is the backward pass of the user's loss, inside which it runs.
    """

    outer: int
    rows: int


def checked_dim(outputs: Any, likelihood: Any, dim: Any) -> int | None:
    """Return the dimension of the classes, None where every entry of the outputs has a label of its own.

    Raises TypeError or ValueError for outputs, a likelihood or a dimension that labels cannot be drawn from.
    """
    if not (isinstance(outputs, Tensor) and outputs.is_floating_point()):
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"sample_labels needs the model's outputs, a tensor of real numbers; got {kind}")
    if likelihood not in get_args(Likelihood):
        allowed = " or ".join(map(repr, get_args(Likelihood)))
        raise ValueError(f"likelihood={likelihood!r} must be {allowed}")
    shape, dims = tuple(outputs.shape), outputs.dim()
    if dim is None:
        if dims == 2:
            return 1
        if likelihood == "gaussian" and dims < 2:
            return None
        raise ValueError(
            f"outputs have the shape {shape}; say which dimension counts the classes (features), such as "
            "dim=1 for (N, C, length) or dim=-1 for (N, length, C)"
        )
    if type(dim) is not int or not -dims <= dim < dims:
        raise ValueError(f"dim={dim!r} must be one of the {dims} dimensions of the outputs, {shape}")
    return dim % dims


def with_sampled_labels(
    outputs: Tensor,
    likelihood: Likelihood,
    dim: int | None,
    recorders: Sequence[Recorder],
    running: RunningPass,
) -> Tensor:
    """Return the outputs; when their gradient comes, the recorders first get statistics of drawn labels."""
    held = [weakref.ref(recorder) for recorder in recorders]
    gather = partial(_gather, likelihood=likelihood, dim=dim, recorders=held, running=running)
    labelled: Tensor = _SampledLabels.apply(outputs, gather)  # type: ignore[no-untyped-call]
    return labelled


class _SampledLabels(torch.autograd.Function):
    """The identity; when its gradient comes, the graph that the outputs come from is still whole."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, gather: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(outputs)
        ctx.gather = gather
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if not (is_vmapped(gradient) or is_legacy_vmapped(gradient)):
            ctx.gather(*ctx.saved_tensors)
        return gradient, None


def _gather(
    outputs: Tensor,
    likelihood: Likelihood,
    dim: int | None,
    recorders: Sequence[weakref.ref[Recorder]],
    running: RunningPass,
) -> None:
    """Run the backward pass of labels that are drawn here, from the outputs to the weights."""
    alive = [recorder for each in recorders if (recorder := each()) is not None]
    due = [recorder for recorder in alive if recorder.due and recorder.weight.requires_grad]
    # From labels of a later part of the model the pass may come by here.
    if not due or running.sampled is not None:
        return
    task = current_backward_pass()
    if running.generator is None or running.generator[0] != task:
        # The draws depend on the step and the samples in it so far, so that they resume bit for bit.
        seen = sum(each.samples for each in due if each.taken or each.weight.grad is not None)
        key = f"labels {due[0].key} {due[0].stream} {seen}"
        running.generator = task, keyed_generator(key, outputs.device)
    gradient = _drawn_gradient(outputs.detach(), likelihood, dim, running.generator[1])
    rows = outputs.numel() if dim is None else outputs.numel() // outputs.shape[dim]
    running.sampled = SampledPass(task, max(1, rows))
    try:
        weights = [recorder.weight for recorder in due]
        torch.autograd.grad(outputs, weights, gradient, retain_graph=True, allow_unused=True)
    finally:
        running.sampled = None


@torch.no_grad()
def _drawn_gradient(
    outputs: Tensor, likelihood: Likelihood, dim: int | None, generator: torch.Generator
) -> Tensor:
    """Return the gradient of Σ -log p(label | outputs) over rows, each with a label drawn from p."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    noise = torch.empty(outputs.shape, dtype=dtype, device=generator.device)
    if likelihood == "gaussian":
        return noise.normal_(generator=generator).to(outputs)
    assert dim is not None
    p = outputs.to(dtype).softmax(dim)
    # For E of the exponential distribution the greatest p / E is that of class c with probability p_c.
    noise = noise.exponential_(generator=generator).to(p.device)
    label = (p / noise).argmax(dim, keepdim=True)
    return (p - torch.zeros_like(p).scatter_(dim, label, 1.0)).to(outputs.dtype)
