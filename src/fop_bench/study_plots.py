"""Plots of the studies: curves, speed-up over the batch size, maps, and the scalars of FOP's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, NullLocator

from fop_bench.plot import canvas, draw_band, finish, legend, save, styles
from fop_bench.run_records import Run
from fop_bench.study import UNITS, Study, clock, target_label

SCALARS = {"beta": "β", "eta": "η", "rho": "ρ"}
NAMED_LAYERS = 40


# Curves


def plot_curves(study: Study, path: Path) -> None:
    """Draw accuracy over time and over epochs, and training loss over epochs, a column a batch size."""
    looks, groups = styles(list(study.labels)), study.groups()
    sizes = sorted({size for size, _ in groups})
    time = clock(study.runs["run"].iloc[0])
    judged = "test" if study.phase("final")["run"].iloc[0]["evaluated_on"] == "test" else "held-out"
    titles = {"epoch": "epoch", "accuracy": f"{judged} accuracy", "train_loss": "training loss"}
    titles |= {"seconds": "training time (s)", "processor_seconds": "processor time (s)"}
    figure = canvas(max(6.0, 3.6 * len(sizes) + 0.6), 9.0)
    panels = figure.subplots(3, len(sizes), sharey="row", squeeze=False)
    for row, (value, over) in enumerate([("accuracy", time), ("accuracy", "epoch"), ("train_loss", "epoch")]):
        for panel, size in zip(panels[row], sizes, strict=True):
            for (of, name), group in groups.items():
                epochs = [epoch for run in group["run"][~group["diverged"]] for epoch in run["curve"]]
                if epochs and of == size:
                    look = looks[name] | {"label": study.labels[name]}
                    draw_band(panel, pd.DataFrame(epochs), over, value, **look)
            finish(panel, value, [target for kind, target in study.targets.items() if kind == value])
            panel.set_xlabel(titles[over])
            panel.set_xlim(left=0)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        panels[row, 0].set_ylabel(titles[value])
    for panel, size in zip(panels[0], sizes, strict=True):
        each = ((name, group["diverged"]) for (of, name), group in groups.items() if of == size)
        lost = [f"{study.labels[name]} {runs.sum()} of {len(runs)}" for name, runs in each if runs.any()]
        note = f"\ndiverged, not drawn: {', '.join(lost)}" if lost else ""
        panel.set_title(f"batch {size}{note}", fontsize=10)
    legend(figure)
    figure.suptitle(f"{study.recipe}, {study.task}, {study.name}: mean and range over the seeds")
    save(figure, path)


# Speed-up


def speed_up_reference(study: Study) -> tuple[int, str] | None:
    """Choose what speed-up is relative to, by batch size and contender; None if there is nothing.

    SGD, K-FAC or FOP: the first that reached every target with every seed at the smallest of several sizes.
    """
    groups = study.groups()
    sizes = sorted({size for size, _ in groups})
    reached = [f"{kind} epochs" for kind in study.targets]
    known = [(sizes[0], name) for name in ("sgd", "kfac", "fop") if (sizes[0], name) in groups]
    complete = (key for key in known if groups[key][reached].notna().all(axis=None))
    return next(complete, None) if len(sizes) > 1 and reached else None


def plot_speed_up(study: Study, reference: tuple[int, str], path: Path) -> None:
    """Draw how many times fewer epochs and seconds than the reference it takes to reach every target."""
    looks, groups = styles(list(study.labels)), study.groups()
    figure = canvas(max(6.0, 4.4 * len(study.targets)), 6.4)
    panels = figure.subplots(2, len(study.targets), sharex=True, squeeze=False)
    for column, (kind, target) in enumerate(study.targets.items()):
        for panel, unit in zip(panels[:, column], UNITS, strict=True):
            # The mean is NaN, and no point is drawn, unless every seed reached the target.
            times = {key: group[f"{kind} {unit}"] for key, group in groups.items()}
            means = pd.Series({key: each.mean(skipna=False) for key, each in times.items()})
            for name, ratio in (means[reference] / means).unstack(0).reindex(looks).iterrows():
                if ratio.notna().any():
                    look = looks[name] | {"label": study.labels[name], "marker": "o", "markersize": 5}
                    panel.plot(ratio.dropna(), **look)
            finish(panel, unit, [1.0])
            panel.set_xscale("log")
            panel.set_xticks(*zip(*{size: str(size) for size, _ in groups}.items(), strict=True), fontsize=8)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter("{x:g}×")
            panels[UNITS.index(unit), 0].set_ylabel(f"speed-up in {unit}")
        panels[0, column].set_title(target_label(kind, target), fontsize=10)
        panels[1, column].set_xlabel("batch size")
    legend(figure)
    over = f"speed-up over {study.labels[reference[1]]} at batch {reference[0]}"
    figure.suptitle(f"{study.recipe}, {study.task}, {study.name}: {over}")
    save(figure, path)


# Maps


def plot_maps(grids: Mapping[str, pd.DataFrame], title: str, path: Path) -> None:
    """Draw the differences between FOP and K-FAC over learning rate and damping, a column a map."""
    lrs, dampings = (next(iter(grids.values()))[axis].nunique() for axis in ("lr", "damping"))
    figure = canvas(max(3.4, lrs + 1.0) * len(grids) + 1.2, 2 * (0.62 * dampings + 1.3))
    panels = figure.subplots(2, len(grids), squeeze=False)
    labels = {
        "difference": "final accuracy,\nFOP − K-FAC (points)",
        "loss_ratio": "final training loss,\nlog₂(K-FAC / FOP)",
    }
    for row, (value, label) in enumerate(labels.items()):
        limit = np.nan_to_num(max(points[value].abs().max() for points in grids.values())) or 1.0
        for panel, (name, points) in zip(panels[row], grids.items(), strict=True):
            image = _draw_map(panel, points, value, Normalize(-limit, limit))
            panel.set_title(name if row == 0 else "", fontsize=10)
            panel.set_xlabel("learning rate" if row == 1 else "")
        panels[row, 0].set_ylabel("damping")
        figure.colorbar(image, ax=list(panels[row]), label=label, shrink=0.9)
    figure.suptitle(title)
    save(figure, path)


def _draw_map(panel: Axes, points: pd.DataFrame, value: str, norm: Normalize) -> Any:
    table = points.pivot(index="damping", columns="lr", values=value)
    # Red like FOP's own colour where FOP is ahead, blue like K-FAC's where that is.
    image = panel.imshow(table, cmap="RdBu_r", norm=norm, origin="lower", aspect="auto")
    panel.set_facecolor("#e4e4e4")
    panel.set_xticks(range(table.shape[1]), [f"{lr:g}" for lr in table.columns])
    panel.set_yticks(range(table.shape[0]), [f"{damping:g}" for damping in table.index])
    panel.tick_params(length=0)
    for _, point in points.iterrows():
        known = not np.isnan(point[value])
        text = f"{point['lost']}diverged" if point["lost"] else "not run"
        text = f"{point[value]:+.2f}".replace("-", "−") if known else text
        x, y = table.columns.get_loc(point["lr"]), table.index.get_loc(point["damping"])
        color = "white" if known and abs(norm(point[value]) - 0.5) >= 0.3 else "black"
        panel.text(x, y, text, color=color, fontsize=9 if known else 7, ha="center", va="center")
    return image


# Layers


def layered_runs(study: Study) -> list[Run]:
    """Return FOP's final runs of the smallest batch size and of the largest, with their first seeds."""
    fop = study.phase("final").query("contender == 'fop'").sort_values(["batch_size", "seed"])
    runs = [run for run in fop["run"] if run["layers"] is not None and run["layers"]["epochs"]]
    first = {run["batch_size"]: run for run in reversed(runs)}
    return [first[size] for size in sorted({min(first), max(first)})] if first else []


def plot_layers(runs: Sequence[Run], path: Path) -> None:
    """Draw β, η and ρ of every layer over the epochs, a column a run."""
    count = max(len(run["layers"]["names"]) for run in runs)
    figure = canvas(4.6 * len(runs) + 1.8, 3 * min(6.0, 1.2 + 0.2 * count) + 0.4)
    panels = figure.subplots(len(SCALARS), len(runs), squeeze=False)
    for row, (key, symbol) in enumerate(SCALARS.items()):
        heights = [np.array(run["layers"][key], dtype=float).T for run in runs]
        look: dict[str, Any] = {"cmap": "cividis", "norm": Normalize(0.5 if key == "eta" else 0.0, 1.0)}
        if key == "beta":
            # About 0, up to the 98th percentile; the others have bounds of their own.
            sizes = np.abs(np.concatenate([height.ravel() for height in heights]))
            limit = float(np.nanpercentile(sizes, 98)) if np.isfinite(sizes).any() else 1.0
            look = {"cmap": "PuOr", "norm": Normalize(-(limit or 1.0), limit or 1.0)}
        for panel, run, height in zip(panels[row], runs, heights, strict=True):
            epochs, names = run["layers"]["epochs"], run["layers"]["names"]
            extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
            image = panel.imshow(height, aspect="auto", interpolation="nearest", extent=extent, **look)
            panel.set_facecolor("#d0d0d0")  # a layer that had no pair
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            stride = -(-len(names) // NAMED_LAYERS)
            shown = range(0, len(names), stride) if panel is panels[row, 0] else range(0)
            panel.set_yticks(list(shown), [names[number] for number in shown], fontsize=7)
            panel.set_title(f"batch {run['batch_size']}, seed {run['seed']}" if row == 0 else "", fontsize=10)
            panel.set_xlabel("epoch" if key == "rho" else "")
        bar = figure.colorbar(image, ax=list(panels[row]), extend="both" if key == "beta" else "neither")
        bar.set_label(symbol, rotation=0, labelpad=10, fontsize=12)
    first = runs[0]
    figure.suptitle(f"{first['recipe']}, {first['task']}, {first['study']}: FOP's layers")
    save(figure, path)
