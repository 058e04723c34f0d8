"""Which modules a weight belongs to. All that may happen to a model meanwhile makes it over 500 lines."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fop.capture import (
    AttentionUse,
    BatchSize,
    FirstForwardHook,
    ForwardUse,
    FunctionUse,
    ModelWatch,
    Recorder,
    RunningPass,
    Seen,
    Source,
    in_place,
    local,
    parameter_of,
    retrace,
    source_of,
    stands_for,
)
from fop.curvature import kind_of, make_curvature, next_refresh
from fop.discovery import FoundLayer, Use, find_layers, may_be_weight
from fop.layer_options import LayerChoices
from fop.layers import FunctionCall, Reduction, Slot
from fop.recognition import Recogniser, warn_of_unseen
from fop.step_size import Update
from fop.torch_internals import runs_compiled, unwrapped

Groups: TypeAlias = Mapping[Tensor, Mapping[str, Any]]
State: TypeAlias = MutableMapping[Tensor, dict[str, Any]]


class Binding:
    """A weight that takes the FOP step, with its bias and the modules that use them.

    Beside the curvature's tensors ``state``, the optimizer's of the weight, holds ``refreshed_at``,
    ``refresh_at`` and ``complete`` (whether p.grad is all that the hooks see).

    Attributes:
        corrected: whether the correction by sub-batches is wanted (FOP), and not K-FAC's step.
        rows: how many rows an embedding has, of which a batch uses few; 0 for other weights.
        sizes: the norm of a weight whose outputs have the size 1 if its inputs have it; how many numbers it
            has, 1 if the rows of an embedding have one; and ``rows``; (3,).
        lean: between ranks, whether the gradient goes to the owner and p.grad is None.
        by_adamw: whether the last gradient came without curvature, so that AdamW took the step.
        looked_for: whether functions were looked for, as nobody saw the modules run.
        seen: whether the modules knew of the last gradient.
        counted: steps, and those of them with sub-batch gradients that were believed, on the device.
        length: by which share of its norm the weight moved last, 0-dim; None with the paper's steps.
    """

    def __init__(self, found: FoundLayer, recorder: Recorder, state: dict[str, Any]) -> None:
        self.name, self.kind = found.name, found.kind
        self.modules = tuple(use.name for use in found.uses)
        self.layer, self.weight, self.bias = found.layer, found.weight, found.bias
        self.params: list[Tensor] = recorder.params
        self.recorder = recorder
        self.curvature = make_curvature(found.layer, [use.layer for use in found.uses], state)
        self.corrected = True
        layer, size = found.layer, found.weight.numel()
        self.rows = len(found.weight) if layer.by_index and not layer.swapped else 0
        # Each entry of a norm's weight has an output of its own, and each of an embedding is one.
        own_outputs = self.rows or layer.bias_dim == 1
        typical = (size if own_outputs else layer.groups * layer.out_dim) ** 0.5
        turning = size if size > self.rows else 1
        self.sizes = torch.tensor([typical, turning, self.rows], dtype=torch.float64)
        self.lean = self.by_adamw = self.looked_for = self.seen = False
        self.last: Update | None = None
        self.length: Tensor | None = None
        self.counted: tuple[int, Tensor | None] = (0, None)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the weight."""
        return self.curvature.state

    def schedule(self, group: Mapping[str, Any]) -> None:
        """Tell the recorder what the coming backward pass must give."""
        recorder, curvature = self.recorder, self.curvature
        recorder.paired = self.corrected = group["beta"] != 0.0 and group["sub_batches"] > 1
        # A state that was saved by one of several ranks lacks the curvature that others owned.
        recorder.due = curvature.state.get("refresh_at", 0) <= group["step"] or not curvature.ready
        recorder.counted = group["loss_reduction"] == "sum"
        recorder.count = group["sub_batches"]
        recorder.statistics_rows, recorder.fisher = group["statistics_rows"], group["fisher"]
        recorder.key = f"{self.name} {group['step']}"

    def statistics_reduction(self, group: Mapping[str, Any]) -> Reduction:
        """Return how the loss of the statistics joins the samples; that of sampled labels is a sum."""
        reduction: Reduction = group["loss_reduction"] if self.recorder.fisher == "empirical" else "sum"
        return reduction

    def schedule_refresh(self, group: Mapping[str, Any]) -> None:
        """Note that the curvature was refreshed, when the next time is, and how far p.grad was seen."""
        seen, state = self.recorder.sub_batches, self.state
        if (complete := seen.complete) is not None:
            if seen.clean is not None:
                # What p.grad held before says nothing about the paths into it.
                complete = torch.where(seen.clean, complete, state.get("complete", torch.ones_like(complete)))
            state["complete"] = complete
        # Always there, so that torch.distributed.checkpoint knows where to load it to.
        state.setdefault("complete", torch.ones((), dtype=torch.bool, device=local(self.weight).device))
        state["refresh_at"] = next_refresh(group["step"], group["curvature_interval"])

    def gradient(self) -> Tensor:
        """Return p.grad of weight and bias as gradient matrix, with zeros for a bias that takes no part."""
        assert self.weight.grad is not None
        bias = self.bias
        trained = bias is not None and bias.requires_grad
        return self.layer.to_matrix(self.weight.grad, bias.grad if trained else None)  # type: ignore[union-attr]

    def parts(self, matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, its part of a gradient matrix) of the weight, and of a bias that takes part.

        That is one that requires a gradient and has one; a frozen one may still have an old p.grad.
        """
        weight_part, bias_part = self.layer.from_matrix(matrix, self.weight)
        bias = self.bias
        if bias is None or not (bias.requires_grad and (self.lean or bias.grad is not None)):
            return [(self.weight, weight_part)]
        assert bias_part is not None
        return [(self.weight, weight_part), (bias, bias_part)]

    def squared_length(self, matrix: Tensor, average: Tensor, groups: Groups) -> Tensor:
        """Return lr²·⟨update, gradient⟩, this weight's term of the KL clip, with a bias of another rate."""
        terms = [
            groups[param]["lr"] ** 2 * (part * gradient).sum()
            for (param, part), (_, gradient) in zip(self.parts(matrix), self.parts(average), strict=True)
        ]
        return torch.stack(terms).sum()

    def note(self, update: Update) -> None:
        """Keep for the diagnostics how a step went: the scalars, not the update."""
        reason = update.reason if self.corrected else ""
        self.last = update._replace(matrix=update.length, reason=reason)
        if not self.corrected:
            return
        noted, believed = self.counted
        if update.trusted is not None:
            before = update.trusted.new_zeros((), dtype=torch.long) if believed is None else believed
            believed = before + update.trusted
        self.counted = noted + 1, believed

    def kfac_steps(self) -> tuple[int, str | None]:
        """Return how many steps had no sub-batch gradients, and why the last was one of them, if it was."""
        noted, believed = self.counted
        count = noted - (0 if believed is None else int(believed))
        if count == 0 or self.last is None or not self.last.reason:
            return count, None
        trusted = self.last.trusted
        return count, self.last.reason if trusted is None or not bool(trusted) else None


class Bindings:
    """The modules behind an optimizer's parameters.

    Attributes:
        choices: what the user says of single layers.
        batch_size: the number of samples from the arguments of a model, as the user says; None if nothing.
        by_weight: what takes the FOP step.
        names: qualified names of parameters, as far as known.
        reasons: why a parameter takes AdamW, for those that do.
        running: what is known of the running backward pass.
        searching: whether there may be parameters whose modules are not known.
        watches: what is known of the batch in forward passes of every model.
        recogniser: watches functions for weights that no module's class tells about.
        why_unknown: why the path of a parameter without a binding or a reason is not known.
    """

    why_unknown = "known after the first forward pass"

    def __init__(self, choices: LayerChoices, batch_size: BatchSize | None) -> None:
        self.choices, self.batch_size = choices, batch_size
        self.by_weight: dict[Tensor, Binding] = {}
        self.names: dict[Tensor, str] = {}
        self.reasons: dict[Tensor, str] = {}
        self.running = RunningPass()
        # Whether modules were looked for again in this step.
        self.searching, self._followed = True, False
        self.recogniser = Recogniser()
        self._owners: dict[Tensor, list[tuple[weakref.ref[nn.Module], str]]] = {}
        self._roots: list[weakref.ref[nn.Module]] = []
        self.watches: weakref.WeakKeyDictionary[nn.Module, ModelWatch] = weakref.WeakKeyDictionary()
        self._finder: FirstForwardHook | None = None

    def __iter__(self) -> Iterator[Binding]:
        return iter(self.by_weight.values())

    def covered(self) -> set[Tensor]:
        """Return the parameters that belong to a binding."""
        return {param for binding in self for param in binding.params}

    def roots(self) -> Iterator[nn.Module]:
        """Yield the models known and still alive."""
        return (root for ref in self._roots if (root := ref()) is not None)

    def adopt(self, root: nn.Module, groups: Groups, state: State) -> None:
        """Find the layers of these parameters below ``root`` and start to record them.

        ValueError if a module would give its parameter sparse gradients, or its options name a curvature that
        does not fit; no binding has been changed then.
        """
        # What torch.compile or DistributedDataParallel returned is a wrapper; the layers are the model's.
        root = unwrapped(root)
        self.searching = True
        found = find_layers(root, groups.keys(), self.choices)
        if not found.owners:
            return
        for layer in found.layers:
            kind_of(layer.layer)
        if all(known is not root for known in self.roots()):
            self._roots.append(weakref.ref(root))
        names = found.names
        taken = {name for param, name in self.names.items() if param not in names}
        if taken & set(names.values()):
            # Two roots, or submodules called one by one, number their parts alike.
            found.prefix(f"{type(root).__name__}#{len(self._roots)}")
            names = found.names
        for param, owners in found.owners.items():
            self.names.setdefault(param, names[param])
            # A ScriptModule has others in the place of `_parameters` and hooks.
            alive = [each for each in owners if not isinstance(each.module, torch.jit.ScriptModule)]
            self._owners[param] = [(weakref.ref(each.module), each.key) for each in alive]
        for layer in found.layers:
            self._add(layer, root, found.reasons, state)
            if (binding := self.by_weight.get(layer.weight)) is not None:
                binding.schedule(groups[layer.weight])
        for param, reason in found.reasons.items():
            if param in found.watched and param in self.by_weight:
                # Recognised by its functions before.
                continue
            self.reasons[param] = reason
            # A weight that a later root shares: no single recorder sees its whole gradient.
            self._drop(param)
        if found.watched:
            self._watch(root)
        self.recogniser.watch(root, found.watched - self.covered())

    def _add(self, found: FoundLayer, root: nn.Module, reasons: dict[Tensor, str], state: State) -> None:
        binding = self.by_weight.get(found.weight)
        modules = {use.module for use in found.uses}
        if binding is None:
            binding = self._bind(found, state)
        elif binding.layer.matrix_shape != found.layer.matrix_shape or binding.bias is not found.bias:
            known = set(binding.recorder.modules) >= modules
            if found.bias is not None and binding.bias is None and known:
                reasons[found.bias] = "added after the weight of its layer"
            elif not known:
                reasons[found.weight] = (
                    f"shared by {', '.join(dict.fromkeys([*binding.modules, found.name]))}"
                )
            return
        known_modules = set(binding.recorder.modules)
        watch = self._watch(root)
        # A part that was called by itself before its model: the model knows more.
        binding.recorder.belongs_to(watch)
        for use in found.uses:
            if use.module not in known_modules:
                kind = AttentionUse if isinstance(use.module, nn.MultiheadAttention) else ForwardUse
                names = use.slot.weight, use.slot.bias
                binding.recorder.attach(kind(binding.recorder, use.layer, use.module, names, watch))

    def _bind(self, found: FoundLayer, state: State) -> Binding:
        recorder = Recorder(found.layer, found.weight, found.bias, self.running)
        # Not put into the state before it holds something: by an empty one torch.distributed.checkpoint
        # knows that it must be made.
        binding = Binding(found, recorder, state.get(found.weight, {}))
        self.by_weight[found.weight] = binding
        for param in binding.params:
            self.reasons.pop(param, None)
            self.recogniser.waiting.pop(param, None)
        return binding

    def _watch(self, root: nn.Module) -> ModelWatch:
        if root not in self.watches:
            self.watches[root] = ModelWatch(root, self.batch_size)
        return self.watches[root]

    def recognise(
        self, call: FunctionCall, source: Source, module: nn.Module, groups: Groups, state: State
    ) -> bool:
        """Record a call of a function that uses a weight in ``module``; return whether it could be."""
        if (place := self._place_of(source.leaf)) is None:
            return False
        weight, owner, key = place
        binding, waiting = self.by_weight.get(weight), weight in self.recogniser.waiting
        for use in [] if binding is None else binding.recorder.uses:
            if use.module() is module:
                # A module whose own output is the layer's is recorded by its hook.
                return use.sees(call) if type(use) is FunctionUse else True
        root = next((root for root in self.roots() if module in set(root.modules())), None)
        if root is None or (binding is None and not waiting):
            return False
        named = {each: path for path, each in root.named_modules()} if waiting else {}
        path, name = named.get(module, ""), self.names[weight].removesuffix(".weight")
        known = None if binding is None else binding.layer.options
        options = known or self.choices.of((named.get(owner, name), owner), (path, module))
        bias, bias_key = self._bias_of(call, source, owner, binding)
        layer = call.layer(turned=source.turned, bias=bias is not None, options=options)
        if layer is None or options.path == "adamw":
            return False
        if binding is not None and not layer.same_as(binding.layer):
            if not waiting:
                return False
            # Nobody has seen its module run, and the function that uses it has another bias, or none.
            self._drop(weight)
            if binding.bias is not None:
                self.reasons[binding.bias] = f"not the bias of {call.name} in {type(module).__name__}"
            binding = None
        if binding is None:
            kind = f"{call.name}{' of a computed weight' * source.computed} in {type(module).__name__}"
            name = type(owner).__name__ if name == "weight" else name
            uses = (Use(path, module, Slot(key, bias_key, lambda *_: layer), layer),)
            binding = self._bind(FoundLayer(name, kind, layer, weight, bias, uses), state)
            binding.schedule(groups[weight])
        added = FunctionUse(binding.recorder, layer, module, (key, bias_key), self._watch(root), owner)
        binding.recorder.attach(added)
        if binding.recorder.sharded:
            added.follow_shards(binding.recorder, owner)
        return added.sees(call)

    def _place_of(self, leaf: Tensor) -> tuple[nn.Parameter, nn.Module, str] | None:
        """Return the parameter that a leaf is, or stands for (FSDP), its owner, and its name there.

        None if the owner has another tensor there, as under torch.func.
        """
        places = {leaf: self._owners[leaf]} if leaf in self._owners else self._owners
        for param, owners in places.items():
            for ref, key in owners:
                owner = ref()
                if owner is not None and isinstance(param, nn.Parameter) and parameter_of(owner, key) is leaf:
                    return param, owner, key
        return None

    def _bias_of(
        self, call: FunctionCall, source: Source, owner: nn.Module, binding: Binding | None
    ) -> tuple[nn.Parameter | None, str | None]:
        """Return the bias of a call, and its name, if it belongs to the weight's layer and its owner."""
        given = None if source.computed else source_of(call.given.get("bias"))
        place = None if given is None or given.computed or given.turned else self._place_of(given.leaf)
        if place is None or place[1] is not owner or len(self._owners[place[0]]) > 1:
            return None, None
        bias, _, key = place
        free = bias not in self.covered() if binding is None else bias is binding.bias
        return (bias, key) if free and bias.dim() == 1 else (None, None)

    def settle(self) -> None:
        """Note at a step what takes AdamW; look for functions in place of modules that did not run."""
        unseen = [each for each in self if each.by_adamw and not each.recorder.samples]
        for weight in self.by_weight.keys() - {each.weight for each in unseen}:
            self.recogniser.waiting.pop(weight, None)
        # After a change it begins to look with the next pass.
        settled, self._followed = {} if self._followed else self.recogniser.settle(self.names), False
        for param in settled.keys() & self.reasons.keys():
            self.reasons[param] = f"{self.reasons[param]}; {settled[param]}"
        if new := [each for each in unseen if not each.looked_for]:
            for each in new:
                each.looked_for = True
            for root in self.roots():
                self.recogniser.watch(root, [each.weight for each in new])

    def _drop(self, param: Tensor) -> None:
        binding = self.by_weight.pop(param, None)
        if binding is not None:
            binding.recorder.detach()

    def enter(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any] | None:
        """Begin a forward pass of a model that was adopted in it, too late for a hook of its own."""
        watch = self.watches.get(unwrapped(root))
        # Where torch.compile traces the call, it also runs the new hook.
        if watch is not None and not runs_compiled():
            watch.enter(root, args, kwargs)
        return self.recogniser.enter(root, args, kwargs)

    def current(self) -> set[Tensor]:
        """Return what modules have now in the place of the parameters that were found in them."""
        return {now for param in self._owners for now in self._current(param)}

    def release(self, why: str) -> None:
        """Take every hook away for good; ``why`` is told of all parameters."""
        for weight in list(self.by_weight):
            self._drop(weight)
        if self._finder is not None:
            self._finder.remove()
            self._finder = None
        self.watches.clear()
        self.recogniser.close()
        self._owners.clear()
        self._roots.clear()
        self.reasons.clear()
        self.searching, self.why_unknown = False, why

    def give_up(self, params: list[Tensor]) -> None:
        """Look no longer for the owners of parameters that have a gradient, if any model was run for it."""
        if self._finder is None or not self._finder.used:
            return
        known, why = self.reasons.keys() | self.covered(), "belongs to no module that was called"
        new = {param: why for param in params if param not in known}
        self.reasons |= new
        warn_of_unseen({param: why for param in new if may_be_weight(param)}, self.names)

    def listen(self, params: Iterable[Tensor], seen: Seen) -> None:
        """Show every model that runs to ``seen``, for as long as a parameter's owner is not known."""
        known = self.reasons.keys() | self.covered()
        self.searching = any(param not in known for param in params)
        if self.searching and self._finder is None:
            self._finder = FirstForwardHook(seen)
            weakref.finalize(self, self._finder.remove)
        elif not self.searching:
            self.choices.warn_of_unmatched()
            if self._finder is not None:
                self._finder.remove()
                self._finder = None

    def follow(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """Catch up with what was replaced since the last step; return new parameters by the old ones.

        ValueError if one was replaced by one of another shape; nothing has been changed then.
        """
        for root, watch in self.watches.items():
            if not all(in_place(handle) for handle in watch.handles):
                # Somebody has cleared hooks of the model.
                watch.register(root)
        current = {
            param: [None if (at := ref()) is None else at._parameters.get(key) for ref, key in owners]
            for param, owners in self._owners.items()
        }
        # FSDP leaves a model unsharded that was evaluated last.
        changed = [
            param
            for param, all_now in current.items()
            if not all(now is param or stands_for(now, param) for now in all_now)
        ]
        broken = [weight for weight, binding in self.by_weight.items() if self._lost(binding)]
        if not (changed or broken):
            return {}
        self.searching = True
        replaced = self._replaced(changed, groups)
        for old, new in replaced.items():
            # An empty one would pass for that of a step that was taken.
            if old in state:
                state[new] = state.pop(old)
            if old in self.names:
                self.names[new] = self.names[old]
        for param in changed:
            self._owners.pop(param, None)
        for param in replaced:
            self.names.pop(param, None)
            self.reasons.pop(param, None)
        for weight in {*broken, *replaced, *(each.weight for each in self if each.bias in replaced)}:
            self._drop(weight)
        retrace()
        renamed = {replaced.get(param, param): group for param, group in groups.items()}
        for root in list(self.roots()):
            self.adopt(root, renamed, state)
        self._followed = True
        for param in changed:
            if param in groups and param not in replaced and param not in self._owners:
                self.reasons[param] = "belongs to no module any more"
                self._drop(param)
        return replaced

    def _lost(self, binding: Binding) -> bool:
        """Return whether the modules of a weight must be looked for again."""
        recorder, weight = binding.recorder, binding.weight
        for use in recorder.uses:
            module = use.module()
            if module is None or not (use.uses(weight, module) and all(map(in_place, use.handles))):
                return True
        seen = recorder.samples > 0 or weight.grad is None or not recorder.wants
        was_seen, binding.seen = binding.seen, seen
        if seen or not was_seen:
            return False
        # It has a gradient that, unlike the one before, its modules know nothing of: another module may have
        # the weight now, and the old one be kept by somebody.
        modules = (module for root in self.roots() for module in root.modules())
        have = {module for module in modules if any(p is weight for p in module._parameters.values())}
        return not have <= {ref() for ref, _ in self._owners.get(weight, ())}

    def _current(self, param: Tensor) -> list[Tensor]:
        """Return what the parameter's modules have now under its names, each tensor once."""
        alive = ((module, key) for ref, key in self._owners[param] if (module := ref()) is not None)
        found = {id(now): now for module, key in alive if (now := module._parameters.get(key)) is not None}
        return list(found.values())

    def _replaced(self, changed: list[Tensor], groups: Groups) -> dict[Tensor, Tensor]:
        replaced: dict[Tensor, Tensor] = {}
        for old in changed:
            current = self._current(old)
            if not current or any(new is old or new in groups for new in current):
                continue
            if any(param is old for root in self.roots() for param in root.parameters()):
                continue
            name = self.names.get(old, "a parameter")
            if len(current) > 1:
                raise ValueError(
                    f"{name} was shared by several modules, and they have different parameters now; share it "
                    "again, or make the optimizer after changing the model"
                )
            if current[0].shape != old.shape:
                raise ValueError(
                    f"{name} {tuple(old.shape)} was replaced by one of shape {tuple(current[0].shape)}; make "
                    "the optimizer after changing the model"
                )
            replaced[old] = current[0]
        return replaced
