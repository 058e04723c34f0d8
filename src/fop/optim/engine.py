"""What happens in a step, and what the optimizer keeps between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fop.algebra import Rung
from fop.capture import local
from fop.optim.agreement import Description, check_devices, describe_rank
from fop.optim.block import Block
from fop.optim.checkpoint import enter_block, follow_moves, make_block_state, note_places
from fop.optim.crew import crew_for
from fop.optim.distribution import Distribution, portable
from fop.optim.gradients import unscale
from fop.optim.joining import Shadow
from fop.optim.layer_options import LayerChoices, LayerOptionsLike
from fop.optim.live import live
from fop.optim.options import Schedule, checked
from fop.optim.report import Refusals, warn_of_curvature
from fop.optim.solo import Solo
from fop.optim.team import Team
from fop.optim.tracking import Tracker
from fop.optim.update import adamw_step, apply_moves, make_adamw_state


class Engine(Optimizer):
    """The inside of `fop.FOP`: which modules its parameters belong to, and the order of a step."""

    def _begin(
        self,
        layer_options: LayerOptionsLike | None,
        schedules: dict[str, Schedule],
        distribution: Distribution | None,
    ) -> None:
        self._tracker = Tracker(LayerChoices(layer_options))
        # By index of the group: functions do not belong into a state_dict.
        self._schedules: list[dict[str, Schedule]] = []
        self._default_schedules = schedules
        self._places: dict[Tensor, tuple[torch.device, torch.dtype]] = {}
        self._kl_scale: Tensor | None = None
        self._warned: set[tuple[str, Rung]] = set()
        self._refusals = Refusals()
        self._distribution = distribution
        self._crew = crew_for(distribution, self)

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {param: group for group in self.param_groups for param in group["params"]}

    def _adopt(self, root: nn.Module) -> None:
        groups = self._groups()
        if any(param in groups for param in root.parameters()):
            self._crew.see(root)
        self._tracker.adopt(root, groups, self.state)

    def _seen(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._adopt(root)
        self._tracker.enter(root, args, kwargs)
        # Not only in the step: torch.compile would leave the model in the pieces that the hook made of it.
        self._listen()

    def _form_crew(self) -> None:
        """Work with the other ranks from now on, if a process group has come after the optimizer."""
        if type(self._crew) is Solo:
            self._crew = crew_for(self._distribution, self)
            for root in self._tracker.roots():
                self._crew.see(root)

    def _listen(self) -> None:
        self._form_crew()
        self._tracker.listen(list(self._parameters()), self._seen)
        self._crew.watch(self._tracker.blocks.values(), self._groups())

    def _follow_model(self) -> None:
        replaced = self._tracker.follow(self._groups(), self.state)
        if replaced:
            for group in self.param_groups:
                group["params"] = [replaced.get(param, param) for param in group["params"]]
            # Where the old ones were is where their state is.
            self._places = {replaced.get(param, param): place for param, place in self._places.items()}
        follow_moves(self.state, self._places)
        self._relink()

    def _relink(self) -> None:
        """Take the state as it is now: a new one was loaded, or the old one was thrown away."""
        groups = self._groups()
        for weight, block in self._tracker.blocks.items():
            held = self.state.get(weight)
            if held is not block.state and (held is not None or block.state):
                block.state = {} if held is None else held
                self._schedule(block, groups)

    def _step(self) -> None:
        for group, schedules in zip(self.param_groups, self._schedules, strict=True):
            group.update(checked({name: schedule(group["step"]) for name, schedule in schedules.items()}))
        groups, blocks = self._groups(), self._tracker.blocks.values()
        loss_scale = unscale(self, groups)
        self._form_crew()
        crew = self._crew
        # Parameters may have been replaced since the last step.
        crew.watch(blocks, groups)
        crew.begin(groups, self._describe)
        if (max_norm := self.defaults["max_grad_norm"]) is not None:
            crew.clip(self._parameters(), max_norm)
        active = [block for block in blocks if crew.takes_part(block)]
        for block in active:
            enter_block(block, self.state)
        refused, rescues = crew.refresh(active, groups, loss_scale)
        if refused or rescues:
            warn_of_curvature(refused, rescues, self._warned)
        if any(block.capture.due for block in active):
            self._refusals.report()

        ready = [block for block in active if block.ready]
        if ready:
            moves = crew.moves(ready, groups)
            self._kl_scale, finite = apply_moves(moves, self.defaults["kl_clip"], groups, self.state)
            self._refusals.count(tuple(f"layer {block.name!r}" for block in ready), ~finite)

        for block in active:
            block.by_adamw = not (block.ready or block in refused)
        self._step_adamw({p for block in active if not block.by_adamw for p in block.params})

        self._tracker.give_up([param for param in groups if param.grad is not None])
        for group in self.param_groups:
            group["step"] += 1
            group["last_lr"] = group["lr"]
        for block in blocks:
            block.capture.clear()
            self._schedule(block, groups)
        self._listen()
        note_places(self.state, self._places)

    def _asks_for_state(self) -> bool:
        """Tell whether this step is to do nothing but make the state.

        So does torch.distributed.checkpoint before it loads: it reads only into what is there.
        """
        idle = not self.state and all(group["lr"] == group["step"] == 0 for group in self.param_groups)
        unseen = not any(block.capture.window.samples for block in self._tracker.blocks.values())
        gradients = [param.grad for param in self._parameters() if param.grad is not None]
        return idle and unseen and bool(gradients) and not any(bool(g.any()) for g in map(local, gradients))

    def _make_state(self) -> None:
        """Make the state that this process will hold, as before the first step.

        For a parameter whose module is not known yet that is AdamW's.
        """
        groups, blocks = self._groups(), list(self._tracker.blocks.values())
        owned = self._crew.owned(blocks, groups)
        for block in blocks:
            make_block_state(block, owned=block in owned, groups=groups, state=self.state)
        covered = self._tracker.covered()
        make_adamw_state(
            [param for param in groups if param not in covered and param.requires_grad], self.state
        )
        self._relink()

    def _describe(self) -> Description:
        check_devices(self._parameters(), self._tracker.names)
        return describe_rank(self.param_groups, self._tracker, self._distribution)

    @torch.no_grad()
    def shadow_step(self) -> None:
        """Take part in a step of other ranks, for which this one has no batch left (`Join`)."""
        assert isinstance(self._crew, Team)
        for param in self._parameters():
            param.grad = None
        self._crew.shadow = True
        self._follow_model()
        self._step()
        self._crew.shadow = False

    def join_hook(self, **options: Any) -> Shadow:
        """Return what `torch.distributed.algorithms.Join` calls on ranks without a batch."""
        return Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """The device on which `Join` may communicate."""
        return next(self._parameters()).device

    @property
    def join_process_group(self) -> Any:
        """The process group of the ranks."""
        return self._crew.group if isinstance(self._crew, Team) else torch.distributed.group.WORLD

    def _schedule(self, block: Block, groups: Mapping[Tensor, dict[str, Any]]) -> None:
        block.schedule(groups[block.weight])
        self._crew.schedule(block)

    def _step_adamw(self, done: Set[Tensor]) -> None:
        """Step every other parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None and param.numel() and param not in done:
                    alike.setdefault((param.device, param.dtype), []).append(param)
            for params in alike.values():
                refused = adamw_step(params, group, self.state, self._crew.agree)
                self._refusals.count((f"all {len(params)} AdamW parameters of a group",), refused[None])

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "layer_options": self._tracker.choices.given,
            "schedules": self._schedules,
            "distribution": portable(self._distribution),
        }
        return {**super().__getstate__(), "_own": (own, self._default_schedules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_own", None)
        # A copy or an unpickled optimizer has no modules yet: it finds them as from bare parameters.
        if "_tracker" not in self.__dict__:
            assert own is not None
            self._begin(own[0]["layer_options"], own[1], own[0]["distribution"])
            self._schedules = own[0]["schedules"]
        super().__setstate__(state)
        if self not in live:
            self._listen()
            live.add(self)
