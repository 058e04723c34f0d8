"""The optimizer as users see it: options, steps, reports, state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.optim import Optimizer

from fop.capture import trace_anew
from fop.distributed import Plan
from fop.optim.checkpoint import (
    check_form,
    check_state_dict,
    restore_precision,
)
from fop.optim.distribution import DistributedLike, checked_distribution
from fop.optim.engine import Engine
from fop.optim.gradients import called_by_scaler, overflowed, refuse_sparse
from fop.optim.layer_options import LayerOptionsLike
from fop.optim.live import live, refuse_driven
from fop.optim.options import (
    DEFAULTS,
    ParamsLike,
    Schedule,
    check_parameters,
    checked,
    normalise,
    normalise_group,
    split_schedules,
)
from fop.optim.report import (
    Diagnostics,
    Summary,
    diagnose,
    summarise,
)


class FOP(Engine):
    """Fisher-Orthogonal Projection (Lu & Armour, AAAI 2026, Algorithm 1).

    Linear, convolution, embedding and attention weights take η0·η*·F̂⁻¹·(Ga + β*·G⊥) with Kronecker-factored
    F; all other parameters take AdamW in the same step. Nothing in the training loop changes.

    Args:
        params: an `nn.Module`, parameters, named parameters, or parameter groups. From bare parameters the
            owning modules are found at the first forward pass.
        lr: learning rate η0 of the preconditioned update.
        momentum: heavy-ball momentum on the preconditioned update, as `torch.optim.SGD` applies it.
        nesterov: Nesterov momentum, as in `torch.optim.SGD`.
        weight_decay: decoupled, p ← p·(1 - lr·weight_decay), on all parameters; those on the AdamW path
            use their own learning rate in place of lr.
        damping: λ of the paper; γ = sqrt(damping) is split between A and G by π. May be a function of the
            step.
        stat_decay: weight of the old factors when new statistics come in, in [0, 1).
        curvature_interval: steps between curvature updates; early in training they come more often. May be a
            function of the step.
        inverse_delay: steps after which new inverses are used; until then they are computed in another thread
            (on a GPU, another stream), and steps do not wait. 0 computes them in the step.
        beta: "adaptive" for β* (16), or a fixed mixing coefficient; 0.0 with ``eta=1.0`` is K-FAC.
        eta: "adaptive" for η* (17), or a fixed scale.
        kl_clip: κ; the preconditioned updates are scaled by min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩))
            (Ba et al. 2017), and momentum is held to it when lr rises. None for no clip.
        adamw_lr: learning rate of the AdamW path while ``lr`` has its first value; it follows every
            schedule of ``lr`` in proportion.
        betas: as `torch.optim.AdamW`, for the AdamW path.
        eps: as `torch.optim.AdamW`, for the AdamW path.
        maximize: go up instead of down.
        loss_reduction: "mean" or "sum", how the loss joins the samples; with "sum" the gradients of
            preconditioned layers are divided by N (AdamW does not mind the scale).
        layer_options: choices for single layers, from a glob pattern on the module's name, or a module type,
            to a dict with any of ``path`` ("fop" or "adamw"), ``max_factor_dim`` (factors with a larger side
            are diagonal; 8192), ``weight_sharing`` ("expand" or "reduce") and ``batch_dim`` (0 or 1, where
            samples are in the layer's input; found out if not given). Later entries override earlier ones.
        max_grad_norm: gradients of all parameters are scaled together to this norm at most, as by
            `torch.nn.utils.clip_grad_norm_`; None for no clip.
        distributed: how ranks of `torch.distributed` train one model together, a dict with any of ``mode``,
            ``pair``, ``group``, ``factor_dtype`` and ``ranks_per_node`` (docs/distributed.md); False if every
            rank trains a model of its own.

    Raises:
        ValueError: an option out of range; empty, duplicate, shared or sparse parameters; parameters that
            another live FOP drives.
        TypeError: an option of the wrong type; complex or integer parameters.
    """

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then leaves unscaling, and skipping of bad steps, to `step`, and tells the loss scale. To
        # others, such as Lightning, it would mean that gradients cannot be clipped.
        return called_by_scaler()

    def __init__(
        self,
        params: ParamsLike,
        lr: float = DEFAULTS["lr"],
        *,
        momentum: float = DEFAULTS["momentum"],
        nesterov: bool = DEFAULTS["nesterov"],
        weight_decay: float = DEFAULTS["weight_decay"],
        damping: float | Schedule = DEFAULTS["damping"],
        stat_decay: float = DEFAULTS["stat_decay"],
        curvature_interval: int | Schedule = DEFAULTS["curvature_interval"],
        inverse_delay: int = DEFAULTS["inverse_delay"],
        beta: float | Literal["adaptive"] = DEFAULTS["beta"],
        eta: float | Literal["adaptive"] = DEFAULTS["eta"],
        kl_clip: float | None = DEFAULTS["kl_clip"],
        adamw_lr: float = DEFAULTS["adamw_lr"],
        betas: tuple[float, float] = DEFAULTS["betas"],
        eps: float = DEFAULTS["eps"],
        maximize: bool = DEFAULTS["maximize"],
        loss_reduction: Literal["mean", "sum"] = DEFAULTS["loss_reduction"],
        max_grad_norm: float | None = DEFAULTS["max_grad_norm"],
        layer_options: LayerOptionsLike | None = None,
        distributed: DistributedLike = None,
    ) -> None:
        given = locals()
        defaults, schedules = split_schedules({name: given[name] for name in DEFAULTS})
        defaults = checked(defaults)
        distribution = checked_distribution(distributed)
        groups, root, names = normalise(params)
        self._begin(layer_options, schedules, distribution)
        self._tracker.names.update(names)
        super().__init__(groups, defaults)
        trace_anew()
        if root is not None:
            assert isinstance(params, nn.Module)
            self._adopt(params)
        self._listen()
        live.add(self)

    # Parameters and modules

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: as the constructor, for the group's parameters and options.
            TypeError: likewise.
        """
        group, schedules = split_schedules(normalise_group(param_group, self._tracker.names))
        options = {key: value for key, value in group.items() if key != "params"}
        plain = checked({**self.defaults, **options})
        group |= {key: value for key, value in plain.items() if key in options}
        for name in ("kl_clip", "loss_reduction", "max_grad_norm"):
            if name in options and options[name] != self.defaults[name]:
                raise ValueError(
                    f"{name}={options[name]!r} in a parameter group: it is one for the whole step; give it "
                    "to the constructor"
                )
        if self.param_groups and ("param_names" in group) != ("param_names" in self.param_groups[0]):
            raise ValueError(
                "some parameter groups have named parameters; give names to all groups or to none"
            )
        params = group["params"]
        check_parameters(params, self._tracker.names, set(self._parameters()))
        refuse_driven(self, params, self._tracker.names)
        group.setdefault("base_lr", group.get("lr", self.defaults["lr"]))
        group.setdefault("last_lr", group.get("lr", self.defaults["lr"]))
        group.setdefault("step", self.param_groups[0]["step"] if self.param_groups else 0)
        super().add_param_group(group)
        own = {name: schedule for name, schedule in self._default_schedules.items() if name not in options}
        self._schedules.append({**own, **schedules})
        if self in live:
            trace_anew()
            for root in list(self._tracker.roots()):
                self._adopt(root)
            self._listen()

    @contextlib.contextmanager
    def sub_batch(self, index: int) -> Iterator[None]:
        """Say that the backward passes inside make up one half of the gradient pair.

        Without it every backward pass is split in two, by sample.

        Args:
            index: 0 or 1. A step takes the pair if there were passes of both, and none outside.

        Raises:
            ValueError: another index, or ranks that take the pair from one another.
            RuntimeError: inside another ``sub_batch``.
        """
        if type(index) is not int or index not in (0, 1):
            raise ValueError(f"sub_batch({index!r}): the pair has two halves, 0 and 1")
        said = self._tracker.sub_batch
        if said.index is not None:
            raise RuntimeError(f"sub_batch({index}) inside sub_batch({said.index}); end that one first")
        self._crew.label()
        said.index = index
        try:
            yield
        finally:
            said.index = None

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
            ValueError: for sparse gradients, and for parameters replaced by others of another shape; nothing
                has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        names = self._tracker.names
        refuse_sparse((names.get(param, "a parameter"), param) for param in self._parameters())
        if self._asks_for_state():
            self._make_state()
            return loss
        if hasattr(self, "found_inf"):
            self._crew.allow_scaler()
        if overflowed(self):
            self._crew.abandon()
            return loss
        self._follow_model()
        with contextlib.ExitStack() as stack:
            for device_type in {param.device.type for param in self._parameters()}:
                if torch.amp.is_autocast_available(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            self._step()
        return loss

    # What a step leaves behind

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and forget what was gathered with them."""
        super().zero_grad(set_to_none)
        self._crew.abandon()
        self._relink()
        for block in self._tracker.blocks.values():
            block.capture.clear()

    @property
    def curvature_due(self) -> bool:
        """Whether the coming step refreshes the curvature of any layer."""
        return not self._tracker.blocks or any(block.capture.due for block in self._tracker.blocks.values())

    def request_curvature(self) -> None:
        """Refresh every layer's curvature at the coming step, for instance after new weights were loaded."""
        groups = self._groups()
        for block in self._tracker.blocks.values():
            block.state["refresh_at"] = groups[block.weight]["step"]
            self._schedule(block, groups)

    def summary(self) -> Summary:
        """Return a printable table: parameter, path, why, factor shapes and memory."""
        return summarise(self._groups(), self._tracker, self.state)

    def diagnostics(self) -> Diagnostics:
        """Return β, η, ρ, damping, age of the curvature and rescues of every layer as of the last step.

        Nothing is transferred from the device before this is called.
        """
        self._refusals.report()
        return diagnose(self._groups(), self._tracker.blocks, self._kl_scale)

    @property
    def plan(self) -> Plan | None:
        """Which rank owns which layer, in the order of `diagnostics()`; None on one process, or not yet."""
        return self._crew.plan

    @property
    def bytes_sent(self) -> dict[str, float]:
        """Bytes that this rank has sent to others for the optimizer, by category (docs/distributed.md)."""
        return dict(self._crew.sent)

    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer over the same model; continuing equals never having stopped.

        Raises:
            ValueError: if the state belongs to another model or optimizer; nothing has been changed then.
        """
        check_form(state_dict)
        loaded: list[dict[str, Any]] = []

        def check(_: Optimizer, saved: dict[str, Any]) -> None:
            shapes = {weight: block.layer.factor_shapes for weight, block in self._tracker.blocks.items()}
            check_state_dict(saved, self.param_groups, shapes)
            loaded.append(saved)

        # After the user's hooks, which may make another state of it.
        with self.register_load_state_dict_pre_hook(check):
            super().load_state_dict(state_dict)
        restore_precision(loaded[0], self.param_groups, self.state)
        self._places.clear()
        self._crew.unsettle()
        self._relink()
        for block in self._tracker.blocks.values():
            block.capture.clear()
