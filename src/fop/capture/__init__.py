"""Hooks on live modules that turn one forward and one backward pass into statistics and a gradient pair."""

from fop.capture.batch import ModelWatch
from fop.capture.compiled import trace_anew
from fop.capture.finder import FirstForwardHook, Seen
from fop.capture.hooks import AttentionUse, ForwardUse, parameter_of
from fop.capture.layer import LayerCapture, SubBatch
from fop.capture.lifetime import InertCopy, remove_all
from fop.capture.sharded import is_sharded, local, stands_for

__all__ = [
    "AttentionUse",
    "FirstForwardHook",
    "ForwardUse",
    "InertCopy",
    "LayerCapture",
    "ModelWatch",
    "Seen",
    "SubBatch",
    "is_sharded",
    "local",
    "parameter_of",
    "remove_all",
    "stands_for",
    "trace_anew",
]
