"""Steps as long as the weights, where ranks have all of a weight and where they have shards."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from trajectories import EVERYTHING, Run, Training

# And a matrix of AdamW's, whose rate goes by its size.
PATHS: dict[Any, Any] = {nn.LayerNorm: {"path": "fop"}, nn.GroupNorm: {"path": "fop"}}
PATHS["down"] = {"path": "adamw"}
OPTIONS: dict[str, Any] = {
    "step_length": "weight",
    "damping_kind": "relative",
    "nesterov": True,
    "lr": 0.1,
    "kl_clip": None,
    "weight_decay": 0.0,
    "layer_options": PATHS,
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "lean": ("ddp", {"distributed": {"mode": "lean"}}),
    "fsdp": ("fsdp", {}),
}
STEPS = 8


def whole(param: Tensor) -> Tensor:
    full: Tensor = getattr(param, "full_tensor", lambda: param)()
    return full.detach().clone()


def lengths(rank: int, **more: Any) -> dict[str, tuple[dict[str, Tensor], dict[str, float], list[float]]]:
    """Of every way, the parameters after some steps, how far each moved last, by its norm, and reaches."""
    found = {}
    for name, (wrap, options) in WAYS.items():
        training = Training(EVERYTHING, {**OPTIONS, **more, **options}, wrap=wrap, ranks=2)
        run = Run(training, rank)
        # A weight without norm, too.
        with torch.no_grad():
            next(p for key, p in run.inner.named_parameters() if key.endswith("head.weight")).zero_()
        for step in range(STEPS):
            before = {key: whole(p) for key, p in run.inner.named_parameters()}
            samples = 8 if more.get("loss_reduction") == "sum" and step % 2 else 4
            run.optimizer.zero_grad()
            factor = samples if more.get("loss_reduction") == "sum" else 1
            (factor * run.loss(run.batch(step, 0, samples))).backward()
            run.optimizer.step()
        after = {key: whole(p) for key, p in run.inner.named_parameters()}
        moved = {key: float((after[key] - old).norm() / old.norm()) for key, old in before.items()}
        reaches = [float(state["reach"][1]) for state in run.optimizer.state.values() if "reach" in state]
        found[name] = after, moved, reaches
    return found


@pytest.mark.slow
def test_shards_are_measured_together() -> None:
    one, other = run_ranks(lengths, 2)
    expected, moved, _ = one["ddp"]
    # It is still shorter than what stood for its norm; the other is AdamW's.
    grown = {"head.weight", "down.weight"}
    assert all(0 < far <= 0.1 + 1e-9 for key, far in moved.items() if "weight" in key and key not in grown)
    assert moved["head.weight"] > 0.1
    for results in (one, other):
        for way in WAYS:
            for key, value in results[way][0].items():
                torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_that_go_too_far_are_seen_by_all(reduction: str) -> None:
    one, other = run_ranks(partial(lengths, lr=4.0, momentum=0.9, loss_reduction=reduction), 2)
    expected, _, reaches = one["ddp"]
    assert min(reaches) < 1
    for results in (one, other):
        for way in WAYS:
            assert results[way][2] == pytest.approx(reaches)
            for key, value in results[way][0].items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
