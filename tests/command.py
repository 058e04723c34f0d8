"""Calls `fop-bench` in this process, as a shell would."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from fop_bench.cli import main


@dataclass(frozen=True)
class Told:
    """How a command ended, and all that it printed."""

    exit_code: int
    output: str


def invoke(*arguments: str) -> Told:
    """Run a command; an error that it has no message for is raised."""
    printed, code = io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code)
    return Told(code, printed.getvalue())
