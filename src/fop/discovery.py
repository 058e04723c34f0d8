"""From a module tree to what each parameter's step will be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fop.capture import parameter_of
from fop.layer_options import LayerChoices
from fop.layers import EXCLUDED, EmbeddingLayer, Layer, LayerOptions, Slot, Unfit, describe


@dataclass(frozen=True)
class Use:
    """One module that uses a weight: its name, the slot of the weight, how it sees the weight."""

    name: str
    module: nn.Module
    slot: Slot
    layer: Layer


@dataclass(frozen=True)
class Place:
    """One module with a slot for a weight, before it is known who shares it."""

    name: str
    module: nn.Module
    slot: Slot
    options: LayerOptions

    def use(self, bias: bool, tied: bool, sides: LayerOptions) -> Use:
        """Return how this module sees the weight; ``sides`` has the options on sides of all that use it."""
        own = self.options
        options = replace(own, max_factor_dim=sides.max_factor_dim, block_dim=sides.block_dim)
        tie = self.slot.tied if tied else None
        layer = self.slot.build(bias, options) if tie is None else tie(options)
        return Use(self.name, self.module, self.slot, layer)


@dataclass(frozen=True)
class FoundLayer:
    """A weight (and bias) that can take the FOP step, with every module that uses it; ``kind`` says how."""

    name: str
    kind: str
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Owner:
    """Where a parameter is: the qualified name of a module, the module, the module's name for it."""

    module_name: str
    module: nn.Module
    key: str

    @property
    def name(self) -> str:
        """Qualified name of the parameter."""
        return f"{self.module_name}.{self.key}" if self.module_name else self.key


@dataclass
class Found:
    """Layers that can take the FOP step, every place of wanted parameters, and why others take AdamW."""

    layers: list[FoundLayer] = field(default_factory=list)
    owners: dict[Tensor, list[Owner]] = field(default_factory=dict)
    reasons: dict[Tensor, str] = field(default_factory=dict)
    # Parameters of these reasons that may be the weights of functions.
    watched: set[Tensor] = field(default_factory=set)

    @property
    def names(self) -> dict[Tensor, str]:
        """Qualified name of every wanted parameter that was met."""
        return {param: owners[0].name for param, owners in self.owners.items()}

    def prefix(self, root: str) -> None:
        """Put the name of the root before all names."""
        for param, owners in self.owners.items():
            self.owners[param] = [
                replace(owner, module_name=f"{root}.{owner.module_name}".rstrip(".")) for owner in owners
            ]
        self.layers = [replace(layer, name=f"{root}.{layer.name}") for layer in self.layers]


def find_layers(root: nn.Module, wanted: Collection[Tensor], choices: LayerChoices) -> Found:
    """Look through ``root`` for the owners of the wanted parameters; ValueError for sparse gradients."""
    found = Found()
    slots: dict[Tensor, list[Place]] = {}
    why: dict[nn.Module, Unfit] = {}
    claimed: set[nn.Module] = set()
    for name, module in root.named_modules():
        mine = [(key, param) for key, param in module._parameters.items() if param is not None]
        for key, param in mine:
            if param in wanted:
                found.owners.setdefault(param, []).append(Owner(name, module, key))
                _refuse_sparse(module, name)
        if module in claimed or not (mine or isinstance(module, nn.MultiheadAttention)):
            continue
        options = choices.of((name, module))
        described = describe(module, options)
        # The output projection of attention is a module of its own, but never called.
        parts = [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []
        claimed.update(parts)
        if isinstance(described, Unfit):
            why |= dict.fromkeys([module, *parts], described)
            continue
        for slot in described:
            path = slot.weight.rpartition(".")[0]
            owner = module.get_submodule(path)
            own = choices.of((name, module), (f"{name}.{path}".lstrip("."), owner)) if path else options
            weight = parameter_of(module, slot.weight)
            if own.path == "adamw":
                why[owner] = Unfit(EXCLUDED)
            elif weight in wanted and isinstance(weight, nn.Parameter):
                slots.setdefault(weight, []).append(Place(name, module, slot, own))

    for weight, places in slots.items():
        reason = _join(found, weight, places)
        if reason is not None:
            found.reasons[weight] = reason
    covered = {param for layer in found.layers for param in (layer.weight, layer.bias)}
    for param, owners in found.owners.items():
        if param not in covered and param not in found.reasons:
            found.reasons[param] = _reason(owners, slots, why)
    unfit = {param: [why.get(owner.module) for owner in found.owners[param]] for param in found.reasons}
    found.watched = {
        param
        for param, each in unfit.items()
        if may_be_weight(param) and all(one is not None and one.watched for one in each)
    }
    return found


def may_be_weight(param: Tensor) -> bool:
    """Return whether a parameter may be the weight of a function."""
    return param.dim() > 1 and param.is_floating_point()


def _join(found: Found, weight: Tensor, places: list[Place]) -> str | None:
    """Add the layer of a weight to ``found``, or return why it cannot be one."""
    if not weight.is_floating_point():
        return f"its dtype is {weight.dtype}"
    # An attention module uses what its submodule owns: one place for both.
    split = [(place.module, place.slot.weight.rpartition(".")) for place in places]
    seen = {(module.get_submodule(path), key) for module, (path, _, key) in split}
    others = [owner for owner in found.owners[weight] if (owner.module, owner.key) not in seen]
    if others:
        return f"shared with {', '.join(owner.name for owner in others)}, which takes no FOP step"
    # One block has one pair of factors.
    sides = LayerOptions(
        max_factor_dim=min(place.options.max_factor_dim for place in places),
        block_dim=min(place.options.block_dim for place in places),
    )
    biases = {parameter_of(place.module, place.slot.bias) if place.slot.bias else None for place in places}
    bias = biases.pop() if len(biases) == 1 else None
    alone = bias is not None and bias in found.owners and len(found.owners[bias]) == len(places)
    tied = 0 < sum(place.slot.tied is not None for place in places) < len(places)
    uses = tuple(place.use(alone, tied, sides) for place in places)
    kinds = {
        (type(use.layer), use.layer.transposed) for use in uses if not (tied and use.slot.tied is not None)
    }
    if len(kinds) > 1 or len({use.layer.matrix_shape for use in uses}) > 1:
        return f"shared by {', '.join(use.name for use in uses)}, whose curvatures do not fit together"
    main = next(use for use in uses if not isinstance(use.layer, EmbeddingLayer) or not tied)
    path, _, last = main.slot.weight.rpartition(".")
    name = ".".join(part for part in (main.name, path) if part) or type(main.module).__name__
    if last not in ("weight", ""):
        name = f"{name}.{last.removesuffix('_weight')}"
    assert isinstance(weight, nn.Parameter)
    found.layers.append(
        FoundLayer(
            name,
            type(main.module).__name__,
            main.layer,
            weight,
            bias if alone and isinstance(bias, nn.Parameter) else None,
            uses,
        )
    )
    return None


def _reason(owners: list[Owner], slots: dict[Tensor, list[Place]], why: dict[nn.Module, Unfit]) -> str:
    """Return why a parameter that belongs to no layer takes AdamW."""
    owner = owners[0]
    if owner.module in why:
        return why[owner.module].reason
    kind = type(owner.module).__name__
    if len(owners) > 1:
        return f"shared by {', '.join(each.module_name or kind for each in owners)}"
    weight = owner.module._parameters.get("weight")
    if owner.key == "bias" and weight is not None:
        if len(slots.get(weight, ())) > 1:
            return "its weight is shared, with other biases"
        return f"without the weight of its {kind}"
    if owner.key == "in_proj_bias":
        return "one bias for three weights"
    return f"{owner.key} of {kind} is no weight of a layer"


def _refuse_sparse(module: nn.Module, name: str) -> None:
    if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(
            f"{name or type(module).__name__} has sparse=True, and sparse gradients are not supported; "
            "make it with sparse=False or give its parameters to torch.optim.SparseAdam"
        )
