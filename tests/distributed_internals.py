"""The parts of `fop` that the tests of ranks reach into: only this file changes when they move.

`Bucketed` joins messages into buckets and starts their collectives in a fixed order; `Message` is one tensor
that all ranks add up on one of them; `Channel` counts the bytes of collectives.
"""

from fop.curvature.packing import pack_symmetric, packed_shape, unpack_symmetric
from fop.distributed import (
    BucketedReduce as Bucketed,
)
from fop.distributed import (
    Channel,
    LayerSize,
    Plan,
    buckets,
    difference_weight,
    make_plan,
    representative,
    scale_between,
    side_of,
    sketch,
)
from fop.distributed import Entry as Message
from fop.layers import Layer, LayerOptions, describe
from internals import KroneckerBlock, fop_direction

__all__ = [
    "Bucketed",
    "Channel",
    "KroneckerBlock",
    "Layer",
    "LayerOptions",
    "LayerSize",
    "Message",
    "Plan",
    "buckets",
    "describe",
    "difference_weight",
    "fop_direction",
    "make_plan",
    "pack_symmetric",
    "packed_shape",
    "representative",
    "scale_between",
    "side_of",
    "sketch",
    "unpack_symmetric",
]
