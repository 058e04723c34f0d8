"""FOP and KFAC; `FOP._step` is Algorithm 1 (Lu & Armour). Their options' docs make it over 500 lines."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fop import presets
from fop.adamw import adamw_step, make_adamw_state
from fop.amp import called_by_scaler, overflowed, unscale
from fop.binding import Binding, Bindings
from fop.capture import (
    BatchSize,
    Cleared,
    Likelihood,
    Source,
    checked_dim,
    local,
    retrace,
    with_sampled_labels,
)
from fop.correction import combine, inner, ratio
from fop.curvature import NOISE, Estimate, Fallback, Refresher
from fop.distributed import (
    Description,
    Distributor,
    JoinableOptimizer,
    Plan,
    Shared,
    describe,
    make_distributor,
)
from fop.distributed.options import DistributedLike, checked_distribution, portable
from fop.graphs import Captured, Rates, capturing, check_capturable, check_capture
from fop.layer_options import LayerChoices, LayerOptionsLike
from fop.layers import FunctionCall, Statistics
from fop.options import (
    DEFAULTS,
    SCHEDULED,
    ParamsLike,
    Schedule,
    check_names,
    check_parameters,
    checked,
    checked_group,
    normalise,
    recheck,
    resolved,
    split_schedules,
)
from fop.report import Diagnostics, Refusals, Summary, diagnose, summarise, warn_of_curvature
from fop.state import (
    Places,
    asks_for_state,
    check_form,
    check_state_dict,
    enter_state,
    follow_moves,
    make_state,
    restore_precision,
)
from fop.step_size import (
    REFERENCE_NORM,
    TOGETHER,
    Lengths,
    Sums,
    Update,
    after_overshoot,
    along_gradients,
    kl_scale,
    lengths,
    measure,
    momentum_of,
    noise_share,
    row_products,
    same_rate,
    scale_updates,
    signed_rate,
    turn,
)

_Kind = TypeVar("_Kind", bound="FOP")

# Every optimizer in use: two on one parameter would take each other's gradients.
_live: weakref.WeakSet[FOP] = weakref.WeakSet()

_options_of: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*DEFAULTS)


class FOP(JoinableOptimizer, Optimizer):
    """Fisher-Orthogonal Projection (Lu & Armour, AAAI 2026, Algorithm 1).

    Linear, convolution, embedding and attention weights take η0·η*·F̂⁻¹·(Ga + β*·G⊥) with Kronecker-factored
    F; all other parameters take AdamW in the same step. Nothing in the training loop changes.

    Making an optimizer of a parameter that another live FOP or KFAC has, or adding it in a group, replaces
    that optimizer as a whole: its hooks go, and its `step` and `add_param_group` raise RuntimeError. Its
    `zero_grad` and `state_dict` work on. Optimizers of different parameters do not mind each other.

    Args:
        params: an `nn.Module`, parameters, named parameters, or parameter groups. From bare parameters the
            owning modules are found at the first forward pass.
        lr: learning rate; by how much of its own norm a weight moves in a step, at most 20 % at 0.2. With
            ``step_length="paper"`` η0, times the preconditioned update. None, as for every option whose
            default is None: 0.2, or 0.05 with the paper's steps.
        step_length: "weight": ‖update of a layer‖ = lr·‖its weight‖, whatever the units of loss, inputs and
            weights, and less after steps that went too far. A step turns the weight; its norm follows the
            gradient, and stays where the loss does not depend on it (docs/method.md). A weight that starts at
            0 moves by lr in the metric of F̂ at first, and an embedding by as much as its rows take part.
            "paper": η0·η*·F̂⁻¹·Gc (18), under the KL clip.
        anneal: whether the length of a layer's steps falls with the share of signal in them, as the
            sub-batches show it, down to 1/25 of lr. "auto": unless a scheduler of `torch.optim.lr_scheduler`
            sets the rate, which then says how the length falls. ``ReduceLROnPlateau`` does not count, nor do
            rates written into ``param_groups``: give False if these fall to 0. A layer of which no noise was
            measured, as in batches of one sample, counts as all noise. No effect without sub-batches (`KFAC`)
            and with the paper's steps.
        momentum: heavy-ball momentum on the preconditioned update, as `torch.optim.SGD` applies it, before
            its length is set; 0.6, or 0.5 with the paper's steps. Where it shows that a step went too far it
            is dropped, and the length halved, which grows back: as much as is signal, so without sub-batches
            (`KFAC`) not at all, nor with the paper's steps (docs/method.md).
        nesterov: Nesterov momentum, as in `torch.optim.SGD`; True, or False with the paper's steps.
        weight_decay: decoupled, p ← p·(1 - lr·weight_decay), on all parameters; those on the AdamW path
            use their own learning rate in place of lr.
        damping: λ; "adaptive" if relative, 1e-3 if absolute. Adaptive damping follows ν, the share of noise
            in each layer's gradient, which the sub-batches show: sqrt(λ) = (1 - ν)^(-½) - 1, with λ from
            0.01 to 81; λ is 0.01 before any noise was measured, and without sub-batches. In the first steps
            ν counts for less. May be a function of the step.
        damping_kind: "relative": sqrt(damping) times its mean eigenvalue is added to the diagonal of A and of
            G (the bias' entry of A, whose units are others, counts by itself). "absolute", with the paper's
            steps: the paper's γ = sqrt(damping), split between A and G by π.
        stat_decay: weight of the old factors when new statistics come in, in [0, 1); 0.5, or 0.9 with the
            paper's steps. The average is without bias, as Adam's; with the paper's steps the first estimate
            goes on as if it were an average.
        fisher: whose labels b in G is of. "empirical": the data's. "model": labels drawn from the model's own
            distribution, as in K-FAC's papers, so that F is the Gauss-Newton matrix but for the noise of the
            draws; needs `sample_labels`, and in steps with statistics one more backward pass.
        statistics_rows: how many rows (samples, tokens, positions of a convolution) the statistics are made
            from, for each dimension of a factor, or of its blocks, and 1,024 at least; drawn at random from
            all of the batch, by generators of the optimizer's own. "auto" is 2, or 16 with the paper's
            steps, whose updates are rare; None is for all rows.
        curvature_interval: steps between curvature updates; 1, as steps of the weight's length need a fresh
            curvature, or 100 with the paper's steps. Early in training updates come more often. May be a
            function of the step.
        inverse_delay: steps after which new inverses are used; until then they are computed in another thread
            (on a GPU, another stream), and steps do not wait. 0 computes them in the step.
        sub_batches: K, in how many sub-batches every batch is split; 2 is the paper's method, 1 is K-FAC.
        beta: "adaptive" for β* (16), or a fixed mixing coefficient for two sub-batches; 0.0 with ``eta=1.0``
            is K-FAC.
        eta: "adaptive" for η* (17), or a fixed scale.
        kl_clip: κ; the preconditioned updates are scaled by min(1, sqrt(κ / Σ lr²·⟨update, gradient⟩))
            (Ba et al. 2017), and momentum is held to it when lr rises. None for no clip. It is of
            ``step_length="paper"`` and does nothing otherwise.
        adamw_lr: learning rate of the AdamW path while ``lr`` has its first value; it follows every
            schedule of ``lr`` in proportion. 0.03, but for a parameter with two or more sides above 1 at
            most ``lr`` times the root mean square that it began with, unless that was 0; or 1e-3 with the
            paper's steps.
        betas: as `torch.optim.AdamW`, for the AdamW path.
        eps: as `torch.optim.AdamW`, for the AdamW path; 1e-17, which the scale of the loss does not reach
            (1e-8 in float16), or 1e-8 with the paper's steps.
        maximize: go up instead of down.
        loss_reduction: "mean" or "sum", how the loss joins the samples; with "sum" the gradients of
            preconditioned layers are divided by N (AdamW does not mind the scale).
        layer_options: choices for single layers, from a glob pattern on the module's name, or a module type,
            to a dict with any of ``path`` ("fop" or "adamw"), ``block_dim`` (factors with a larger side,
            without the bias, are kept as blocks of this side at most; 512), ``max_factor_dim`` (as their
            diagonal; 8192), ``weight_sharing`` ("expand" or "reduce"), ``batch_dim`` (0 or 1, where samples
            are in the layer's input; found out if not given) and ``curvature`` (which approximation,
            "kronecker" or "diagonal"). Later entries override earlier ones.
        max_grad_norm: gradients of all parameters are scaled together to this norm at most, as by
            `torch.nn.utils.clip_grad_norm_`; None for no clip.
        batch_size: a function from the arguments of the model to the number of samples in the batch, such as
            ``lambda x, mask: len(x)``. If not given, dim 0 of the model's tensor inputs, where they agree.
        capturable: whether steps without a curvature update can be captured in a `torch.cuda.CUDAGraph` and
            taken by `replay`: curvature and learning rates then stay where they are in memory. For one
            process, ``step_length="weight"`` and ``inverse_delay=0`` (docs/guides/cuda-graphs.md).
        distributed: how ranks of `torch.distributed` train one model together, a dict with any of ``mode``,
            ``pair``, ``group``, ``factor_dtype`` and ``ranks_per_node`` (docs/distributed.md); False if every
            rank trains a model of its own.

    Raises:
        ValueError: an option out of range; empty, duplicate, shared or sparse parameters; an unknown key of a
            parameter group that resembles an option, or is one of another optimizer.
        TypeError: an option of the wrong type or of an unknown name; integer tensors, and
            float8 parameters that are not frozen.
    """

    # Options that are no choice.
    _fixed: ClassVar[dict[str, Any]] = {}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then leaves unscaling, and skipping of bad steps, to `step`, and tells the loss scale. To
        # others, such as Lightning, it would mean that gradients cannot be clipped.
        return called_by_scaler()

    def __init__(
        self,
        params: ParamsLike,
        lr: float | None = DEFAULTS["lr"],
        *,
        step_length: Literal["weight", "paper"] = DEFAULTS["step_length"],
        anneal: bool | Literal["auto"] = DEFAULTS["anneal"],
        momentum: float | None = DEFAULTS["momentum"],
        nesterov: bool | None = DEFAULTS["nesterov"],
        weight_decay: float = DEFAULTS["weight_decay"],
        damping: float | Literal["adaptive"] | Schedule | None = DEFAULTS["damping"],
        damping_kind: Literal["relative", "absolute"] | None = DEFAULTS["damping_kind"],
        stat_decay: float | None = DEFAULTS["stat_decay"],
        fisher: Literal["empirical", "model"] = DEFAULTS["fisher"],
        statistics_rows: int | Literal["auto"] | None = DEFAULTS["statistics_rows"],
        curvature_interval: int | Schedule | None = DEFAULTS["curvature_interval"],
        inverse_delay: int = DEFAULTS["inverse_delay"],
        sub_batches: int = DEFAULTS["sub_batches"],
        beta: float | Literal["adaptive"] = DEFAULTS["beta"],
        eta: float | Literal["adaptive"] = DEFAULTS["eta"],
        kl_clip: float | None = DEFAULTS["kl_clip"],
        adamw_lr: float | None = DEFAULTS["adamw_lr"],
        betas: tuple[float, float] = DEFAULTS["betas"],
        eps: float | None = DEFAULTS["eps"],
        maximize: bool = DEFAULTS["maximize"],
        loss_reduction: Literal["mean", "sum"] = DEFAULTS["loss_reduction"],
        max_grad_norm: float | None = DEFAULTS["max_grad_norm"],
        layer_options: LayerOptionsLike | None = None,
        batch_size: BatchSize | None = None,
        capturable: bool = False,
        distributed: DistributedLike = None,
        **unknown: NoReturn,
    ) -> None:
        given = locals()
        check_names(unknown, type(self).__name__)
        options = {name: given[name] for name in DEFAULTS}
        defaults, schedules = split_schedules(resolved(options))
        defaults = checked(defaults)
        self._distribution = checked_distribution(distributed)
        groups, root, names = normalise(params)
        self._begin(layer_options, batch_size, schedules, capturable)
        if capturable:
            check_capturable(defaults, type(self).__name__)
        self._bindings.names.update(names)
        super().__init__(groups, defaults)
        retrace()
        if root is not None:
            assert isinstance(params, nn.Module)
            self._adopt(params)
        self._prepare()
        self._take_over()

    @classmethod
    def paper(cls: type[_Kind], params: ParamsLike, lr: float = 0.05, **options: Any) -> _Kind:
        """Return an optimizer with the paper's equations, ``step_length="paper"``, and typical values.

        The rate, ``damping=1e-4`` and ``curvature_interval=150`` are the paper's, statistics are of all rows,
        and no factor is in blocks; it names no momentum, decay or clip: those are ours. Takes and raises what
        the class does.
        """
        choices = options.pop("layer_options", None) or {}
        if isinstance(choices, Mapping):
            # First, so that every other entry overrides it.
            choices = {nn.Module: {}, **choices}
            choices[nn.Module] = {**presets.paper["layer_options"][nn.Module], **choices[nn.Module]}
        return cls(params, **{**presets.paper, "lr": lr, **options, "layer_options": choices})

    def _begin(
        self,
        layer_options: LayerOptionsLike | None,
        batch_size: BatchSize | None,
        schedules: dict[str, Schedule],
        capturable: bool,
    ) -> None:
        if not isinstance(capturable, bool):
            raise TypeError(f"capturable={capturable!r} must be True or False")
        if batch_size is not None and not callable(batch_size):
            raise TypeError(
                f"batch_size={batch_size!r} must be a function from the arguments of the model to the number "
                "of samples, such as lambda x, mask: len(x)"
            )
        self._bindings = Bindings(LayerChoices(layer_options), batch_size)
        self._bindings.recogniser.found = weakref.WeakMethod(self._recognise)
        self._refresher = Refresher()
        self._distributor: Distributor = make_distributor(self._distribution, self)
        # By index of the group: functions do not belong into a state_dict.
        self._schedules: list[dict[str, Schedule]] = []
        self._default_schedules = schedules
        self._places: Places = {}
        self._kl_scale: Tensor | None = None
        # Only where steps may be captured.
        self._rates = Rates() if capturable else None
        # What the last capture has read, and what its step told of the layers.
        self._captured: Captured | None = None
        self._diagnosed: dict[Binding, tuple[Update | None, Tensor | None]] = {}
        # What was replayed first since then.
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refusals = Refusals()
        self._warned: set[tuple[str, Fallback]] = set()
        # Of each group, the options that were checked last.
        self._checked: list[tuple[Any, ...]] = []
        # Why no step is taken any more.
        self._retired = ""

    def _take_over(self) -> None:
        """Replace every other optimizer that has any of these parameters."""
        mine = self._groups()
        for other in list(_live):
            shared = mine.keys() & (other._groups().keys() | other._bindings.current())
            if other is not self and shared:
                names = {**other._bindings.names, **self._bindings.names}
                other._retire(next((names[param] for param in mine if param in shared & names.keys()), ""))
        _live.add(self)

    def _retire(self, name: str) -> None:
        _live.discard(self)
        taken = f"its parameter {name!r}" if name else "some of its parameters"
        self._retired = (
            f"this {type(self).__name__} was replaced: a newer FOP or KFAC has {taken}. Step with the newer "
            "one, and give it to schedulers and trainers; or make each optimizer of parameters of its own"
        )
        self._bindings.release("a newer optimizer has replaced this one")
        self._refresher = Refresher()
        self._distributor = Distributor(None, self)

    # Parameters and modules

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {param: group for group in self.param_groups for param in group["params"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: as the constructor, for the group's parameters and options; nothing has been changed
                then.
            TypeError: likewise.
            RuntimeError: if a newer optimizer has replaced this one.
        """
        if self._retired:
            raise RuntimeError(self._retired)
        names, first = self._bindings.names, self.param_groups[0] if self.param_groups else None
        group, schedules = checked_group(param_group, names, self.defaults, first)
        self._check_fixed(group, "a parameter group")
        check_parameters(group["params"], names, set(self._parameters()))
        super().add_param_group(group)
        own = {name: each for name, each in self._default_schedules.items() if name not in param_group}
        self._schedules.append({**own, **schedules})
        self._bindings.searching = True
        if self in _live:
            retrace()
            try:
                for root in list(self._bindings.roots()):
                    self._adopt(root)
            except ValueError:
                self.param_groups.pop()
                self._schedules.pop()
                raise
            self._prepare()
            self._take_over()

    def _check_fixed(self, options: Mapping[str, Any], place: str) -> None:
        """Raise ValueError for an option that this class of optimizers, or a captured step, cannot have."""
        if self._rates is not None:
            check_capturable(options, place)
        for name, value in self._fixed.items():
            if options.get(name, value) != value:
                kind, other = type(self).__name__, options[name]
                raise ValueError(f"{kind} has {name}={value}, and {place} has {name}={other!r}; use FOP")

    def _adopt(self, root: nn.Module) -> None:
        groups = self._groups()
        if any(param in groups for param in root.parameters()):
            self._distributor.see(root)
        self._bindings.adopt(root, groups, self.state)

    def _seen(self, root: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        self._adopt(root)
        entered = self._bindings.enter(root, args, kwargs)
        # Not only in the step: torch.compile would leave the model in the pieces that the hook made of it.
        self._prepare()
        return entered

    def _recognise(self, call: FunctionCall, source: Source, module: nn.Module) -> bool:
        known = list(self._bindings)
        taken = self._bindings.recognise(call, source, module, self._groups(), self.state)
        if list(self._bindings) != known:
            self._prepare()
        return taken

    def _prepare(self) -> None:
        """Get ready for the coming forward pass."""
        if self._bindings.searching:
            self._bindings.listen(self._parameters(), self._seen)
        self._distributor = self._distributor.prepare(self._bindings, self._groups())

    @contextlib.contextmanager
    def sub_batch(self, index: int) -> Iterator[None]:
        """Say that the backward passes inside make up one sub-batch.

        Without it every backward pass is split, by sample.

        Args:
            index: 0 to K - 1; 0 or 1 unless the option ``sub_batches`` says otherwise. A step uses the
                sub-batches if there were passes of each, and none outside.

        Raises:
            ValueError: another index, or ranks that are each other's sub-batches.
            RuntimeError: inside another ``sub_batch``.
        """
        count = self.param_groups[0]["sub_batches"]
        if type(index) is not int or not 0 <= index < count:
            known = "0 and 1" if count == 2 else f"0 to {count - 1}"
            raise ValueError(f"sub_batch({index!r}): the sub-batches are {known}")
        running = self._bindings.running
        if running.sub_batch is not None:
            now = running.sub_batch
            raise RuntimeError(f"sub_batch({index}) inside sub_batch({now}); end that one first")
        self._distributor.use_labels()
        running.sub_batch = index
        try:
            yield
        finally:
            running.sub_batch = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sample_labels(self, outputs: Tensor, likelihood: Likelihood, *, dim: int | None = None) -> Tensor:
        """Return the model's outputs, for the loss; in the backward pass labels are drawn from them first.

        With ``fisher="model"`` the statistics are of these labels, and gradients stay what they are, to the
        last bit; otherwise nothing happens. The loss must be computed from what this returns, and be a mean
        or a sum over rows, as the option ``loss_reduction`` says::

            loss = cross_entropy(optimizer.sample_labels(model(x), "categorical"), y)

        Draws are by generators of the optimizer's own, and resume bit for bit.

        Args:
            outputs: one entry for each class (logits) or feature, for every row. Leave out rows that have no
                label, such as padding: ``logits[mask]``.
            likelihood: "categorical": softmax of the outputs, the loss is cross-entropy. "gaussian": normal
                distributions around the outputs, with variance 1; the loss of a row is ½·Σ (y - output)²
                (`torch.nn.functional.mse_loss` is 2/features times that, and relative damping does not mind).
            dim: dimension that counts the classes or features. If not given, 1 for (N, C); for outputs (N,)
                with "gaussian" every entry is a row.

        Raises:
            ValueError: another likelihood; outputs of other shapes without ``dim``, or a ``dim`` that they do
                not have; ``fisher="model"`` together with `fully_shard`.
            TypeError: outputs that are no tensor of real numbers.
        """
        dim = checked_dim(outputs, likelihood, dim)
        recorders = [each.recorder for each in self._bindings if each.recorder.fisher == "model"]
        if any(recorder.sharded for recorder in recorders):
            raise ValueError('fisher="model" does not go together with fully_shard; use fisher="empirical"')
        if not (recorders and outputs.requires_grad):
            return outputs
        return with_sampled_labels(outputs, likelihood, dim, recorders, self._bindings.running)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients.

        A layer (or, on the AdamW path, all parameters) whose gradient is not finite is left as it is, with
        a warning that names it; on other devices than the CPU the warning comes with one of the next two
        curvature updates or `diagnostics()`, so that no step waits for the device.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            ValueError: for sparse gradients, and for parameters replaced by others of another shape; nothing
                has been changed then; for options that were set in ``param_groups`` and are out of range.
            TypeError: for such options of the wrong type.
            RuntimeError: if a newer optimizer has replaced this one; if ``fisher="model"`` and no labels were
                sampled for a layer whose statistics are due; in the capture of a CUDA graph, for a step that
                cannot be captured. Nothing has been changed then.
        """
        if self._retired:
            raise RuntimeError(self._retired)
        if [*map(_options_of, self.param_groups)] != self._checked:
            self._check_options()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        scaled, take_step = hasattr(self, "found_inf"), self._step
        if any(param.is_cuda for param in groups) and capturing():
            capturable = self._rates is not None
            check_capture(list(groups), capturable=capturable, due=self.curvature_due, scaled=scaled)
            take_step = self._capture
        for param in groups:
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise ValueError(
                    f"{self._bindings.names.get(param, 'a parameter')} has a sparse gradient, which is not "
                    "supported; make its module with sparse=False or give it to torch.optim.SparseAdam"
                )
        if self.state.keys().isdisjoint(groups) and asks_for_state(self.param_groups, self._bindings):
            self._make_state()
            return loss
        if scaled:
            self._distributor.check_scaler()
            if overflowed(self):
                self._distributor.discard()
                return loss
        if any(group["fisher"] == "model" for group in self.param_groups):
            self._check_labels()
        self._follow_model()
        with contextlib.ExitStack() as stack:
            for device_type in {param.device.type for param in groups}:
                if torch.amp.is_autocast_available(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            take_step()
        return loss

    def _check_options(self) -> None:
        """Raise for options that were set in ``param_groups`` since they were checked last."""
        recheck(self.param_groups, self._checked)
        for group in self.param_groups:
            self._check_fixed(group, "a parameter group")
        if self._rates is not None and type(self._distributor) is not Distributor:
            raise ValueError("capturable=True is for one process; leave it out on several ranks")
        self._checked = [*map(_options_of, self.param_groups)]

    def _check_labels(self) -> None:
        for binding in self._bindings:
            recorder = binding.recorder
            if recorder.fisher == "model" and recorder.due and recorder.samples and not recorder.labelled:
                raise RuntimeError(
                    f"fisher='model', and layer {binding.name!r} has a gradient but no sampled labels; "
                    "compute the loss from outputs = optimizer.sample_labels(outputs, ...), for each output "
                    "of the model that has a loss (layers in activation checkpoints need "
                    "use_reentrant=False), or give fisher='empirical', also in a parameter group"
                )

    def _step(self) -> None:  # noqa: PLR0912 - the algorithm in one piece
        """Take a step of Algorithm 1; on one process this rank owns every weight."""
        if any(self._schedules):
            self._follow_schedules()
        groups = self._groups() if self._rates is None else self._rates.of(self.param_groups)
        loss_scale = unscale(self, groups) if hasattr(self, "found_inf") else None
        # Parameters may have been replaced since the last step.
        distributor = self._distributor = self._distributor.prepare(self._bindings, groups)

        for binding in self._bindings.by_weight.values():
            recorder, gradient = binding.recorder, binding.weight.grad
            if gradient is None or recorder.cleared is None:
                continue
            if recorder.cleared.version != (id(gradient), gradient._version):
                # Put there by hand since `zero_grad`.
                recorder.statistics, recorder.samples, _ = recorder.cleared

        # Gradients, sub-batch gradients and statistics of all ranks meet at the owners of the weights.
        active, statistics = distributor.reduce(self.param_groups[0]["max_grad_norm"], self._describe)
        for binding in active:
            if self.state.get(binding.weight) is not binding.curvature.state:
                enter_state(binding, self.state)

        # Owners refresh the curvature.
        refused: list[Binding] = []
        if statistics or any(binding.curvature.pending for binding in active):
            refused = self._refresh_curvature(active, statistics, groups, loss_scale)

        # Owners compute the updates of their weights, (3) to (18), and share them.
        ready = [binding for binding in active if binding.curvature.ready]
        if ready:
            own: dict[Binding, Update] = {}
            for alike in self._alike(distributor.owned(ready), groups):
                own |= self._updates(alike, groups)
            shared = dict(zip(ready, distributor.share(ready, own), strict=True))
            del own

            # All ranks move the weights alike.
            home = shared[ready[0]][0].length.device
            norms = torch.stack([update.length.to(home) for update, _ in shared.values()])
            finite, first = torch.isfinite(norms), self.param_groups[0]
            clipped = first["step_length"] == "paper" and first["kl_clip"] is not None
            self._kl_scale = kl_scale(norms, first["kl_clip"]) if clipped else None
            good = dict(zip(ready, finite.unbind(), strict=True))
            for alike in self._alike(ready, groups):
                self._move(alike, shared, good, groups)
            if not (finite.is_cpu and bool(finite.all())):
                self._refusals.count(tuple(f"layer {binding.name!r}" for binding in ready), finite)

        # AdamW moves everything else.
        for binding in active:
            binding.by_adamw = not (binding.curvature.ready or binding in refused)
        moved = {param for binding in active if not binding.by_adamw for param in binding.params}
        if len(moved) < len(groups):
            self._step_adamw(moved, groups)
        if self._refusals.at_hand:
            self._refusals.report()

        if self._bindings.recogniser.open or any(binding.by_adamw for binding in active):
            self._bindings.settle()
        if self._bindings.searching:
            self._bindings.give_up([param for param in groups if param.grad is not None])
        for group in self.param_groups:
            group["step"] += 1
            group["last_lr"] = group["lr"]
        # With the new count: those with rates on the device are copies.
        groups = self._groups()
        for binding in self._bindings.by_weight.values():
            binding.recorder.clear()
            binding.schedule(groups[binding.weight])
        self._prepare()
        self._places = {param: (param.device, param.dtype) for param in groups if param in self.state}

    def _follow_schedules(self) -> None:
        for group, schedules in zip(self.param_groups, self._schedules, strict=True):
            if schedules:
                now = {name: schedule(group["step"]) for name, schedule in schedules.items()}
                group.update(checked({"damping_kind": group["damping_kind"], **now}))

    def _reads(self) -> Captured:
        """Return what a captured step reads and cannot follow."""
        # Damping and interval are of steps that are not captured.
        own = [name for name in DEFAULTS if name not in ("lr", *SCHEDULED)]
        options = [[group[name] for name in own] + ["initial_lr" in group] for group in self.param_groups]
        tensors = [] if self._rates is None else list(self._rates.held)
        for binding in self._bindings:
            tensors += [binding.sizes, *binding.curvature.places().values()]
        return Captured(options, self.state, tensors, self._parameters())

    def _capture(self) -> None:
        """Take a step that is being captured: it computes nothing yet, and does not count."""
        before, states = self._reads(), {param: dict(state) for param, state in self.state.items()}
        told = {each: (each.counted, each.last, each.length) for each in self._bindings}
        self._captured = self._graph = None
        self._step()
        self._diagnosed = {binding: (binding.last, binding.length) for binding in self._bindings}
        for group in self.param_groups:
            group["step"] -= 1
        groups = self._groups()
        for binding in self._bindings:
            binding.schedule(groups[binding.weight])
            if binding in told:
                binding.counted, binding.last, binding.length = told[binding]
        after = self._reads()
        if before.differs(after):
            for param, state in self.state.items():
                # In place: curvatures hold the dicts.
                state.clear()
                state.update(states.get(param, {}))
            raise RuntimeError(
                "this step makes state, which every replay would make again (momentum of a parameter that is "
                "new or was frozen): take one such step that is not captured before the capture"
            )
        self._captured = after

    @torch.no_grad()
    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Take the step that was captured last, forward and backward pass included, in a CUDA graph.

        In place of `step` where `curvature_due` is False; hooks of `step` do not run. Learning rates are
        those of now. What is not finite is refused without a warning, and ``kfac_steps`` does not count it.

        Raises:
            ValueError: for options out of range, as `step`. Nothing has been changed then.
            TypeError: likewise.
            RuntimeError: without ``capturable=True``; if nothing was captured, another graph than that of the
                last capture is given, or parameters, state or options, but for ``lr``, ``damping`` and
                ``curvature_interval``, are not those of the capture; if the curvature is due; if a newer
                optimizer has replaced this one.
        """
        if self._retired:
            raise RuntimeError(self._retired)
        if self._rates is None:
            raise RuntimeError("replay() needs an optimizer that was made with capturable=True")
        if [*map(_options_of, self.param_groups)] != self._checked:
            self._check_options()
        if self._captured is None:
            raise RuntimeError("replay() of a graph in which no step of this optimizer was captured")
        if self._graph not in (None, graph):
            raise RuntimeError("replay() of another graph: only that of the last capture can be replayed")
        self._follow_model()
        if changed := self._captured.differs(self._reads()):
            raise RuntimeError(f"since the capture there is a change of {changed}; capture a step again")
        if self.curvature_due:
            raise RuntimeError(
                "the curvature is due in this step, and a graph does not renew it: take this step by "
                "backward() and step(), and replay where optimizer.curvature_due is False"
            )
        self._follow_schedules()
        self._rates.fill(self.param_groups)
        self._graph = graph
        graph.replay()
        for binding, (last, length) in self._diagnosed.items():
            binding.last, binding.length = last, length
        groups = self._groups()
        for group in self.param_groups:
            group["step"] += 1
            group["last_lr"] = group["lr"]
        for binding in self._bindings.by_weight.values():
            binding.schedule(groups[binding.weight])

    def _refresh_curvature(
        self,
        active: list[Binding],
        statistics: dict[Binding, Statistics | None],
        groups: dict[Tensor, dict[str, Any]],
        loss_scale: Tensor | None,
    ) -> list[Binding]:
        """Take the statistics of a step into the curvature; return the bindings whose were not finite."""
        own = self._distributor.owned(active)
        fallbacks = self._refresher.finish([(b.curvature, groups[b.weight]["step"]) for b in own])
        refused: list[Binding] = []
        earlier: list[Binding] = []
        if statistics:
            estimates = []
            for binding, sums in statistics.items():
                if sums is not None:
                    group = groups[binding.weight]
                    # Sampled labels know nothing of the loss scale.
                    scale = loss_scale if binding.recorder.fisher == "empirical" else None
                    tensors = binding.curvature.estimate(sums, binding.statistics_reduction(group), scale)
                    estimates.append(Estimate(binding.curvature, tensors, group))
            estimated = [] if self._rates is None else [each.curvature for each in estimates]
            places = [curvature.places() for curvature in estimated]
            bad, before, more = self._refresher.refresh(estimates)
            fallbacks += more
            earlier = [binding for binding in own if binding.curvature in before]
            taken = {each.curvature for each in estimates} - set(bad)
            own_outcomes = [(each, each.curvature in taken, each.curvature in bad) for each in statistics]
            for binding, was_taken, was_refused in self._distributor.outcomes(own_outcomes):
                if was_taken:
                    binding.schedule_refresh(groups[binding.weight])
                if was_refused:
                    refused.append(binding)
            for curvature, of_one in zip(estimated, places, strict=True):
                curvature.stay_in_place(of_one)
        if refused or earlier or fallbacks:
            names = {binding.curvature: binding.name for binding in own}
            of_layers = [(names[c], fallback) for c, fallback in fallbacks if c in names]
            warn_of_curvature(refused + earlier, of_layers, self._warned)
        if statistics:
            self._refusals.report(wait=False)
        return refused

    def _alike(
        self, bindings: Sequence[Binding], groups: dict[Tensor, dict[str, Any]]
    ) -> list[list[Binding]]:
        """Return bindings of one group, device, dtype and kind of tensor together: their scalars are one."""
        alike: dict[tuple[Any, ...], list[Binding]] = {}
        sizes: Counter[tuple[Any, ...]] = Counter()
        for binding in bindings:
            weight = binding.weight
            dtype, sharded = torch.promote_types(weight.dtype, torch.float32), hasattr(weight, "to_local")
            key = id(groups[weight]), weight.device, dtype, sharded
            sizes[key] += weight.numel()
            # Not too many, for what is computed of all of them is in memory together.
            alike.setdefault((*key, sizes[key] // TOGETHER), []).append(binding)
        return list(alike.values())

    def _updates(
        self, bindings: list[Binding], groups: dict[Tensor, dict[str, Any]]
    ) -> dict[Binding, Update]:
        """Return what alike weights are about to do, from the gradients of all ranks."""
        group = groups[bindings[0].weight]
        beta, eta = (None if group[name] == "adaptive" else float(group[name]) for name in ("beta", "eta"))
        by_weight = group["step_length"] == "weight"
        updates: dict[Binding, Update] = {}
        found = dict(zip(bindings, self._distributor.gradients(bindings), strict=True))
        for corrected in (True, False):
            owners = [
                each for each, (gradients, _) in found.items() if bool(gradients.contrasts) is corrected
            ]
            if not owners:
                continue
            gradients = [found[binding][0] for binding in owners]
            if group["loss_reduction"] == "sum":
                gradients = [found[binding][0].divided(found[binding][1]) for binding in owners]
            units = [binding.curvature.units if by_weight else None for binding in owners]
            directions = combine([b.curvature for b in owners], gradients, beta=beta, units=units)
            matrices, alignment, eta_used = scale_updates(directions, eta, corrected)
            trusted = (
                torch.stack([g.trusted for g in gradients if g.trusted is not None]) if corrected else None
            )
            mixing = directions.beta if trusted is None else torch.where(trusted, directions.beta, 0)
            noise: Sequence[Tensor | None] = [None] * len(owners)
            if all(binding.corrected for binding in owners):
                held = [binding.curvature.state[NOISE] for binding in owners]
                share, averages = noise_share(torch.stack(held), directions.noise, trusted)
                torch._foreach_copy_(held, list(averages.unbind()))
                noise = share.unbind()
            along: Sequence[Tensor | None] = [None] * len(owners)
            if by_weight:
                slopes = [torch.zeros_like(alignment)] * 3
                if not hasattr(owners[0].weight, "to_local"):
                    parts = [b.parts(each.average) for b, each in zip(owners, gradients, strict=True)]
                    slopes = along_gradients(parts, self.state)
                along = torch.stack([*slopes, alignment], 1).unbind()
            scaled = alignment * group["lr"] ** 2
            scalars = zip(*(v.unbind() for v in (scaled, mixing, eta_used, directions.rho)), strict=True)
            for n, (binding, (length, beta_used, eta_of, rho)) in enumerate(
                zip(owners, scalars, strict=True)
            ):
                one, unit = gradients[n], units[n]
                own = group if binding.bias is None else groups[binding.bias]
                if own is not group and not same_rate(own, group):
                    length = binding.squared_length(matrices[n], one.average, groups)
                updates[binding] = Update(
                    matrices[n],
                    length,
                    beta_used,
                    eta_of,
                    rho,
                    one.trusted,
                    one.reason,
                    input_square=None if unit is None else unit.flatten()[-1],
                    noise=noise[n],
                    along=along[n],
                )
        return updates

    def _move(
        self,
        bindings: list[Binding],
        shared: Mapping[Binding, Shared],
        finite: Mapping[Binding, Tensor],
        groups: dict[Tensor, dict[str, Any]],
    ) -> None:
        """Move alike weights and their biases by the updates, with momentum, as far as the options say.

        Where ``finite``, or ``used`` of its update, is false, all of a binding stays as it is.
        """
        group, updates = groups[bindings[0].weight], [shared[binding][0] for binding in bindings]
        like = updates[0].length.new_empty(())
        good = torch.stack([finite[binding].to(like.device) for binding in bindings])
        if used := [update.used for update in updates if update.used is not None]:
            good = good & torch.stack(used)
        # Numbers for those that move and those that stay; tensors, as torch.where of two numbers would round
        # them to float32.
        chosen = functools.cache(
            lambda yes, no: torch.where(good, number(yes), like.new_full((), no)).unbind()
        )

        def number(value: float | Tensor) -> Tensor:
            return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)

        # Of weights that move.
        decayed = functools.cache(lambda lr, decay: chosen(1 - lr * decay, 1.0))

        # This rank's part, where parameters are sharded.
        sharded = hasattr(bindings[0].weight, "to_local")
        mine: Callable[[Tensor], Tensor] = local if sharded else (lambda tensor: tensor)
        by_weight, kept = group["step_length"] == "weight", like.new_ones(len(bindings))
        if by_weight:
            along = torch.stack([update.along for update in updates if update.along is not None])
            along = self._slopes(bindings, shared, along) if sharded else along
            # Where noise is not known all counts as noise.
            one = along.new_ones(())
            noise = torch.stack([one if u.noise is None else u.noise.to(one) for u in updates])
            states = [self.state[binding.weight] for binding in bindings]
            kept, radius = after_overshoot(states, along, noise, group["momentum"], good)
        momenta = functools.cache(lambda momentum: torch.where(good, kept * momentum, 1).unbind())
        us: list[list[Tensor]] = []
        for n, (binding, moves) in enumerate(zip(bindings, good.unbind(), strict=True)):
            binding.note(updates[n])
            us.append([])
            for param, part in shared[binding][1]:
                options, state = groups[param], self.state[param]
                if self._kl_scale is not None:
                    part = part * self._kl_scale.to(part)
                # Not a product: 0 times NaN is NaN.
                u = torch.where(moves, part, 0)
                if options["momentum"]:
                    # That of `torch.optim.SGD`.
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(param, dtype=u.dtype)
                    buffer = mine(state["momentum_buffer"])
                    momentum = options["momentum"] if self._kl_scale is None else momentum_of(options)
                    torch.addcmul(u, buffer, momenta(momentum)[n], out=buffer)
                    u = u.add_(buffer, alpha=options["momentum"]) if options["nesterov"] else buffer
                us[-1].append(u)
        turns: dict[Tensor, tuple[Tensor | None, Tensor]] = {}
        if by_weight:
            decay = group["weight_decay"]
            left = torch.stack(decayed(group["lr"], decay)) if decay else None
            weights = [mine(binding.weight) for binding in bindings]
            turns = self._turns(bindings, weights, us, updates, along, noise, radius, good, left, groups)
        for n, binding in enumerate(bindings):
            for (param, _), u in zip(shared[binding][1], us[n], strict=True):
                options = groups[param]
                a, b = turns.get(param) or (None, chosen(signed_rate(options), 0.0)[n])
                if a is None and options["weight_decay"]:
                    a = decayed(options["lr"], options["weight_decay"])[n]
                weight = mine(param)
                # Half precision is rounded once.
                moved = weight if weight.dtype == u.dtype else weight.to(u.dtype)
                (moved if a is None else moved.mul_(a)).addcmul_(u, b, value=-1)
                if moved is not weight:
                    weight.copy_(moved)

    def _slopes(self, bindings: list[Binding], shared: Mapping[Binding, Shared], along: Tensor) -> Tensor:
        """Return `Update.along` of sharded weights, (n, 4), from all ranks; its last is in ``along``."""
        parts = [shared[binding][1] for binding in bindings]
        gradients = [[(p, local(p.grad).to(d)) for p, d in of_one if p.grad is not None] for of_one in parts]
        ahead = [
            inner([d for _, d in of_one], [g for _, g in its]).sum()
            for of_one, its in zip(parts, gradients, strict=True)
        ]
        slopes = along_gradients(gradients, self.state, local)
        found = self._distributor.sums(torch.stack([*slopes, torch.stack(ahead)], 1))
        # p.grad may be a sum over samples, and not be clipped yet: ⟨update, Ga⟩ tells what Ga is of it.
        own, square, past, of_grads = found.unbind(1)
        of_Ga = along[:, 3].to(found)
        return torch.stack([own, square, past * ratio(of_Ga, of_grads, otherwise=1.0), of_Ga], 1)

    def _turns(
        self,
        bindings: list[Binding],
        weights: list[Tensor],
        us: list[list[Tensor]],
        updates: list[Update],
        along: Tensor,
        noise: Tensor,
        radius: Tensor,
        good: Tensor,
        kept: Tensor | None,
        groups: dict[Tensor, dict[str, Any]],
    ) -> dict[Tensor, tuple[Tensor | None, Tensor]]:
        """Return a and b of the step a·W - b·u of every parameter W; a is None for biases: decay alone."""
        group, rows = groups[bindings[0].weight], [binding.rows for binding in bindings]
        one = good.new_ones((), dtype=updates[0].length.dtype)
        sizes_of_inputs = [one if u.input_square is None else u.input_square.to(one) for u in updates]
        inputs = torch.stack(sizes_of_inputs)
        numbers = measure(weights, us, inputs, rows)
        if hasattr(bindings[0].weight, "to_local"):
            numbers = self._distributor.sums(numbers)
        sums = Sums(*numbers.unbind(1), *along[:, :2].unbind(1))
        sums = sums if kept is None else sums.times(kept)
        held: list[Tensor] = []
        for binding in bindings:
            # A transfer would wait for the device: once only.
            binding.sizes = binding.sizes.to(numbers)
            state = self.state[binding.weight]
            if REFERENCE_NORM not in state:
                state[REFERENCE_NORM] = numbers.new_zeros(())
            held.append(state[REFERENCE_NORM])
        sizes = torch.stack([binding.sizes for binding in bindings])
        far = lengths(sums, updates, inputs, good, torch.stack(held), noise, radius, sizes, group)
        torch._foreach_copy_(held, list(far.reference.unbind()))
        a, b = turn(sums.own, sums.product, sums.of_weight, far, kept=kept)
        of_all = [each.unbind() for each in (far.share * group["lr"], far.factor, far.rate, a, b)]
        turns: dict[Tensor, tuple[Tensor | None, Tensor]] = {}
        for n, binding in enumerate(bindings):
            binding.length, factor, rate, a, b = (each[n] for each in of_all)
            if binding.rows:
                left, weight = None if kept is None else kept[n], weights[n].to(numbers)
                products = row_products(weight if left is None else weight * left, us[n][0])
                a, b = turn(*products, Lengths(*(each[n] for each in far)), kept=left)
            turns[binding.weight] = a, b
            if binding.bias is not None:
                options = groups[binding.bias]
                turns[binding.bias] = None, rate if options is group else factor * signed_rate(options)
        return turns

    def _step_adamw(self, done: set[Tensor], groups: dict[Tensor, dict[str, Any]]) -> None:
        """Step every other parameter that is trained and has a gradient."""
        alike: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        for param, group in groups.items():
            wanted = param.requires_grad and param.grad is not None and param.numel()
            if wanted and param not in done:
                alike.setdefault((id(group), param.device, param.dtype), []).append(param)
        for params in alike.values():
            refused = adamw_step(params, groups[params[0]], self.state, self._distributor.any)
            self._refusals.count((f"all {len(params)} AdamW parameters of a group",), ~refused[None])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients and forget what was recorded with them.

        But for the curvature of the passes so far, if gradients are put there by hand next (PCGrad, MAML).
        """
        super().zero_grad(set_to_none)
        self._distributor.discard()
        self._relink()
        for watch in self._bindings.watches.values():
            watch.thread.state.running.clear()
        for binding in self._bindings.by_weight.values():
            recorder, gradient = binding.recorder, binding.weight.grad
            cleared = recorder.cleared
            if recorder.samples and not recorder.taken:
                version = None if gradient is None else (id(gradient), gradient._version)
                cleared = Cleared(recorder.statistics, recorder.samples, version)
            recorder.clear(cleared)

    # Curvature and reports

    @property
    def curvature_due(self) -> bool:
        """Whether the coming step refreshes the curvature of any layer that is trained, as far as known."""
        due = [binding.recorder.due for binding in self._bindings if binding.weight.requires_grad]
        return any(due) if due else self._bindings.searching

    def request_curvature(self) -> None:
        """Refresh every layer's curvature at the coming step, for instance after new weights were loaded."""
        groups = self._groups()
        for param, group in groups.items():
            # Also in a state that was loaded before the parameter's module is known.
            if "refresh_at" in (held := self.state.get(param, {})):
                held["refresh_at"] = group["step"]
        for binding in self._bindings:
            binding.state["refresh_at"] = groups[binding.weight]["step"]
            binding.schedule(groups[binding.weight])
        self._prepare()

    def summary(self) -> Summary:
        """Return a printable table: parameter, path, why, factor shapes and memory."""
        return summarise(self._groups(), self._bindings, self.state)

    def diagnostics(self) -> Diagnostics:
        """Return β, η, ρ, noise, length, damping, age and fallbacks of every layer as of its last step.

        Nothing is transferred from the device before this is called.
        """
        self._refusals.report()
        return diagnose(self._groups(), self._bindings, self._kl_scale)

    @property
    def plan(self) -> Plan | None:
        """Which rank owns which layer, in the order of `diagnostics()`; None on one process, or not yet."""
        return self._distributor.plan

    @property
    def bytes_sent(self) -> dict[str, float]:
        """Bytes that this rank has sent to others for the optimizer, by category (docs/distributed.md)."""
        return dict(self._distributor.bytes_sent)

    def _describe(self) -> Description:
        return describe(self.param_groups, self._bindings, self._distribution)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state; on a GPU it waits to know whether the last curvature update succeeded."""
        self._refresher.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer over the same model; continuing equals never having stopped.

        Raises:
            ValueError: if the state belongs to another model or optimizer, or holds what no step could use;
                nothing has been changed then.
        """
        check_form(state_dict)
        loaded: list[dict[str, Any]] = []

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            layers = {weight: binding.layer for weight, binding in self._bindings.by_weight.items()}
            loaded.append(check_state_dict(saved, self.param_groups, layers))
            for group in loaded[0]["param_groups"]:
                self._check_fixed(group, "the state_dict")
            return loaded[0]

        # Names, which torch itself keeps since 2.6, and the mark of a scheduler that was made before loading.
        kept = [
            {key: group[key] for key in ("param_names", "initial_lr") if key in group}
            for group in self.param_groups
        ]
        # After the user's hooks, which may make another state of it.
        with self.register_load_state_dict_pre_hook(check):
            super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, kept, strict=True):
            for key, value in own.items():
                group.setdefault(key, value)
        restore_precision(loaded[0], self.param_groups, self.state)
        self._distributor.discard(state_replaced=True)
        self._relink()
        groups = self._groups()
        for binding in self._bindings.by_weight.values():
            binding.schedule(groups[binding.weight])
            binding.recorder.clear()

    def _follow_model(self) -> None:
        """Catch up with parameters that were replaced or moved, and with a state that was."""
        if self._retired:
            raise RuntimeError(self._retired)
        replaced = self._bindings.follow(self._groups(), self.state)
        if replaced:
            for group in self.param_groups:
                group["params"] = [replaced.get(param, param) for param in group["params"]]
            # Where the old ones were is where their state is.
            self._places = {replaced.get(param, param): place for param, place in self._places.items()}
        if moved := [p for p, place in self._places.items() if (p.device, p.dtype) != place]:
            follow_moves(self.state, moved)
            for binding in self._bindings:
                binding.curvature.derive()
        self._relink()

    def _relink(self) -> None:
        """Take the state as it is now: a new one was loaded, or the old one was thrown away."""
        changed = False
        for binding in self._bindings.by_weight.values():
            # A state may also have been emptied in place.
            held, curvature = self.state.get(binding.weight) or None, binding.curvature
            lost = bool(curvature.state) or (curvature.ready and self.plan is None)
            if held is not curvature.state and (held is not None or lost):
                curvature.load({} if held is None else held)
                changed = True
        if changed:
            groups = self._groups()
            for binding in self._bindings:
                binding.schedule(groups[binding.weight])
            self._prepare()

    def _make_state(self) -> None:
        """Make the state as before the first step; AdamW's for a parameter whose module is not known yet."""
        groups, owned = self._groups(), self._distributor.owned(list(self._bindings))
        for binding in self._bindings:
            make_state(binding, owned=binding in owned, groups=groups, state=self.state)
        covered = self._bindings.covered()
        for group in self.param_groups:
            rest = [param for param in group["params"] if param not in covered and param.requires_grad]
            make_adamw_state(rest, group, self.state)
        self._places = {param: (param.device, param.dtype) for param in groups}
        self._relink()

    def __getstate__(self) -> dict[str, Any]:
        self._refresher.settle()
        own = {
            "layer_options": self._bindings.choices.given,
            "batch_size": self._bindings.batch_size,
            "capturable": self._rates is not None,
            "schedules": self._schedules,
            "distribution": portable(self._distribution),
        }
        return {**super().__getstate__(), "_own": (own, self._default_schedules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own, fresh = state.pop("_own", None), False
        # A copy or an unpickled optimizer has no modules yet: it finds them as from bare parameters.
        if "_bindings" not in self.__dict__:
            assert own is not None
            self._distribution = own[0]["distribution"]
            given = own[0]
            self._begin(
                given["layer_options"], given.get("batch_size"), own[1], given.get("capturable", False)
            )
            self._schedules = own[0]["schedules"]
            fresh = True
        super().__setstate__(state)
        groups = self._groups()
        self._places = {param: (param.device, param.dtype) for param in groups}
        if fresh:
            # The original's parameters may have moved since its last step.
            follow_moves(self.state, groups)
            self._prepare()
            self._take_over()


class KFAC(FOP):
    """K-FAC: `FOP` with ``beta=0.0`` and ``eta=1.0``, so that no second gradient is computed.

    It takes every other argument of `FOP`, and raises as `FOP` does; TypeError for ``beta`` and ``eta``, and
    ValueError where a parameter group or a loaded state has others.
    """

    _fixed: ClassVar[dict[str, Any]] = {"beta": 0.0, "eta": 1.0}

    def __init__(self, params: ParamsLike, lr: float | None = DEFAULTS["lr"], **options: Any) -> None:
        given = sorted(self._fixed.keys() & options.keys())
        if given:
            raise TypeError(f"KFAC has beta=0.0 and eta=1.0; got {', '.join(given)}. Use FOP to set them.")
        super().__init__(params, lr, **self._fixed, **options)
