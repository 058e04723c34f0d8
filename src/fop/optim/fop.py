"""The optimizer: options, the order of a step, state."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fop.algebra import Direction, Rung
from fop.capture import FirstForwardHook
from fop.optim.block import Block, refresh_curvature
from fop.optim.checkpoint import check_state_dict, restore_precision
from fop.optim.discovery import find_layers
from fop.optim.options import (
    DEFAULTS,
    ParamsLike,
    check_parameters,
    checked,
    normalise,
    normalise_group,
)
from fop.optim.report import (
    Diagnostics,
    Refusals,
    Summary,
    diagnose,
    summarise,
    warn_of_curvature,
)
from fop.optim.update import adamw_step, move

# Every optimizer alive, to refuse a second one on the same parameters.
_live: weakref.WeakSet[FOP] = weakref.WeakSet()


class FOP(Optimizer):
    """Fisher-Orthogonal Projection (Lu & Armour, AAAI 2026, Algorithm 1 on one process).

    Linear and Conv2d layers take η0·η*·F̂⁻¹·(Ga + β*·G⊥) with Kronecker-factored F; all other parameters
    take AdamW in the same step. Nothing in the training loop changes.

    Args:
        params: an `nn.Module`, parameters, named parameters, or parameter groups. From bare parameters the
            owning modules are found at the first forward pass.
        lr: learning rate η0 of the preconditioned update.
        momentum: heavy-ball momentum on the preconditioned update, as `torch.optim.SGD` applies it.
        nesterov: Nesterov momentum, as in `torch.optim.SGD`.
        weight_decay: decoupled, p ← p·(1 - lr·weight_decay), on all parameters; those on the AdamW path
            use their own learning rate in place of lr.
        damping: λ of the paper; γ = sqrt(damping) is split between A and G by π.
        stat_decay: weight of the old factors when new statistics come in, in [0, 1).
        curvature_interval: steps between curvature updates; early in training they come more often.
        beta: "adaptive" for β* (16), or a fixed mixing coefficient; 0.0 with ``eta=1.0`` is K-FAC.
        eta: "adaptive" for η* (17), or a fixed scale.
        kl_clip: κ; the preconditioned updates are scaled by min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩))
            (Ba et al. 2017), and momentum is held to it when lr rises. None for no clip.
        adamw_lr: learning rate of the AdamW path while ``lr`` has its first value; it follows every
            schedule of ``lr`` in proportion.
        betas: as `torch.optim.AdamW`, for the AdamW path.
        eps: as `torch.optim.AdamW`, for the AdamW path.
        maximize: go up instead of down.

    Raises:
        ValueError: an option out of range; empty, duplicate, shared or sparse parameters; parameters that
            another live FOP drives.
        TypeError: an option of the wrong type; complex or integer parameters.
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float = DEFAULTS["lr"],
        *,
        momentum: float = DEFAULTS["momentum"],
        nesterov: bool = DEFAULTS["nesterov"],
        weight_decay: float = DEFAULTS["weight_decay"],
        damping: float = DEFAULTS["damping"],
        stat_decay: float = DEFAULTS["stat_decay"],
        curvature_interval: int = DEFAULTS["curvature_interval"],
        beta: float | Literal["adaptive"] = DEFAULTS["beta"],
        eta: float | Literal["adaptive"] = DEFAULTS["eta"],
        kl_clip: float | None = DEFAULTS["kl_clip"],
        adamw_lr: float = DEFAULTS["adamw_lr"],
        betas: tuple[float, float] = DEFAULTS["betas"],
        eps: float = DEFAULTS["eps"],
        maximize: bool = DEFAULTS["maximize"],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "stat_decay": stat_decay,
            "curvature_interval": curvature_interval,
            "beta": beta,
            "eta": eta,
            "kl_clip": kl_clip,
            "adamw_lr": adamw_lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
        }
        defaults = checked(defaults)
        groups, root, names = normalise(params)
        self._begin()
        self._names.update(names)
        super().__init__(groups, defaults)
        if root is not None:
            self._adopt(root)
        self._listen()
        _live.add(self)

    def _begin(self) -> None:
        self._blocks: dict[Tensor, Block] = {}
        self._names: dict[Tensor, str] = {}
        self._reasons: dict[Tensor, str] = {}
        self._roots: list[weakref.ref[nn.Module]] = []
        self._finder: FirstForwardHook | None = None
        self._kl_scale: Tensor | None = None
        self._warned: set[tuple[str, Rung]] = set()
        self._refusals = Refusals()

    # Parameters and modules

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: as the constructor, for the group's parameters and options.
            TypeError: likewise.
        """
        group = normalise_group(param_group, self._names)
        options = {key: value for key, value in group.items() if key != "params"}
        group |= {
            key: value for key, value in checked({**self.defaults, **options}).items() if key in options
        }
        if "kl_clip" in options and options["kl_clip"] != self.defaults["kl_clip"]:
            raise ValueError(
                f"kl_clip={options['kl_clip']!r} in a parameter group: the clip is one number for the whole "
                "step; give it to the constructor"
            )
        params = group["params"]
        check_parameters(params, self._names, set(self._parameters()))
        self._refuse_driven(params)
        group.setdefault("base_lr", group.get("lr", self.defaults["lr"]))
        group.setdefault("last_lr", group.get("lr", self.defaults["lr"]))
        group.setdefault("step", self.param_groups[0]["step"] if self.param_groups else 0)
        super().add_param_group(group)
        if self in _live:
            for root in [alive for ref in self._roots if (alive := ref()) is not None]:
                self._adopt(root)
            self._listen()

    def _refuse_driven(self, params: list[Tensor]) -> None:
        if not self._driven(params):
            return
        # An optimizer that nobody can reach any more may still wait for the collector.
        gc.collect()
        for param in self._driven(params):
            label = f"{self._names.get(param, 'a parameter')} {tuple(param.shape)}"
            raise ValueError(
                f"{label} is already driven by another live FOP or KFAC; delete that optimizer first "
                "(del optimizer) or give each its own parameters"
            )

    def _driven(self, params: list[Tensor]) -> list[Tensor]:
        others = {p for other in _live if other is not self for p in other._parameters()}
        return [param for param in params if param in others]

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {param: group for group in self.param_groups for param in group["params"]}

    def _adopt(self, root: nn.Module) -> None:
        """Find this optimizer's layers below ``root`` and start to capture them."""
        groups = self._groups()
        found = find_layers(root, groups.keys())
        if not found.names:
            return
        if all(ref() is not root for ref in self._roots):
            self._roots.append(weakref.ref(root))
        taken = {name for param, name in self._names.items() if param not in found.names}
        if taken & set(found.names.values()):
            # Two roots, or submodules called one by one, number their parts alike.
            found.prefix(f"{type(root).__name__}#{len(self._roots)}")
        for param, name in found.names.items():
            self._names.setdefault(param, name)
        for layer in found.layers:
            block = self._blocks.get(layer.weight)
            if block is None:
                self._reasons.pop(layer.weight, None)
                block = Block(layer, self.state[layer.weight])
                self._blocks[layer.weight] = block
                block.schedule(groups[layer.weight])
            elif block.capture.module is not layer.module:
                found.reasons[layer.weight] = f"shared by {block.name}, {layer.name}"
            elif layer.bias is not None and block.bias is not layer.bias:
                found.reasons[layer.bias] = "added after the weight of its layer"
        for param, reason in found.reasons.items():
            self._reasons[param] = reason
            # A weight that a later root shares: no single capture sees its whole gradient.
            self._blocks.pop(param, None)

    def _covered(self) -> set[Tensor]:
        """Return the parameters that belong to a block."""
        return {param for block in self._blocks.values() for param in block.params}

    def _listen(self) -> None:
        """Watch forward passes for as long as a parameter's owner is not known."""
        known = self._reasons.keys() | self._covered()
        unknown = any(param not in known for param in self._parameters())
        if unknown and self._finder is None:
            self._finder = FirstForwardHook(self._adopt)
            weakref.finalize(self, self._finder.remove)
        elif not unknown and self._finder is not None:
            self._finder.remove()
            self._finder = None

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients.

        A layer (or, on the AdamW path, all parameters) whose gradient is not finite is left as it is, with
        a warning that names it; on other devices than the CPU the warning comes with the next curvature
        update or `diagnostics()`, so that no step waits for the device.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            ValueError: for sparse gradients; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        with contextlib.ExitStack() as stack:
            for device_type in {param.device.type for param in self._parameters()}:
                if torch.amp.is_autocast_available(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            self._step()
        return loss

    def _refuse_sparse(self) -> None:
        for param in self._parameters():
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise ValueError(
                    f"{self._names.get(param, 'a parameter')} has a sparse gradient, which is not supported; "
                    "make its module with sparse=False or give it to torch.optim.SparseAdam"
                )

    def _step(self) -> None:
        groups = self._groups()
        active = [block for block in self._blocks.values() if block.weight.grad is not None]
        refused = self._refresh([block for block in active if block.capture.window.sums is not None], groups)

        ready = [block for block in active if block.ready]
        directions = [block.direction(groups[block.weight]) for block in ready]
        self._apply(ready, directions, groups)

        for block in active:
            block.by_adamw = not (block.ready or block in refused)
        done = {param for block in active if not block.by_adamw for param in block.params}
        self._step_adamw(done)

        covered = self._covered()
        for param in self._parameters():
            if param.grad is not None and param not in covered:
                self._reasons.setdefault(param, "belongs to no module that was called")
        self._listen()
        for group in self.param_groups:
            group["step"] += 1
            group["last_lr"] = group["lr"]
        for block in self._blocks.values():
            block.capture.clear()
            block.schedule(groups[block.weight])

    def _refresh(self, blocks: list[Block], groups: Mapping[Tensor, dict[str, Any]]) -> list[Block]:
        """Take in the gathered statistics; return the blocks whose statistics were not finite."""
        if not blocks:
            return []
        refused, rescues = refresh_curvature(blocks, [groups[block.weight] for block in blocks])
        self._refusals.report()
        warn_of_curvature(refused, rescues, self._warned)
        return refused

    def _apply(
        self, blocks: list[Block], directions: list[Direction], groups: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Update the weights of ``blocks``; those whose direction is not finite stay as they are."""
        if not blocks:
            return
        home = directions[0].alignment.device
        lengths = torch.stack(
            [b.squared_length(d, groups).to(home) for b, d in zip(blocks, directions, strict=True)]
        )
        fine = torch.isfinite(lengths)
        total = torch.where(fine, lengths, 0).sum()
        kl_clip = self.param_groups[0]["kl_clip"]
        scale = torch.ones_like(total)
        if kl_clip is not None:
            # A total of 0 or less (possible with fixed beta) means that there is nothing to clip.
            scale = torch.where(total > kl_clip, (kl_clip / total).sqrt(), scale)
        self._kl_scale = scale
        for index, (block, direction) in enumerate(zip(blocks, directions, strict=True)):
            update, device = direction.update, direction.update.device
            # Not a product: 0 times NaN is NaN.
            update = torch.where(fine[index].to(device), update * scale.to(device, update.dtype), 0)
            for param, part in block.parts(update):
                move(param, part, fine[index].to(device), groups[param], self.state[param])
        self._refusals.count(tuple(block.name for block in blocks), ~fine)

    def _step_adamw(self, done: Set[Tensor]) -> None:
        """Step every other parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None and param.numel() and param not in done:
                    alike.setdefault((param.device, param.dtype), []).append(param)
            for params in alike.values():
                refused = adamw_step(params, group, self.state)
                self._refusals.count((f"all {len(params)} AdamW parameters of a group",), refused[None])

    # What a step leaves behind

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and forget what was gathered with them."""
        super().zero_grad(set_to_none)
        for block in self._blocks.values():
            block.capture.clear()

    @property
    def curvature_due(self) -> bool:
        """Whether the coming step refreshes the curvature of any layer."""
        return not self._blocks or any(block.capture.due for block in self._blocks.values())

    def request_curvature(self) -> None:
        """Refresh every layer's curvature at the coming step, for instance after new weights were loaded."""
        groups = self._groups()
        for block in self._blocks.values():
            block.state["refresh_at"] = groups[block.weight]["step"]
            block.schedule(groups[block.weight])

    def summary(self) -> Summary:
        """Return a printable table: parameter, path, why, factor shapes and memory."""
        return summarise(self._groups(), self._blocks, self._names, self._reasons, self.state)

    def diagnostics(self) -> Diagnostics:
        """Return β, η, ρ, damping, age of the curvature and rescues of every layer as of the last step.

        Nothing is transferred from the device before this is called.
        """
        self._refusals.report()
        return diagnose(self._groups(), self._blocks, self._kl_scale)

    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer over the same model; continuing equals never having stopped.

        Raises:
            ValueError: if the state belongs to another model or optimizer; nothing has been changed then.
        """
        shapes = {weight: block.layer.matrix_shape for weight, block in self._blocks.items()}
        check_state_dict(state_dict, self.param_groups, shapes)
        super().load_state_dict(state_dict)
        restore_precision(state_dict, self.param_groups, self.state)
        groups = self._groups()
        for weight, block in self._blocks.items():
            block.state = self.state[weight]
            block.capture.clear()
            block.schedule(groups[weight])

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy or an unpickled optimizer has no modules yet: it finds them as from bare parameters.
        if "_blocks" not in self.__dict__:
            self._begin()
        super().__setstate__(state)
        if self not in _live:
            self._listen()
            _live.add(self)
