"""Hooks on live modules that turn one forward and one backward pass into statistics and a gradient pair."""

from fop.capture.compiled import trace_anew
from fop.capture.finder import FirstForwardHook, Seen
from fop.capture.hooks import AttentionUse, ForwardUse, Hook, ModelWatch, in_place, parameter_of, remove_all
from fop.capture.recorder import Recorder, SubBatchLabel, Use
from fop.capture.sharded import is_sharded, local, stands_for
from fop.capture.statistics import gather_statistics
from fop.capture.sub_batches import SubBatches

__all__ = [
    "AttentionUse",
    "FirstForwardHook",
    "ForwardUse",
    "Hook",
    "ModelWatch",
    "Recorder",
    "Seen",
    "SubBatchLabel",
    "SubBatches",
    "Use",
    "gather_statistics",
    "in_place",
    "is_sharded",
    "local",
    "parameter_of",
    "remove_all",
    "stands_for",
    "trace_anew",
]
