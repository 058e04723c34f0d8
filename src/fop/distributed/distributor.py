"""Where gradients, statistics and updates of a step come from: this process alone, or several ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from fop.binding import Binding, Bindings, Groups
from fop.capture import scalings
from fop.correction import SubBatchGradients
from fop.distributed.assignment import Plan
from fop.distributed.handshake import Description
from fop.distributed.join import JoinableOptimizer
from fop.distributed.options import Distribution
from fop.layers import Statistics
from fop.step_size import Update

# What a weight is about to do, and the part of it for each of its parameters.
Shared: TypeAlias = tuple[Update, list[tuple[Tensor, Tensor]]]
# A binding whose curvature is due, whether its statistics were taken in, whether they were refused.
Outcome: TypeAlias = tuple[Binding, bool, bool]


def several_ranks(options: Distribution | None) -> bool:
    """Return whether there is a process group of several ranks that train one model."""
    if options is None or not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(options.group) > 1


def make_distributor(options: Distribution | None, optimizer: JoinableOptimizer) -> Distributor:
    """Return the distributor of this process, or that of several ranks; it holds the optimizer weakly."""
    if options is None or not several_ranks(options):
        return Distributor(options, optimizer)
    # Not at the top: it builds on this module.
    from fop.distributed.ranks import Ranks  # noqa: PLC0415

    return Ranks(options, optimizer)


class Distributor:
    """This process alone: it owns every weight. `fop.distributed.ranks` has the same for several.

    Attributes:
        plan: which rank owns which weight; None on one process.
        bytes_sent: bytes sent to other ranks, by category.
    """

    plan: Plan | None = None

    def __init__(self, options: Distribution | None, optimizer: JoinableOptimizer) -> None:
        self._options = options
        self._optimizer = weakref.ref(optimizer)
        self.bytes_sent: dict[str, float] = {}
        self._bindings: list[Binding] = []
        self._groups: Groups = {}

    def prepare(self, bindings: Bindings, groups: Groups) -> Distributor:
        """Get ready for a backward pass; return what takes this one's place once there are several ranks.

        Raises RuntimeError for a weight that is sharded, as its shards are of several ranks.
        """
        optimizer = self._optimizer() if dist.is_available() and dist.is_initialized() else None
        if optimizer is not None and several_ranks(self._options):
            # A process group has come after the optimizer.
            ranks = make_distributor(self._options, optimizer)
            for root in bindings.roots():
                ranks.see(root)
            return ranks.prepare(bindings, groups)
        self._bindings, self._groups = list(bindings.by_weight.values()), groups
        for binding in self._bindings:
            if hasattr(binding.weight, "to_local"):
                raise RuntimeError(
                    f"the weight of {binding.name!r} is a DTensor, and this optimizer knows one rank only: "
                    "leave fully_shard out on one rank; on several leave distributed=False out"
                )
        return self

    @property
    def group(self) -> Any:
        """The process group of the ranks that train the model."""
        return dist.group.WORLD

    def see(self, root: nn.Module) -> None:
        """Look at a model for what wraps it."""

    def owned(self, bindings: Sequence[Binding]) -> list[Binding]:
        """Return the bindings whose curvature this process keeps."""
        return list(bindings)

    def reduce(
        self, max_grad_norm: float | None, describe: Callable[[], Description]
    ) -> tuple[list[Binding], dict[Binding, Statistics | None]]:
        """Begin a step: bring gradients and statistics together, and clip the gradients.

        Returns the bindings that take part in the step; and, of those whose curvature is due, the statistics,
        None where this process has none. ``describe`` returns what must be the same on all ranks.
        """
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for p in self._groups if p.requires_grad], max_grad_norm)
        weights = [(binding, binding.weight) for binding in self._bindings]
        active = [binding for binding, w in weights if w.requires_grad and w.grad is not None]
        return active, {b: b.recorder.statistics for b in active if b.recorder.due or b.recorder.statistics}

    def gradients(self, bindings: Sequence[Binding]) -> list[tuple[SubBatchGradients, int | Tensor]]:
        """Return the sub-batch gradients of alike owned weights, and by what they are divided for a mean."""
        found: list[tuple[SubBatchGradients, int | Tensor]] = []
        scaled = scalings(binding.recorder.sub_batches for binding in bindings if binding.recorder.paired)
        for binding in bindings:
            recorder, average, bias = binding.recorder, binding.gradient(), binding.bias
            gradients = SubBatchGradients(average)
            if recorder.paired:
                complete = binding.curvature.state.get("complete")
                reduction = self._groups[binding.weight]["loss_reduction"]
                scaling = scaled.get(recorder.sub_batches)
                gradients = recorder.sub_batches.gradients(average, complete, reduction, scaling)
                if bias is not None and not (bias.requires_grad and bias.grad is not None):
                    for difference in gradients.contrasts:
                        binding.layer.bias_part(difference).zero_()
            found.append((gradients, max(1, recorder.samples)))
        return found

    def outcomes(self, own: Sequence[Outcome]) -> list[Outcome]:
        """Return what became of the statistics of bindings, as their owners say."""
        return list(own)

    def share(self, bindings: Sequence[Binding], own: Mapping[Binding, Update]) -> list[Shared]:
        """Return the updates of all bindings, from those of the owned ones."""
        return [(own[binding], binding.parts(own[binding].matrix)) for binding in bindings]

    def sums(self, own: Tensor) -> Tensor:
        """Return sums over whole parameters from those over this process's shards."""
        return own

    def any(self, found: Tensor) -> Tensor:
        """Return whether any rank found something in its gradients; ``found``: whether this one did."""
        return found

    def discard(self, *, state_replaced: bool = False) -> None:
        """Forget what was gathered for a step that will not be taken."""

    def use_labels(self) -> None:
        """Take the sub-batches of the coming step from labelled passes; ValueError if ranks give them."""

    def check_scaler(self) -> None:
        """Raise RuntimeError where a `GradScaler` would not see the overflow of all ranks."""
