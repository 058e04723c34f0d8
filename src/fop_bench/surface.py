"""The loss around a point of a training, and the steps from there: the picture of the paper's Figure 1.

Parameters on the AdamW path stay: what is seen is what the correction changes.
Shapes: N batch, P all parameters in one row (float64), M points along each side of the grid.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from fop import FOP, KFAC
from fop_bench.environment import environment
from fop_bench.recipe_runs import Description
from fop_bench.recipes import recipe
from fop_bench.tables import markdown_table
from fop_bench.training import messages

# In the order of the legend: what each step was made from.
STEPS = {
    "first": "K-FAC on the gradient of the first half, g1",
    "second": "K-FAC on the gradient of the second half, g2",
    "average": "K-FAC on the whole batch, (g1 + g2)/2",
    "fop": "FOP on the pair g1, g2",
    "fop_rows": "FOP as in training, halves by layer rows",
}
PARTS = ("whole", "first", "second")
Losses = dict[str, float | None]
MARGIN = 0.35  # of the side that holds all steps, free on each side of it
# What makes a step nothing but lr·update: no memory of earlier ones, no clip, no AdamW.
BARE: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None, "adamw_lr": 0.0}
BARE |= {"step_length": "paper"}  # as in recipes


@dataclass(frozen=True)
class Point:
    """A network, the state dict of the FOP that trained it with ``options``, and a batch of even length."""

    model: nn.Module
    state: Mapping[str, Any]
    options: Mapping[str, Any]
    inputs: Tensor
    targets: Tensor
    loss: Callable[..., Tensor] = cross_entropy

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean losses of `PARTS`; the model's mode and running averages change."""
        # Surface and steps belong to one function of the weights: BatchNorm takes its statistics from the
        # whole batch, and dropout is off.
        model.eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        each = self.loss(model(self.inputs), self.targets, reduction="none")
        # FOP's own sub-batches, so that both pairs of FOP are of the same halves.
        first = torch.ones(len(each), dtype=torch.bool, device=each.device)
        first[len(each) // 4 : len(each) // 4 + len(each) // 2] = False
        return dict(zip(PARTS, (each.mean(), each[first].mean(), each[~first].mean()), strict=True))


def single_step(point: Point, name: str) -> tuple[Tensor, FOP]:
    """Take one step of `STEPS` on copies, the curvature as it is; return it, (P,), and its optimizer.

    The pair of "fop" is the gradients of the halves' losses; that of "fop_rows" each layer's gradient summed
    over its rows of either half. They are the same unless BatchNorm ties samples together.
    """
    model, kind = deepcopy(point.model), FOP if name in ("fop", "fop_rows") else KFAC
    optimizer = kind(model, **{**point.options, **BARE})
    # Its step 0, for which the state has a curvature already.
    fresh = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": point.state["state"], "param_groups": fresh})
    if name == "fop":
        for index, part in enumerate(PARTS[1:]):
            with optimizer.sub_batch(index):
                (point.losses(model)[part] / 2).backward()
    else:
        point.losses(model)[name if name in PARTS else "whole"].backward()
    optimizer.step()
    return flat(model.parameters()) - flat(point.model.parameters()), optimizer


# --- The plane


def flat(tensors: Any) -> Tensor:
    """Return tensors of any shapes as one row (P,) of float64."""
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def filter_normalised(direction: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Scale every filter of a direction (P,), a bias being one, to its norm in the weights; 0 stays 0."""
    scaled = []
    for part, weight in zip(direction.split([w.numel() for w in weights]), weights, strict=True):
        filters = weight.detach().double().reshape(len(weight) if weight.dim() > 1 else 1, -1)
        units = normalize(part.view_as(filters), dim=1, eps=1e-300)
        scaled.append((units * filters.norm(dim=1, keepdim=True)).reshape(-1))
    return torch.cat(scaled)


def axes(weights: Sequence[Tensor], along_u: Tensor, along_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return two filter-normalised directions (Li et al. 2018), (P,) each, orthogonal and of one length.

    The second loses its component along the first. Raises ValueError if they span no plane.
    """
    u, v = filter_normalised(along_u, weights), filter_normalised(along_v, weights)
    v = v - (u @ v) / (u @ u) * u
    if not v.norm() > 1e-6 * u.norm() > 0:
        raise ValueError("the steps span no plane; take another --batch or --seed, or a smaller --lr")
    return u, v * (u.norm() / v.norm())


def picture_of(point: Point, points: int) -> dict[str, Any]:
    """Take the steps of `STEPS` from a point and measure the loss on their plane; the point stays."""
    weights = list(point.model.parameters())
    steps = {name: single_step(point, name)[0] for name in STEPS}
    u, v = axes(weights, steps["average"], steps["first"] - steps["second"])
    model, here = deepcopy(point.model), flat(weights)

    @torch.no_grad()
    def losses(step: Tensor) -> Losses:
        nn.utils.vector_to_parameters((here + step).to(weights[0].dtype), model.parameters())
        found = {part: loss.item() for part, loss in point.losses(model).items()}
        return {part: float(f"{loss:.6g}") if math.isfinite(loss) else None for part, loss in found.items()}

    shown: dict[str, Any] = {}
    for name, step in steps.items():
        x, y = (float(axis @ step / (u @ u)) for axis in (u, v))  # least squares
        share = float((x * u + y * v).norm() / step.norm().clamp(min=1e-300))
        shown[name] = {"what": STEPS[name], "x": x, "y": y, "share_in_plane": share}
        shown[name] |= {"norm": step.norm().item(), "losses_at_end": losses(step)}
    places = torch.tensor([(0.0, 0.0), *((each["x"], each["y"]) for each in shown.values())]).double()
    low, high = places.aminmax(dim=0)
    reach = torch.linspace(-1.0, 1.0, points).double() * (high - low).max() * (0.5 + MARGIN)
    x, y = ((middle + reach).tolist() for middle in (low + high) / 2)
    rows = [[losses(at_x * u + at_y * v) for at_x in x] for at_y in y]
    return {
        **{"origin": losses(torch.zeros_like(u)), "steps": shown, "x": x, "y": y},
        "losses": {part: [[cell[part] for cell in row] for row in rows] for part in PARTS},
    }


# --- The record


def surface(asked: Namespace) -> dict[str, Any]:
    """Train to the point, take the steps, measure the loss on the plane; return all that the plot needs."""
    if asked.batch_size % 2:
        raise ValueError(f"batch size {asked.batch_size} has no halves; give an even one")
    if asked.points < 2:
        raise ValueError(f"--grid {asked.points} is no plane; give 2 or more points along each side")
    task, options = next(iter(recipe(asked.recipe).tasks)), {"lr": asked.lr, "damping": asked.damping}
    what = asked.recipe, task, "comparison", "final", "fop", options
    run_of_fop = Description(*what, asked.batch_size, asked.epochs, asked.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training, record = run_of_fop.begin(asked.data, asked.device)
        training.run()
        run = record([])
        if run["diverged"]:
            epoch = len(run["curve"]) + 1
            raise ValueError(f"diverged in epoch {epoch}; give a smaller --lr, or a larger --damping")
        draw = torch.Generator().manual_seed(asked.seed)
        numbers = torch.randperm(training.samples, generator=draw)[: asked.batch_size].to(asked.device)
        state = training.optimizer.state_dict()
        point = Point(training.model, state, run["all_options"], *training.batch(numbers))
        picture = picture_of(point, asked.points)
    found = {**run, **options, "points": asked.points, **picture, "warnings": messages(caught)}
    return found | {"environment": environment(asked.device)}


def surface_table(record: Mapping[str, Any]) -> str:
    """Lay out the losses of the batch and its halves at the point and after every step."""

    def row(what: str, losses: Losses) -> list[str]:
        each = (losses[part] for part in PARTS)
        return [what, *("not finite" if loss is None else f"{loss:.4f}" for loss in each)]

    head = [f"learning rate {record['lr']:g}", "loss of the batch", "of its first half", "of its second half"]
    steps = record["steps"].values()
    ends = [row(f"after {step['what']}", step["losses_at_end"]) for step in steps]
    return markdown_table(head, [row("at the point", record["origin"]), *ends])
