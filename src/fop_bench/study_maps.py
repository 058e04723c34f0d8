"""Map studies: FOP against K-FAC over a grid of learning rates and dampings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fop_bench.defaults_report import markdown_table
from fop_bench.report import plus_minus
from fop_bench.run_records import Run
from fop_bench.study_groups import Group, Study, compare, one_setting
from fop_bench.summary import Statistic

Point = tuple[float, float]
CLIPS = {"": "with KL clip", "-noclip": "without KL clip"}


@dataclass(frozen=True)
class Cell:
    """FOP's and K-FAC's runs at one learning rate and damping; None where one of them has none."""

    fop: Group | None
    kfac: Group | None

    @property
    def lost(self) -> str:
        """Whose runs diverged, if any did."""
        groups = [group for group in (self.kfac, self.fop) if group is not None and group.diverged]
        return ", ".join(
            _family(group) + ("" if not group.finished else f" {group.diverged} of {len(group.runs)}")
            for group in groups
        )

    def difference(self) -> float | None:
        """Give FOP's mean final accuracy less K-FAC's, in percentage points."""
        pair = self.finals("accuracy")
        return None if pair is None else 100 * (pair[0].mean - pair[1].mean)

    def loss_ratio(self) -> float | None:
        """Give log2 of K-FAC's mean final training loss over FOP's: positive where FOP's is lower."""
        pair = self.finals("train_loss")
        if pair is None or min(each.mean for each in pair) <= 0:
            return None
        fop, kfac = pair
        return math.log2(kfac.mean / fop.mean)

    def finals(self, key: str) -> tuple[Statistic, Statistic] | None:
        """Give both sides' value of the last epoch, FOP's first; None if a run is missing or diverged."""
        if self.fop is None or self.kfac is None or self.lost:
            return None
        fop, kfac = self.fop.final(key), self.kfac.final(key)
        assert fop is not None
        assert kfac is not None
        return fop, kfac


def _family(group: Group) -> str:
    return "FOP" if group.contender.startswith("fop") else "K-FAC"


@dataclass(frozen=True)
class Map:
    """One grid at one batch size: the contenders "fop" and "kfac", both with the same ending of the name."""

    title: str
    batch_size: int
    cells: Mapping[Point, Cell]

    @property
    def lrs(self) -> list[float]:
        """Learning rates, upwards."""
        return sorted({lr for lr, _ in self.cells})

    @property
    def dampings(self) -> list[float]:
        """Dampings, upwards."""
        return sorted({damping for _, damping in self.cells})


def maps(study: Study, batch_size: int) -> list[Map]:
    """Give the maps of a batch size: with the KL clip, without it.

    Raises:
        ValueError: a run without learning rate or damping, or several options at one point.
    """
    found: dict[str, dict[Point, dict[str, list[Run]]]] = defaultdict(lambda: defaultdict(dict))
    for run in study.phase("final"):
        contender = str(run["contender"])
        family = next((name for name in ("fop", "kfac") if contender.startswith(name)), None)
        if family is None or run["batch_size"] != batch_size:
            continue
        point = _point(run, study)
        found[contender.removeprefix(family)][point].setdefault(family, []).append(run)
    where = f"{study.recipe}, task {study.task}, study {study.name}"
    return [
        Map(
            CLIPS.get(ending, ending.strip("-")),
            batch_size,
            {point: _cell(families, ending, batch_size, where) for point, families in sorted(points.items())},
        )
        for ending, points in sorted(found.items())
    ]


def _point(run: Run, study: Study) -> Point:
    try:
        return float(run["options"]["lr"]), float(run["options"]["damping"])
    except KeyError as error:
        raise ValueError(
            f"{study.recipe}, task {study.task}, study {study.name}: a run of {run['contender']} has no "
            f"{error} in its options; a map needs lr and damping"
        ) from error


def _cell(families: Mapping[str, list[Run]], ending: str, batch_size: int, where: str) -> Cell:
    for runs in families.values():
        one_setting(runs, where)
    fop, kfac = (
        Group(family + ending, batch_size, families[family]) if family in families else None
        for family in ("fop", "kfac")
    )
    return Cell(fop, kfac)


def map_table(grid: Map) -> str:
    """Give one row for every point: both final accuracies and losses, and the difference."""
    head = ["lr", "damping", "n", "K-FAC accuracy %", "FOP accuracy %", "FOP − K-FAC"]
    head += ["K-FAC train loss", "FOP train loss"]
    rows = [
        [
            f"{lr:g}",
            f"{damping:g}",
            "/".join(str(0 if group is None else len(group.runs)) for group in (cell.kfac, cell.fop)),
            *(_value(group, "accuracy", 2, 100.0) for group in (cell.kfac, cell.fop)),
            _difference(cell),
            *(_value(group, "train_loss", 4, 1.0) for group in (cell.kfac, cell.fop)),
        ]
        for (lr, damping), cell in grid.cells.items()
    ]
    return markdown_table(head, rows)


def _value(group: Group | None, key: str, digits: int, scale: float) -> str:
    if group is None:
        return "not run"
    value = group.final(key)
    if value is None:
        return "diverged"
    lost = f" ({group.diverged} of {len(group.runs)} diverged)" if group.diverged else ""
    return f"{value.mean * scale:.{digits}f}{lost}"


def _difference(cell: Cell) -> str:
    pair = cell.finals("accuracy")
    if pair is None:
        return "–"
    gap = _gap(*pair)
    return ("+" if gap.mean > 0 else "") + plus_minus(gap, 2, scale=100.0)


def _gap(fop: Statistic, kfac: Statistic) -> Statistic:
    """Give the difference of two means, with its standard error for a spread."""
    error = (
        None if fop.std is None or kfac.std is None else math.sqrt(fop.std**2 / fop.n + kfac.std**2 / kfac.n)
    )
    return Statistic(fop.mean - kfac.mean, error, fop.n + kfac.n)


def map_sentence(grid: Map) -> str:
    """Count the points at which FOP ends higher than K-FAC, lower, and within the spread."""
    cells = list(grid.cells.values())
    verdicts = []
    single: list[float] = []
    for cell in cells:
        pair = cell.finals("accuracy")
        if pair is None:
            continue
        verdict = compare(*pair, low=False)
        if verdict is None:
            single.append(pair[0].mean - pair[1].mean)
        else:
            verdicts.append(verdict)
    parts = []
    if verdicts:
        parts.append(
            f"by more than the spread (pooled standard deviation over the seeds) in "
            f"{verdicts.count('ahead of')}, K-FAC higher than FOP in {verdicts.count('behind')}, "
            f"within it in {verdicts.count('within the spread of')}"
        )
    if single:
        parts.append(
            f"{'and ' if parts else ''}with single runs, which say nothing of the spread, in "
            f"{sum(each > 0 for each in single)}, lower in {sum(each < 0 for each in single)}, "
            f"equal in {sum(each == 0 for each in single)}"
        )
    comparison = f"; FOP ends higher than K-FAC {', '.join(parts)}" if parts else ""
    return (
        f"{grid.title[:1].upper()}{grid.title[1:]}: of {len(cells)} points {len(verdicts) + len(single)} can "
        f"be compared{comparison}. Points with a diverged run: "
        f"{_lost(cell.kfac for cell in cells)} of K-FAC, {_lost(cell.fop for cell in cells)} of FOP."
    )


def _lost(groups: Iterable[Group | None]) -> int:
    return sum(group is not None and group.diverged > 0 for group in groups)
