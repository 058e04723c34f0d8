"""Hooks on modules that record what one forward and one backward pass give of each weight."""

from fop.capture.compiled import retrace
from fop.capture.finder import FirstForwardHook, Seen
from fop.capture.hooks import AttentionUse, ForwardUse, Hook, ModelWatch, in_place, parameter_of, remove_all
from fop.capture.recorder import Recorder, SubBatchLabel
from fop.capture.sharded import is_sharded, local, stands_for

__all__ = [
    "AttentionUse",
    "FirstForwardHook",
    "ForwardUse",
    "Hook",
    "ModelWatch",
    "Recorder",
    "Seen",
    "SubBatchLabel",
    "in_place",
    "is_sharded",
    "local",
    "parameter_of",
    "remove_all",
    "retrace",
    "stands_for",
]
