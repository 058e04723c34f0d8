"""Choices for single layers, by name or by type."""

from __future__ import annotations

import fnmatch
import numbers
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from fop.curvature import KINDS
from fop.layers import LayerOptions
from fop.torch_internals import outside

# Mappings are invariant in their keys: a variable of the caller's has only one kind of them, or both.
LayerOptionsLike: TypeAlias = (
    Mapping[str, Mapping[str, Any]]
    | Mapping[type[nn.Module], Mapping[str, Any]]
    | Mapping[str | type[nn.Module], Mapping[str, Any]]
)

_LEAST = {"max_factor_dim": 0, "block_dim": 1}
_ALLOWED: dict[str, Collection[Any]] = {
    "path": ("fop", "adamw"),
    "weight_sharing": ("expand", "reduce"),
    "batch_dim": (0, 1),
    "curvature": KINDS.keys(),
}


class LayerChoices:
    """What the user says of single layers; ValueError or TypeError for what is no option.

    ``given`` is from a glob pattern on the module's qualified name, or a module type, to options; later
    entries override earlier ones.
    """

    def __init__(self, given: LayerOptionsLike | None) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"layer_options={given!r} must be a dict from a name pattern or module type to options, such "
                "as {'head': {'path': 'adamw'}}"
            )
        self.given = {} if given is None else {key: _checked(key, value) for key, value in given.items()}
        self._unmatched = set(self.given)

    def of(self, *modules: tuple[str, nn.Module]) -> LayerOptions:
        """Return the options of a module, or of a part of one: what is said of any of these named modules."""
        options = LayerOptions()
        for key, chosen in self.given.items():
            if any(_matches(key, name, module) for name, module in modules):
                self._unmatched.discard(key)
                options = replace(options, **chosen)
        return options

    def warn_of_unmatched(self) -> None:
        """Warn of patterns that no module matches; to be called when all modules are known."""
        for key in self._unmatched:
            warnings.warn(
                f"layer_options: no module matches {_label(key)}; patterns are matched against the names of "
                "model.named_modules(), as by fnmatch",
                UserWarning,
                stacklevel=outside(),
            )
        self._unmatched.clear()


def _checked(key: Any, chosen: Any) -> dict[str, Any]:
    if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
        raise TypeError(f"layer_options: the key {key!r} must be a name pattern or a module type")
    if not isinstance(chosen, Mapping):
        raise TypeError(
            f"layer_options: {_label(key)} must have a dict of options, such as {{'path': 'adamw'}}; "
            f"got {chosen!r}"
        )
    for name, value in chosen.items():
        if name in _LEAST:
            least = _LEAST[name]
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(
                    f"layer_options: {name}={value!r} of {_label(key)} must be a whole number, {least} or "
                    "more"
                )
        elif name not in _ALLOWED:
            known = ", ".join([*_LEAST, *_ALLOWED])
            raise ValueError(
                f"layer_options: unknown option {name!r} of {_label(key)}; the options are {known}"
            )
        elif not any(type(value) is type(each) and value == each for each in _ALLOWED[name]):
            allowed = " or ".join(map(repr, _ALLOWED[name]))
            raise ValueError(f"layer_options: {name}={value!r} of {_label(key)} must be {allowed}")
    return dict(chosen)


def _matches(key: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatch.fnmatchcase(name, key) if isinstance(key, str) else isinstance(module, key)


def _label(key: str | type[nn.Module]) -> str:
    return repr(key) if isinstance(key, str) else key.__name__
