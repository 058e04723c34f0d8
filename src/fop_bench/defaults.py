"""What default options are chosen by: FOP with other values of one option, on short tasks of the race."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fop import FOP
from fop_bench import race
from fop_bench.records import Record, read_lines
from fop_bench.tables import plus_minus, section

TASK = "digits-autoencoder"  # by default: its runs are the shortest, and the measure has no ceiling
# By option, values beside the default.
CANDIDATES: dict[str, Sequence[Any]] = {
    "lr": (0.05, 0.1, 0.4, 0.8),
    "momentum": (0.0, 0.3, 0.8, 0.9),
    "nesterov": (False,),
    "anneal": (True, False),
    "damping": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "stat_decay": (0.0, 0.8, 0.9, 0.95),
    "statistics_rows": (1, 4, 16, None),
    "curvature_interval": (2, 10, 100),
    "sub_batches": (1, 4, 8),
    "eta": (1.0,),
    "adamw_lr": (1e-3, 1e-2, 1e-1),
}
NOTE = (
    "FOP, all other options at their defaults; mean ± standard deviation of {measure} over n seeds that did "
    "not diverge. Seconds: of a processor, one thread. {machine}; source {source}."
)
# Of the lines of an earlier version: every combination of several options, also of other optimizers.
OLD_KEYS = ("task", "optimizer", "options", "seed", "accuracy", "diverged")


def sides(options: Iterable[str], tasks: Sequence[str], device: torch.device) -> list[Record]:
    """Return what to run: on every task the defaults, and the other values of the options."""
    changes = [{}, *({name: value} for name in options for value in CANDIDATES[name])]
    side = partial(race.side_of, "fop-default", keep_norm=True, bf16=False, device=device)
    return [side(task, change) for task in tasks for change in changes]


def read_old(path: Path) -> list[Record]:
    """Return the lines that an earlier version wrote, with the keys of today's; none of another file."""
    head = path.read_bytes().partition(b"\n")[0] if path.exists() else b""
    rows = read_lines(path, OLD_KEYS, "defaults") if b'"accuracy": ' in head else []
    for row in rows:
        where, accuracy = row["environment"], row["accuracy"]
        row |= {"measure": "accuracy, %", "value": None if accuracy is None else 100 * accuracy}
        row |= {"machine": where["device"], "source": where["git"]["commit"], "processor_seconds": None}
    return rows


def defaults_table(rows: Sequence[Record]) -> str:
    """Lay out a section a task and option, the default first, from the lines alone."""
    default = FOP(nn.Linear(1, 1)).defaults
    found: dict[tuple[Any, tuple[str, ...]], dict[str, list[Record]]] = {}
    for row in rows:
        changed = {k: v for k, v in row["options"].items() if k not in race.OPTIONS["fop-default"]}
        label = ", ".join(map(str, changed.values()))
        label = label if row["optimizer"] == "fop-default" else f"{row['optimizer']}: {label}"
        place = row["task"], row["machine"], row["source"]
        found.setdefault((place, (*changed,)), {}).setdefault(label, []).append(row)
    sections = []
    for (place, names), by_label in found.items():
        if names:
            title, unchanged = ", ".join(names), found.get((place, ()), {}).get("")
            every = {f"**{default[title]}** (default)": unchanged} if unchanged else {}
            cells = [{title: label, **_cells(runs)} for label, runs in (every | by_label).items()]
            note = NOTE.format(**next(iter(by_label.values()))[0])
            sections.append(section(f"{title}: {place[0]}", note, cells))
    return "\n\n".join(sections) + "\n"


def _cells(runs: Sequence[Record]) -> Record:
    ended = [run for run in runs if not run["diverged"]]
    value = plus_minus((run["value"] for run in ended), 2 if "accuracy" in runs[0]["measure"] else 4)
    seconds = [run["processor_seconds"] for run in ended if run["processor_seconds"] is not None]
    shown = f"{fmean(seconds):.0f}" if seconds else "–"
    return {"n": len(ended), "diverged": len(runs) - len(ended), "value": value, "seconds": shown}
