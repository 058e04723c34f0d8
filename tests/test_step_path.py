"""How much of `fop` one training step of a small network runs through; as a script, prints all of it.

`python tests/test_step_path.py` lists files and functions in the order of their first call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import fop
from fop import FOP

SOURCE = Path(fop.__file__).parent
MAX_FILES, MAX_FUNCTIONS = 12, 70


@dataclass(frozen=True)
class StepPath:
    """Calls into `fop`, in order; comprehensions, generator expressions and lambdas are calls, too."""

    calls: list[CodeType]

    @property
    def files(self) -> list[str]:
        """Distinct files, by first call."""
        return list(dict.fromkeys(map(file_of, self.calls)))

    @property
    def functions(self) -> list[CodeType]:
        """Distinct functions and methods, by first call; those without a name of their own do not count."""
        return list(dict.fromkeys(code for code in self.calls if not code.co_name.startswith("<")))

    @property
    def switches(self) -> int:
        """How often a call is in another file than the call before it."""
        return sum(file_of(one) != file_of(other) for one, other in pairwise(self.calls))

    def __str__(self) -> str:
        lines = [f"{len(self.files)} files, {len(self.functions)} functions, {self.switches} switches"]
        lines += [f"  {file}" for file in self.files]
        lines.append("functions by first call:")
        last = ""
        for code in self.functions:
            if file_of(code) != last:
                last = file_of(code)
                lines.append(f"  {last}")
            lines.append(f"    {code.co_firstlineno:4}  {getattr(code, 'co_qualname', code.co_name)}")
        return "\n".join(lines)


def file_of(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(SOURCE))


def follow(action: Callable[[], Any]) -> StepPath:
    """Return the calls into `fop` that an action makes. On the CPU, backward passes run in this thread."""
    calls: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(SOURCE):
            calls.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return StepPath(calls)


def step_path(curvature: bool) -> StepPath:
    """Return the path of a step of Linear-Tanh-Linear, with new statistics and inverses or without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = FOP(model, curvature_interval=100)
    x, y = torch.randn(8, 4), torch.randn(8, 3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    # The first step creates the state; steps without statistics come a few steps later.
    for _ in range(30):
        step()
        if optimizer.curvature_due is curvature:
            return follow(step)
    raise AssertionError(f"no step with curvature_due={curvature} among the first 30")


def test_plain_step_stays_within_its_budget() -> None:
    path = step_path(curvature=False)
    files, functions = len(path.files), len(path.functions)
    assert files <= MAX_FILES and functions <= MAX_FUNCTIONS, str(path)


def test_step_with_statistics_runs_more_than_a_plain_one() -> None:
    """Had the counter missed calls in hooks, or taken the wrong step, the two would not differ."""
    plain, curvature = (step_path(curvature=due) for due in (False, True))
    assert len(curvature.functions) > len(plain.functions) > 20
    assert any("capture" in file for file in plain.files)
    assert plain.functions[0].co_name == "zero_grad"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, due in (("plain step", False), ("step with curvature update", True)):
        print(f"{title}: {step_path(due)}\n")
