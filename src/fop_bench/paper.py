"""The paper's tables (arXiv:2508.13898, Tables 1 to 4), with what was measured here beside every cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from fop_bench.records import Record, of_one_commit, read_runs
from fop_bench.study import UNITS, reached, studies
from fop_bench.tables import markdown_table, plus_minus


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper; in its text "–" where the paper reports none, the target was not reached."""

    number: int
    title: str
    text: str  # contenders down and batch sizes or tasks across, or the other way round
    target: float | None = None  # the accuracy that epochs and time are measured to; None for errors
    unit: float = 1.0  # seconds of the table's unit of time

    @property
    def cells(self) -> pd.DataFrame:
        """The text as a table of strings."""
        return pd.read_csv(StringIO(self.text), sep=r"\s*\|\s*", index_col=0, engine="python", dtype=str)


# As the paper names the optimizers; in Table 4 SGD is "baseline (SGD)".
LABELS = {"sgd": "SGD", "adamw": "AdamW", "shampoo": "Shampoo", "lamb": "LAMB", "kfac": "K-FAC", "fop": "FOP"}

# By recipe.
PAPER_TABLES = {
    "cifar10-resnet18": PaperTable(
        1,
        "CIFAR-10, ResNet-18, epochs / seconds to 91 % top-1",
        """
        batch          | sgd        | adamw      | kfac       | fop
        2048 (2 GPUs)  | 58 / 743.3 | 61 / 768.4 | 37 / 588.7 | 29 / 475.2
        4096 (2 GPUs)  | 73 / 457.9 | 73 / 454.0 | 34 / 270.5 | 22 / 181.9
        8192 (2 GPUs)  | –          | –          | 71 / 296.4 | 35 / 157.5
        16384 (2 GPUs) | –          | –          | 99 / 186.4 | 58 / 121.2
        32768 (2 GPUs) | –          | –          | –          | 60 / 90.6
        50000 (2 GPUs) | –          | –          | –          | 82 / 84.3
        """,
        target=0.91,
    ),
    "imagenet100-t2tvit": PaperTable(
        2,
        "ImageNet-100, T2T-ViT, epochs / minutes to 80.6 %",
        """
        optimizer | 512 (1 GPU) | 1024 (2 GPUs) | 2048 (4 GPUs) | 4096 (8 GPUs)
        adamw     | 97 / 291.6  | –             | –             | –
        kfac      | 42 / 138.6  | 49 / 76.7     | 57 / 46.0     | 87 / 45.3
        fop       | 44 / 158.9  | 41 / 67.3     | 48 / 42.3     | 49 / 27.8
        """,
        target=0.806,
        unit=60.0,
    ),
    "imagenet1k-resnet50": PaperTable(
        3,
        "ImageNet-1K, ResNet-50, epochs / minutes to 75.9 %",
        """
        optimizer | 1024 (1 GPU) | 2048 (2 GPUs) | 4096 (4 GPUs) | 8192 (8 GPUs)
        sgd       | 71 / 2511.1  | –             | –             | –
        shampoo   | 65 / 2523.1  | –             | –             | –
        lamb      | 67 / 2492.7  | –             | –             | –
        kfac      | 35 / 1336.5  | –             | –             | –
        fop       | 32 / 1306.1  | 33 / 999.5    | 34 / 514.9    | 40 / 335.1
        """,
        target=0.759,
        unit=60.0,
    ),
    "cifar-lt-resnet32": PaperTable(
        4,
        "CIFAR-LT, ResNet-32, top-1 error %",
        """
        optimizer | CIFAR-10-LT 100 | CIFAR-10-LT 50 | CIFAR-100-LT 100 | CIFAR-100-LT 50
        sgd       | 28.05           | 23.55          | 62.27            | 56.22
        kfac      | 28.59           | 22.29          | 61.78            | 55.02
        fop       | 26.65           | 20.55          | 58.97            | 53.67
        """,
    ),
}

NOT_RUN = "not run yet"
# These change the optimizers: no contender in them is the one that the paper's table means.
ELSEWHERE = ("ablation", "formula")


def paper_page(folders: Sequence[Path]) -> str:
    """Return the paper's four tables as Markdown, with what the runs in these folders say beside."""
    runs = of_one_commit([run for folder in folders for run in read_runs(folder)])
    parts = [
        "# The paper's tables, and ours",
        "Lu & Armour, arXiv:2508.13898. Each cell: the paper's number (–: it reports none, the target was "
        "not reached), then ours as mean ± standard deviation over n seeds. Epochs and errors can be "
        "compared; times only on the same device, which is named below each table.",
    ]
    for recipe, table in PAPER_TABLES.items():
        parts += [f"## Table {table.number}: {table.title}", *paper_section(recipe, runs)]
    return "\n\n".join(parts) + "\n"


def paper_section(recipe: str, runs: Sequence[Record]) -> list[str]:
    """Return the paper's table of a recipe with the runs' results, and what must be known about them."""
    table = PAPER_TABLES[recipe]
    # Of a contender the group of the comparison, or of the first other study that it is in. A place is a
    # batch size, or, in the table of errors, a task; where there are several groups each is named.
    found: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(dict)
    for study in studies([run for run in runs if run["recipe"] == recipe]):
        if study.name not in ELSEWHERE:
            for (size, name), group in study.groups().items():
                at, other = (study.task, f"batch {size}") if table.target is None else (str(size), study.task)
                found[name, at].setdefault(other, list(group["run"]))
    shown = table.cells
    for down in shown.index:
        for across in shown.columns:
            contender, place = (across, down) if shown.index.name == "batch" else (down, across)
            groups = found.get((contender, place.partition(" (")[0]), {})
            each = (
                _measured(table, group) + (f", {other}" if len(groups) > 1 else "")
                for other, group in groups.items()
            )
            ours = f"ours {'; '.join(each)}" if groups else NOT_RUN
            shown.loc[down, across] = f"paper {shown.loc[down, across]} · {ours}"
    shown = shown.rename(index=LABELS, columns=LABELS).reset_index()
    used = [run for groups in found.values() for group in groups.values() for run in group]
    return [markdown_table(shown, shown.to_numpy()), _about(recipe, table, used)]


def _measured(table: PaperTable, group: Sequence[Record]) -> str:
    n, diverged = len(group), sum(run["diverged"] for run in group)
    lost = f", {diverged} diverged" if diverged else ""
    if table.target is None:
        errors = [1 - run["curve"][-1]["accuracy"] for run in group if not run["diverged"]]
        return f"{plus_minus(pd.Series(errors, dtype=float), 2, scale=100.0)} (n={n}{lost})"
    # The paper's target, whatever the recipe's own is.
    times = pd.DataFrame([reached(run, "accuracy", table.target) for run in group], columns=[*UNITS])
    count = times["epochs"].count()
    if count == 0:
        return f"not reached (0 of {n}{lost})"
    share = f"n={n}" if count == n else f"reached by {count} of {n}{lost}"
    return f"{plus_minus(times['epochs'], 1)} / {plus_minus(times['seconds'] / table.unit, 1)} ({share})"


def _about(recipe: str, table: PaperTable, runs: Sequence[Record]) -> str:
    if not runs:
        return f"None of it is measured yet; to run it: `fop-bench run {recipe}`."
    devices = sorted({str(run["environment"]["device"]) for run in runs})
    data = sorted({str(run["data"]) for run in runs})
    said = f"Ours: `fop-bench run {recipe}` on {', '.join(devices)}; data: {', '.join(data)}"
    if table.target is not None:
        epochs = sorted({run["batch_size"]: run["epochs"] for run in runs}.items())
        trained = ", ".join(f"{number} at batch {size}" for size, number in epochs)
        on_cpu = any(run["environment"]["processor"] == "cpu" for run in runs)
        said += f"; epochs of a whole run: {trained}" + ("; times are processor time" if on_cpu else "")
    return f"{said}."
