"""What every approximation of a weight's curvature must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fop.curvature.cost import LayerSize
from fop.curvature.inversion import Fallback, Inversion
from fop.layers import Layer, Reduction, Statistics

Shape: TypeAlias = tuple[int, ...]

# In place of a step: there are tensors for the inverse, but it was never computed.
NEVER = -1


# In the state: the share of the averages that statistics have given; what is missing to 1 counts as zeros
# that are divided out, as in Adam.
AVERAGING_WEIGHT = "averaging_weight"
# In the state: averages over steps of the squared norms of noise and gradient, (2,), see `fop.step_size`.
NOISE = "noise"
# Of these averages from one step to the next.
NOISE_DECAY = 0.9
# As much of a gradient is taken for signal whatever its noise.
LEAST_SIGNAL = 0.01
# Damping that is adaptive: at least, and before any noise was measured.
LEAST_DAMPING = 1e-2


class Damping(NamedTuple):
    """λ = ``value``, in the curvature's own units, or ``relative`` to its mean eigenvalue."""

    value: float | Tensor
    relative: bool


def adaptive_damping(noise: Tensor, step: int) -> Tensor:
    """Return the damping that fits the noise share ν of weights, from their `NOISE`, (..., 2).

    The mean eigenvalue of F̂ is that of F divided by 1 - ν: each factor gets (1 - ν)^(-½) - 1 times its own.
    Where steps of all eigendirections are equally long and noise has the covariance F, as it has for the
    log-likelihood, the step with F + δI, δ in proportion to ν / (1 - ν), has the least expected error. λ is
    from 0.01 to 81, and 0.01 as long as no noise was measured.

    After t steps ν counts by 1 - 0.9ᵗ. At the start a gradient is small and nearly all noise, and after a few
    steps no longer; what heavy damping costs until then a short training does not make up for.
    """
    of_noise, whole = noise.unbind(-1)
    share = (1 - NOISE_DECAY**step) * (of_noise / whole).clamp(max=1 - LEAST_SIGNAL)
    root = ((1 - share).rsqrt() - 1).clamp(min=LEAST_DAMPING**0.5)
    return torch.where(whole > 0, root.square(), LEAST_DAMPING)


class Curvature(ABC):
    """The curvature of one weight: averaged statistics, their damped inverse, products with both.

    A new approximation is a subclass in a file of its own and a row in `fop.curvature.registry`. ``views``
    are the layers of all uses of the weight; ``state`` is the optimizer's, so that a checkpoint is complete.

    Attributes:
        averages: names of the averaged statistics in the state.
        inverses: names of what `solve` uses; if there are matrices to invert, in their order.
        by_inversion: whether the inverse comes from `matrices` and may be computed in the background.
        pending: whether a new inverse is being computed, see `fop.curvature.refresh`.
        ready: whether there is an inverse, here or, on several ranks, at the weight's owner.
        trace: tr F of the averages, 0-dim, from which `fop.correction` knows what is rounding.
        units: None, or in the form of a gradient matrix, but for dimensions of 1, what makes weight and bias
            comparable: 1 for a weight, and for a bias, whose input is 1, the mean square of the others.
        fallbacks: how often an inversion needed each fallback.
    """

    averages: ClassVar[tuple[str, ...]]
    inverses: ClassVar[tuple[str, ...]]
    by_inversion: ClassVar[bool] = True

    def __init__(self, layer: Layer, views: Sequence[Layer], state: dict[str, Any]) -> None:
        self.layer = layer
        # A layer for each of the ways round in which modules use the weight, as in `Statistics.terms`.
        self.terms = {view.swapped: view for view in sorted(views, key=lambda view: view.swapped)}
        self.fallbacks: Counter[Fallback] = Counter()
        shapes = self.entries(layer)
        if any(name in state and tuple(state[name].shape) != shape for name, shape in shapes.items()):
            # Loaded before the layer was known, from a run with other options or bias: estimate again.
            gone = "refresh_at", "refreshed_at", "complete", "inverse_at", AVERAGING_WEIGHT, NOISE
            for name in (*shapes, *gone):
                state.pop(name, None)
        self.load(state)

    def load(self, state: dict[str, Any]) -> None:
        """Use another state."""
        self.state = state
        self.ready = self.held
        self.derive()
        self.pending = self.estimated and state.get("inverse_at", NEVER) != NEVER

    @property
    def estimated(self) -> bool:
        """Whether the averages are in this process."""
        return self.averages[0] in self.state

    @property
    def held(self) -> bool:
        """Whether the inverse is in this process."""
        return self.inverses[0] in self.state and self.state.get("refreshed_at", 0) != NEVER

    def drop(self) -> None:
        """Forget the tensors; another rank owns the weight."""
        for name in (*self.averages, *self.inverses, "inverse_at", AVERAGING_WEIGHT, NOISE):
            self.state.pop(name, None)
        self.pending = False
        self.derive()

    @classmethod
    def unsupported(cls, layer: Layer) -> str | None:
        """Return why this approximation does not fit a layer, None if it does."""
        return None

    @classmethod
    @abstractmethod
    def entries(cls, layer: Layer) -> dict[str, Shape]:
        """Return the names and shapes of the tensors in the state, averages and inverses."""

    @classmethod
    @abstractmethod
    def plausible(cls, state: Mapping[str, Any], shape: torch.Size) -> dict[str, Shape] | None:
        """Return what `entries` may be of a parameter's saved state; None for another kind's."""

    def estimate(
        self, statistics: Statistics, reduction: Reduction, loss_scale: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the estimate of this step's statistics, one tensor for each of ``averages``."""
        return statistics.factors(reduction, loss_scale)

    @property
    def known(self) -> bool:
        """Whether an estimate was taken into the averages."""
        return self.state.get("refreshed_at", 0) != NEVER and self.estimated

    def update(
        self,
        estimate: Sequence[Tensor],
        decay: float,
        *,
        unbiased: bool = False,
        where: Tensor | None = None,
    ) -> None:
        """Take an estimate into the averages.

        The first one is taken as it is, and goes on as if it were an average; if ``unbiased``, estimates
        weigh 1, decay, decay², … from the newest to the first. Only ``where`` it says so, 0-dim bool, if
        there are averages to keep.
        """
        known = self.known
        if unbiased:
            before = decay * self.state.get(AVERAGING_WEIGHT, 1.0) if known else 0.0
            weight = self.state[AVERAGING_WEIGHT] = before + 1 - decay
            decay = before / weight
        for name, new in zip(self.averages, estimate, strict=True):
            average = torch.lerp(new, self.state[name], decay) if known else new
            if where is not None:
                average = torch.where(where.to(new.device), average, self.state[name])
            self.state[name] = average
        self.derive()

    def follows_noise(self, group: Mapping[str, Any]) -> bool:
        """Return whether the damping of a parameter group is that of the noise, which sub-batches show."""
        paired = group["beta"] != 0.0 and group["sub_batches"] > 1
        return group["damping"] == "adaptive" and paired and NOISE in self.state

    def damping(self, group: Mapping[str, Any], adaptive: Tensor | None = None) -> Damping:
        """Return the damping of a parameter group; "adaptive" is λ = 0.01 without sub-batches.

        ``adaptive`` is `adaptive_damping` of the weight, if it is known already.
        """
        value = group["damping"]
        if value == "adaptive":
            if adaptive is None and self.follows_noise(group):
                adaptive = adaptive_damping(self.state[NOISE], group["step"])
            value = LEAST_DAMPING if adaptive is None else adaptive
        return Damping(value, group["damping_kind"] == "relative")

    def derive(self) -> None:
        """Compute what follows from the averages, and what goes with them: they are others, or have moved."""
        if self.estimated:
            # Always there, so that torch.distributed.checkpoint knows where to load it to.
            self.state.setdefault(NOISE, self.state[self.averages[0]].new_zeros(2))
            self.trace, self.units = self.fisher_trace(), self.input_units()

    def places(self) -> dict[str, Tensor]:
        """Return all tensors that a step without statistics may read, by name."""
        found = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        if self.estimated:
            found |= {"trace": self.trace} | ({} if self.units is None else {"units": self.units})
        return found

    def stay_in_place(self, before: Mapping[str, Tensor]) -> None:
        """Put what is new where it was ``before``, see `places`, for a captured step reads it there."""
        for name, now in self.places().items():
            if name in self.state:
                self.state[name] = _put(now, before.get(name))
        # Of tensors that are kept, not of the new ones.
        self.derive()
        if self.estimated:
            self.trace = _put(self.trace, before.get("trace"))
            self.units = None if self.units is None else _put(self.units, before.get("units"))

    @abstractmethod
    def matrices(self, damping: Damping) -> tuple[list[Tensor], list[Tensor]]:
        """Return the matrices to invert and what damping adds to their diagonals; both empty for none.

        That is one number a group, or (relative damping) one for every entry of the diagonal.

        `fop.curvature.refresh` inverts those of all weights together and hands the result to `store`.
        """

    @abstractmethod
    def store(self, inversions: Sequence[Inversion], damping: Damping) -> bool:
        """Take the inverses of ``matrices``; return whether they can be used, else the old ones stay."""

    @abstractmethod
    def fisher(self, V: Tensor) -> Tensor:
        """Return F·V, undamped, for a gradient matrix V."""

    @abstractmethod
    def solve(self, V: Tensor) -> Tensor:
        """Return F̂⁻¹·V, damped, for a gradient matrix V."""

    def fisher_trace(self) -> Tensor:
        """Return tr F, 0-dim; 0 if an approximation does not say, which is safe for means of few samples."""
        return torch.zeros(())

    def input_units(self) -> Tensor | None:
        """Return ``units`` of the averages; None for a weight without bias, or if nothing is known."""
        return None

    # Reports, costs, messages between ranks

    @abstractmethod
    def describe(self) -> str:
        """Return the shapes of the factors for `summary()`."""

    @abstractmethod
    def damping_shares(self, damping: Damping) -> list[float | None]:
        """Return the share of the damping in the mean eigenvalues of A and G; None where there is none."""

    @abstractmethod
    def size(self, name: str) -> LayerSize:
        """Return what keeping, sending and using it takes; ``name`` is the layer's."""

    def message_shapes(self, layer: Layer) -> list[Shape]:
        """Return the shapes in which the statistics of one of the ``terms`` travel between ranks."""
        return list(layer.sum_shapes)

    @abstractmethod
    def pack(self, statistics: Statistics, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Return statistics as they travel, and for every term N and the numbers of rows, 1-d float64."""

    @abstractmethod
    def unpack(self, message: Tensor, counts: Sequence[float], share: float) -> Statistics:
        """Return the statistics of all ranks, from the sums of what they have packed, 1-d.

        ``share`` is what b bᵀ of one rank weighs in that of the averaged loss.
        """


def _put(now: Tensor, place: Tensor | None) -> Tensor:
    """Return a tensor at a place, if it fits there."""
    if place is None or (place.device, place.dtype, place.shape) != (now.device, now.dtype, now.shape):
        return now
    return place if place is now else place.copy_(now)
