"""The picture of the loss surface: contours of the loss and the steps from the point in the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

from fop_bench.plot import STYLES

Line = str | tuple[int, tuple[float, ...]]
# K-FAC's and FOP's own colours; the halves get two more of Okabe and Ito's. The step of the whole batch is
# broad, because FOP's often lies on it.
ARROWS: dict[str, tuple[str, Line, float]] = {
    "first": ("#009E73", "-", 2.2),
    "second": ("#CC79A7", "-", 2.2),
    "average": (STYLES["kfac"][0], "-", 6.5),
    "fop": (STYLES["fop"][0], "-", 2.2),
    "fop_rows": (STYLES["fop"][0], (0, (2, 1)), 2.2),
}
PANELS = {"whole": "loss of the whole batch", "first": "of the first half", "second": "of the second half"}
LEVELS = 22  # at most
# The grey of high losses leaves the arrows their colours.
GREYS = LinearSegmentedColormap.from_list("light greys", ["#ffffff", "#8c8c8c"])


def plot_surface(result: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of the batch and its halves on the plane, with the steps, and save it as a PNG.

    Args:
        result: what `surface.surface` gives, or the JSON of it.
        path: of the PNG.
    """
    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file without asking for a display
    places = figure.add_gridspec(2, 3)
    panels = {
        "whole": figure.add_subplot(places[:, :2]),
        "first": figure.add_subplot(places[0, 2]),
        "second": figure.add_subplot(places[1, 2]),
    }
    for part, panel in panels.items():
        filled = _land(panel, result, part)
        _steps(panel, result, small=part != "whole")
        panel.set_title(PANELS[part], fontsize=11)
        if part == "whole":
            bar = figure.colorbar(filled, ax=panel, shrink=0.75, pad=0.02)
            bar.set_label("cross-entropy (nats)")
            panel.set_xlabel("along the K-FAC step of the whole batch, in units of ‖w‖ per filter")
            panel.set_ylabel("along the difference of the halves' steps, in units of ‖w‖ per filter")
    figure.suptitle(_title(result))
    figure.legend(
        handles=_legend(result),
        loc="outside lower center",
        ncols=1,
        frameon=False,
        fontsize=9.5,
        handlelength=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _land(panel: Axes, result: Mapping[str, Any], part: str) -> QuadContourSet:
    losses = _array(result["losses"][part])
    levels = _levels(losses)
    filled = panel.contourf(result["x"], result["y"], losses, levels, cmap=GREYS, extend="max")
    lines = panel.contour(result["x"], result["y"], losses, levels, colors="#6e6e6e", linewidths=0.6)
    every = 2 if part == "whole" else 4
    panel.clabel(lines, levels[1::every].tolist(), fontsize=7 if part == "whole" else 6, fmt="%.3g")
    panel.set_facecolor("#8c8c8c")  # where the loss is not finite
    panel.set_aspect("equal")  # the axes are orthogonal and of one length: angles are true
    panel.tick_params(labelsize=8)
    return filled


def _levels(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give round levels at equal distances; the highest twentieth of the window has one colour."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        raise ValueError("the loss is not finite anywhere on the surface; give a smaller --lr")
    return np.asarray(MaxNLocator(LEVELS).tick_values(finite.min(), np.quantile(finite, 0.95)))


def _steps(panel: Axes, result: Mapping[str, Any], *, small: bool) -> None:
    scale = 0.55 if small else 1.0
    for name in sorted(result["steps"], key=lambda name: -ARROWS[name][2]):
        color, line, width = ARROWS[name]
        step = result["steps"][name]
        end = np.array([step["x"], step["y"]])
        # The shaft ends inside the head, whose outline would have the shaft's dashes if they were one.
        panel.plot(
            *np.outer(end, (0, 0.95)),
            linestyle=line,
            color=color,
            linewidth=scale * width,
            solid_capstyle="butt",
            zorder=4,
        )
        head = FancyArrowPatch(
            tuple(0.5 * end),
            tuple(end),
            arrowstyle="-|>,head_length=0.45,head_width=0.22",
            mutation_scale=scale * (18 + 2 * width),
            color=color,
            linewidth=0,
            shrinkA=0,
            shrinkB=0,
            zorder=4,
        )
        panel.add_patch(head)
    panel.plot(0, 0, marker="o", markersize=8 * scale, color="black", markeredgecolor="white", zorder=6)


def _legend(result: Mapping[str, Any]) -> list[Line2D]:
    origin = f"the point: loss {_number(result['origin']['whole'])}"
    handles = [
        Line2D([], [], linestyle="none", marker="o", color="black", markeredgecolor="white", label=origin)
    ]
    for name, step in result["steps"].items():
        color, line, width = ARROWS[name]
        label = (
            f"{step['what']}: loss {_number(step['losses_at_end']['whole'])} at its end, "
            f"{step['share_in_plane']:.0%} of its norm in this plane"
        )
        handles.append(Line2D([], [], color=color, linestyle=line, linewidth=width, label=label))
    return handles


def _title(result: Mapping[str, Any]) -> str:
    epochs = "one epoch" if result["epochs"] == 1 else f"{result['epochs']} epochs"
    return (
        f"{result['title']}, batch {result['batch_size']}, after {epochs} of FOP\n"
        f"one step each with the same curvature; learning rate {result['lr']:g}, "
        f"damping {result['damping']:g}, seed {result['seed']}"
    )


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _array(rows: Sequence[Sequence[float | None]]) -> npt.NDArray[np.float64]:
    """Give rows of the grid as an array, nan (which contours leave out) for None."""
    return np.array([[np.nan if loss is None else loss for loss in row] for row in rows])
