"""README.md and plots of `fop-bench run`'s studies, made from their JSON lines alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fop_bench.defaults_report import markdown_table
from fop_bench.paper import PAPER_TABLES
from fop_bench.paper_report import paper_section
from fop_bench.run_records import Run, commit_of, of_one_commit, read_runs
from fop_bench.study_groups import Study, clock, studies
from fop_bench.study_maps import map_sentence, map_table, maps
from fop_bench.study_plots import (
    layered_runs,
    plot_curves,
    plot_layers,
    plot_maps,
    plot_speed_up,
    speed_up_reference,
)
from fop_bench.study_tables import (
    comparison_table,
    options_table,
    ratio_table,
    tuning_counts,
    tuning_table,
    unfair,
)
from fop_bench.study_words import in_words

TIME_ON_A_CPU = (
    "Seconds are processor time of the training, without evaluation: the runs shared the machine, and with "
    "one thread this is the time on an idle one."
)
TIME_ON_A_GPU = "Seconds are wall time of the training, without evaluation."


def write_report(folder: Path, commit: str | None = None) -> Path:
    """Write ``folder``/README.md and its plots from the JSON lines in ``folder``; return its path.

    Args:
        folder: holds the lines, and gets the report.
        commit: the one to report where a study has runs of several; its first characters are enough.

    Raises:
        ValueError: no runs, a broken line, or runs that no report may mix.
    """
    read = read_runs(folder)
    runs = of_one_commit(read, commit)
    parts = [
        "# Results of `fop-bench run`",
        "Made by `fop-bench report` from the JSON lines in this folder; do not edit. Every line holds its "
        "commit, versions, device and command. Values are mean ± sample standard deviation over the runs; "
        "epochs and seconds to a target are over the runs that reached it. A diverged run counts as that and "
        "nothing else.",
    ]
    if len(runs) < len(read):
        parts.append(f"**{len(read) - len(runs)} runs of other commits than {commit} are left out.**")
    for recipe, of_recipe in groupby(studies(runs), key=lambda study: study.recipe):
        for task, of_task in groupby(of_recipe, key=lambda study: study.task):
            parts += _task(list(of_task), task, folder)
        if recipe in PAPER_TABLES:
            table = PAPER_TABLES[recipe]
            heading = f"## {recipe}: Table {table.number} of the paper, {table.title}"
            parts += [heading, *paper_section(recipe, runs)]
    report = folder / "README.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _task(of_task: Sequence[Study], task: str, folder: Path) -> list[str]:
    runs = [run for study in of_task for run in study.runs]
    parts = [f"## {of_task[0].recipe}, {task}: {runs[0]['title']}", *_how_to_repeat(runs)]
    for study in of_task:
        parts += _map(study, folder) if study.name.startswith("map") else _comparison(study, folder)
    return parts


# What was run, and where


def _how_to_repeat(runs: Sequence[Run]) -> list[str]:
    commands = sorted({str(run["environment"]["command"]) for run in runs})
    data = sorted({str(run["data"]) for run in runs})
    judged = sorted(
        {f"{run['evaluated_samples']} {run['evaluated_on']} samples ({run['phase']})" for run in runs}
    )
    sizes = sorted({f"{run['train_samples']} ({run['phase']})" for run in runs})
    parameters = sorted({f"{run['parameters']:,}" for run in runs})
    warned = Counter(str(each) for run in runs for each in run["warnings"])
    parts = [
        "### How to repeat",
        "```\n" + "\n".join(commands) + "\n```",
        f"{len(runs)} runs, {sum(run['diverged'] for run in runs)} diverged. Data: {', '.join(data)}; "
        f"trained on {', '.join(sizes)} samples, judged by {', '.join(judged)}. "
        f"Parameters: {', '.join(parameters)}.",
        _environments(runs),
    ]
    if warned:
        rows = [
            [" ".join(text.split()).replace("|", "\\|"), str(count)] for text, count in warned.most_common()
        ]
        parts.append(_folded("Warnings during the runs", markdown_table(["warning", "times"], rows)))
    return parts


def _environments(runs: Sequence[Run]) -> str:
    counts: Counter[tuple[str, ...]] = Counter()
    days: dict[tuple[str, ...], set[str]] = {}
    for run in runs:
        where = run["environment"]
        row = (
            str(where["device"]),
            str(where["processor"]),
            str(where["threads"]),
            str(where["torch"]),
            str(where["python"]),
            str(where["fop"]),
            _source(run),
        )
        counts[row] += 1
        days.setdefault(row, set()).add(str(where["date"])[:10])
    head = ["device", "kind", "threads", "torch", "Python", "fop", "commit", "days", "runs"]
    rows = [
        [*row, " to ".join(dict.fromkeys((min(days[row]), max(days[row])))), str(count)]
        for row, count in sorted(counts.items())
    ]
    return markdown_table(head, rows)


def _source(run: Run) -> str:
    git = run["environment"]["git"]
    if git is None:
        return "**in no checkout: unknown, with uncommitted changes for all we know**"
    return f"`{commit_of(run)}`" + (" **with uncommitted changes**" if git["dirty"] else "")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


# Studies


def _comparison(study: Study, folder: Path) -> list[str]:
    parts = [f"### Study {study.name}", *(f"**{sentence}**" for sentence in unfair(study))]
    final = study.phase("final")
    if final:
        parts += [comparison_table(study), _about_time(study)]
        ratios = ratio_table(study)
        if ratios is not None:
            parts += [
                "How many times fewer epochs and seconds FOP takes (the other's mean over FOP's, ± from both "
                "standard deviations), where both reached the target with every seed:",
                ratios,
            ]
        parts += ["#### In words", *in_words(study), *_plots(study, folder)]
    else:
        parts.append("No final run yet.")
    return [*parts, *_tuning(study)]


def _about_time(study: Study) -> str:
    on_cpu = {clock(run) == "processor_seconds" for run in study.runs}
    return " ".join(text for cpu, text in ((True, TIME_ON_A_CPU), (False, TIME_ON_A_GPU)) if cpu in on_cpu)


def _tuning(study: Study) -> list[str]:
    options = options_table(study)
    parts = [] if options is None else [_folded("All options of the final runs", options)]
    if not study.phase("tuning"):
        return [*parts, "There are no tuning runs of this study."]
    summary = f"All {len(study.phase('tuning'))} tuning runs"
    note = "The options with the highest mean accuracy over the epochs go into the final runs."
    return [*parts, tuning_counts(study), _folded(summary, f"{note}\n\n{tuning_table(study)}")]


def _plots(study: Study, folder: Path) -> list[str]:
    stem = _stem(study)
    plot_curves(study, folder / f"{stem}-curves.png")
    parts = [
        f"![Curves]({stem}-curves.png)",
        "Lines: mean over the final runs that did not diverge; bands: their range; horizontal: the targets.",
    ]
    reference = speed_up_reference(study)
    if reference is not None:
        plot_speed_up(study, reference, folder / f"{stem}-speed-up.png")
        parts += [
            f"![Speed-up]({stem}-speed-up.png)",
            f"Speed-up: the mean epochs (seconds) to the target of {reference.label} at batch "
            f"{reference.batch_size}, the smallest, over a contender's at each batch size. A point is there "
            "only if every seed reached the target.",
        ]
    elif len({run["batch_size"] for run in study.phase("final")}) > 1:
        parts.append(
            "No plot of the speed-up: neither SGD, K-FAC nor FOP reached every target with every seed at the "
            "smallest batch size."
        )
    layered = layered_runs(study)
    if layered:
        plot_layers(layered, folder / f"{stem}-layers.png")
        parts += [
            f"![Layers]({stem}-layers.png)",
            "β, η and ρ of FOP's layers after every epoch; grey: the layer had no pair of sub-batches.",
        ]
    return parts


def _map(study: Study, folder: Path) -> list[str]:
    parts = [
        f"### Study {study.name}",
        "Every point of the grid was run with every seed; nothing is selected.",
    ]
    for size in study.batch_sizes:
        grids = maps(study, size)
        if not grids:
            parts.append(f"No run of FOP or K-FAC at batch {size}.")
            continue
        image = f"{_stem(study)}-batch-{size}.png"
        title = f"{study.recipe}, {study.task}, {study.name}: batch {size}"
        plot_maps(grids, title, folder / image)
        epochs = "/".join(
            map(str, sorted({run["epochs"] for run in study.runs if run["batch_size"] == size}))
        )
        parts += [
            f"#### Batch {size}, {epochs} epochs",
            f"![Map]({image})",
            "Red: FOP ends better, blue: K-FAC does. Hatched: a run diverged, and whose. Accuracy in "
            "percentage points; loss as the binary logarithm of K-FAC's over FOP's: 1 is half the loss.",
        ]
        for grid in grids:
            parts += [map_sentence(grid), _folded(f"Batch {size}, {grid.title}", map_table(grid))]
    return [*parts, "Differences ± their standard error, from the standard deviations over n seeds of each."]


def _stem(study: Study) -> str:
    name = f"{study.recipe}-{study.task}-{study.name}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
