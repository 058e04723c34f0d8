"""Made-up lines of `fop-bench run`, for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LABELS = {"sgd": "SGD", "adamw": "AdamW", "kfac": "K-FAC", "fop": "FOP"}
ONE, OTHER = "1" * 40, "2" * 40


def line(contender: str, accuracies: list[float], **changes: Any) -> dict[str, Any]:
    """A record whose epochs take 2 s on the wall and 1 s on the processor; loss is 2 less the accuracy."""
    curve = [
        {"epoch": e, "seconds": 2.0 * e, "processor_seconds": 1.0 * e, "train_loss": 2.0 - a, "accuracy": a}
        for e, a in enumerate(accuracies, start=1)
    ]
    record: dict[str, Any] = {
        **{"recipe": "small", "title": "A small one", "task": "images", "study": "comparison"},
        **{"phase": "final", "contender": contender, "label": LABELS.get(contender, contender)},
        **{"options": {"lr": 0.1}, "batch_size": 100, "epochs": len(accuracies), "seed": 1},
        **{"targets": {"accuracy": 0.5, "train_loss": 1.3}, "diverged": False},
        **{"curve": curve, "layers": None, "parameters": 10, "train_samples": 1000},
        **{"evaluated_on": "test", "evaluated_samples": 50, "warnings": [], "data": "images on the hub"},
        "environment": {
            **{"device": "A processor", "processor": "cpu", "torch": "2", "python": "3", "fop": "0"},
            **{"git": {"commit": ONE, "dirty": False}, "threads": 1, "date": "2026-01-01T00:00:00"},
            "command": "fop-bench run small",
        },
    }
    for key in ("processor", "git", "threads", "device"):
        if key in changes:
            record["environment"][key] = changes.pop(key)
    return record | changes


def write(path: Path, runs: list[dict[str, Any]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs) + end, encoding="utf-8")
    return path


def noisy_runs() -> list[dict[str, Any]]:
    """Two batch sizes, four contenders, three seeds, tuning: enough for every part of the report."""
    draw = np.random.default_rng(0)
    runs = []
    for size in (100, 400):
        for name, top in (("sgd", 0.56), ("adamw", 0.58), ("kfac", 0.62), ("fop", 0.64)):

            def curve(top: float = top) -> list[float]:
                return (top * (1 - np.exp(-np.arange(1, 9) / 2)) + draw.normal(0, 0.01, 8)).tolist()

            targets = {"accuracy": 0.5, "train_loss": 1.42}
            tuning = {
                "phase": "tuning",
                "seed": 0,
                "batch_size": size,
                "evaluated_on": "held-out",
                "targets": targets,
            }
            tuned = [line(name, curve(), **tuning, options={"lr": lr}) for lr in (0.1, 0.3)]
            best = max(tuned, key=lambda run: np.mean([e["accuracy"] for e in run["curve"]]))
            runs += tuned
            for seed in (1, 2, 3):
                final = line(
                    name, curve(), seed=seed, batch_size=size, options=best["options"], targets=targets
                )
                if name == "fop":
                    scalars = draw.uniform(0.5, 1, (8, 2)).tolist()
                    scalars[3][1] = None
                    final["layers"] = {
                        "names": ["a", "b"],
                        "epochs": list(range(1, 9)),
                        **dict.fromkeys(("beta", "eta", "rho"), scalars),
                    }
                runs.append(final)
    return runs
