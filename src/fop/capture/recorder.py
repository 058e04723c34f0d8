"""What forward and backward passes give of one weight: input and output gradient, then p.grad."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.hooks import RemovableHandle

from fop.capture.batch import Batch, Layout
from fop.capture.hooks import Hook, ModelWatch, ModuleUse, remove_all
from fop.capture.labels import SampledPass
from fop.capture.sharded import is_sharded
from fop.capture.statistics import gather_statistics
from fop.capture.sub_batches import EMPTY, PassRecord, SplitSums, SubBatches, sub_batch_runs
from fop.layers import Layer, RowSampler, Statistics
from fop.torch_internals import (
    current_backward_pass,
    graph_is_retained,
    is_legacy_vmapped,
    is_vmapped,
    outside,
    view_base,
)

# Gradients of weight and bias, in their shapes; None if the bias is not the layer's.
Gradients: TypeAlias = tuple[Tensor, Tensor | None]

_UNCLEAR = (
    "it is not clear where the samples of a batch are in the input of a layer: {}. Such layers take K-FAC's "
    "step. Give FOP batch_size=lambda x, mask: len(x), with the arguments of your model, or batch_dim in "
    "layer_options"
)


@dataclass
class RunningPass:
    """What is known of the running backward pass; shared by all recorders.

    Attributes:
        sub_batch: which sub-batch the user says that it is a part of, None for no word.
        sampled: the pass of sampled labels that runs inside it, None if none does.
        generator: of these labels, and the backward pass that it was made for.
        warned: whether the user was told of batches whose samples are not known.
    """

    sub_batch: int | None = None
    sampled: SampledPass | None = None
    generator: tuple[int, torch.Generator] | None = None
    warned: bool = False


class Cleared(NamedTuple):
    """What passes gave whose gradients were cleared; ``version`` is then p.grad's, None for no p.grad."""

    statistics: Statistics | None
    samples: int
    version: tuple[int, int] | None


class Recorder:
    """Records one weight between two optimizer steps.

    The hooks know it by weak reference only: dropping the optimizer drops the recorder.

    Attributes:
        params: the weight, and the bias if it belongs to the weight's layer.
        count: number of sub-batches K, from the coming gradient on.
        paired: whether sub-batch gradients are wanted (FOP) or only statistics (K-FAC).
        due: whether statistics are wanted of the coming backward pass.
        counted: whether the number of samples is wanted in every step.
        statistics_rows: rows for each dimension of a factor that statistics are made from; None for all.
        fisher: whose labels the statistics are of, "empirical" for the data's or "model" for its own.
        labelled: whether labels of the model's own were sampled.
        key: of the draws of these rows, another one in every step and for every weight.
        stream: of the draws, for those who share a key (ranks).
        samples: N of all passes together.
        cleared: what they gave before `zero_grad`; serves a gradient that is put there by hand since.
        averaged: whether the last backward pass was one after which somebody averages p.grad over ranks.
        taken: whether the gradient is taken away after a pass that averages (FSDP, and mode "lean").
        restarted: whether the last pass found a gradient that it knew nothing of: None, zeroed, or changed.
        sharded: whether this rank has a shard of the weight only (FSDP).
        accumulates: whether the last pass added to a gradient that was still there, where ``taken``.
        stand_ins: the parameter of every unsharded tensor that FSDP puts in its place while a module runs.
        completed: called when a backward pass has given all gradients of the layer, with these by parameter.
    """

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None, running: RunningPass) -> None:
        self.layer = layer
        self.weight = weight
        self.params = [weight] if bias is None else [weight, bias]
        self.paired, self.due, self.counted, self.count = True, True, False, 2
        self.statistics_rows: int | None = None
        self.fisher: str = "empirical"
        self.key, self.stream = "", 0
        self.taken = self.sharded = is_sharded(weight)
        self.accumulates = False
        self.restarted = True
        self.completed: Callable[[dict[Tensor, Tensor]], None] | None = None
        self.uses: list[ModuleUse] = []
        self._running = running
        # What the running backward passes have given so far.
        self._passes: dict[int, PassRecord] = {}
        self._handles: list[RemovableHandle] = []
        self._watched: set[Tensor] = set()
        self.stand_ins: dict[Tensor, Tensor] = {}
        weakref.finalize(self, remove_all, self._handles)
        self.clear()

    def clear(self, cleared: Cleared | None = None) -> None:
        """Forget what was recorded: the gradients were zeroed, or a step has used it."""
        self.cleared = cleared
        self.sub_batches = SubBatches(self.layer, self.params, self.count)
        self.statistics: Statistics | None = None
        self.samples = 0
        self.averaged = self.labelled = False
        self._passes.clear()
        # Which tensor p.grad was, and its version, when it was last recorded; None before.
        self._version: tuple[int, int] | None = None
        # Backward pass around the last one, whether others inside it came before, and its N.
        self._outer, self._continued, self._last_samples = -1, False, 0
        self._arrived: dict[Tensor, Tensor] = {}
        self._sampler: RowSampler | None = None

    # The modules

    def attach(self, use: ModuleUse) -> None:
        """Record one more module that uses the weight."""
        self.uses.append(use)
        self._handles += use.handles
        # A compiled forward pass cannot do it.
        self.watch_gradients()

    def belongs_to(self, watch: ModelWatch) -> None:
        """Take what is known of the batch from this model."""
        for use in self.uses:
            use.watch = watch

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that use the weight."""
        return [module for use in self.uses if (module := use.module()) is not None]

    def detach(self) -> None:
        """Record no longer."""
        remove_all(self._handles)

    def watch_gradients(self) -> None:
        """Be told when the gradients of the parameters are complete."""
        for param in self.stand_ins if self.sharded else self.params:
            # A frozen parameter takes no hook; it may be thawed later.
            if param.requires_grad and param not in self._watched:
                hook = Hook(self, Recorder.accumulated)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                self._watched.add(param)

    # The passes

    @property
    def wants(self) -> bool:
        """Whether anything is wanted of the coming backward pass."""
        return self.paired or self.due or self.counted

    def observe(
        self, layer: Layer, x: Tensor, output: Tensor, batch: Batch, module: nn.Module | None = None
    ) -> Tensor | None:
        """Arrange that the gradient of ``output`` meets ``x`` in the backward pass.

        Not only if anything is wanted of it: that may change until then, and checkpointing expects the same
        tensors to be kept when it repeats a forward pass. Where all that ``module`` does is this layer, and
        sub-batch gradients are wanted, returns what must take the place of ``output``.
        """
        if not (torch.is_grad_enabled() and output.requires_grad and self.weight.requires_grad):
            return None
        if len(self._watched) < len(self.params) or self.sharded:
            self.watch_gradients()
        call = _Call(weakref.ref(self), layer, batch, current_backward_pass())
        if module is not None and self.paired and layer.owns_backward and not self.sharded:
            plain = type(x) in (Tensor, nn.Parameter) and type(output) is Tensor
            # A custom function has no forward-mode derivative.
            if plain and x.layout is torch.strided and unpack_dual(output).tangent is None:
                bias = module._parameters.get("bias")
                # In the precision of autocast.
                given = x.to(output.dtype), module._parameters["weight"], bias, call, [output]
                replaced: Tensor = _LayerFunction.apply(*given)  # type: ignore[no-untyped-call]
                return replaced
        x = x.detach()
        # An in-place operation on a view (3-d inputs of Linear, unbatched convolutions) would cut the view,
        # and a hook on it, out of the graph.
        base = view_base(output)
        source = base if base is not None and base.numel() == output.numel() else output
        node, index, hook = source.grad_fn, source.output_nr, _OutputHook(call, x, output.shape)
        assert node is not None
        # On the node and not on the tensor: after hooks of the user's that change the gradient.
        node.register_prehook(lambda gradients: hook(gradients[index]))
        return None

    @torch.no_grad()
    def record(
        self,
        layer: Layer,
        x: Tensor | None,
        b: Tensor,
        batch: Batch,
        outer: int = -1,
        *,
        whole: bool = False,
    ) -> Gradients | tuple[None, None] | None:
        """Record one use of the weight, which ``layer`` describes, in a running backward pass.

        ``x`` is None if it was changed since the forward pass; ``outer`` is the backward pass that repeated
        the forward pass (reentrant checkpointing), -1 if none did. Returns the gradients of weight and bias,
        as sums over the sub-batches, if asked for the ``whole`` and the pass was split; (None, None) in one
        of sampled labels, which is for statistics only.
        """
        task, sampled = current_backward_pass(), self._running.sampled
        if sampled is None or sampled.outer == task:
            sampled = None
        elif self.due and self.fisher == "model":
            # It is one more use of the weight in the pass inside which it runs.
            task = sampled.outer
        else:
            return None, None
        if x is None:
            layout = Layout(0, 0, problem="its input was changed in place")
        elif x.is_nested or x.layout is not torch.strided:
            x, layout = None, Layout(0, 0, problem="its input is sparse or nested")
        else:
            layout = batch.layout(layer, x)
            if layout.unclear and self.paired and not self._running.warned:
                self._running.warned = True
                warnings.warn(_UNCLEAR.format(layout.problem), UserWarning, stacklevel=outside())
        if task not in self._passes:
            # Leftovers of passes that never reached the weight, as torch.autograd.grad for its inputs.
            self._passes.clear()
            self._begin_pass()
            # Every repeated forward pass runs a backward pass of its own; together they are one.
            self._continued = outer != -1 and outer == self._outer
            self._outer = outer
            samples = layout.samples if layout.problem is None else 0
            if not self._continued and (samples or layout.problem is not None):
                self.sub_batches.begin(samples, self._running.sub_batch)
        self.labelled |= sampled is not None
        with torch.autocast(b.device.type, enabled=False):
            record, gradients = self._record_of(layer, x, b, layout, whole, sampled)
        if task in self._passes:
            self._passes[task].add_use(record)
        else:
            self._passes[task] = record
        return gradients if sampled is None else (None, None)

    def _record_of(
        self,
        layer: Layer,
        x: Tensor | None,
        b: Tensor,
        layout: Layout,
        whole: bool,
        sampled: SampledPass | None,
    ) -> tuple[PassRecord, Gradients | None]:
        record = PassRecord(layout.samples, layout.problem, precise=torch.finfo(b.dtype).bits > 16)
        gradients: Gradients | None = None
        if x is None or not x.numel() or not b.numel():
            record.problem = record.problem or EMPTY
            return record, None
        if layout.dim != 0 or layout.folded:
            x, b = layout.batched(x), layout.batched(b)
        if layout.samples < self.count:
            how = "has no halves" if self.count == 2 else f"cannot be split in {self.count}"
            record.problem = record.problem or f"a batch of {layout.samples} {how}"
        if sampled is None and self.paired and self.sub_batches.split and record.problem is None:
            runs = sub_batch_runs(layout.samples, self.sub_batches.count, layout.rows)
            if whole:
                gradients = _sum_of_parts(layer, x, b, runs, record.sums)
                if self.due:
                    record.sums.whole = layer.to_matrix(*gradients)
            else:
                wanted = runs if self.due else runs[:-1]
                parts = [reduce(torch.add, (layer.gradient(x[run], b[run]) for run in own)) for own in wanted]
                record.sums.first = parts[: len(runs) - 1]
                if self.due:
                    record.sums.whole = reduce(torch.add, parts)
        if self.due and (sampled is not None) == (self.fisher == "model"):
            if self.statistics_rows is not None and self._sampler is None:
                self._sampler = RowSampler(self.statistics_rows, f"{self.key} {self.stream}", x.device)
            record.statistics = gather_statistics(layer, x, b, layout.samples, self._sampler)
            if sampled is not None and not self.counted:
                # The loss is a mean over rows, and that of a sample its share of the sum.
                record.statistics.scale(layout.samples / sampled.rows)
        return record, gradients

    @torch.no_grad()
    def accumulated(self, param: Tensor) -> None:
        """Take over the finished backward pass: it is in p.grad now."""
        if (gradient := param.grad) is None:
            return
        param = self.stand_ins.get(param, param)
        sub_batches = self.sub_batches
        if param is self.weight:
            self.cleared = None
            record = self._passes.pop(current_backward_pass(), None)
            if record is None:
                sub_batches.drop("its gradient came by a path that no hook saw")
            else:
                samples, continued = record.samples, self._continued
                if continued and samples != self._last_samples:
                    record.problem = f"its uses have batches of {self._last_samples} and {samples}"
                self._last_samples = samples
                self.samples += 0 if continued else samples
                if self.statistics is None:
                    self.statistics = record.statistics
                elif record.statistics is not None:
                    self.statistics.add(record.statistics, same_samples=continued)
                sub_batches.add(record, continued)
                if sub_batches.sums.whole is not None and not (self.averaged and self._version is not None):
                    sub_batches.compare(gradient)
            self._version = id(gradient), gradient._version
        if self.paired or self.due:
            sub_batches.measures[param] = sub_batches.measure(param, gradient)
            if param is self.weight and self.statistics is not None:
                # The rows that were drawn may not show that a gradient is not finite.
                self.statistics.spoil(sub_batches.measures[param][0])
        if self.completed is not None:
            self._arrived[param] = gradient
            if all(each in self._arrived or not each.requires_grad for each in self.params):
                arrived, self._arrived = self._arrived, {}
                self.completed(arrived)

    def averaging_ended(self) -> None:
        """Take p.grad as it is now for what the backward passes gave."""
        if (gradient := self.weight.grad) is not None and self._version is not None:
            self._version = id(gradient), gradient._version

    def _begin_pass(self) -> None:
        """Forget the passes so far unless this one adds to a gradient that is recorded already."""
        gradient = self.weight.grad
        if self.taken:
            whole = next((w for w, own in self.stand_ins.items() if own is self.weight), self.weight)
            self.accumulates = whole.grad is not None
            # A shard's gradient is there after a pass that was averaged, unless somebody has zeroed it.
            self.restarted = self.averaged and gradient is None and self.sharded
            if self.restarted:
                self.clear()
            elif not self.accumulates:
                # The gradients of the passes so far are gone, their statistics are not.
                self._last_samples = 0
                self.sub_batches = SubBatches(self.layer, self.params, self.count)
            return
        self.restarted = gradient is None or (id(gradient), gradient._version) != self._version
        if self.restarted:
            # This pass may never reach p.grad.
            self.clear(self.cleared)
            if gradient is not None:
                # Zeros are as good as None; anything else is a gradient whose sub-batches nobody knows.
                self.sub_batches.clean = gradient.count_nonzero() == 0


def _sum_of_parts(
    layer: Layer, x: Tensor, b: Tensor, runs: Sequence[Sequence[slice]], sums: SplitSums
) -> Gradients:
    """Return the gradients of weight and bias from those of the sub-batches; ``sums`` keeps all but one."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    # In half precision the sum would round once more.
    dtype = torch.promote_types(b.dtype, torch.float32)
    for own in runs:
        parts = [layer.gradients(x[run], b[run], bias=layer.bias) for run in own]
        weights.append(reduce(torch.add, [weight.to(dtype) for weight, _ in parts]))
        if layer.bias:
            biases.append(reduce(torch.add, [bias.to(dtype) for _, bias in parts if bias is not None]))
    sums.first += [layer.to_matrix(*both) for both in zip_longest(weights[:-1], biases[:-1])]
    return reduce(torch.add, weights), reduce(torch.add, biases) if biases else None


class _Call(NamedTuple):
    """One use of a weight in a forward pass; ``outer`` is the backward pass that runs it, -1 for none."""

    recorder: weakref.ReferenceType[Recorder]
    layer: Layer
    batch: Batch
    outer: int


class _LayerFunction(torch.autograd.Function):
    """Stands for a layer in the graph, and computes the gradient of its weight sub-batch by sub-batch.

    Their sum is what autograd would have computed, so that the gradients of the sub-batches cost nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, output: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        # Computed already; not a tensor among the arguments, of which the result must not be a view.
        return output[0].detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_input, of_weight, of_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        call: _Call = ctx.call
        recorder, layer = call.recorder(), call.layer
        whole: Gradients | tuple[None, None] | None = None
        with torch.autocast(b.device.type, enabled=False):
            if recorder is not None and of_weight and not (is_vmapped(b) or is_legacy_vmapped(b)):
                # With create_graph=True the gradients must themselves have a graph.
                split = not torch.is_grad_enabled()
                whole = recorder.record(layer, x.detach(), b.detach(), call.batch, call.outer, whole=split)
            single = not x.shape[layer.leading]
            x_N, b_N = (x[None], b[None]) if single else (x, b)
            gradient = layer.input_gradient(x_N, b_N, weight.to(b.dtype)) if of_input else None
            # Also where the bias is not the layer's. A pass of sampled labels asks for none.
            if whole is None or (of_bias and whole[1] is None and whole[0] is not None):
                whole = layer.gradients(x_N, b_N, bias=of_bias) if of_weight or of_bias else (None, None)
        of_x = gradient[0] if gradient is not None and single else gradient
        weight_gradient, bias_gradient = (None, None) if whole is None else whole
        of_params = weight_gradient if of_weight else None, bias_gradient if of_bias else None
        return of_x, *of_params, None, None


class _Keep(torch.autograd.Function):
    """Holds a tensor where checkpointing and offloading find it, and where changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError("nothing is computed from it")


class _OutputHook:
    """Hook on an output's node: holds the input until the gradient of the output comes, as autograd does."""

    def __init__(self, call: _Call, x: Tensor, shape: torch.Size) -> None:
        self._call, self._shape = call, shape
        # The output and not its node: before torch 2.13 the node's tensors went with the output.
        self._kept: Any = _Keep.apply(torch.empty(0, requires_grad=True), x)  # type: ignore[no-untyped-call]

    def __call__(self, b: Tensor | None) -> None:
        call, kept = self._call, self._kept
        if not graph_is_retained():
            self._kept = None
        recorder = call.recorder()
        if recorder is None or not recorder.wants:
            return
        if b is None or is_vmapped(b) or is_legacy_vmapped(b):
            return
        x: Tensor | None = None
        if kept is not None:
            try:
                x = kept.grad_fn.saved_tensors[0]
            except RuntimeError as error:
                # Legal where autograd kept a copy of its own, as under autocast.
                if "modified by an inplace operation" not in str(error):
                    raise
        recorder.record(call.layer, x, b.reshape(self._shape), call.batch, call.outer)
