"""Draws docs/assets/large-batch.png, the README's picture, from records/cifar10-small/comparison.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from fop_bench.plots import STYLES

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "records/cifar10-small/comparison.jsonl"
MARKERS = {"sgd": "s", "adamw": "^", "kfac": "D", "fop": "o"}


def ends() -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Return test accuracy (%) and training loss where every final run ends, by optimizer and batch."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if run["phase"] == "final":
            last = run["curve"][-1]
            values = 100 * last["accuracy"], last["train_loss"]
            found[run["contender"]][run["batch_size"]].append(values)
    return found


def main() -> None:
    """Draw it."""
    found = ends()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name, label in (("sgd", "SGD"), ("adamw", "AdamW"), ("kfac", "K-FAC"), ("fop", "FOP")):
        batches = sorted(found[name])
        for at, ax in enumerate(axes):
            columns = [[run[at] for run in found[name][batch]] for batch in batches]
            means = [sum(column) / len(column) for column in columns]
            ax.plot(batches, means, marker=MARKERS[name], markersize=5, label=label, **STYLES[name])
            color, lowest, highest = STYLES[name]["color"], [*map(min, columns)], [*map(max, columns)]
            ax.fill_between(batches, lowest, highest, color=color, alpha=0.15, linewidth=0)
    for ax, title in zip(axes, ("Test accuracy, %", "Training loss"), strict=True):
        ax.set_xscale("log")
        ax.set_xticks(batches, [f"{batch:,}" for batch in batches])
        ax.minorticks_off()
        ax.set_xlabel("batch size (10,000: all images in every step)")
        ax.set_title(title)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(ROOT / "docs/assets/large-batch.png", dpi=140)


if __name__ == "__main__":
    main()
