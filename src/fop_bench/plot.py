"""What the plots share, and the demo's picture: accuracy over training time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from fop_bench.demo import TARGET, TRAIN_SIZE, Entry
from fop_bench.optimizers import BUILDERS

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles for print in black and white.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#7f7f7f", "linestyle": ":"},
    "adamw": {"color": "#E69F00", "linestyle": "-."},
    "kfac": {"color": "#56B4E9", "linestyle": "--"},
    "fop": {"color": "#D55E00", "linestyle": "-"},
    "lamb": {"color": "#009E73", "linestyle": (0, (5, 1, 1, 1))},
    "soap": {"color": "#0072B2", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "muon": {"color": "#CC79A7", "linestyle": (0, (7, 2))},
    "shampoo": {"color": "#000000", "linestyle": (0, (1, 1))},
}
# For variants of an optimizer: the colours that no other contender of the picture has.
SPARE = ("lamb", "soap", "muon", "shampoo", "adamw", "sgd")


def styles(contenders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for every contender a colour and a line: the known ones theirs, the others what is left."""
    left = [STYLES[name] for name in SPARE if name not in contenders] + [
        {"color": "#8C510A", "linestyle": "--"}
    ]
    others = [name for name in contenders if name not in STYLES]
    spare = {name: left[number % len(left)] for number, name in enumerate(others)}
    return {name: STYLES.get(name) or spare[name] for name in contenders}


def canvas(width: float, height: float) -> Figure:
    """Return a figure of so many inches that draws to a file without asking for a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a PNG, creating the folder if need be; the same data give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_band(panel: Axes, epochs: pd.DataFrame, x: str, y: str, **look: Any) -> None:
    """Draw the mean over the runs at every epoch, with a band from the lowest ``y`` to the highest."""
    by_epoch = epochs.groupby("epoch")
    at, values = by_epoch[x].mean(), by_epoch[y]
    panel.fill_between(at, values.min(), values.max(), color=look["color"], alpha=0.18, linewidth=0)
    panel.plot(at, values.mean(), linewidth=1.8, **look)


def finish(panel: Axes, value: str, targets: Iterable[float] = ()) -> None:
    """Add grid, targets and, for an accuracy, percent signs to a panel of curves."""
    for target in targets:
        panel.axhline(target, color="black", linewidth=0.8, alpha=0.6, zorder=1)
    if value == "accuracy":
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure) -> None:
    """Name every line of a figure once, below its panels."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        found |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if found:
        # Inches that an entry takes, about: the line, and a letter at this size.
        columns = int(figure.get_figwidth() / (0.8 + 0.085 * max(map(len, found))))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": max(1, min(len(found), columns))}
        figure.legend(found.values(), found.keys(), frameon=False, handlelength=3.2, **place)


def plot_demo(entries: Sequence[Entry], path: Path) -> None:
    """Draw test accuracy over training seconds, one panel per batch size, and save it as a PNG."""
    batch_sizes = list(dict.fromkeys(entry.batch_size for entry in entries))
    figure = canvas(4.2 * len(batch_sizes), 4.2)
    panels = figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0]
    for panel, batch_size in zip(panels, batch_sizes, strict=True):
        for entry in entries:
            epochs = [asdict(epoch) for run in entry.runs if not run.diverged for epoch in run.curve]
            if epochs and entry.batch_size == batch_size:
                look = STYLES[entry.optimizer] | {"label": BUILDERS[entry.optimizer][0]}
                draw_band(panel, pd.DataFrame(epochs), "seconds", "accuracy", **look)
        finish(panel, "accuracy", [TARGET])
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        panel.annotate(f"target {TARGET:.0%}", (0.98, TARGET), **place)
        full = ", the full training set" if batch_size == TRAIN_SIZE else ""
        panel.set(title=f"batch {batch_size}{full}", xlabel="training time (s)", ylim=(0.88, 1.0))
        panel.set_xlim(left=0)
        panel.yaxis.set_major_locator(MultipleLocator(0.02))
    panels[0].set_ylabel("test accuracy")
    legend(figure)
    figure.suptitle("Handwritten digits, small CNN with BatchNorm: mean and range over the seeds")
    save(figure, path)
