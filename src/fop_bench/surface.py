"""The loss around a point of a training, and the steps from there: the picture of the paper's Figure 1.

Parameters on the AdamW path stay: what is seen is what the correction changes.
Shapes: N batch, P all parameters in one row (float64), M points along each side of the grid.
"""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from fop import FOP, KFAC
from fop_bench.environment import environment
from fop_bench.images import Normaliser, training_inputs
from fop_bench.recipes import Recipe, recipe
from fop_bench.training import Training, by_sub_batch, messages

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
# A backward pass: inside what, over which samples, and by what its mean loss is multiplied.
Pass = tuple[AbstractContextManager[None], slice | Tensor, float]
MARGIN = 0.35  # of the side that holds all steps, free on each side of it
# What makes a step nothing but lr·update: no memory of earlier ones, no clip, no new curvature, no AdamW.
BARE: dict[str, Any] = {
    **{"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "kl_clip": None, "max_grad_norm": None},
    **{"adamw_lr": 0.0, "curvature_interval": 10**9, "inverse_delay": 0, "step_length": "paper"},
}


@dataclass(frozen=True)
class Point:
    """A network in training, the state dict of the FOP that trains it, and that FOP's options."""

    model: nn.Module
    state: Mapping[str, Any]
    options: Mapping[str, Any]


class FixedBatch:
    """Inputs (N, ...) and class numbers (N,), N even, and the losses of a model on them."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        self.halves = by_sub_batch(len(labels)).to(labels.device).chunk(2)

    def losses(self, model: nn.Module) -> Tensor:
        """Return the loss of every sample, (N,); the model's mode and running averages change."""
        # Surface and steps belong to one function of the weights: BatchNorm takes its statistics from the
        # whole batch, and dropout is off.
        model.eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        return cross_entropy(model(self.inputs), self.labels, reduction="none")

    @torch.no_grad()
    def parts(self, model: nn.Module) -> Losses:
        """Return the mean losses of `PARTS`, None for one that is not finite."""
        each = self.losses(model).double()
        parts: tuple[slice | Tensor, ...] = (slice(None), *self.halves)
        means = (each[part].mean().item() for part in parts)
        rounded = (float(f"{mean:.6g}") if math.isfinite(mean) else None for mean in means)
        return dict(zip(PARTS, rounded, strict=True))


class Plane:
    """The plane of the picture, spanned by filter-normalised directions (Li et al. 2018).

    The second one, v (P,), loses its component along the first, u (P,), and gets its length. So 1 along u is
    the norm of every filter; along v as a root mean square. Raises ValueError if they span no plane.
    """

    def __init__(self, weights: Sequence[Tensor], along_u: Tensor, along_v: Tensor) -> None:
        self.u, v = filter_normalised(along_u, weights), filter_normalised(along_v, weights)
        v = v - (self.u @ v) / (self.u @ self.u) * self.u
        if not v.norm() > 1e-6 * self.u.norm() > 0:
            raise ValueError("the steps span no plane; take another --batch or --seed, or a smaller --lr")
        self.v = v * (self.u.norm() / v.norm())

    def place(self, step: Tensor) -> tuple[float, float, float]:
        """Return the least-squares coordinates (x, y) of a step (P,), and how much of its norm they hold."""
        square = self.u @ self.u  # the axes are orthogonal and of one length
        x, y = float(self.u @ step / square), float(self.v @ step / square)
        return x, y, float(self.at(x, y).norm() / step.norm().clamp(min=1e-300))

    def at(self, x: float, y: float) -> Tensor:
        """Return the vector (P,) of coordinates."""
        return x * self.u + y * self.v


def flat(tensors: Sequence[Tensor]) -> Tensor:
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


def grid(places: Sequence[tuple[float, float]], points: int) -> tuple[list[float], list[float]]:
    """Return x and y, M each, of a square window with a margin around all places."""
    lowest, highest = torch.tensor(places, dtype=torch.float64).aminmax(dim=0)
    reach = (highest - lowest).max() * (0.5 + MARGIN)
    steps = torch.linspace(-1.0, 1.0, points, dtype=torch.float64) * reach
    x, y = ((middle + steps).tolist() for middle in (lowest + highest) / 2)
    return x, y


def surface(asked: Namespace) -> dict[str, Any]:
    """Train to the point, take the steps, measure the loss on the plane; return all that the plot needs."""
    plan, device = recipe(asked.recipe), asked.device
    task = next(iter(plan.tasks))
    train, _ = plan.tasks[task].load(asked.data)["final"]
    if asked.batch_size % 2 or asked.batch_size > len(train):
        raise ValueError(
            f"batch size {asked.batch_size} must be even, and from 2 to {len(train)}, all of {task}"
        )
    normalise = Normaliser(train.pixels)
    options = {**_fop_options(plan, asked.batch_size), "lr": asked.lr, "damping": asked.damping}
    draw = torch.Generator(device).manual_seed(asked.seed)

    def batch(numbers: Tensor) -> tuple[Tensor, Tensor]:
        images = train.taken(numbers, device)
        return training_inputs(images.pixels, plan.augmentation, normalise, draw), images.labels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(asked.seed)
        model = plan.network(len(train.classes), device)
        training = Training(
            model,
            FOP(model, **{"step_length": "paper", **options}),
            # A schedule that ended at the point would make its steps 0.
            lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0),
            batch,
            evaluate=lambda: math.nan,  # nobody asks for the accuracy
            samples=len(train),
            batch_size=asked.batch_size,
            epochs=asked.epochs,
            shuffle=torch.Generator().manual_seed(asked.seed),
            bf16=plan.bf16 and device.type == "cuda",
        )
        training.run()
        now = training.progress
        if now.diverged:
            epoch = len(now.curve) + 1
            raise ValueError(f"diverged in epoch {epoch}; give a smaller --lr, or a larger --damping")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(asked.seed))
        chosen = train[order[: asked.batch_size]].to(device)
        point = Point(model, training.optimizer.state_dict(), options)
        picture = picture_of(point, FixedBatch(normalise(chosen.pixels), chosen.labels), asked.points)
    losses = [epoch["train_loss"] for epoch in now.curve]
    return {
        **{key: value for key, value in vars(asked).items() if key not in ("out", "device")},
        **{"task": task, "title": plan.title, "train_samples": len(train)},
        "training": {"options": options, "schedule": "constant", "train_loss": losses},
        **picture,
        "warnings": messages(caught),
        "environment": environment(device),
    }


def _fop_options(plan: Recipe, batch_size: int) -> dict[str, Any]:
    """Return the fixed options of the recipe's first contender that is FOP as in the paper."""
    for study in plan.studies.values():
        for each in study.contenders.values():
            if (each.optimizer, each.formula) == ("fop", "paper"):
                return dict(each.options(batch_size))
    return {}


def picture_of(point: Point, batch: FixedBatch, points: int) -> dict[str, Any]:
    """Take the steps of `STEPS` from a point and measure the loss on their plane; the point stays."""
    weights = list(point.model.parameters())
    steps = {name: single_step(point, batch, name)[0] for name in STEPS}
    plane = Plane(weights, steps["average"], steps["first"] - steps["second"])
    model, here = deepcopy(point.model), flat(weights)

    def losses(vector: Tensor) -> Losses:
        nn.utils.vector_to_parameters((here + vector).to(weights[0].dtype), model.parameters())
        return batch.parts(model)

    shown: dict[str, Any] = {}
    for name, step in steps.items():
        place = dict(zip(("x", "y", "share_in_plane"), plane.place(step), strict=True))
        ends = {"norm": step.norm().item(), "losses_at_end": losses(step)}
        shown[name] = {"what": STEPS[name], **place, **ends}
    x, y = grid([(0.0, 0.0), *((each["x"], each["y"]) for each in shown.values())], points)
    rows = [[losses(plane.at(along_u, along_v)) for along_u in x] for along_v in y]
    return {
        "step_options": {"lr": point.options["lr"], "damping": point.options["damping"], **BARE},
        "origin": losses(torch.zeros_like(plane.u)),
        **{"steps": shown, "x": x, "y": y},
        "losses": {part: [[cell[part] for cell in row] for row in rows] for part in PARTS},
    }


def single_step(point: Point, batch: FixedBatch, name: str, **changes: Any) -> tuple[Tensor, FOP]:
    """Take one step on deep copies; return the change of the parameters (P,) and the optimizer that made it.

    The pair of "fop" is the gradients of the two halves' losses, those of "first" and "second". The pair of
    "fop_rows" is each layer's gradient summed over its rows of either half, as in a training that labels no
    passes. They are the same unless BatchNorm ties samples together. ``changes`` are optimizer options.
    """
    model, kind = deepcopy(point.model), FOP if name in ("fop", "fop_rows") else KFAC
    adaptive = () if kind is FOP else ("beta", "eta")
    options = {key: value for key, value in point.options.items() if key not in adaptive}
    optimizer = kind(model, **{**options, **BARE, **changes})
    optimizer.load_state_dict(_with_curvature(optimizer.state_dict(), point.state))
    first, second = batch.halves
    passes: dict[str, list[Pass]] = {
        "first": [(nullcontext(), first, 1.0)],
        "second": [(nullcontext(), second, 1.0)],
        "fop": [(optimizer.sub_batch(0), first, 0.5), (optimizer.sub_batch(1), second, 0.5)],
    }
    for label, part, weight in passes.get(name, [(nullcontext(), slice(None), 1.0)]):
        with label:
            (weight * batch.losses(model)[part].mean()).backward()
    optimizer.step()
    return flat(list(model.parameters())) - flat(list(point.model.parameters())), optimizer


def _with_curvature(fresh: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trained state under a fresh optimizer's options, without new curvature in the next step."""
    pairs = zip(fresh["param_groups"], trained["param_groups"], strict=True)
    groups = [{**new, "step": old["step"]} for new, old in pairs]
    later = groups[0]["step"] + BARE["curvature_interval"]
    state = {
        key: entries | ({"refresh_at": later} if "refresh_at" in entries else {})
        for key, entries in trained["state"].items()
    }
    return {"state": state, "param_groups": groups}
