"""Hooks on live modules that turn one forward and one backward pass into statistics and a gradient pair."""

from fop.capture.batch import ModelWatch
from fop.capture.compiled import trace_anew
from fop.capture.finder import FirstForwardHook, Seen
from fop.capture.hooks import AttentionUse, ForwardUse, parameter_of
from fop.capture.layer import LayerCapture, SubBatch

__all__ = [
    "AttentionUse",
    "FirstForwardHook",
    "ForwardUse",
    "LayerCapture",
    "ModelWatch",
    "Seen",
    "SubBatch",
    "parameter_of",
    "trace_anew",
]
