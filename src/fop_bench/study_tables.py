"""Tables of a study: what was reached, how much sooner, and what tuning there was."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fop_bench.defaults_report import markdown_table
from fop_bench.report import plus_minus
from fop_bench.run_records import Run
from fop_bench.study_groups import Group, Reached, Study, Target, in_order, settings_text
from fop_bench.summary import Statistic

ACCURACY_DIGITS = 2
LOSS_DIGITS = 4

# Final runs


def comparison_table(study: Study) -> str:
    """Give one row for every batch size and contender that has final runs."""
    head = ["batch", "optimizer", "options", "n", "diverged"]
    for target in study.targets:
        head += [f"{target.label}: reached", "epochs", "seconds"]
    head += ["final accuracy %", "best accuracy %", "final train loss"]
    return markdown_table(head, [_comparison_row(group, study.targets) for group in study.groups()])


def _comparison_row(group: Group, targets: Sequence[Target]) -> list[str]:
    row = [
        str(group.batch_size),
        group.label,
        settings_text(group.runs[0]),
        str(len(group.runs)),
        str(group.diverged),
    ]
    for target in targets:
        reached = group.reached(target)
        row += [
            f"{reached.count} of {reached.n}",
            plus_minus(reached.epochs, 1),
            plus_minus(reached.seconds, seconds_digits(reached.seconds)),
        ]
    return [
        *row,
        plus_minus(group.final("accuracy"), ACCURACY_DIGITS, scale=100.0),
        plus_minus(group.best_accuracy(), ACCURACY_DIGITS, scale=100.0),
        plus_minus(group.final("train_loss"), LOSS_DIGITS),
    ]


def seconds_digits(seconds: Statistic | None) -> int:
    """Choose the decimals of a time: as many as it has meaning for."""
    return 2 if seconds is not None and seconds.mean < 10 else 1


def ratio_table(study: Study) -> str | None:
    """Say how many times fewer epochs and seconds FOP takes than every other; None without FOP."""
    rows = [
        [
            str(batch_size),
            target.label,
            other.label,
            *_ratio_cells(fop.reached(target), other.reached(target)),
        ]
        for batch_size, fop, others in opponents(study)
        for target in study.targets
        for other in others
    ]
    return markdown_table(["batch", "target", "against", "epochs", "seconds"], rows) if rows else None


def opponents(study: Study) -> Iterator[tuple[int, Group, list[Group]]]:
    """Give, for every batch size at which FOP has final runs, these and those of every other contender."""
    for batch_size in study.batch_sizes:
        groups = {group.contender: group for group in study.groups(batch_size)}
        fop = groups.pop("fop", None)
        if fop is not None:
            yield batch_size, fop, list(groups.values())


def _ratio_cells(fop: Reached, other: Reached) -> list[str]:
    if not (fop.all and other.all):
        reason = f"– (reached: FOP {fop.count} of {fop.n}, it {other.count} of {other.n})"
        return [reason, "–"]
    return [_ratio(other.epochs, fop.epochs), _ratio(other.seconds, fop.seconds)]


def _ratio(above: Statistic | None, below: Statistic | None) -> str:
    assert above is not None
    assert below is not None
    ratio = above.mean / below.mean
    if above.std is None or below.std is None:
        return f"{ratio:.2f} (single runs)"
    # The two vary independently of each other, by seeds of their own.
    error = ratio * math.hypot(above.std / above.mean, below.std / below.mean)
    return f"{ratio:.2f} ± {error:.2f}"


# Tuning


def tuning_table(study: Study) -> str:
    """Give every tuning run, and which options went into the final runs."""
    chosen = {(group.batch_size, group.contender): settings_text(group.runs[0]) for group in study.groups()}
    runs = sorted(study.phase("tuning"), key=lambda run: (run["batch_size"], in_order(run["contender"])))
    rows = [
        [
            str(run["batch_size"]),
            str(run["label"]),
            settings_text(run),
            str(run["seed"]),
            "–" if run["diverged"] else f"{100 * mean_accuracy(run):.{ACCURACY_DIGITS}f}",
            "–" if run["diverged"] else f"{100 * run['curve'][-1]['accuracy']:.{ACCURACY_DIGITS}f}",
            "yes" if run["diverged"] else "no",
            "chosen" if chosen.get((run["batch_size"], run["contender"])) == settings_text(run) else "",
        ]
        for run in runs
    ]
    head = ["batch", "optimizer", "options", "seed", "mean accuracy %", "final accuracy %", "diverged", ""]
    return markdown_table(head, rows)


def mean_accuracy(run: Run) -> float:
    """Give the mean of the accuracy over the epochs, which tuning chooses by."""
    return statistics.fmean(epoch["accuracy"] for epoch in run["curve"])


def options_table(study: Study) -> str | None:
    """Give all options of the final runs, the fixed ones included; None where the lines do not hold them."""
    rows = [
        [str(group.batch_size), group.label, _text(group.runs[0]["all_options"])]
        for group in study.groups()
        if group.runs[0].get("all_options") is not None
    ]
    return markdown_table(["batch", "optimizer", "all options given"], rows) if rows else None


def _text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in options.items()) or "–"


# Whether it is a fair comparison


def unfair(study: Study) -> list[str]:
    """Say, loudly, everything in which contenders of a study were not treated alike."""
    found: list[str] = []
    for batch_size in study.batch_sizes:
        tuning = [run for run in study.phase("tuning") if run["batch_size"] == batch_size]
        final = [run for run in study.phase("final") if run["batch_size"] == batch_size]
        where = f"at batch {batch_size}"
        found += _unequal("TUNING", f"tuning runs {where}", _counts(study, tuning))
        seeds = {name: _seeds([run for run in final if run["contender"] == name]) for name in study.labels}
        found += _unequal("SEEDS", f"seeds of the final runs {where}", _labelled(study, seeds))
        epochs = {
            name: "/".join(map(str, sorted({r["epochs"] for r in tuning + final if r["contender"] == name})))
            for name in study.labels
        }
        found += _unequal("EPOCHS", f"epochs {where}", _labelled(study, epochs))
        for group in study.groups(batch_size):
            found += _not_best(group, [run for run in tuning if run["contender"] == group.contender])
    devices = {run["environment"]["device"] for run in study.runs}
    if len(devices) > 1:
        found.append(f"SEVERAL DEVICES: {', '.join(sorted(devices))}; seconds are not of one machine.")
    if any(
        run["environment"]["processor"] == "cpu" and run["environment"]["threads"] != 1 for run in study.runs
    ):
        found.append(
            "SEVERAL THREADS: processor seconds are the sum over the threads, not the time of a run."
        )
    return found


def tuning_counts(study: Study) -> str:
    """State the number of tuning runs of every contender at a batch size, in words."""
    by_size = {
        size: _counts(study, [run for run in study.phase("tuning") if run["batch_size"] == size])
        for size in study.batch_sizes
    }
    numbers = {count for counts in by_size.values() for count in counts.values()}
    if len(numbers) == 1:
        return f"Tuning runs: {numbers.pop()} for every optimizer at every batch size."
    each = [
        f"at batch {size} {', '.join(f'{label} {count}' for label, count in counts.items())}"
        for size, counts in by_size.items()
    ]
    return f"Tuning runs: {'; '.join(each)}."


def _counts(study: Study, runs: Sequence[Run]) -> dict[str, str]:
    counts = Counter(run["contender"] for run in runs)
    return _labelled(study, {name: str(counts[name]) for name in study.labels})


def _seeds(runs: Sequence[Run]) -> str:
    return "/".join(map(str, sorted(run["seed"] for run in runs))) or "none"


def _labelled(study: Study, values: Mapping[str, str]) -> dict[str, str]:
    return {study.labels[name]: value or "none" for name, value in values.items()}


def _unequal(what: str, sentence: str, values: Mapping[str, str]) -> list[str]:
    if len(set(values.values())) <= 1:
        return []
    return [f"UNEQUAL {what}: {sentence}: {', '.join(f'{name} {value}' for name, value in values.items())}."]


def _not_best(group: Group, tuning: Sequence[Run]) -> list[str]:
    where = f"{group.label} at batch {group.batch_size}"
    if not tuning:
        return []
    alive = [run for run in tuning if not run["diverged"]]
    if not alive:
        return [f"NOTHING TO CHOOSE: all {len(tuning)} tuning runs of {where} diverged."]
    best = max(map(mean_accuracy, alive))
    used = settings_text(group.runs[0])
    if used in {settings_text(run) for run in alive if mean_accuracy(run) == best}:
        return []
    return [f"NOT THE BEST OF ITS TUNING: the final runs of {where} have {used}."]
