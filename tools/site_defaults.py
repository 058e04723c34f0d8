"""An extension of griffe: the API page shows defaults and not where they are kept, and η* as it is meant."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

from fop.options import DEFAULTS


class Defaults(griffe.Extension):
    """Replaces ``DEFAULTS["lr"]`` in signatures by its value, and escapes asterisks that are no emphasis."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Look at every docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?<=[βη])\*", r"\*", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Look at every parameter of a function."""
        for parameter in func.parameters:
            text = str(parameter.default or "")
            if text.startswith("DEFAULTS["):
                parameter.default = repr(DEFAULTS[ast.literal_eval(text[len("DEFAULTS[") : -1])])
