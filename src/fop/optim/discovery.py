"""From a module tree to what each parameter's step will be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fop.layers import Layer, describe


@dataclass(frozen=True)
class FoundLayer:
    """A module whose weight (and bias) can take the FOP step."""

    name: str
    module: nn.Module
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass
class Found:
    """Result of looking through a module tree.

    Attributes:
        layers: the Kronecker-factored layers.
        names: qualified name of every wanted parameter that was met.
        reasons: why a parameter takes AdamW, for those that do.
    """

    layers: list[FoundLayer] = field(default_factory=list)
    names: dict[Tensor, str] = field(default_factory=dict)
    reasons: dict[Tensor, str] = field(default_factory=dict)

    def prefix(self, root: str) -> None:
        """Put the name of the root before all names."""
        self.names = {param: f"{root}.{name}" for param, name in self.names.items()}
        self.layers = [replace(layer, name=f"{root}.{layer.name}") for layer in self.layers]


def find_layers(root: nn.Module, wanted: Collection[Tensor]) -> Found:
    """Look through ``root`` for the owners of the wanted parameters.

    Raises:
        ValueError: if a module would give its parameter sparse gradients.
    """
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for name, module in root.named_modules():
        for key, param in module._parameters.items():
            if param is not None and param in wanted:
                owners.setdefault(param, []).append((name, module, key))

    found = Found()
    for param, places in owners.items():
        name, module, key = places[0]
        found.names[param] = f"{name}.{key}" if name else key
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"{name or type(module).__name__} has sparse=True, and sparse gradients are not supported; "
                "make it with sparse=False or give its parameters to torch.optim.SparseAdam"
            )
        if len(places) > 1:
            modules = ", ".join(place or type(owner).__name__ for place, owner, _ in places)
            found.reasons[param] = f"shared by {modules}"

    for weight, places in owners.items():
        name, module, key = places[0]
        if weight in found.reasons or key != "weight":
            continue
        bias = module._parameters.get("bias")
        owned = bias if bias is not None and bias in owners and bias not in found.reasons else None
        layer = describe(module, bias=owned is not None)
        if isinstance(layer, str):
            found.reasons[weight] = layer
        elif isinstance(weight, nn.Parameter):
            found.layers.append(FoundLayer(name or type(module).__name__, module, layer, weight, owned))

    covered = {param for layer in found.layers for param in (layer.weight, layer.bias)}
    for param, places in owners.items():
        if param not in covered and param not in found.reasons:
            _, module, key = places[0]
            layer = describe(module, bias=False)
            found.reasons[param] = (
                layer if isinstance(layer, str) else f"without the weight of its {type(module).__name__}"
            )
    return found
