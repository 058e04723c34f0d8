"""README.md and plots of `fop-bench run`'s studies, made from their JSON lines alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from fop_bench import plots
from fop_bench import study as tables
from fop_bench.paper import PAPER_TABLES, paper_section
from fop_bench.records import Record, of_one_commit, read_runs, write_text
from fop_bench.study import Study
from fop_bench.tables import markdown_table

Drawings = dict[str, Callable[[Path], None]]
TIMES = {
    True: "Seconds are processor time of the training, without evaluation: the runs shared the machine, and "
    "with one thread this is the time on an idle one.",
    False: "Seconds are wall time of the training, without evaluation.",
}
AGAINST = (
    "FOP against the others: how many times fewer epochs and seconds it takes (the other's mean over FOP's, "
    "± from both standard deviations), where both reached the target with every seed. *Ahead* and *behind*: "
    "the means differ by more than the pooled standard deviation over the seeds; *within the spread*: they "
    "do not. That is no test of significance, and nothing is claimed from single runs."
)


def write_report(folder: Path) -> Path:
    """Write ``folder``/README.md and its plots from the JSON lines in there; return its path."""
    text, drawings = report(folder)
    for name, draw in drawings.items():
        draw(folder / name)
    return write_text(folder / "README.md", text)


def report(folder: Path) -> tuple[str, Drawings]:
    """Return what README.md says, and by the name of every picture what draws it."""
    runs, drawings = of_one_commit(read_runs(folder)), Drawings()
    parts = [
        "# Results of `fop-bench run`",
        "Made by `fop-bench report` from the JSON lines in this folder; do not edit. Every line holds its "
        "commit, versions, device and command. Values are mean ± sample standard deviation over the runs; "
        "epochs and seconds to a target are over the runs that reached it. A diverged run counts as that and "
        "nothing else.",
    ]
    for recipe, of_recipe in groupby(tables.studies(runs), key=lambda study: study.recipe):
        for task, of_task in groupby(of_recipe, key=lambda study: study.task):
            each = list(of_task)
            lines = [run for study in each for run in study.runs["run"]]
            parts += [f"## {recipe}, {task}: {lines[0]['title']}", *_how_to_repeat(lines)]
            for study in each:
                parts += _comparison(study, drawings)
        if table := PAPER_TABLES.get(recipe):
            heading = f"## {recipe}: Table {table.number} of the paper, {table.title}"
            parts += [heading, *paper_section(recipe, runs)]
    return "\n\n".join(parts) + "\n", drawings


def _how_to_repeat(runs: list[Record]) -> list[str]:
    def listed(template: str) -> str:
        return ", ".join(sorted({template.format(**run) for run in runs}))

    commands = sorted({str(run["environment"]["command"]) for run in runs})
    parts = [
        "### How to repeat",
        "\n".join(["```", *commands, "```"]),
        f"{len(runs)} runs, {sum(run['diverged'] for run in runs)} diverged. Data: {listed('{data}')}; "
        f"trained on {listed('{train_samples} ({phase})')} samples, judged by "
        f"{listed('{evaluated_samples} {evaluated_on} samples ({phase})')}. "
        f"Parameters: {listed('{parameters:,}')}.",
        environments(runs),
    ]
    warned = Counter(" ".join(str(each).split()) for run in runs for each in run["warnings"])
    if warned:
        rows = [[text.replace("|", "\\|"), count] for text, count in warned.most_common()]
        parts.append(_folded("Warnings during the runs", markdown_table(["warning", "times"], rows)))
    return parts


def environments(runs: Sequence[Record]) -> str:
    """Return a table of where, when and from which commits runs were made."""

    def source(git: dict[str, Any] | None) -> str:
        if git is None:
            return "**in no checkout: unknown, with uncommitted changes for all we know**"
        return f"`{git['commit']}`" + (" **with uncommitted changes**" if git["dirty"] else "")

    table = pd.DataFrame([run["environment"] for run in runs])
    table = table.rename(columns={"processor": "kind", "python": "Python", "date": "days"})
    table["commit"], table["days"] = table["git"].map(source), table["days"].astype(str).str[:10]
    keys = ["device", "kind", "threads", "torch", "Python", "fop", "commit"]
    rows = [
        [*key, " to ".join(dict.fromkeys((days.min(), days.max()))), len(days)]
        for key, days in table.groupby(keys)["days"]
    ]
    return markdown_table([*keys, "days", "runs"], rows)


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def _comparison(study: Study, drawings: Drawings) -> list[str]:
    if study.is_map:
        note = "Every combination of options; none is chosen."
        return [f"### Study {study.name}", note, tables.comparison_table(study)]
    parts = [f"### Study {study.name}", *(f"**{sentence}**" for sentence in tables.unfair(study))]
    if study.phase("final").empty:
        parts.append("No final run yet.")
    else:
        on_cpu = {run["environment"]["processor"] == "cpu" for run in study.runs["run"]}
        times = " ".join(text for cpu, text in TIMES.items() if cpu in on_cpu)
        parts += [tables.comparison_table(study), f"Bold: the best at its batch size. {times}"]
        if table := tables.fop_table(study):
            label = study.labels["fop"]
            parts += [AGAINST if label == "FOP" else f"{AGAINST} FOP is here “{label}”.", table]
        parts += _plots(study, drawings)
    if options := tables.options_table(study):
        parts.append(_folded("All options of the final runs", options))
    tuning = study.phase("tuning")
    if tuning.empty:
        return [*parts, "There are no tuning runs of this study."]
    counts = sorted(set(tuning.groupby(tables.SIDE, observed=True).size()))
    parts.append(f"Tuning runs of an optimizer at a batch size: {'/'.join(map(str, counts))}.")
    note = "The options with the highest mean accuracy over the epochs go into the final runs."
    return [*parts, _folded(f"All {len(tuning)} tuning runs", f"{note}\n\n{tables.tuning_table(study)}")]


def _plots(study: Study, drawings: Drawings) -> list[str]:
    stem = re.sub(r"[^a-z0-9]+", "-", f"{study.recipe}-{study.task}-{study.name}".lower()).strip("-")
    drawings[f"{stem}-curves.png"] = partial(plots.plot_curves, study)
    parts = [
        f"![Curves]({stem}-curves.png)",
        "Lines: mean over the final runs that did not diverge; bands: their range; horizontal: the targets.",
    ]
    if (reference := plots.speed_up_reference(study)) is not None:
        drawings[f"{stem}-speed-up.png"] = partial(plots.plot_speed_up, study, reference)
        parts += [
            f"![Speed-up]({stem}-speed-up.png)",
            f"Speed-up: the mean epochs (seconds) to the target of {study.labels[reference[1]]} at batch "
            f"{reference[0]}, the smallest, over a contender's at each batch size. A point is there "
            "only if every seed reached the target.",
        ]
    if layered := plots.layered_runs(study):
        drawings[f"{stem}-layers.png"] = partial(plots.plot_layers, layered)
        *symbols, last = plots.noted(layered).values()
        of_what = f"{', '.join(symbols)} and {last} of FOP's layers"
        note = f"{of_what} after every epoch; grey: the layer had no pair of sub-batches."
        parts += [f"![Layers]({stem}-layers.png)", note]
    return parts
