"""Plots of the studies: curves, speed-up over the batch size, maps, and the scalars of FOP's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from fop_bench import plot
from fop_bench.run_records import Run
from fop_bench.study_groups import Group, Study, clock
from fop_bench.study_maps import Cell, Map

Line = str | tuple[int, tuple[float, ...]]

# The rest of Okabe and Ito's colours; their yellow is too pale for a line on white.
STYLES: dict[str, tuple[str, Line]] = {
    **plot.STYLES,
    "lamb": ("#009E73", (0, (5, 1, 1, 1))),
    "soap": ("#0072B2", (0, (3, 1, 1, 1, 1, 1))),
    "muon": ("#CC79A7", (0, (7, 2))),
    "shampoo": ("#000000", (0, (1, 1))),
}
SPARE = ("#009E73", "#0072B2", "#CC79A7", "#000000", "#E69F00", "#7f7f7f", "#8C510A")
SPARE_LINES: tuple[Line, ...] = (
    (0, (5, 1, 1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (7, 2)),
    (0, (1, 1)),
    "-.",
    "--",
    ":",
)
AHEAD = "RdBu_r"  # red like FOP's own colour where it is ahead, blue like K-FAC's where that is

SCALARS = {"beta": "β", "eta": "η", "rho": "ρ"}
NAMED_LAYERS = 40


def styles(contenders: Sequence[str]) -> dict[str, tuple[str, Line]]:
    """Give every contender a colour and a line: the known ones theirs, the others what is left."""
    others = [name for name in contenders if name not in STYLES]
    used = {STYLES[name][0] for name in contenders if name in STYLES}
    colors = [color for color in SPARE if color not in used]
    spare = {
        name: (colors[number % len(colors)], SPARE_LINES[number % len(SPARE_LINES)])
        for number, name in enumerate(others)
    }
    return {name: STYLES.get(name) or spare[name] for name in contenders}


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file without asking for a display
    return figure


def _save(figure: Figure, path: Path) -> None:
    # Without matplotlib's version in the file, the same runs give the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _bare(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


# Curves


def plot_curves(study: Study, path: Path) -> None:
    """Draw accuracy over time and over epochs, and training loss over epochs, a column a batch size."""
    sizes = [size for size in study.batch_sizes if study.groups(size)]
    figure = _canvas(max(6.0, 3.6 * len(sizes) + 0.6), 9.0)
    panels = figure.subplots(3, len(sizes), sharey="row", squeeze=False)
    looks = styles(list(study.labels))
    rows: list[tuple[str, str]] = [("accuracy", "time"), ("accuracy", "epoch"), ("train_loss", "epoch")]
    for column, size in enumerate(sizes):
        groups = study.groups(size)
        for panel, (value, over) in zip(panels[:, column], rows, strict=True):
            for group in groups:
                _draw(panel, group, value, over, looks[group.contender])
            _dress(panel, study, value, over)
        lost = [f"{group.label} {group.diverged} of {len(group.runs)}" for group in groups if group.diverged]
        note = f"\ndiverged, not drawn: {', '.join(lost)}" if lost else ""
        panels[0, column].set_title(f"batch {size}{note}", fontsize=10)
    kind = "test" if study.phase("final")[0]["evaluated_on"] == "test" else "held-out"
    for panel, label in zip(
        panels[:, 0], [f"{kind} accuracy", f"{kind} accuracy", "training loss"], strict=True
    ):
        panel.set_ylabel(label)
    _legend(figure, list(panels.flat))
    figure.suptitle(f"{study.recipe}, {study.task}, {study.name}: mean and range over the seeds")
    _save(figure, path)


def _draw(panel: Axes, group: Group, value: str, over: str, look: tuple[str, Line]) -> None:
    color, line = look
    curves = [run["curve"] for run in group.finished]
    if not curves:
        return
    key = clock(group.runs[0]) if over == "time" else "epoch"
    length = min(map(len, curves))
    x = np.mean([[epoch[key] for epoch in curve[:length]] for curve in curves], axis=0)
    y = np.array([[epoch[value] for epoch in curve[:length]] for curve in curves])
    panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.18, linewidth=0)
    panel.plot(x, y.mean(axis=0), linestyle=line, color=color, label=group.label, linewidth=1.8)


def _dress(panel: Axes, study: Study, value: str, over: str) -> None:
    cpu = clock(study.runs[0]) == "processor_seconds"
    time = "processor time (s)" if cpu else "training time (s)"
    panel.set_xlabel(time if over == "time" else "epoch")
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    for target in study.targets:
        if target.kind == value:
            panel.axhline(target.value, color="black", linewidth=0.8, alpha=0.6, zorder=1)
    if value == "accuracy":
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _bare(panel)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        # Inches that an entry takes, about: the line, and a letter at this size.
        widest = 0.8 + 0.085 * max(map(len, found))
        columns = max(1, min(len(found), int(figure.get_size_inches()[0] / widest)))
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.2,
        )


# Speed-up


def speed_up_reference(study: Study) -> Group | None:
    """Choose what speed-up is relative to: SGD, K-FAC or FOP, the first that reached every target with every
    seed at the smallest batch size; None if there is none, or only one batch size.
    """
    sizes = sorted({group.batch_size for group in study.groups()})
    if len(sizes) < 2:
        return None
    groups = {group.contender: group for group in study.groups(sizes[0])}
    for name in ("sgd", "kfac", "fop"):
        if name in groups and all(groups[name].reached(target).all for target in study.targets):
            return groups[name]
    return None


def plot_speed_up(study: Study, reference: Group, path: Path) -> None:
    """Draw how many times fewer epochs and seconds than the reference it takes to reach every target."""
    targets = study.targets
    figure = _canvas(max(6.0, 4.4 * len(targets)), 6.4)
    panels = figure.subplots(2, len(targets), sharex=True, squeeze=False)
    looks = styles(list(study.labels))
    sizes = sorted({group.batch_size for group in study.groups()})
    for column, target in enumerate(targets):
        for panel, value in zip(panels[:, column], ("epochs", "seconds"), strict=True):
            unit = getattr(reference.reached(target), value).mean
            for name in study.labels:
                points = [
                    (group.batch_size, unit / getattr(reached, value).mean)
                    for group in study.groups()
                    if group.contender == name and (reached := group.reached(target)).all
                ]
                if points:
                    color, line = looks[name]
                    panel.plot(
                        *zip(*points, strict=True),
                        linestyle=line,
                        color=color,
                        marker="o",
                        markersize=5,
                        label=study.labels[name],
                    )
            panel.axhline(1.0, color="black", linewidth=0.8, alpha=0.6, zorder=1)
            panel.set_xscale("log")
            panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
            _bare(panel)
        panels[0, column].set_title(target.label, fontsize=10)
        panels[1, column].set_xlabel("batch size")
    for panel, value in zip(panels[:, 0], ("epochs", "seconds"), strict=True):
        panel.set_ylabel(f"speed-up in {value}")
    _legend(figure, list(panels.flat))
    figure.suptitle(
        f"{study.recipe}, {study.task}, {study.name}: "
        f"speed-up over {reference.label} at batch {reference.batch_size}"
    )
    _save(figure, path)


# Maps


def plot_maps(grids: Sequence[Map], title: str, path: Path) -> None:
    """Draw the differences between FOP and K-FAC over learning rate and damping, a column a map."""
    first = grids[0]
    width = max(3.4, 1.0 * len(first.lrs) + 1.0) * len(grids) + 1.2
    figure = _canvas(width, 2 * (0.62 * len(first.dampings) + 1.3))
    panels = figure.subplots(2, len(grids), squeeze=False)
    rows: list[tuple[Callable[[Cell], float | None], str]] = [
        (Cell.difference, "final accuracy,\nFOP − K-FAC (points)"),
        (Cell.loss_ratio, "final training loss,\nlog₂(K-FAC / FOP)"),
    ]
    for row, (value, label) in enumerate(rows):
        shown = [each for grid in grids for cell in grid.cells.values() if (each := value(cell)) is not None]
        limit = max(map(abs, shown), default=1.0) or 1.0
        for panel, grid in zip(panels[row], grids, strict=True):
            image = _draw_map(panel, grid, value, Normalize(-limit, limit))
            panel.set_title(grid.title if row == 0 else "", fontsize=10)
            panel.set_xlabel("learning rate" if row == 1 else "")
        panels[row, 0].set_ylabel("damping")
        figure.colorbar(image, ax=list(panels[row]), label=label, shrink=0.9)
    figure.suptitle(title)
    _save(figure, path)


def _draw_map(panel: Axes, grid: Map, value: Callable[[Cell], float | None], norm: Normalize) -> Any:
    lrs, dampings = grid.lrs, grid.dampings
    heights = np.full((len(dampings), len(lrs)), np.nan)
    for (lr, damping), cell in grid.cells.items():
        y, x = dampings.index(damping), lrs.index(lr)
        height = value(cell)
        if height is not None:
            heights[y, x] = height
            pale = abs(float(norm(height)) - 0.5) < 0.3
            panel.text(
                x,
                y,
                f"{height:+.2f}".replace("-", "−"),
                ha="center",
                va="center",
                color="black" if pale else "white",
                fontsize=9,
            )
        elif cell.lost:
            panel.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5),
                    1,
                    1,
                    facecolor="#f2f2f2",
                    edgecolor="#b0b0b0",
                    hatch="///",
                    linewidth=0,
                )
            )
            panel.text(
                x,
                y,
                cell.lost.replace(", ", "\n") + "\ndiverged",
                ha="center",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )
        else:
            panel.text(x, y, "not run", ha="center", va="center", fontsize=7, color="#7f7f7f")
    image = panel.imshow(heights, cmap=AHEAD, norm=norm, origin="lower", aspect="auto")
    panel.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    panel.set_yticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
    panel.tick_params(length=0)
    return image


# Layers


def layered_runs(study: Study) -> list[Run]:
    """Give FOP's final runs of the smallest batch size and of the largest, with their first seeds."""
    runs = [
        run
        for run in study.phase("final")
        if run["contender"] == "fop" and run["layers"] is not None and run["layers"]["epochs"]
    ]
    sizes = sorted({run["batch_size"] for run in runs})
    return [
        min((run for run in runs if run["batch_size"] == size), key=lambda run: int(run["seed"]))
        for size in sorted({*sizes[:1], *sizes[-1:]})
    ]


def plot_layers(runs: Sequence[Run], path: Path) -> None:
    """Draw β, η and ρ of every layer over the epochs, a column a run."""
    count = max(len(run["layers"]["names"]) for run in runs)
    figure = _canvas(4.6 * len(runs) + 1.8, 3 * min(6.0, 1.2 + 0.2 * count) + 0.4)
    panels = figure.subplots(len(SCALARS), len(runs), squeeze=False)
    for row, (key, symbol) in enumerate(SCALARS.items()):
        heights = [np.array(run["layers"][key], dtype=float).T for run in runs]
        colors, norm = _scale(key, heights)
        for panel, run, height in zip(panels[row], runs, heights, strict=True):
            epochs, names = run["layers"]["epochs"], run["layers"]["names"]
            image = panel.imshow(
                height,
                cmap=colors,
                norm=norm,
                aspect="auto",
                interpolation="nearest",
                extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5),
            )
            panel.set_facecolor("#d0d0d0")  # a layer that had no pair
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            stride = -(-len(names) // NAMED_LAYERS)
            shown = range(0, len(names), stride) if panel is panels[row, 0] else range(0)
            panel.set_yticks(list(shown), [names[number] for number in shown], fontsize=7)
            panel.set_title(f"batch {run['batch_size']}, seed {run['seed']}" if row == 0 else "", fontsize=10)
            panel.set_xlabel("epoch" if key == "rho" else "")
        extend = "both" if key == "beta" else "neither"
        bar = figure.colorbar(image, ax=list(panels[row]), extend=extend)
        bar.set_label(symbol, rotation=0, labelpad=10, fontsize=12)
    first = runs[0]
    figure.suptitle(f"{first['recipe']}, {first['task']}, {first['study']}: FOP's layers")
    _save(figure, path)


def _scale(key: str, heights: Sequence[Any]) -> tuple[str, Normalize]:
    """Choose colours: β about 0, up to its 98th percentile; the others have bounds of their own."""
    if key != "beta":
        return "cividis", Normalize(0.5 if key == "eta" else 0.0, 1.0)
    sizes = np.abs(np.concatenate([height.ravel() for height in heights]))
    sizes = sizes[np.isfinite(sizes)]
    limit = float(np.percentile(sizes, 98)) if len(sizes) else 1.0
    return "PuOr", Normalize(-(limit or 1.0), limit or 1.0)
