"""Who owns which layer, and what travels between the ranks that train one model."""

from fop.distributed.comm import Channel, Outbox, Parcel, Pending, share
from fop.distributed.packing import (
    SKETCH,
    pack_symmetric,
    packed_shape,
    scale_between,
    sketch,
    unpack_symmetric,
)
from fop.distributed.parity import difference_weight, representative, side_of
from fop.distributed.plan import LayerSize, Plan, make_plan

__all__ = [
    "SKETCH",
    "Channel",
    "LayerSize",
    "Outbox",
    "Parcel",
    "Pending",
    "Plan",
    "difference_weight",
    "make_plan",
    "pack_symmetric",
    "packed_shape",
    "representative",
    "scale_between",
    "share",
    "side_of",
    "sketch",
    "unpack_symmetric",
]
