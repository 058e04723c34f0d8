"""An extension of griffe: the API page shows an option's default, and not where the source keeps it."""

from __future__ import annotations

import ast
from typing import Any

import griffe

from fop.options import DEFAULTS


class Defaults(griffe.Extension):
    """Replaces ``DEFAULTS["lr"]`` in signatures by its value."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Look at every parameter of a function."""
        for parameter in func.parameters:
            text = str(parameter.default or "")
            if text.startswith("DEFAULTS["):
                parameter.default = repr(DEFAULTS[ast.literal_eval(text[len("DEFAULTS[") : -1])])
