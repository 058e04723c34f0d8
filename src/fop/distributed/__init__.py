"""Who owns which layer, and what travels between the ranks that train one model."""

from fop.curvature import LayerSize, packed_shape
from fop.distributed.assignment import Plan, make_plan
from fop.distributed.buckets import BucketedReduce, Channel, Entry
from fop.distributed.distributor import Distributor, Shared, make_distributor
from fop.distributed.handshake import Description, describe
from fop.distributed.join import JoinableOptimizer
from fop.distributed.messages import SKETCH, difference_weight, representative, scale_between, side_of, sketch

__all__ = [
    "SKETCH",
    "BucketedReduce",
    "Channel",
    "Description",
    "Distributor",
    "Entry",
    "JoinableOptimizer",
    "LayerSize",
    "Plan",
    "Shared",
    "describe",
    "difference_weight",
    "make_distributor",
    "make_plan",
    "packed_shape",
    "representative",
    "scale_between",
    "side_of",
    "sketch",
]
