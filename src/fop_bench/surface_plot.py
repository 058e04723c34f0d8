"""The picture of the loss surface: contours of the loss and the steps from the point in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fop_bench.plot import STYLES, canvas, save

FOP, KFAC = STYLES["fop"]["color"], STYLES["kfac"]["color"]
# The step of the whole batch is broad, because FOP's often lies on it.
ARROWS: dict[str, dict[str, Any]] = {
    "average": {"color": KFAC, "linestyle": "-", "linewidth": 6.5},
    "first": {"color": STYLES["lamb"]["color"], "linestyle": "-", "linewidth": 2.2},
    "second": {"color": STYLES["muon"]["color"], "linestyle": "-", "linewidth": 2.2},
    "fop": {"color": FOP, "linestyle": "-", "linewidth": 2.2},
    "fop_rows": {"color": FOP, "linestyle": (0, (2, 1)), "linewidth": 2.2},
}
PANELS = {"whole": "loss of the whole batch", "first": "of the first half", "second": "of the second half"}
# The grey of high losses leaves the arrows their colours.
GREYS = LinearSegmentedColormap.from_list("light greys", ["#ffffff", "#8c8c8c"])
DOT: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "black", "markeredgecolor": "white"}


def plot_surface(result: Mapping[str, Any], path: Path) -> None:
    """Draw the losses of the batch and its halves on the plane, with the steps, and save it as a PNG.

    Args:
        result: what `surface.surface` gives, or the JSON of it.
        path: of the PNG.
    """
    figure = canvas(11.5, 8.2)
    panels = figure.subplot_mosaic([["whole", "whole", "first"], ["whole", "whole", "second"]])
    for part in ("first", "second", "whole"):
        filled = _draw(panels[part], result, part)
        panels[part].set_title(PANELS[part], fontsize=11)
    figure.colorbar(filled, ax=panels["whole"], shrink=0.75, pad=0.02, label="cross-entropy (nats)")
    unit = "in units of ‖w‖ per filter"
    panels["whole"].set_xlabel(f"along the K-FAC step of the whole batch, {unit}")
    panels["whole"].set_ylabel(f"along the difference of the halves' steps, {unit}")
    epochs = "one epoch" if result["epochs"] == 1 else f"{result['epochs']} epochs"
    figure.suptitle(
        f"{result['title']}, batch {result['batch_size']}, after {epochs} of FOP\n"
        f"one step each with the same curvature; learning rate {result['lr']:g}, "
        f"damping {result['damping']:g}, seed {result['seed']}"
    )
    handles = [Line2D([], [], label=f"the point: loss {_number(result['origin']['whole'])}", **DOT)]
    for name, step in result["steps"].items():
        ends = f"loss {_number(step['losses_at_end']['whole'])} at its end"
        label = f"{step['what']}: {ends}, {step['share_in_plane']:.0%} of its norm in this plane"
        handles.append(Line2D([], [], label=label, **ARROWS[name]))
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5}
    figure.legend(handles=handles, **place)
    save(figure, path)


def _draw(panel: Axes, result: Mapping[str, Any], part: str) -> Any:
    """Draw the contours of the loss of a part of the batch, and the steps."""
    large = part == "whole"
    losses = np.array(result["losses"][part], dtype=float)  # NaN, which contours leave out, for None
    if not np.isfinite(losses).any():
        raise ValueError("the loss is not finite anywhere on the surface; give a smaller --lr")
    # At most 22 round levels at equal distances; the highest twentieth of the window has one colour.
    levels = list(MaxNLocator(22).tick_values(np.nanmin(losses), np.nanquantile(losses, 0.95)))
    filled = panel.contourf(result["x"], result["y"], losses, levels, cmap=GREYS, extend="max")
    lines = panel.contour(result["x"], result["y"], losses, levels, colors="#6e6e6e", linewidths=0.6)
    panel.clabel(lines, levels[1 :: 2 if large else 4], fontsize=7 if large else 6, fmt="%.3g")
    panel.set_facecolor("#8c8c8c")  # where the loss is not finite
    panel.set_aspect("equal")  # the axes are orthogonal and of one length: angles are true
    panel.tick_params(labelsize=8)
    scale = 1.0 if large else 0.55
    for name, look in ARROWS.items():
        end = (result["steps"][name]["x"], result["steps"][name]["y"])
        arrow = look | {
            "arrowstyle": "-|>",
            "linewidth": scale * look["linewidth"],
            "shrinkA": 0,
            "shrinkB": 0,
        }
        arrow |= {"mutation_scale": scale * (18 + 2 * look["linewidth"]), "capstyle": "butt"}
        panel.annotate("", end, (0, 0), arrowprops=arrow)
    panel.plot(0, 0, markersize=8 * scale, zorder=6, **DOT)
    return filled


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
