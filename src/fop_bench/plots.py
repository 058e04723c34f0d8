"""Plots of the studies, curves, speed-up and the scalars of FOP's layers; and of the loss surface."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from fop_bench.recipe_runs import SCALARS
from fop_bench.records import Record
from fop_bench.study import UNITS, Study, clock, target_label

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles for print in black and white.
# Variants of an optimizer get the first that no other contender of the picture has.
STYLES: dict[str, dict[str, Any]] = {
    "lamb": {"color": "#009E73", "linestyle": (0, (5, 1, 1, 1))},
    "soap": {"color": "#0072B2", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "muon": {"color": "#CC79A7", "linestyle": (0, (7, 2))},
    "shampoo-blocks": {"color": "#000000", "linestyle": (0, (1, 1))},
    "adamw": {"color": "#E69F00", "linestyle": "-."},
    "sgd": {"color": "#7f7f7f", "linestyle": ":"},
    "kfac": {"color": "#56B4E9", "linestyle": "--"},
    "fop": {"color": "#D55E00", "linestyle": "-"},
}
BROWN = {"color": "#8C510A", "linestyle": "--"}
NAMED_LAYERS = 40
EPOCHS: dict[str, Any] = {"nbins": 6, "integer": True, "steps": [1, 2, 5, 10]}


def styles(contenders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for every contender a colour and a line: the known ones theirs, the others what is left."""
    left = cycle([*(look for name, look in STYLES.items() if name not in contenders), BROWN])
    return {name: STYLES[name] if name in STYLES else next(left) for name in contenders}


def save(figure: Figure, title: str, path: Path) -> None:
    """Name every line once, below the panels, and save a PNG; the same data give the same bytes."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        found |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if found:
        # Inches that an entry takes, about: the line, and a letter at this size.
        columns = int(figure.get_figwidth() / (0.8 + 0.085 * max(map(len, found))))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": max(1, min(len(found), columns))}
        figure.legend(found.values(), found.keys(), frameon=False, handlelength=3.2, **place)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _finish(panel: Axes, lines: Sequence[float]) -> None:
    for height in lines:
        panel.axhline(height, color="black", linewidth=0.8, alpha=0.6, zorder=1)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


# Curves


def plot_curves(study: Study, path: Path) -> None:
    """Draw accuracy over time and over epochs, and training loss over epochs, a column a batch size."""
    looks, labels, groups = styles(list(study.labels)), study.labels, study.groups()
    sizes = sorted({size for size, _ in groups})
    first = study.phase("final")["run"].iloc[0]
    titles = {"accuracy": f"{first['evaluated_on']} accuracy", "train_loss": "training loss"}
    titles |= {"epoch": "epoch", "seconds": "training time (s)", "processor_seconds": "processor time (s)"}
    rows = [("accuracy", clock(first)), ("accuracy", "epoch"), ("train_loss", "epoch")]
    figure = Figure(figsize=(max(6.0, 3.6 * len(sizes) + 0.6), 9.0), layout="constrained")
    panels = figure.subplots(3, len(sizes), sharey="row", squeeze=False)
    for column, size in enumerate(sizes):
        lost = []
        for name, group in ((name, group) for (of, name), group in groups.items() if of == size):
            if group["diverged"].any():
                lost.append(f"{labels[name]} {group['diverged'].sum()} of {len(group)}")
            curves = [epoch for run in group["run"][~group["diverged"]] for epoch in run["curve"]]
            if curves:
                epochs = pd.DataFrame(curves).groupby("epoch").agg(["mean", "min", "max"])
                epochs["epoch", "mean"] = epochs.index
                for panel, (value, over) in zip(panels[:, column], rows, strict=True):
                    at, heights, look = epochs[over, "mean"], epochs[value], looks[name]
                    band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
                    panel.fill_between(at, heights["min"], heights["max"], **band)
                    panel.plot(at, heights["mean"], linewidth=1.8, label=labels[name], **look)
        for panel, (value, over) in zip(panels[:, column], rows, strict=True):
            _finish(panel, [target for kind, target in study.targets.items() if kind == value])
            if value == "accuracy":
                panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panel.set(xlabel=titles[over], ylabel="" if column else titles[value])
            panel.set_xlim(left=0)
            panel.xaxis.set_major_locator(MaxNLocator(**EPOCHS))
        note = f"\ndiverged, not drawn: {', '.join(lost)}" if lost else ""
        panels[0, column].set_title(f"batch {size}{note}", fontsize=10)
    save(figure, f"{study.title}: mean and range over the seeds", path)


# Speed-up


def speed_up_reference(study: Study) -> tuple[int, str] | None:
    """Return batch size and contender of the first that always reached all targets at the smallest size."""
    groups, reached = study.groups(), [f"{kind} epochs" for kind in study.targets]
    sizes = {size for size, _ in groups}
    known = [(min(sizes), name) for name in ("sgd", "kfac", "fop") if len(sizes) > 1 and reached]
    complete = (key for key in known if key in groups and groups[key][reached].notna().all(axis=None))
    return next(complete, None)


def plot_speed_up(study: Study, reference: tuple[int, str], path: Path) -> None:
    """Draw how many times fewer epochs and seconds than the reference it takes to reach every target."""
    looks, labels, groups = styles(list(study.labels)), study.labels, study.groups()
    sizes = sorted({size for size, _ in groups})
    figure = Figure(figsize=(max(6.0, 4.4 * len(study.targets)), 6.4), layout="constrained")
    panels = figure.subplots(2, len(study.targets), sharex=True, squeeze=False)
    for column, (kind, target) in enumerate(study.targets.items()):
        for panel, unit in zip(panels[:, column], UNITS, strict=True):
            # The mean is NaN, and no point is drawn, unless every seed reached the target.
            times = {key: group[f"{kind} {unit}"].mean(skipna=False) for key, group in groups.items()}
            ratios = (times[reference] / pd.Series(times)).unstack(0)
            for name in labels:
                if name in ratios.index and ratios.loc[name].notna().any():
                    look = looks[name] | {"label": labels[name], "marker": "o", "markersize": 5}
                    panel.plot(ratios.loc[name].dropna(), **look)
            _finish(panel, [1.0])
            panel.set(xscale="log", ylabel="" if column else f"speed-up in {unit}")
            panel.set_xticks(sizes, list(map(str, sizes)), fontsize=8)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter("{x:g}×")
        panels[0, column].set_title(target_label(kind, target), fontsize=10)
        panels[1, column].set_xlabel("batch size")
    over = f"speed-up over {labels[reference[1]]} at batch {reference[0]}"
    save(figure, f"{study.title}: {over}", path)


# Layers


def layered_runs(study: Study) -> list[Record]:
    """Return FOP's final runs of the smallest batch size and of the largest, with their first seeds."""
    fop = study.phase("final").query("contender == 'fop'").sort_values(["batch_size", "seed"])
    runs = [run for run in fop["run"] if run["layers"] is not None and run["layers"]["epochs"]]
    first = {run["batch_size"]: run for run in reversed(runs)}
    return [first[size] for size in sorted({min(first), max(first)})] if first else []


def noted(runs: Sequence[Record]) -> dict[str, str]:
    """Return the names and symbols of what runs noted of their layers; the noise is not in older ones."""
    return {key: symbol for key, symbol in SCALARS.items() if all(key in run["layers"] for run in runs)}


def plot_layers(runs: Sequence[Record], path: Path) -> None:
    """Draw what was `noted` of every layer over the epochs, a column a run."""
    count = max(len(run["layers"]["names"]) for run in runs)
    scalars = noted(runs)
    size = (4.6 * len(runs) + 1.8, len(scalars) * min(6.0, 1.2 + 0.2 * count) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(scalars), len(runs), squeeze=False)
    for row, (key, symbol) in enumerate(scalars.items()):
        heights = [np.array(run["layers"][key], dtype=float).T for run in runs]
        look: dict[str, Any] = {"cmap": "cividis", "norm": Normalize(0.5 if key == "eta" else 0.0, 1.0)}
        if key == "beta":
            # About 0, up to the 98th percentile; the others have bounds of their own.
            sizes = np.abs(np.concatenate([height.ravel() for height in heights]))
            limit = (np.nanpercentile(sizes, 98) if np.isfinite(sizes).any() else 0.0) or 1.0
            look = {"cmap": "PuOr", "norm": Normalize(-limit, limit)}
        for panel, run, height in zip(panels[row], runs, heights, strict=True):
            epochs, names = run["layers"]["epochs"], run["layers"]["names"]
            extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5)
            image = panel.imshow(height, aspect="auto", interpolation="nearest", extent=extent, **look)
            panel.set_facecolor("#d0d0d0")  # a layer that had no pair
            panel.xaxis.set_major_locator(MaxNLocator(**EPOCHS))
            shown = range(0, len(names), -(-len(names) // NAMED_LAYERS)) if panel is panels[row, 0] else ()
            panel.set_yticks(list(shown), [names[number] for number in shown], fontsize=7)
            panel.set_title(f"batch {run['batch_size']}, seed {run['seed']}" if row == 0 else "", fontsize=10)
            panel.set_xlabel("epoch" if row == len(scalars) - 1 else "")
        bar = figure.colorbar(image, ax=list(panels[row]), extend="both" if key == "beta" else "neither")
        bar.set_label(symbol, rotation=0, labelpad=10, fontsize=12)
    save(figure, "{recipe}, {task}, {study}: FOP's layers".format(**runs[0]), path)


# The loss surface

# The step of the whole batch is broad, because FOP's often lies on it.
ARROWS: dict[str, dict[str, Any]] = {
    "average": {"color": STYLES["kfac"]["color"], "linestyle": "-", "linewidth": 6.5},
    "first": {"color": STYLES["lamb"]["color"], "linestyle": "-", "linewidth": 2.2},
    "second": {"color": STYLES["muon"]["color"], "linestyle": "-", "linewidth": 2.2},
    "fop": {"color": STYLES["fop"]["color"], "linestyle": "-", "linewidth": 2.2},
    "fop_rows": {"color": STYLES["fop"]["color"], "linestyle": (0, (2, 1)), "linewidth": 2.2},
}
PANELS = {"whole": "loss of the whole batch", "first": "of the first half", "second": "of the second half"}
# The grey of high losses leaves the arrows their colours.
GREYS = LinearSegmentedColormap.from_list("light greys", ["#ffffff", "#8c8c8c"])
DOT: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "black", "markeredgecolor": "white"}


def plot_surface(record: Record, path: Path) -> None:
    """Draw what `surface.surface` gives, losses of the batch and its halves and the steps, as a PNG."""
    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    panels = figure.subplot_mosaic([["whole", "whole", "first"], ["whole", "whole", "second"]])
    filled = {part: _draw_losses(panels[part], record, part) for part in PANELS}
    figure.colorbar(filled["whole"], ax=panels["whole"], shrink=0.75, pad=0.02, label="loss")
    panels["whole"].set_xlabel("along the K-FAC step of the whole batch, in units of ‖w‖ per filter")
    panels["whole"].set_ylabel("along the difference of the halves' steps, in units of ‖w‖ per filter")
    ends = {"the point": (record["origin"], DOT)}
    ends |= {each["what"]: (each["losses_at_end"], ARROWS[key]) for key, each in record["steps"].items()}
    for what, (losses, look) in ends.items():
        loss = "not finite" if losses["whole"] is None else f"{losses['whole']:.4f}"
        panels["whole"].plot([], [], label=f"{what}: loss {loss}", **look)
    title = "{title}, batch {batch_size}, after {epochs} epochs of FOP".format(**record)
    how = "learning rate {lr:g}, damping {damping:g}, seed {seed}".format(**record)
    save(figure, f"{title}\none step each with the same curvature; {how}", path)


def _draw_losses(panel: Axes, record: Record, part: str) -> Any:
    """Draw the contours of the loss of a part of the batch, and the steps."""
    losses, scale = np.array(record["losses"][part], dtype=float), 1.0 if part == "whole" else 0.55
    if not np.isfinite(losses).any():  # one that is None is NaN, which contours leave out
        raise ValueError("the loss is not finite anywhere on the surface; give a smaller --lr")
    # At most 22 round levels at equal distances; the highest twentieth of the window has one colour.
    levels = MaxNLocator(22).tick_values(np.nanmin(losses), np.nanquantile(losses, 0.95))
    filled = panel.contourf(record["x"], record["y"], losses, levels, cmap=GREYS, extend="max")
    lines = panel.contour(record["x"], record["y"], losses, levels, colors="#6e6e6e", linewidths=0.6)
    panel.clabel(lines, levels[1 :: 2 if part == "whole" else 4], fontsize=7, fmt="%.3g")
    panel.set_facecolor("#8c8c8c")  # where the loss is not finite
    panel.set_aspect("equal")  # the axes are orthogonal and of one length: angles are true
    panel.set_title(PANELS[part], fontsize=11)
    for name, look in ARROWS.items():
        width = {"linewidth": scale * look["linewidth"], "shrinkA": 0, "shrinkB": 0, "capstyle": "butt"}
        head = {"arrowstyle": "-|>", "mutation_scale": scale * (18 + 2 * look["linewidth"])}
        end = record["steps"][name]["x"], record["steps"][name]["y"]
        panel.annotate("", end, (0, 0), arrowprops=look | head | width)
    panel.plot(0, 0, markersize=8 * scale, zorder=6, **DOT)
    return filled
