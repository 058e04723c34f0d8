"""Writes docs/report.md and its pictures, from the JSON lines in records/race and records/overhead-* alone.

Then the other tables of the race: race.md and those of `tools/race_results.py`. `fop-bench report` calls it;
`fop-bench verify-records` compares the pages with what it gives.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fop_bench import overhead, race
from fop_bench.optimizers import PEERS
from fop_bench.plots import BROWN, STYLES, save
from fop_bench.race_tasks import TASKS
from fop_bench.records import Record, record_files
from fop_bench.study_report import environments

ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE = ROOT / "records", ROOT / "docs/report.md"
RACE = RECORDS / "race/race.jsonl"
INTRO = f"""# The race and the cost of a step

Made by `fop-bench report` from the JSON lines in [records/race](../records/race/README.md) and
`records/overhead-*` alone; do not edit.

## The race: values at the end

Of every optimizer the newest runs of a task; variants, and what earlier sources of the library did, are in
[race.md](../records/race/race.md). {race.NOTE}

In the pictures a small point is a seed and a large one the mean: filled after a search of the rate, hollow at
the default or at a rate that was given. Lines: the mean over the seeds on the way, over steps and over
processor seconds, of runs that noted it. Tables of environments count all runs, also those of the search."""
TARGETS = "report-targets.png"
SMALLEST = "cifar-half-500"  # batch
TO_TARGET = f"""### Steps to a target by batch size

CIFAR-10: the accuracy at the end, and steps and processor seconds until an evaluation reached
{TASKS[SMALLEST].target:g} %, the mean over the seeds at the rate of the tables above; no point where a
seed never did. Grey: as many fewer steps as the batch is larger, from the best at the smallest. The noise
share ν that FOP measures is the mean over the layers and the evaluations of a run.

![Steps and seconds to the target](assets/{TARGETS})"""
STEPS = f"""## The cost of a step

The newest record first.
{overhead.NOTE}

In the pictures a small point is a round and a large one the median: filled for plain steps, hollow for those
with statistics and inversion. What could not be measured has no point."""


def page(pictures: Path | None = None) -> str:
    """Return the page; draw its pictures into a folder if that is given."""
    parts, newest = [INTRO], newest_sides()
    for task, sides in newest.items():
        picture, rows = f"report-{task}.png", [run for side in sides for run in side]
        parts += [f"#{race.race_table(rows, note='').strip()}", *sources(rows, picture)]
        if pictures:
            draw_task(sides, pictures / picture)
    cifar = {task: sides for task, sides in newest.items() if task.startswith("cifar-half")}
    if cifar:
        parts.append(TO_TARGET)
        if pictures:
            draw_targets(cifar, pictures / TARGETS)
    parts.append(STEPS)
    for name, rows in overhead_records().items():
        picture = f"report-{name}.png"
        rounds = f"Rounds: {', '.join(sorted({str(row['rounds']) for row in rows}))}."
        table = overhead.overhead_table(rows, note=rounds).strip().replace("## ", "#### ")
        parts += [f"### records/{name}", table, *sources(rows, picture)]
        if pictures:
            draw_steps(overhead.newest(rows), pictures / picture)
    return "\n\n".join(parts).replace(" \n", "\n") + "\n"


def newest_sides() -> dict[str, list[list[Record]]]:
    """Return the newest runs of every optimizer by task, the best first.

    Without variants of options, and without those of another number of steps than the task's.
    """
    found: dict[str, dict[str, list[Record]]] = {task: {} for task in TASKS}
    for (task, variant), side in race.newest(race.read(RACE)).items():
        if variant == side[0]["optimizer"]:
            found[task][variant] = side
    best_first = {
        task: sorted(of.values(), key=lambda side: race.cells_of(side)[0]) for task, of in found.items()
    }
    return {task: sides for task, sides in best_first.items() if sides}


def overhead_records() -> dict[str, list[Record]]:
    """Return the lines of every folder with a record of overhead, the newest first."""
    files = {folder: record_files(folder) for folder in RECORDS.glob("overhead-*")}
    read = {
        folder.name: [row for file in of for row in overhead.read(file)] for folder, of in files.items() if of
    }
    dates = {name: max(row["environment"]["date"] for row in rows) for name, rows in read.items()}
    return {name: read[name] for name in sorted(read, key=lambda name: dates[name], reverse=True)}


def sources(rows: Sequence[Record], picture: str) -> list[str]:
    """Return the picture of a table, where and from what its rows were made, and by which commands."""
    commands = sorted({str(row["environment"]["command"]) for row in rows})
    shown = f"![The values of the table](assets/{picture})"
    why = "<!-- not run: minutes to hours; they are what made the records -->"
    return [shown, environments(rows), "\n".join([why, "```", *commands, "```"])]


# --- Pictures


def draw_task(sides: Sequence[Sequence[Record]], path: Path) -> None:
    """Draw values by optimizer, and over steps and processor seconds."""
    figure, names, measure = figure_of(3, len(sides)), [], sides[0][0]["measure"]
    left, middle, right = figure.subplots(1, 3)
    for at, side in enumerate(sides):
        found, _, runs = race.at_best_rate(side)
        ended = [run for run in runs if not run["diverged"]]
        look = look_of(side[0]["optimizer"], filled=len(found) > 1)
        mark(left, [(run["value"], at) for run in ended], look, fmean)
        mark(right, [(run["processor_seconds"], run["value"]) for run in ended], look, fmean)
        if curves := [run["curve"] for run in ended if run["curve"]]:
            # All have their evaluations at the same steps; the first is far from the others.
            way = [[*map(fmean, zip(*at, strict=True))] for at in zip(*curves, strict=True)][1:]
            for panel, time in ((middle, 0), (right, 2)):
                panel.plot([at[time] for at in way], [at[1] for at in way], color=look["color"], linewidth=1)
        names.append("{optimizer}: n = {n}, {diverged} diverged".format(**race.cells_of(side)[1]))
    name_rows(left, names)
    left.set_xlabel(measure)
    middle.grid(alpha=0.25)
    middle.set(xlabel="steps", ylabel=measure)
    right.set(xlabel="processor seconds", ylabel=measure)
    right.set_xlim(left=0)
    save(figure, "{task}: batch {batch_size}, {steps} steps".format(**sides[0][0]), path)


def draw_targets(cifar: Mapping[str, Sequence[Sequence[Record]]], path: Path) -> None:
    """Draw accuracy, steps and seconds to the target, and noise, of CIFAR-10 over the batch size."""
    noise: dict[str, list[tuple[float, float]]] = {}
    ends: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[tuple[float, ...]]] = {}
    for task, sides in cifar.items():
        for side in sides:
            todo, name = TASKS[task], side[0]["optimizer"]
            runs = [run for run in race.at_best_rate(side)[2] if not run["diverged"]]
            if name in ("fop", "kfac") or not runs:  # variants of the default
                continue
            ends.setdefault(name, []).append((todo.batch_size, fmean(run["value"] for run in runs)))
            if shares := [share for run in runs for share in run["noise"]]:
                noise.setdefault(name, []).append((todo.batch_size, fmean(shares)))
            found = [race.reached(run, todo.target, todo.highest) for run in runs]
            there = [each for each in found if each is not None]
            if len(there) == len(runs):
                means = map(fmean, zip(*there, strict=True))
                times.setdefault(name, []).append((todo.batch_size, *means))
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    panels, target = figure.subplots(1, 4), f"to {TASKS[SMALLEST].target:g} %"
    for name, points in ends.items():
        look = {"marker": "o", **STYLES[name.removesuffix("-default")]}
        label = PEERS[name.removesuffix("-default")].label
        label += ", defaults" if name.endswith("-default") else ", best rate"
        panels[0].plot(*zip(*sorted(points), strict=True), label=label, **look)
        if name in noise:
            panels[3].plot(*zip(*sorted(noise[name]), strict=True), **look)
        for at, panel in enumerate(panels[1:3], start=1):
            if name in times:
                sizes, *each = zip(*sorted(times[name]), strict=True)
                panel.plot(sizes, each[at - 1], **look)
    if times:
        first = min(min(points) for points in times.values())
        sizes = sorted({point[0] for points in times.values() for point in points})
        panels[1].plot(sizes, [first[1] * first[0] / size for size in sizes], color="0.7", label="ideal")
        panels[1].set_yscale("log")
    titles = "accuracy at the end, %", f"steps {target}", f"processor seconds {target}", "noise share ν"
    for panel, title in zip(panels, titles, strict=True):
        panel.set(xscale="log", xlabel="batch size", title=title)
        panel.grid(alpha=0.25)
    shown = " or ".join(f"{TASKS[task].steps} at batch {TASKS[task].batch_size:,}" for task in cifar)
    save(figure, f"CIFAR-10, steps: {shown}", path)


def draw_steps(newest: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Draw times over SGD's, a panel a workload."""
    figure = figure_of(len(newest), max(map(len, newest.values())))
    panels = figure.subplots(1, len(newest), squeeze=False)[0]
    for panel, (title, rows) in zip(panels, newest.items(), strict=True):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        for at, row in enumerate(rows):
            for kind, ratios in row.get("ratios_to_sgd", {}).items():
                look = look_of(row["optimizer"], filled=kind == "plain")
                mark(panel, [(ratio, at) for ratio in ratios], look, median)
        name_rows(panel, [row["label"] for row in rows])
        panel.set_title(title, fontsize=10)
    save(figure, "Time of a step over that of SGD's plain step", path)


def figure_of(columns: int, rows: int) -> Figure:
    """Return an empty figure for rows of points."""
    return Figure(figsize=(4.8 * columns, 1.4 + 0.3 * rows), layout="constrained")


def look_of(optimizer: str, *, filled: bool) -> dict[str, Any]:
    """Return the colour of an optimizer's points, and of the inside of the large one."""
    color = STYLES.get(optimizer.removesuffix("-default"), BROWN)["color"]
    return {"color": color, "markerfacecolor": color if filled else "white"}


def mark(
    panel: Axes, points: Sequence[tuple[float, float]], look: dict[str, Any], middle: Callable[..., float]
) -> None:
    """Draw points small, and their middle large."""
    panel.grid(alpha=0.25)
    if points:
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, ".", color=look["color"], alpha=0.5)
        panel.plot(middle(xs), middle(ys), "o", **look)


def name_rows(panel: Axes, names: Sequence[str]) -> None:
    """Name the rows of points, the first on top."""
    panel.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))


def main() -> None:
    """Write the page with its pictures, and the other tables of the race."""
    text = page(PAGE.parent / "assets")
    results = runpy.run_path(str(ROOT / "tools/race_results.py"))
    pages = {PAGE: text, RACE.with_suffix(".md"): race.race_table(race.read(RACE))}
    for path, made in (pages | {path: results["made"](path) for path in results["PAGES"]}).items():
        path.write_text(made, encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
