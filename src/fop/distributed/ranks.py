"""Several ranks that train one model: every weight has an owner, which alone keeps its curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fop.binding import Binding, Bindings, Groups
from fop.capture import Hook, is_sharded, local
from fop.correction import SubBatchGradients, inner
from fop.distributed.distributor import Distributor, Outcome, Shared
from fop.distributed.handshake import Description, open_channels, plan_for, shake_hands
from fop.distributed.join import JoinableOptimizer, join_along
from fop.distributed.messages import Reductions, Sending, contribution, received
from fop.distributed.options import Distribution
from fop.distributed.updates import clip_shared, gather_gradients, share_updates
from fop.distributed.wrappers import Wrappers, average, average_lean, check_group, share_gradients
from fop.layers import Statistics
from fop.step_size import Update
from fop.torch_internals import after_backward, is_joining, outside


class Ranks(Distributor):
    """This rank as one of several.

    In a backward pass every weight sends its statistics, if they are due, and its part of the pair to its
    owner as soon as it has them. In `step()` owners refresh the curvature, compute the updates of their
    weights and share these; momentum and weight decay then follow on all ranks alike.

    Attributes:
        without_batch: whether the running step is one of other ranks, for which this one has no batch.
    """

    _options: Distribution

    def __init__(self, options: Distribution, optimizer: JoinableOptimizer) -> None:
        super().__init__(options, optimizer)
        self.without_batch = False
        self._wrappers = Wrappers(Hook(self, Ranks._meet))
        self._reductions = Reductions(options.factor_dtype)
        self._binding_of: dict[Tensor, Binding] = {}
        # Whether there was a handshake for the present model and state; without that nothing can be sent.
        self._agreed = False
        self._labelled = False
        # Whether `backward_ended` will be called.
        self._awaits_end = False
        # Whether a backward pass has sent anything for the running step.
        self._had_pass = False
        self._warned = False
        # Of the running step.
        self._sent: dict[Binding, Sending] = {}
        self._cumulative: list[Binding] = []
        self._samples: dict[Binding, Tensor] = {}
        self._gathered: dict[Binding, Tensor] = {}
        # Of owned weights: the squared norm of Ga, and whether any rank used the weight.
        self._noted: dict[Binding, tuple[Tensor, Tensor]] = {}
        self._max_norm: float | None = None

    # Who takes part

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks that train the model."""
        ddp = self._wrappers.ddp
        group = self._options.group or (dist.group.WORLD if ddp is None else ddp.process_group)
        if group is None or not dist.is_initialized():
            raise RuntimeError(
                "the process group is gone, and the model is trained by several ranks; step before "
                "torch.distributed.destroy_process_group(), or make a new optimizer"
            )
        return group

    def see(self, root: nn.Module) -> None:
        """Look at a model for what wraps it."""
        self._wrappers.see(root)

    def _meet(self, ddp: Any) -> None:
        """Prepare the DistributedDataParallel around the model."""
        check_group(self._options.group, ddp)
        if (optimizer := self._optimizer()) is not None:
            join_along(ddp, optimizer)
        if self._options.mode == "lean":
            average_lean(ddp, Hook(self, Ranks._is_lean))

    def _is_lean(self, param: Tensor) -> bool:
        binding = self._binding_of.get(param)
        # The bias of a weight that was frozen since takes AdamW's step, from its averaged gradient.
        return binding is not None and binding.lean and binding.weight.requires_grad

    def owned(self, bindings: Sequence[Binding]) -> list[Binding]:
        """Return the bindings whose curvature this rank keeps."""
        if self._agreed:
            return [binding for binding in bindings if self._reductions.owns(binding)]
        # No message is needed: the plan is the same on all ranks.
        plan = plan_for(self._bindings, self._options, dist.get_world_size(self.group), self._groups)
        owner = dict(zip(self._bindings, plan.owners, strict=True))
        return [binding for binding in bindings if owner[binding] == dist.get_rank(self.group)]

    # What a backward pass must give

    def prepare(self, bindings: Bindings, groups: Groups) -> Distributor:
        """Have the recorders of these bindings call `completed`, and say what the coming pass must give."""
        weights = [id(binding.weight) for binding in bindings]
        if weights != [id(binding.weight) for binding in self._bindings]:
            self._agreed = False
        self._bindings, self._groups = list(bindings), groups
        self._binding_of = {param: binding for binding in bindings for param in binding.params}
        lean = self._agreed and self._options.mode == "lean"
        completed = Hook(self, Ranks.completed)
        for binding in bindings:
            recorder = binding.recorder
            recorder.completed, recorder.stream = completed, dist.get_rank(self.group)
            if not self._agreed:
                # Which weights lack a curvature is known after the handshake.
                recorder.due = True
            if self._by_parity:
                # Nothing of this rank's own batch is split.
                recorder.paired = False
            sharded = is_sharded(binding.weight)
            binding.lean = lean and binding.curvature.ready and not sharded
            recorder.taken = binding.lean or sharded
        return self

    @property
    def _by_parity(self) -> bool:
        """Whether a rank's side says which sub-batch its batch is (Algorithm 1)."""
        even = dist.get_world_size(self.group) % 2 == 0
        return not self._labelled and (self._options.pair or ("parity" if even else "halves")) == "parity"

    def use_labels(self) -> None:
        """Take the pair of the coming step from passes that the user labels."""
        if self._options.pair == "parity":
            raise ValueError(
                "sub_batch() labels backward passes, and distributed={'pair': 'parity'} takes the pair from "
                "the ranks; use one or the other"
            )
        if self._options.mode == "lean":
            raise ValueError("sub_batch() does not go together with mode='lean'; leave the pair to the ranks")
        if any(is_sharded(binding.weight) for binding in self._bindings):
            raise ValueError("sub_batch() does not go together with fully_shard; leave the pair to the ranks")
        self._labelled = True
        for binding in self._bindings:
            binding.recorder.paired = binding.corrected

    def _sending(self, binding: Binding) -> Sending:
        if not binding.lean:
            return Sending.DIFFERENCE if binding.corrected else Sending.NOTHING
        if not binding.corrected:
            return Sending.GRADIENT
        return Sending.SIDE if self._by_parity else Sending.BOTH

    def _adds_up(self, binding: Binding) -> bool:
        """Return whether the contributions of several passes are to be added; otherwise the last has it all.

        By parity p.grad of earlier passes, a mean over all ranks, cancels from Gd.
        """
        return self._by_parity or binding.recorder.taken

    def check_scaler(self) -> None:
        """Raise RuntimeError where ranks would not find the same overflow."""
        if self._options.mode == "lean":
            raise RuntimeError(
                "GradScaler looks for overflow in p.grad, and with distributed={'mode': 'lean'} "
                "preconditioned layers have none; use bfloat16 without a scaler, or mode='compatible'"
            )
        if self._wrappers.ddp is None and not any(map(is_sharded, self._groups)):
            raise RuntimeError(
                "GradScaler looks for overflow before the optimizer averages gradients, so that ranks would "
                "skip different steps; wrap the model in DistributedDataParallel, or use bfloat16"
            )

    # In a backward pass

    def completed(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Take the gradients of a binding, this rank's own, as a backward pass has just given them."""
        binding = self._binding_of[next(iter(gradients))]
        recorder, reductions, weight = binding.recorder, self._reductions, binding.weight
        synchronises = self._wrappers.synchronises(weight)
        if weight not in gradients or not (synchronises or is_sharded(weight)):
            # It is frozen; or the last pass shows the whole gradient, or the step averages it.
            return
        recorder.averaged = synchronises
        if recorder.restarted and not binding.lean:
            # Its gradient was zeroed since the passes so far.
            reductions.drop(binding)
        if not self._awaits_end:
            self._awaits_end = True
            after_backward(Hook(self, Ranks.backward_ended))
        pieces = self._contribution(binding, gradients)
        if (before := reductions.held.pop(binding, None)) is not None:
            pieces = self._added(binding, before, pieces)
        if self._agreed and synchronises:
            reductions.send(binding, pieces, self._outgoing)
        else:
            reductions.held[binding] = pieces

    def _outgoing(self) -> tuple[list[Binding], dict[Binding, Sending]]:
        """Return the trained bindings, in the order in which they will be ready, and what each sends."""
        bindings = [binding for binding in reversed(self._bindings) if binding.weight.requires_grad]
        return bindings, {binding: self._sending(binding) for binding in bindings}

    def _contribution(
        self, binding: Binding, gradients: Mapping[Tensor, Tensor], *, in_step: bool = False
    ) -> list[Tensor]:
        bias = None if binding.bias is None else gradients.get(binding.bias)
        return contribution(
            binding,
            binding.layer.to_matrix(gradients[binding.weight], bias),
            self._sending(binding),
            self._groups[binding.weight],
            rank=dist.get_rank(self.group),
            ranks=dist.get_world_size(self.group),
            parity=self._by_parity,
            in_step=in_step,
        )

    def _added(self, binding: Binding, before: list[Tensor], now: list[Tensor]) -> list[Tensor]:
        """Return the contribution of two backward passes."""
        recorder = binding.recorder
        if not self._adds_up(binding) or (recorder.taken and recorder.accumulates):
            return now
        sums = [old + new for old, new in zip(before, now, strict=True)]
        if self._sending(binding) is Sending.DIFFERENCE and not recorder.taken:
            # p.grad, and its sketch, hold all passes so far.
            sums[1] = now[1]
        return sums if len(sums) < 3 else [*sums[:2], torch.minimum(before[2], now[2])]

    def backward_ended(self) -> None:
        """Take the gradients as the backward pass has left them, after averaging."""
        self._awaits_end = False
        for binding in self._bindings:
            binding.recorder.averaging_ended()
            if self._is_lean(binding.weight) and self._wrappers.synchronises(binding.weight):
                # It is of one rank alone, and no norm to clip by or to log.
                for param in binding.params:
                    param.grad = None

    # In a step

    def reduce(
        self, max_grad_norm: float | None, describe: Callable[[], Description]
    ) -> tuple[list[Binding], dict[Binding, Statistics | None]]:
        """Shake hands if need be, average, and get what other ranks have sent to this one as an owner."""
        reductions, groups = self._reductions, self._groups
        # A backward pass that raised an error has no end.
        self._awaits_end = False
        if not self._agreed:
            self._shake_hands(describe())
        self._had_pass = reductions.count > 0 or self.without_batch
        self._warn_of_several_passes()
        self._send_rest()
        # All that follows comes after the last bucket, on every rank.
        if is_joining(self._optimizer()) or is_joining(self._wrappers.ddp):
            share_gradients(reductions.ranks, list(groups), not self.without_batch)
        if not_averaged := [p for p in groups if p.requires_grad and not self._wrappers.averages(p)]:
            average(reductions.ranks, not_averaged)
        reductions.collect()
        bindings, self._sent = self._outgoing()
        if sides := [binding for binding in bindings if self._sent[binding] is Sending.SIDE]:
            reductions.swap_sides(sides)
        if self._bindings and any(group["loss_reduction"] == "sum" for group in groups.values()):
            self._count_samples()
        self._cumulative = [binding for binding in self._bindings if not self._adds_up(binding)]
        self._labelled = False
        if max_grad_norm is not None:
            if any(self._is_lean(binding.weight) for binding in self._bindings):
                # The norms of lean weights come with their updates.
                self._max_norm = max_grad_norm
            else:
                nn.utils.clip_grad_norm_([p for p in groups if p.requires_grad], max_grad_norm)
        active = [binding for binding in self._bindings if self._takes_part(binding)]
        due = [binding for binding in active if binding.recorder.due]
        sharded = [binding for binding in active if is_sharded(binding.weight)]
        self._gathered = gather_gradients(reductions, sharded) if sharded else {}
        return active, reductions.statistics(due, groups) if due else {}

    def _takes_part(self, binding: Binding) -> bool:
        """Return whether a weight is trained, and has a gradient on any rank."""
        used = self._had_pass if binding.lean else binding.weight.grad is not None
        return used and binding.weight.requires_grad

    def _shake_hands(self, description: Description) -> None:
        bindings, reductions = self._bindings, self._reductions
        if self.plan is None:
            reductions.ranks, reductions.side = open_channels(self.group, self.bytes_sent)
        self.plan = shake_hands(bindings, description, self._options, reductions.ranks, self._groups)
        reductions.owners = {b.weight: owner for b, owner in zip(bindings, self.plan.owners, strict=True)}
        for binding in bindings:
            step = self._groups[binding.weight]["step"]
            if binding.curvature.ready and binding.state.get("refresh_at", 0) > step:
                # Recorded in case that its owner had no curvature.
                binding.recorder.due, binding.recorder.statistics = False, None
        self._agreed = True

    def _warn_of_several_passes(self) -> None:
        several = self._reductions.count > 1
        if several and not self._warned and any(binding.lean for binding in self._bindings):
            self._warned = True
            warnings.warn(
                "several averaged backward passes were added up for one step; with mode='lean' only "
                "optimizer.zero_grad() discards a pass, model.zero_grad() does not. Reported once",
                UserWarning,
                stacklevel=outside(),
            )

    def _send_rest(self) -> None:
        """Send what no backward pass has sent: all of it in the first step, and without a wrapper."""
        bindings, _ = self._outgoing()
        not_averaged = [binding for binding in bindings if not self._wrappers.averages(binding.weight)]
        if not_averaged or not self._reductions.count:
            for binding in bindings:
                pieces = self._reductions.held.pop(binding, None)
                if binding in not_averaged and binding.weight.grad is not None:
                    trained = [param for param in binding.params if param.requires_grad]
                    gradients = {param: param.grad for param in trained if param.grad is not None}
                    pieces = self._contribution(binding, gradients, in_step=True)
                self._reductions.send(binding, pieces or [], self._outgoing)
        self._reductions.flush()

    def _count_samples(self) -> None:
        ranks = self._reductions.ranks
        counts = torch.tensor([float(binding.recorder.samples) for binding in self._bindings])
        counts = counts.to(local(self._bindings[0].weight).device)
        ranks.all_reduce(counts, "control").wait()
        means = (counts / ranks.size).clamp(min=1)
        self._samples = dict(zip(self._bindings, means.unbind(), strict=True))

    def gradients(self, bindings: Sequence[Binding]) -> list[tuple[SubBatchGradients, int | Tensor]]:
        """Return the sub-batch gradients of alike owned weights, and by what they are divided for a mean."""
        found: list[tuple[SubBatchGradients, int | Tensor]] = []
        for binding in bindings:
            gradients, used = received(
                binding,
                self._sent[binding],
                self._reductions.gradients(binding),
                self._gathered.pop(binding, None),
                ranks=self._reductions.ranks.size,
                cumulative=binding in self._cumulative,
            )
            self._noted[binding] = inner([gradients.average], [gradients.average])[0], used
            found.append((gradients, self._samples.get(binding, 1)))
        return found

    def outcomes(self, own: Sequence[Outcome]) -> list[Outcome]:
        """Return what became of the statistics of bindings, as their owners say."""
        owns = self._reductions.owns
        # 1 taken in, 2 refused; 4 more if there is a curvature.
        said = [
            1.0 * taken + 2.0 * refused + 4.0 * binding.curvature.ready if owns(binding) else 0.0
            for binding, taken, refused in own
        ]
        codes = torch.tensor(said, dtype=torch.float32).to(local(own[0][0].weight).device)
        self._reductions.ranks.all_reduce(codes, "control").wait()
        outcomes = []
        for (binding, *_), code in zip(own, map(int, codes.tolist()), strict=True):
            taken, refused, ready = bool(code & 1), bool(code & 2), bool(code & 4)
            if not owns(binding):
                binding.curvature.ready = ready
                if taken:
                    binding.state["refreshed_at"] = self._groups[binding.weight]["step"]
            outcomes.append((binding, taken, refused))
        return outcomes

    def share(self, bindings: Sequence[Binding], own: Mapping[Binding, Update]) -> list[Shared]:
        """Give the updates of owned weights to all ranks, and take those of the others."""
        updates: dict[Binding, tuple[Update, Tensor]] = {}
        for binding, update in own.items():
            square, used = self._noted.pop(binding)
            updates[binding] = update._replace(used=used), square
        shared, squares = share_updates(self._reductions, bindings, updates)
        if self._max_norm is not None:
            moving = {param for binding in bindings for param in binding.params}
            rest = [
                p.grad for p in self._groups if p.requires_grad and p.grad is not None and p not in moving
            ]
            shared = clip_shared(shared, squares, rest, self._max_norm)
            self._max_norm = None
        return shared

    def sums(self, own: Tensor) -> Tensor:
        """Return sums over whole parameters from those over this rank's shards, in place."""
        self._reductions.ranks.all_reduce(own, "updates").wait()
        return own

    def any(self, found: Tensor) -> Tensor:
        """Return whether any rank found something in its gradients."""
        if not any(map(is_sharded, self._groups)):
            # All ranks have the same gradients.
            return found
        total = found.float()
        self._reductions.ranks.all_reduce(total, "control").wait()
        return total > 0

    def discard(self, *, state_replaced: bool = False) -> None:
        """Forget what was sent for a step that no rank will take."""
        if state_replaced:
            self._agreed = False
            for binding in self._bindings:
                binding.curvature.ready = binding.curvature.held
            return
        self._reductions.discard()
        self._labelled = self._awaits_end = False
