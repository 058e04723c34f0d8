"""Who takes part in a step: this process alone, or several ranks."""

from __future__ import annotations

import torch.distributed as dist

from fop.optim.distribution import Distribution
from fop.optim.joining import Stepping
from fop.optim.solo import Solo
from fop.optim.team import Team


def crew_for(distribution: Distribution | None, optimizer: Stepping) -> Solo:
    """Return what a step gets gradients, curvature and updates from.

    Args:
        distribution: options for several ranks; None if this process trains a model of its own.
        optimizer: whose steps these are.
    """
    if distribution is None or not (dist.is_available() and dist.is_initialized()):
        return Solo()
    return Team(distribution, optimizer) if dist.get_world_size(distribution.group) > 1 else Solo()
