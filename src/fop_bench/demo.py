"""What `fop-bench demo` ends with: bars in the terminal, and in words which optimizer is ahead in what."""

from __future__ import annotations

import math

from fop_bench.study import UNITS, Study, target_label

WIDTH = 40
Means = dict[tuple[int, str], float]


def means(study: Study, column: str) -> Means:
    """Return the mean of a column over the seeds by batch size and label; NaN where a seed has none."""
    found = {}
    for (size, _), group in study.groups().items():
        found[size, str(group["label"].iloc[0])] = float(group[column].mean(skipna=False))
    return found


def bars(study: Study) -> str:
    """Return a bar a batch size and optimizer for the epochs, and one for the seconds, to the accuracy."""
    parts = []
    for unit in UNITS:
        values = means(study, f"accuracy {unit}")
        longest = max((value for value in values.values() if value > 0), default=1.0)
        parts.append(f"{unit} to {target_label('accuracy', study.targets['accuracy'])}, mean of the seeds")
        for (size, label), value in values.items():
            reached = not math.isnan(value)
            bar = "█" * max(1, round(WIDTH * value / longest)) if reached else "not with every seed"
            parts.append(f"  batch {size:<6}{label:<7}{bar}" + (f" {value:.3g}" if reached else ""))
        parts.append("")
    return "\n".join(parts)


def meaning(study: Study) -> str:
    """Say who is ahead at the smallest and at the largest batch size."""
    parts = []
    sizes = sorted({size for size, _ in means(study, "accuracy")})
    for size in dict.fromkeys((sizes[0], sizes[-1])):
        ahead = []
        for column, what, lowest in (
            *((f"accuracy {unit}", f"fewest {unit}", True) for unit in UNITS),
            ("accuracy", "highest final accuracy", False),
        ):
            values = {label: value for (at, label), value in means(study, column).items() if at == size}
            values = {label: value for label, value in values.items() if not math.isnan(value)}
            if values:
                best = (min if lowest else max)(values.values())
                names = " and ".join(label for label, value in values.items() if value == best)
                number = f"{best:.3g}" if lowest else f"{100 * best:.1f} %"
                ahead.append(f"{what} {names} ({number})")
        parts.append(f"At batch {size}: {'; '.join(ahead)}.")
    return "\n".join(
        [
            *parts,
            "Epochs say how far a step gets: K-FAC and FOP are made for few, large steps. Seconds say what",
            "steps cost on this machine, where those of SGD and AdamW cost little for so small a model.",
        ]
    )
