"""Map studies: FOP against K-FAC over a grid of learning rates and dampings, one row a point.

The columns up to "FOP train loss" are those of the table. Beside them ``difference`` of the final accuracies
(FOP's less K-FAC's, in points) and ``loss_ratio`` (log2 of K-FAC's final training loss over FOP's), both NaN
where a run is missing or diverged; ``verdict`` on the accuracies; ``lost``, whose runs diverged.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fop_bench.report import markdown_table
from fop_bench.study import NAN, Study, one_setting
from fop_bench.summary import Statistic, compare, plus_minus, statistic


def maps(study: Study, batch_size: int) -> dict[str, pd.DataFrame]:
    """Return the maps of a batch size by title: with the KL clip, without it.

    Raises:
        ValueError: a run without learning rate or damping, or several options at one point.
    """
    final = study.phase("final")[lambda runs: runs["batch_size"] == batch_size]
    parts = final["contender"].str.extract("^(?P<family>fop|kfac)(?P<ending>.*)")
    final = final.join(parts).dropna(subset="family")
    for axis in ("lr", "damping"):
        final[axis] = [run["options"].get(axis) for run in final["run"]]
        for name in final["contender"][final[axis].isna()]:
            raise ValueError(
                f"{study.where}: a run of {name} has no {axis!r} in its options; a map needs lr and damping"
            )
    found = {}
    for ending, runs in final.groupby("ending"):
        title = {"": "with KL clip", "-noclip": "without KL clip"}.get(ending, ending.strip("-"))
        points = runs.groupby(["lr", "damping"])
        where = f"{study.where}, batch {batch_size}"
        rows = [{"lr": lr, "damping": damping, **_point(each, where)} for (lr, damping), each in points]
        found[title] = pd.DataFrame(rows)
    return found


def _point(runs: pd.DataFrame, where: str) -> dict[str, Any]:
    sides = {label: runs[runs["family"] == name] for label, name in (("K-FAC", "kfac"), ("FOP", "fop"))}
    lost = {label: side["diverged"].sum() for label, side in sides.items()}
    for label, side in sides.items():
        one_setting(side, f"{where}: {label}")
    (kfac, fop), losses = (
        [statistic(side[key]) for side in sides.values()] for key in ("accuracy", "train_loss")
    )
    row: dict[str, Any] = {"n": "/".join(str(len(side)) for side in sides.values())}
    row |= {f"{label} accuracy %": _final(side, "accuracy", 2, 100.0) for label, side in sides.items()}
    row["FOP − K-FAC"] = "–"
    row |= {f"{label} train loss": _final(side, "train_loss", 4, 1.0) for label, side in sides.items()}
    row |= {"K-FAC lost": lost["K-FAC"] > 0, "FOP lost": lost["FOP"] > 0, "lost": ""}
    for label, count in lost.items():
        n = len(sides[label])
        row["lost"] += f"{label}{f' {count} of {n}' if count < n else ''}\n" if count else ""
    row |= {"difference": NAN, "loss_ratio": NAN, "verdict": None}
    if kfac is None or fop is None or any(lost.values()):
        return row
    error = None  # the standard error of the difference
    if kfac.std is not None and fop.std is not None:
        error = math.sqrt(kfac.std**2 / kfac.n + fop.std**2 / fop.n)
    gap = Statistic(fop.mean - kfac.mean, error, fop.n + kfac.n)
    row["FOP − K-FAC"] = ("+" if gap.mean > 0 else "") + plus_minus(gap, 2, scale=100.0)
    row |= {"difference": 100 * gap.mean, "verdict": compare(fop, kfac, low=False)}
    above, below = (each.mean if each else 0.0 for each in losses)
    return row | ({"loss_ratio": math.log2(above / below)} if min(above, below) > 0 else {})


def _final(side: pd.DataFrame, key: str, digits: int, scale: float) -> str:
    value, diverged = statistic(side[key]), side["diverged"].sum()
    if value is None:
        return "diverged" if len(side) else "not run"
    lost = f" ({diverged} of {len(side)} diverged)" if diverged else ""
    return f"{value.mean * scale:.{digits}f}{lost}"


def map_table(points: pd.DataFrame) -> str:
    """Return one row for every point: both final accuracies and losses, and the difference."""
    shown = points.loc[:, slice("lr", "FOP train loss")]
    shown = shown.assign(**{axis: shown[axis].map("{:g}".format) for axis in ("lr", "damping")})
    return markdown_table(shown, shown.to_numpy())


def map_sentence(title: str, points: pd.DataFrame) -> str:
    """Count the points at which FOP ends higher than K-FAC, lower, and within the spread."""
    compared = points[points["difference"].notna()]
    verdicts = compared["verdict"].value_counts()
    single = compared["difference"][compared["verdict"].isna()]
    parts = []
    if len(verdicts):
        parts.append(
            "by more than the spread (pooled standard deviation over the seeds) in "
            f"{verdicts.get('ahead', 0)}, K-FAC higher than FOP in {verdicts.get('behind', 0)}, "
            f"within it in {verdicts.get('within the spread', 0)}"
        )
    if len(single):
        parts.append(
            f"{'and ' if parts else ''}with single runs, which say nothing of the spread, in "
            f"{(single > 0).sum()}, lower in {(single < 0).sum()}, equal in {(single == 0).sum()}"
        )
    comparison = f"; FOP ends higher than K-FAC {', '.join(parts)}" if parts else ""
    lost = f"{points['K-FAC lost'].sum()} of K-FAC, {points['FOP lost'].sum()} of FOP"
    return (
        f"{title[:1].upper()}{title[1:]}: of {len(points)} points {len(compared)} can be compared"
        f"{comparison}. Points with a diverged run: {lost}."
    )
