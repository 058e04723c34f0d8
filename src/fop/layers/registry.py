"""Which modules take the FOP step, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fop.layers.base import Layer
from fop.layers.conv import Conv2dLayer, unsupported_conv2d
from fop.layers.linear import LinearLayer, unsupported_linear

# To add a kind of layer: a file with its `Layer` and its check, and one row here.
_KINDS: tuple[tuple[type[nn.Module], Callable[[Any], str | None], Callable[..., Layer]], ...] = (
    (nn.Linear, unsupported_linear, LinearLayer),
    (nn.Conv2d, unsupported_conv2d, Conv2dLayer),
)


def describe(module: nn.Module, *, bias: bool) -> Layer | str:
    """Return the module's `Layer`, or the reason why it cannot take the FOP step.

    Args:
        module: any module that owns parameters of the optimizer.
        bias: whether the module's bias belongs to the block, as the last column of the gradient matrix.
    """
    for kind, unsupported, layer in _KINDS:
        if isinstance(module, kind):
            # Not through the attribute: a parametrized weight would be computed, which may change buffers.
            if module._parameters.get("weight") is None:
                return "its weight is computed from other parameters"
            if "forward" in vars(module):
                return "its forward was replaced"
            return unsupported(module) or layer(module, bias=bias)
    known = ", ".join(kind.__name__ for kind, _, _ in _KINDS)
    return f"{type(module).__name__} is not one of {known}"
