"""What the graph of a forward pass holds for us: a hook on the output of a layer, or the layer's own node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fop.capture.batch import Batch
from fop.layers import Layer
from fop.torch_internals import graph_is_retained, is_executed, is_legacy_vmapped, is_vmapped

if TYPE_CHECKING:
    from fop.capture.recorder import Recorder


class Call(NamedTuple):
    """One use of a weight in a forward pass; ``outer`` is the backward pass that runs it, -1 for none."""

    recorder: ReferenceType[Recorder]
    layer: Layer
    batch: Batch
    outer: int

    def wanting(self, b: Tensor | None) -> Recorder | None:
        """Return the recorder if it wants anything of this gradient of the output."""
        recorder = self.recorder()
        if recorder is None or b is None or is_vmapped(b) or is_legacy_vmapped(b):
            return None
        return recorder if recorder.wants else None


class LayerFunction(torch.autograd.Function):
    """Stands for a layer in the graph: its backward pass computes the gradients sub-batch by sub-batch.

    Their sum is what autograd would have computed, so that the gradients of the sub-batches cost nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, output: list[Tensor]
    ) -> Tensor:
        (result,) = output
        # As autocast has it.
        ctx.save_for_backward(x.to(result.dtype), weight)
        ctx.call = call
        return result.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call, layer = ctx.call, ctx.call.layer
        # Tensors among the arguments; that of the bias comes last if there is one.
        executed = [is_executed(node) for node, _ in ctx.next_functions]
        of_input, of_weight = (
            wanted and node for wanted, node in zip(ctx.needs_input_grad[:2], executed, strict=False)
        )
        of_bias = ctx.needs_input_grad[2] and executed[2]
        with torch.autocast(b.device.type, enabled=False):
            batched = layer.leading_dims(x) > 0
            x_N, b_N = (x, b) if batched else (x[None], b[None])
            gradient = layer.input_gradient(x_N, b_N, weight.to(b.dtype)) if of_input else None
            if gradient is not None and not batched:
                gradient = gradient[0]
            whole = None
            if of_weight and (recorder := call.wanting(b)) is not None:
                # With create_graph=True the gradient of the weight must itself have a graph.
                split = not torch.is_grad_enabled()
                whole = recorder.record(layer, x.detach(), b.detach(), call.batch, call.outer, whole=split)
            if whole is not None:
                return gradient, whole[0], whole[1] if of_bias else None, None, None
            own = layer.weight_gradient(x_N, b_N) if of_weight else None
            return gradient, own, layer.bias_gradient(b_N) if of_bias else None, None, None


def replace_output(call: Call, x: Tensor, module: nn.Module, output: Tensor) -> Tensor | None:
    """Return ``output`` of ``module``, whose forward is the layer alone, as that of `LayerFunction`.

    None where the function cannot stand for the layer: subclasses of tensors, forward-mode derivatives.
    """
    plain = all(type(each) in (Tensor, nn.Parameter) for each in (x, output))
    if not plain or x.layout is not torch.strided or unpack_dual(output).tangent is not None:
        return None
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    result: Tensor = LayerFunction.apply(x, weight, bias, call, [output])  # type: ignore[no-untyped-call]
    return result


class _Keep(torch.autograd.Function):
    """Holds a tensor where checkpointing and offloading find it, and where changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError("nothing is computed from it")


class OutputHook:
    """Hook on an output's node: holds the input until the gradient of the output comes, as autograd does."""

    def __init__(self, call: Call, x: Tensor, shape: torch.Size) -> None:
        self._call, self._shape = call, shape
        # The output and not its node: before torch 2.13 the node's tensors went with the output.
        self._kept: Any = _Keep.apply(torch.empty(0, requires_grad=True), x)  # type: ignore[no-untyped-call]

    def __call__(self, b: Tensor | None) -> None:
        call, kept = self._call, self._kept
        if not graph_is_retained():
            self._kept = None
        recorder = call.wanting(b)
        if recorder is None or b is None:
            return
        x: Tensor | None = None
        if kept is not None:
            try:
                x = kept.grad_fn.saved_tensors[0]
            except RuntimeError as error:
                # Legal where autograd kept a copy of its own, as under autocast.
                if "modified by an inplace operation" not in str(error):
                    raise
        recorder.record(call.layer, x, b.reshape(self._shape), call.batch, call.outer)
