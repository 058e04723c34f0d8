"""Hooks on live modules that turn one forward and one backward pass into statistics and a gradient pair."""

from fop.capture.finder import FirstForwardHook
from fop.capture.layer import LayerCapture

__all__ = ["FirstForwardHook", "LayerCapture"]
