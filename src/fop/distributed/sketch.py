"""Linear sketches of gradients, by which an owner knows what p.grad must be on average."""

from __future__ import annotations

import torch
from torch import Tensor

# A prime, so that it shares no period with the dimensions of a layer.
SKETCH = 127


def sketch(V: Tensor) -> Tensor:
    """Return a linear sketch of V, (127,): the sums over the elements whose index leaves the same remainder.

    A scaling of V scales it alike; other changes do not. Being linear, the sketch of a mean over ranks is the
    mean of their sketches.
    """
    flat = V.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SKETCH))
    return padded.view(-1, SKETCH).sum(0)


def scale_between(was: Tensor, now: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return by what a gradient was scaled, from its sketches, and whether that was all that happened.

    Args:
        was: sketch before.
        now: sketch after.
        tolerance: how much of ``now`` may be left unexplained.

    Returns:
        The scale, and a bool, both 0-dim.
    """
    scale = torch.nan_to_num(torch.dot(now, was) / torch.dot(was, was), nan=0.0, posinf=0.0, neginf=0.0)
    rest = torch.linalg.vector_norm(now - scale * was)
    return scale, rest <= tolerance * torch.linalg.vector_norm(now)
