"""Hooks on modules that record what one forward and one backward pass give of each weight."""

from fop.capture.compiled import retrace
from fop.capture.finder import FirstForwardHook, Seen
from fop.capture.functions import Source, begin_watch, end_watch, source_of, watches
from fop.capture.hooks import (
    AttentionUse,
    BatchSize,
    ForwardUse,
    FunctionUse,
    Hook,
    ModelWatch,
    in_place,
    parameter_of,
    parts_called,
    remove_all,
)
from fop.capture.labels import Likelihood, checked_dim, with_sampled_labels
from fop.capture.recorder import Cleared, Recorder, RunningPass
from fop.capture.sharded import is_sharded, local, stands_for
from fop.capture.sub_batches import Scaling, scalings

__all__ = [
    "AttentionUse",
    "BatchSize",
    "Cleared",
    "FirstForwardHook",
    "ForwardUse",
    "FunctionUse",
    "Hook",
    "Likelihood",
    "ModelWatch",
    "Recorder",
    "RunningPass",
    "Scaling",
    "Seen",
    "Source",
    "begin_watch",
    "checked_dim",
    "end_watch",
    "in_place",
    "is_sharded",
    "local",
    "parameter_of",
    "parts_called",
    "remove_all",
    "retrace",
    "scalings",
    "source_of",
    "stands_for",
    "watches",
    "with_sampled_labels",
]
