"""Capture under torch.compile: two operators that it does not look into, so that no graph breaks.

In a traced forward pass the output of a layer goes through `tap`, whose backward calls `collect`; what is to
be gathered is decided when that runs, not when it is traced.
"""

# Not `from __future__ import annotations`: torch 2.4 cannot read the operators' schemas from strings.
import itertools
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fop.capture.batch import Batch

if TYPE_CHECKING:
    from fop.capture.hooks import ForwardUse

# What `tap` is given where the size of the batch is not known, or another dimension than 0 may count samples.
UNKNOWN, AMBIGUOUS = -1, -2

# A compiled model keeps the number of each of its layers, also when another optimizer comes to feed.
_numbers: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()
_collectors: "weakref.WeakValueDictionary[int, ForwardUse]" = weakref.WeakValueDictionary()
_count = itertools.count()


def retrace() -> None:
    """Let torch.compile trace every model again: it does not notice hooks that came after its trace.

    Not of this model alone: another model of the same class shares what was compiled for its code.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def key_of(module: nn.Module, weight: str, collector: "ForwardUse") -> Tensor:
    """Return the number of a module's weight, and let its gradients go to ``collector`` from now on.

    A tensor, 0-dim: a number would be a constant in the graph, and every layer would be compiled by itself.
    """
    key = _numbers.setdefault(module, {}).setdefault(weight, next(_count))
    _collectors[key] = collector
    return torch.tensor(key)


@torch.library.custom_op("fop::tap", mutates_args=())
def tap(x: Tensor, output: Tensor, key: Tensor, size: int) -> Tensor:
    """Return a copy of ``output``; an operator must not return its input."""
    return output.clone()


@tap.register_fake
def _(x: Tensor, output: Tensor, key: Tensor, size: int) -> Tensor:
    return torch.empty_like(output)


@torch.library.custom_op("fop::collect", mutates_args=())
def collect(x: Tensor, b: Tensor, key: Tensor, size: int) -> Tensor:
    """Give input and output gradient to the layer of that number; return a copy of the gradient."""
    collector = _collectors.get(int(key))
    if collector is not None:
        collector.compiled(x, b, Batch(None if size < 0 else size, ambiguous=size == AMBIGUOUS))
    return b.clone()


@collect.register_fake
def _(x: Tensor, b: Tensor, key: Tensor, size: int) -> Tensor:
    return torch.empty_like(b)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, key, ctx.size = inputs
    ctx.save_for_backward(x, key)


def _backward(ctx: Any, b: Tensor) -> tuple[None, Tensor, None, None]:
    x, key = ctx.saved_tensors
    return None, collect(x, b, key, ctx.size), None, None


tap.register_autograd(_backward, setup_context=_setup)
