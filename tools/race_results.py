"""Writes the tables of README.md and docs/results.md, from records/race and records/overhead-peers."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

from fop_bench import overhead
from fop_bench.race import at_best_rate, newest, read
from fop_bench.race_tasks import TASKS
from fop_bench.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/results.md"]
MARKS = re.compile(r"(<!-- table: (\w+), made by tools/race_results.py -->\n).*?(<!-- /table -->)", re.DOTALL)
TITLES = {
    "gpt-128": "GPT, 128 × 100 steps, nats a byte ↓",
    "gpt-1024": "GPT, 1,024 × 60 steps, nats a byte ↓",
    "gpt-tied-128": "GPT with a tied head, 128 × 100 steps, nats a byte ↓",
    "gpt-2m-128": "GPT of 1.9 M, 128 × 100 steps, nats a byte ↓",
    "gpt-2m-1024": "GPT of 1.9 M, 1,024 × 60 steps, nats a byte ↓",
    "gpt-2m-4096": "GPT of 1.9 M, 4,096 × 60 steps, nats a byte ↓",
    "cifar-half-500": "CIFAR-10, 500 × 120 steps, % ↑",
    "cifar-half-2000": "CIFAR-10, 2,000 × 60 steps, % ↑",
    "cifar-half-5000": "CIFAR-10, 5,000 × 30 steps, % ↑",
    "cifar-half-16384": "CIFAR-10, 16,384 × 24 steps, % ↑",
    "cifar-half-25000": "CIFAR-10, 25,000 × 20 steps, % ↑",
    "cifar-half-50000": "CIFAR-10, 50,000 × 20 steps, % ↑",
    "cifar-500": "the same, logits a ninth, 500 × 120 steps, % ↑",
    "cifar-5000": "the same, logits a ninth, 5,000 × 30 steps, % ↑",
    "cifar-16384": "the same, logits a ninth, 16,384 × 24 steps, % ↑",
    "cifar-25000": "the same, logits a ninth, 25,000 × 20 steps, % ↑",
    "digits-autoencoder": "autoencoder, full batch, MSE ↓",
    "deep-autoencoder": "deep autoencoder, full batch, MSE ↓",
    "digits-cnn": "CNN, full batch, % ↑",
    "digits-lstm": "LSTM, batch 128, % ↑",
    "digits-cnn-long": "CNN, 32 × 2,000 steps, % ↑",
    "digits-mlp-long": "MLP, 32 × 2,000 steps, % ↑",
}
SHOWN = ["gpt-128", "cifar-half-5000"]  # in README.md
LABELS = {
    **{"sgd": "SGD", "adamw": "AdamW", "soap": "SOAP", "muon": "Muon"},
    **{"kfac-default": "K-FAC, defaults", "fop-default": "FOP, defaults", "fop": "FOP, rate searched"},
}


def race_rows() -> dict[str, list[str]]:
    """Return the cells of `LABELS` by task, the best of a row in bold; n where it is not 3."""
    lines = read(ROOT / "records/race/race.jsonl")
    # Runs of other sources, options or numbers of steps stay in the record.
    found = {key: at_best_rate(side)[2] for key, side in newest(lines).items()}
    rows = {}
    for task in TITLES:
        highest, cells = TASKS[task].highest, []
        runs = {name: found.get((task, name), []) for name in LABELS}
        of = {name: [run["value"] for run in each if not run["diverged"]] for name, each in runs.items()}
        means = {name: statistics.fmean(each) for name, each in of.items() if each}
        if "fop-default" not in means:
            continue
        best = (max if highest else min)(means.values(), default=math.nan)
        digits = 1 if highest else 4 if "autoencoder" in task else 2
        for name in LABELS:
            if name not in means:
                cells.append("–")
                continue
            text = f"{means[name]:.{digits}f}"
            text = f"**{text}**" if len(means) > 1 and text == f"{best:.{digits}f}" else text
            spread = f" ± {statistics.stdev(of[name]):.{digits}f}" if len(of[name]) > 1 else ""
            cells.append(text + spread + ("" if len(of[name]) == 3 else f" (n = {len(of[name])})"))
        rows[task] = cells
    return rows


def table() -> str:
    """Return rows of tasks and columns of optimizers."""
    rows = [[TITLES[task], *cells] for task, cells in race_rows().items()]
    return markdown_table(["", *LABELS.values()], rows) + "\n"


def row() -> str:
    """Return the rows of the table that README.md shows, and of its columns those with a value in each."""
    found = race_rows()
    tasks = [task for task in SHOWN if task in found]
    columns = [at for at in range(len(LABELS)) if all(found[task][at] != "–" for task in tasks)]
    rows = [[TITLES[task], *(found[task][at].replace("**", "") for at in columns)] for task in tasks]
    return markdown_table(["", *([*LABELS.values()][at] for at in columns)], rows) + "\n"


def cost_table() -> str:
    """Return rows of workloads and columns of optimizers: steps ÷ SGD's, plain / with statistics."""
    record = ROOT / "records/overhead-peers/overhead.jsonl"
    lines = overhead.newest(overhead.read(record))
    labels: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for title, of_one in lines.items():
        found[title] = {}
        for row in of_one:
            if "error" not in row and row["optimizer"] != "sgd":
                labels[row["optimizer"]] = row["label"]
                medians = [statistics.median(each) for each in row["ratios_to_sgd"].values() if each]
                found[title][row["optimizer"]] = " / ".join(f"{each:.2f}" for each in medians)
    rows = [[title, *(cells.get(name, "–") for name in labels)] for title, cells in found.items()]
    return markdown_table(["", *labels.values()], rows) + "\n"


def made(page: Path) -> str:
    """Return a page with the tables between their marks."""
    tables = {"race": table, "row": row, "overhead": cost_table}
    text = page.read_text(encoding="utf-8")
    new, count = MARKS.subn(lambda match: match[1] + tables[match[2]]() + match[3], text)
    if not count:
        raise SystemExit(f"{page}: no marks for the table")
    return new


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(made(each), encoding="utf-8")
