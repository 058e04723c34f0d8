"""Which module each parameter belongs to, kept true while models are changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from fop.capture import (
    AttentionUse,
    FirstForwardHook,
    ForwardUse,
    LayerCapture,
    ModelWatch,
    Seen,
    SubBatch,
    stands_for,
    trace_anew,
)
from fop.optim.block import Block
from fop.optim.discovery import FoundLayer, Owner, find_layers
from fop.optim.layer_options import LayerChoices
from fop.optim.wrapping import unwrapped

Groups = Mapping[Tensor, Mapping[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]


class Tracker:
    """The modules behind an optimizer's parameters.

    Args:
        choices: what the user says of single layers.

    Attributes:
        blocks: by weight, what takes the FOP step.
        names: qualified names of parameters, as far as known.
        reasons: why a parameter takes AdamW, for those that do.
        sub_batch: what the user says of running backward passes.
    """

    def __init__(self, choices: LayerChoices) -> None:
        self.choices = choices
        self.blocks: dict[Tensor, Block] = {}
        self.names: dict[Tensor, str] = {}
        self.reasons: dict[Tensor, str] = {}
        self.sub_batch = SubBatch()
        self._owners: dict[Tensor, list[tuple[weakref.ref[nn.Module], str]]] = {}
        self._roots: list[weakref.ref[nn.Module]] = []
        self._watches: weakref.WeakKeyDictionary[nn.Module, ModelWatch] = weakref.WeakKeyDictionary()
        self._finder: FirstForwardHook | None = None

    def covered(self) -> set[Tensor]:
        """Return the parameters that belong to a block."""
        return {param for block in self.blocks.values() for param in block.params}

    def roots(self) -> Iterator[nn.Module]:
        """Yield the models known and still alive."""
        return (root for ref in self._roots if (root := ref()) is not None)

    def adopt(self, root: nn.Module, groups: Groups, state: State) -> None:
        """Find the layers of these parameters below ``root`` and start to watch them.

        Raises:
            ValueError: if a module would give its parameter sparse gradients; nothing has been changed then.
        """
        # What torch.compile or DistributedDataParallel returned is a wrapper; the layers are the model's.
        root = unwrapped(root)
        found = find_layers(root, groups.keys(), self.choices)
        if not found.owners:
            return
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
            self._remember(param, owners)
        for layer in found.layers:
            self._add(layer, root, found.reasons, state)
            if (block := self.blocks.get(layer.weight)) is not None:
                block.schedule(groups[layer.weight])
        for param, reason in found.reasons.items():
            self.reasons[param] = reason
            # A weight that a later root shares: no single capture sees its whole gradient.
            self._drop(param)

    def _remember(self, param: Tensor, owners: list[Owner]) -> None:
        self._owners[param] = [(weakref.ref(owner.module), owner.key) for owner in owners]

    def _add(self, found: FoundLayer, root: nn.Module, reasons: dict[Tensor, str], state: State) -> None:
        block = self.blocks.get(found.weight)
        if block is None:
            capture = LayerCapture(found.layer, found.weight, found.bias, self.sub_batch)
            # Not put into the state before it holds something: by an empty one torch.distributed.checkpoint
            # knows that it must be made.
            block = Block(found, capture, state.get(found.weight, {}))
            self.blocks[found.weight] = block
            for param in block.params:
                self.reasons.pop(param, None)
        elif block.layer.matrix_shape != found.layer.matrix_shape or block.bias is not found.bias:
            if (
                found.bias is not None
                and block.bias is None
                and set(block.capture.modules) >= _modules(found)
            ):
                reasons[found.bias] = "added after the weight of its layer"
            elif not set(block.capture.modules) >= _modules(found):
                reasons[found.weight] = f"shared by {', '.join(dict.fromkeys([*block.modules, found.name]))}"
            return
        known = set(block.capture.modules)
        if root not in self._watches:
            self._watches[root] = ModelWatch(root)
        # A part that was called by itself before its model: the model knows more.
        block.capture.belongs_to(self._watches[root])
        for use in found.uses:
            if use.module not in known:
                hook = AttentionUse if isinstance(use.module, nn.MultiheadAttention) else ForwardUse
                names = (use.slot.weight, use.slot.bias)
                block.capture.attach(hook(block.capture, use.layer, use.module, *names, self._watches[root]))

    def _drop(self, param: Tensor) -> None:
        block = self.blocks.pop(param, None)
        if block is not None:
            block.capture.detach()

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a forward pass of a model that was adopted in it, too late for a hook of its own."""
        watch = self._watches.get(unwrapped(root))
        if watch is not None:
            watch.enter(args, kwargs)

    def give_up(self, params: list[Tensor]) -> None:
        """Look no longer for the owners of parameters that have a gradient, if any model was run for it."""
        if self._finder is None or not self._finder.used:
            return
        covered = self.covered()
        for param in params:
            if param not in covered:
                self.reasons.setdefault(param, "belongs to no module that was called")

    def listen(self, params: list[Tensor], seen: Seen) -> None:
        """Watch forward passes for as long as a parameter's owner is not known.

        Args:
            params: all parameters.
            seen: bound method, called with each model that is run and its arguments; held by weak reference.
        """
        known = self.reasons.keys() | self.covered()
        unknown = any(param not in known for param in params)
        if unknown and self._finder is None:
            self._finder = FirstForwardHook(seen)
            weakref.finalize(self, self._finder.remove)
        elif not unknown:
            self.choices.warn_of_unmatched()
            if self._finder is not None:
                self._finder.remove()
                self._finder = None

    def follow(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """Look for parameters and hooks that were replaced since the last step, and catch up.

        Returns:
            New parameters by the old ones that they replace.

        Raises:
            ValueError: a parameter was replaced by one of another shape; nothing has been changed then.
        """
        for root in self.roots():
            if (watch := self._watches.get(root)) is not None:
                watch.repair(root)
        changed = [param for param in self._owners if not self._as_found(param)]
        broken = [weight for weight, block in self.blocks.items() if self._lost(block)]
        if not (changed or broken):
            return {}
        replaced = self._replaced(changed, groups)
        for old, new in replaced.items():
            state[new] = state.pop(old, {})
            if old in self.names:
                self.names[new] = self.names[old]
        for param in changed:
            self._owners.pop(param, None)
        for param in replaced:
            self.names.pop(param, None)
            self.reasons.pop(param, None)
        for weight in {*broken, *replaced}:
            self._drop(weight)
        trace_anew()
        renamed = {replaced.get(param, param): group for param, group in groups.items()}
        for root in list(self.roots()):
            self.adopt(root, renamed, state)
        for param in changed:
            if param in groups and param not in replaced and param not in self._owners:
                self.reasons[param] = "belongs to no module any more"
                self._drop(param)
        return replaced

    def _lost(self, block: Block) -> bool:
        """Tell whether the modules of a block must be looked for again."""
        if not block.capture.intact:
            return True
        if not block.newly_unseen():
            return False
        # Another module may have the weight now, and the old one be kept by somebody.
        modules = (module for root in self.roots() for module in root.modules())
        have = {module for module in modules if any(p is block.weight for p in module._parameters.values())}
        return not have <= {ref() for ref, _ in self._owners.get(block.weight, ())}

    def _as_found(self, param: Tensor) -> bool:
        """Tell whether all modules that had a parameter have it still."""
        owners = ((ref(), key) for ref, key in self._owners[param])
        # FSDP leaves a model unsharded that was evaluated last.
        return all(
            module is not None and stands_for(module._parameters.get(key), param) for module, key in owners
        )

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


def _modules(found: FoundLayer) -> set[nn.Module]:
    return {use.module for use in found.uses}
