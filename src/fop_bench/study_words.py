"""What a study says, in sentences: who was best, and where FOP stands, as far as the spread allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fop_bench.report import plus_minus
from fop_bench.study_groups import Group, Reached, Study, Target, compare
from fop_bench.study_tables import opponents, seconds_digits
from fop_bench.summary import Statistic

RULE = (
    "*Ahead of* and *behind*: the means differ by more than the pooled standard deviation over the seeds; "
    "*within the spread of*: they do not. That is no test of significance. Nothing is claimed from single "
    "runs, nor about epochs and seconds where one side did not reach the target with every seed."
)


def in_words(study: Study) -> list[str]:
    """Give a Markdown list for every batch size, an item a target and one for the final accuracy."""
    fop = {batch_size: (group, others) for batch_size, group, others in opponents(study)}
    label = study.labels.get("fop", "FOP")
    parts = [RULE if label == "FOP" else f"{RULE} FOP is here {_quoted(label)}."]
    for batch_size in study.batch_sizes:
        groups = study.groups(batch_size)
        if not groups:
            continue
        lines = []
        for target in (*study.targets, None):
            lines.append(f"- {_best_at_the_end(groups) if target is None else _best_at(groups, target)}")
            if batch_size in fop:
                lines += [f"  - {sentence}" for sentence in _against(*fop[batch_size], target)]
        parts += [f"Batch {batch_size}:", "\n".join(lines)]
    return parts


def _quoted(label: str) -> str:
    return f"“{label}”" if "," in label else label


def _best_at(groups: Sequence[Group], target: Target) -> str:
    reached = [(group, group.reached(target)) for group in groups]
    sure = [(group, each) for group, each in reached if each.all and each.n > 1]
    if not sure:
        return f"{target.label}: no optimizer reached it with every one of at least two seeds."
    epochs = _lowest(sure, lambda each: each.epochs)
    seconds = _lowest(sure, lambda each: each.seconds)
    return (
        f"{target.label}: fewest epochs {_named(epochs, 1)}; "
        f"fewest seconds {_named(seconds, seconds_digits(seconds[0][1]))}."
    )


Ranked = list[tuple[Group, Statistic]]


def _lowest(reached: Sequence[tuple[Group, Reached]], value: Callable[[Reached], Statistic | None]) -> Ranked:
    values = [(group, found) for group, each in reached if (found := value(each)) is not None]
    least = min(each.mean for _, each in values)
    return [(group, each) for group, each in values if each.mean == least]


def _named(best: Ranked, digits: int, scale: float = 1.0) -> str:
    return " and ".join(
        f"{_quoted(group.label)} ({plus_minus(value, digits, scale)})" for group, value in best
    )


def _best_at_the_end(groups: Sequence[Group]) -> str:
    finals = [(group, group.final("accuracy")) for group in groups]
    sure = [(group, final) for group, final in finals if final is not None and final.n > 1]
    if not sure:
        return "Final accuracy: no optimizer has two runs that did not diverge."
    most = max(final.mean for _, final in sure)
    best = [(group, final) for group, final in sure if final.mean == most]
    return f"Final accuracy: highest {_named(best, 2, 100.0)} %."


def _against(fop: Group, others: Sequence[Group], target: Target | None) -> list[str]:
    """Say in which of epochs, seconds or accuracy FOP is ahead of whom, and whom it is not compared with."""
    if target is None:
        pairs = [(other, fop.final("accuracy"), other.final("accuracy")) for other in others]
        return _verdicts("In final accuracy", pairs, low=False) + _lost([fop, *others])
    ours = fop.reached(target)
    theirs = [(other, other.reached(target)) for other in others]
    sure = [(other, each) for other, each in theirs if each.all and ours.all]
    epochs = [(other, ours.epochs, each.epochs) for other, each in sure]
    seconds = [(other, ours.seconds, each.seconds) for other, each in sure]
    short = [f"{_quoted(other.label)} {each.count} of {each.n}" for other, each in theirs if not each.all]
    if short or not ours.all:
        short = [f"Reached by fewer than all runs: {', '.join([*_fop_short(ours), *short])}."]
    return [
        *_verdicts("In epochs", epochs, low=True),
        *_verdicts("In seconds", seconds, low=True),
        *short,
    ]


def _fop_short(ours: Reached) -> list[str]:
    return [] if ours.all else [f"FOP {ours.count} of {ours.n}"]


def _verdicts(
    what: str, pairs: Sequence[tuple[Group, Statistic | None, Statistic | None]], *, low: bool
) -> list[str]:
    found: dict[str, list[str]] = {}
    for other, ours, theirs in pairs:
        verdict = compare(ours, theirs, low=low) or "not compared (fewer than two runs) with"
        found.setdefault(verdict, []).append(_quoted(other.label))
    if not found:
        return []
    return [f"{what} FOP is {'; '.join(f'{how} {_and(names)}' for how, names in found.items())}."]


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _lost(groups: Sequence[Group]) -> list[str]:
    lost = [f"{_quoted(each.label)} {each.diverged} of {len(each.runs)}" for each in groups if each.diverged]
    return [f"Diverged, and not in this mean: {', '.join(lost)}."] if lost else []
