"""The demo's picture: accuracy over training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from fop_bench.demo import TARGET, TRAIN_SIZE, Entry
from fop_bench.optimizers import BUILDERS

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles for print in black and white.
STYLES = {
    "sgd": ("#7f7f7f", ":"),
    "adamw": ("#E69F00", "-."),
    "kfac": ("#56B4E9", "--"),
    "fop": ("#D55E00", "-"),
}


def plot_demo(entries: Sequence[Entry], path: Path) -> None:
    """Draw test accuracy over training seconds, one panel per batch size, and save it as a PNG."""
    batch_sizes = list(dict.fromkeys(entry.batch_size for entry in entries))
    figure = Figure(figsize=(4.2 * len(batch_sizes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file without asking for a display
    panels: list[Axes] = list(figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0])
    for panel, batch_size in zip(panels, batch_sizes, strict=True):
        for entry in entries:
            if entry.batch_size == batch_size:
                _draw(panel, entry)
        _dress(panel, batch_size)
    panels[0].set_ylabel("test accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Handwritten digits, small CNN with BatchNorm: mean and range over the seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(panel: Axes, entry: Entry) -> None:
    """Draw the mean over the seeds at every epoch, with a band from the worst seed to the best."""
    curves = [run.curve for run in entry.runs if not run.diverged]
    color, line = STYLES[entry.optimizer]
    label = BUILDERS[entry.optimizer][0]
    if not curves:
        panel.plot([], [], line, color=color, label=label)
        return
    seconds = np.mean([[epoch.seconds for epoch in curve] for curve in curves], axis=0)
    accuracy = np.array([[epoch.accuracy for epoch in curve] for curve in curves])
    panel.fill_between(
        seconds, accuracy.min(axis=0), accuracy.max(axis=0), color=color, alpha=0.18, linewidth=0
    )
    panel.plot(seconds, accuracy.mean(axis=0), line, color=color, label=label, linewidth=2)


def _dress(panel: Axes, batch_size: int) -> None:
    panel.axhline(TARGET, color="black", linewidth=0.8, alpha=0.6)
    panel.annotate(
        f"target {TARGET:.0%}", (0.98, TARGET), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    full = ", the full training set" if batch_size == TRAIN_SIZE else ""
    panel.set_title(f"batch {batch_size}{full}")
    panel.set_xlabel("training time (s)")
    panel.set_xlim(left=0)
    panel.set_ylim(0.88, 1.0)
    panel.yaxis.set_major_locator(MultipleLocator(0.02))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
