"""The `fop-bench` command. What one of its commands alone needs is imported there."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException

from fop_bench import defaults as candidates
from fop_bench import overhead as steps
from fop_bench import race as races
from fop_bench import records
from fop_bench import scale as scaling
from fop_bench.environment import environment
from fop_bench.optimizers import PEERS, installed
from fop_bench.race_tasks import GROUPS
from fop_bench.race_tasks import TASKS as RACES
from fop_bench.recipe_runs import Selection, make
from fop_bench.recipes import RECIPES
from fop_bench.runner import OnRun, make_runs

MEASURED = (1, 2, 4)  # ranks that `scale` measures by default


def run(asked: argparse.Namespace) -> None:
    """Make the runs of a recipe's study, one JSON line each in OUT/STUDY.jsonl, or go on with them."""
    chosen = Selection(asked.recipe, asked.study, asked.task, asked.optimizer, asked.batch)
    folder = asked.out or Path("fop-runs") / chosen.recipe
    jobs = asked.jobs or (1 if asked.device.type == "cuda" else os.cpu_count() or 1)
    how = {"data": asked.data, "device": asked.device, "out": folder, "jobs": jobs, "minutes": asked.minutes}
    with _bar(chosen.recipe) as on_run:
        left = make(chosen, on_run=on_run, **how)
    end = "all that was asked for is there" if left == 0 else f"{left} runs left; the same command goes on"
    print(f"{folder / chosen.study}.jsonl: {end}. Tables and plots: fop-bench report {folder}")


def report(asked: argparse.Namespace) -> None:
    """Make README.md and plots in every FOLDER, or docs/report.md of a clone, from JSON lines alone."""
    from fop_bench.paper import paper_page
    from fop_bench.study_report import write_report

    for folder in asked.folders:
        print(f"Wrote {write_report(folder)}")
    if not asked.folders:
        if not (tool := Path("tools/report_page.py")).exists():
            raise ValueError("name folders with JSON lines, or go to a clone, to make its docs/report.md")
        runpy.run_path(str(tool))["main"]()
    if asked.paper is not None:
        print(f"Wrote {records.write_text(asked.paper, paper_page(asked.folders))}")


def verify_records(asked: argparse.Namespace) -> None:
    """Re-read records, and compare the pages made from them with what they give; exit 1 on a difference."""
    from fop_bench.verify import verify

    failed = False
    for given in asked.folders or [Path("records")]:
        if not given.is_dir():
            raise ValueError(f"{given} is no folder; give folders with records, or go to a clone")
        inside = () if [*given.glob("*.json*")] else sorted(path for path in given.iterdir() if path.is_dir())
        for line, found in map(verify, inside or [given]):
            print(line, *found, sep="\n  ", flush=True)
            failed = failed or bool(found)
    if failed:
        sys.exit(1)


def demo(asked: argparse.Namespace) -> None:
    """Train a small CNN on digits at three batch sizes, and report on it: two minutes on two CPU cores."""
    # Before the imports, which take seconds.
    print("Four optimizers on handwritten digits at three batch sizes: four learning rates of each, then")
    print("three seeds with the best. About two minutes on two quiet cores.", flush=True)
    from fop_bench.study import comparison_table, studies
    from fop_bench.study_report import write_report

    # The tensors are tiny: a second thread gains little, and stalls once other programs want its core.
    torch.set_num_threads(1)
    chosen, out = Selection("digits", "demo"), asked.out
    lines = out / f"{chosen.study}.jsonl"
    with records.locked(lines):  # another process may be writing them
        lines.unlink(missing_ok=True)
    with _bar("demo") as on_run:
        make(chosen, data=None, device=asked.device, out=out, jobs=1, minutes=600.0, on_run=on_run)
    print("Drawing the plots", flush=True)
    page = write_report(out)
    [study] = studies(records.read_runs(lines))
    _show(comparison_table(study))
    print("\nEpochs say how far a step gets: K-FAC and FOP are made for few, large steps. Seconds say what")
    print("steps cost on this machine, where those of SGD and AdamW cost little for so small a model.\n")
    print(f"Wrote {page}, its plots and {lines.name}")
    print(f"The picture of it: {out / 'digits-digits-demo-curves.png'}")
    print(f"β, η, ρ and the noise ν of FOP's layers: {out / 'digits-digits-demo-layers.png'}")


def overhead(asked: argparse.Namespace) -> None:
    """Measure time, peak memory and state of optimizers' steps in turns, or go on with it."""
    if asked.device.type == "cpu":
        torch.set_num_threads(1)  # so that processor seconds are those of a step
    names = asked.optimizer or (PEERS if asked.peers else steps.COMPARED)
    todo = [
        steps.Workload(model, size, asked.bf16)
        for model in asked.model or steps.TASKS
        for size in asked.batch or [steps.TASKS.get(model, 128)]
    ]
    path, where = asked.out, environment(asked.device) | {"packages": installed()}
    with records.locked(path), _bar("overhead") as on_run:
        rows = steps.read(path)
        for there in (row["environment"] for row in rows):
            same = [(f"with {key}", there[key], where[key]) for key in ("device", "torch", "threads")]
            records.refuse_mixture(path, there, where["git"], same)
        for at, workload in enumerate(todo):
            on_run(at, len(todo), workload.title)
            mine = [row for row in rows if row["workload"] == asdict(workload) and "error" not in row]
            if left := [name for name in names if name not in {row["optimizer"] for row in mine}]:
                for row in steps.measure_overhead(workload, left, asked.device, asked.rounds):
                    rows.append(row | {"rounds": asked.rounds, "environment": where})
                    records.append(path, rows[-1])
    _show_and_write(steps.overhead_table(rows), path)


def race(asked: argparse.Namespace) -> None:
    """Search every optimizer's rate on small tasks and repeat the best by seeds, or go on with it."""
    options = races.parsed_options(asked.set)
    names = "keep_norm", "bf16", "held_out", "test_flip", "steps", "device"
    how = {name: vars(asked)[name] for name in names}
    tasks = [task for given in asked.task or RACES for task in GROUPS.get(given, [given])]
    for name in asked.optimizer or ():
        if asked.rate is not None and races.STARTS[name] is None:
            raise ValueError(f"{name} keeps its rate; with --rate give {name.removesuffix('-default')}")
    sides = [
        races.side_of(name, task, options.get(name, {}), **how)
        for task in tasks
        for name in asked.optimizer or races.STARTS
    ]
    _race(asked, sides, asked.rate, races.race_table)


def _race(
    asked: argparse.Namespace, sides: list[records.Record], rate: float | None, table: Callable[..., str]
) -> None:
    """Make the runs that a file lacks, or none with --table, and lay out what it holds."""
    path, planned = asked.out, partial(races.planned, sides, asked.seeds, rate)
    if asked.table:  # also while another process writes the file
        left = planned(races.read(path))[1]
    else:
        how = {"data": asked.data, "device": asked.device, "jobs": asked.jobs, "minutes": asked.limit}
        with _bar("race") as on_run:
            left = make_runs(path, lambda git: races.read(path), planned, on_run=on_run, **how)
    rows = races.read(path)
    if asked.table and not rows:
        raise ValueError(f"{path} has no runs; make some without --table")
    if not rows:
        why = f"--limit {asked.limit:g} minutes left no time to end one; the same command goes on"
        raise ValueError(f"{path} has no runs, and {why}")
    _show_and_write(table(rows), path)
    on = "without --table this command goes on" if asked.table else "the same command goes on"
    print(f"{left} optimizers are not done; {on}" if left else "all is done")


def defaults(asked: argparse.Namespace) -> None:
    """Train by FOP with other values of its options, one at a time, beside the defaults, or go on with it."""
    if asked.table and (old := candidates.read_old(asked.out)):
        _show_and_write(candidates.defaults_table(old), asked.out)
        return
    sides = candidates.sides(
        asked.option or candidates.CANDIDATES, asked.task or [candidates.TASK], asked.device
    )
    _race(asked, sides, None, candidates.defaults_table)


def scale(asked: argparse.Namespace) -> None:
    """Measure SGD, K-FAC and FOP on several processes of this machine, or predict more ranks from one."""
    workload, where = steps.Workload(asked.model, asked.batch, bf16=False), environment(torch.device("cpu"))
    protocol = {"workload": asdict(workload), "cores": os.cpu_count() or 1, "rounds": asked.rounds}
    protocol["plain_steps_a_round"] = steps.PLAIN_STEPS
    record: records.Record = {"environment": where | {"threads": 1}, "protocol": protocol}
    if asked.predict:
        path, bandwidth = asked.out / "prediction.json", 1e9 * asked.bandwidth
        with records.locked(path):
            one = scaling.measure_scale(workload, 1, asked.rounds)
            predicted = scaling.predict(one, asked.ranks or scaling.PREDICTED, bandwidth)
            record |= {"bandwidth": bandwidth, "measured": one, "results": predicted}
            records.write_json(path, record)
        _show_and_write(scaling.predicted_table(predicted, bandwidth), path)
        return
    path, results = asked.out / "scale.json", list[records.Record]()
    todo = dict.fromkeys(asked.ranks or MEASURED)  # a number that is given twice is measured once
    with records.locked(path), _bar("scale") as on_run:
        for at, ranks in enumerate(todo):
            on_run(at, len(todo), f"{ranks} ranks")
            results += scaling.measure_scale(workload, ranks, asked.rounds)
            # At once, so that one that fails takes no other with it.
            records.write_json(path, record | {"results": results})
    _show_and_write(scaling.measured_tables(results), path)


def surface(asked: argparse.Namespace) -> None:
    """Draw the loss around a point of a training with FOP, and one step of K-FAC and of FOP from there."""
    from fop_bench.plots import plot_surface
    from fop_bench.surface import surface as measured
    from fop_bench.surface import surface_table

    path = Path(asked.recipe)
    if path.suffix == ".json":
        record = records.loads(path.read_bytes(), str(path))
        if not (isinstance(record, dict) and {"origin", "steps", "losses"} <= record.keys()):
            raise ValueError(f"{path} is no record of fop-bench surface; give one, or a recipe")
    else:
        record = measured(asked)
        path = records.write_json(asked.out / "surface.json", record)
    plot_surface(record, path.with_suffix(".png"))
    _show(surface_table(record))
    print(f"The picture of {path}: {path.with_suffix('.png')}")


# --- What they show


def _console() -> Any:
    """Return the console; a table that is written to a file or a pipe is not squeezed into 80 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=130)


def _show(markdown: str) -> None:
    from rich.markdown import Markdown

    _console().print(Markdown(markdown))


def _show_and_write(markdown: str, record: Path) -> None:
    """Show a table, and write it beside the record that it was made from."""
    _show(markdown)
    print(f"Wrote {record} and {records.write_text(record.with_suffix('.md'), markdown)}")


@contextmanager
def _bar(title: str) -> Iterator[OnRun]:
    """Yield what shows how many runs are done and planned, and what is run now.

    Where the output is no terminal, which could not show a bar, a line comes every ten seconds at most.
    """
    from rich.progress import Progress

    console, said = _console(), time.monotonic()

    def show(done: int, planned: int, title: str) -> None:
        nonlocal said
        text = f"{done} of {planned} · {title}"
        progress.update(bar, completed=done, total=planned, description=text)
        if not console.is_terminal and time.monotonic() - said > 10:
            said = time.monotonic()
            print(text, flush=True)

    with Progress(console=console) as progress:
        bar = progress.add_task(title, total=None)
        yield show


# --- Their options


def _above_0(kind: type) -> Callable[[str], Any]:
    """Return what turns the text of an option into a number, and refuses others."""

    def convert(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            which = "whole" if kind is int else "finite"
            raise argparse.ArgumentTypeError(f"{text} is not a {which} number above 0")
        return number

    return convert


def _json_lines(text: str) -> Path:
    """Refuse a file that the table, or what is written on the way, would take the place of."""
    path = Path(text)
    if path.suffix in (".md", ".unfinished") or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file of JSON lines; give one, such as runs.jsonl")
    return path


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda nor cuda:N; give one of these")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # timing events are recorded on the current device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {reason}; give cpu") from error
    return device


Option = tuple[str, dict[str, Any]]


def _option(name: str, what: str, default: Any = None, kind: Any = None, **how: Any) -> Option:
    """Return what argparse is told of an option; a default is given as it would be typed."""
    shown = f"{what} (default: {default})" if default else what
    return name, {"help": shown, "default": default, **({"type": kind} if kind else {}), **how}


def _flag(name: str, what: str, default: bool) -> Option:
    return _option(name, what, default, action=argparse.BooleanOptionalAction)


def _list(name: str, what: str, kind: Any = str, **how: Any) -> Option:
    return name, {"help": f"{what}; may be repeated", "default": [], "type": kind, "action": "append", **how}


WHOLE, ABOVE_0 = _above_0(int), _above_0(float)
DEVICE = _option("--device", "cpu or cuda[:N]", "cuda" if torch.cuda.is_available() else "cpu", _device)
DATA = _option("--data", "folder with train/<class>/* and test/<class>/*, or a name on the Hugging Face hub")
# Of runs of the race.
HOW = [
    _option("--seeds", "runs at the best rate, by seeds 0, 1, …", "3", WHOLE),
    DATA,
    _option("--device", "cpu or cuda[:N]", "cpu", _device),
    _option("--jobs", "runs at a time, one thread each", "1", WHOLE),
    _option("--limit", "stop after so many minutes, wherever a run is", "60", ABOVE_0),
    _option("--table", "make no run, only the table", action="store_true"),
]
STUDIES = "; ".join(f"of {name} {', '.join(each.studies)}" for name, each in RECIPES.items())
OPTIONS: dict[Callable[[argparse.Namespace], None], list[Option]] = {
    demo: [_option("--out", "folder", "fop-demo", Path), DEVICE],
    run: [
        _option("recipe", ", ".join(RECIPES), metavar="RECIPE"),
        _option("--study", f"which study: {STUDIES}", "comparison", metavar="STUDY"),
        DATA,
        _list("--task", "only this data set"),
        _list("--batch", "only this size", int),
        _list("--optimizer", "only this one"),
        DEVICE,
        _option("--jobs", "runs at a time; else one a GPU, one a core", kind=WHOLE),
        _option("--minutes", "stop after this time, wherever a run is", "60", ABOVE_0),
        _option("--out", "folder; else fop-runs/RECIPE", kind=Path),
    ],
    report: [
        _option("folders", "with JSON lines; else this clone", kind=Path, nargs="*", metavar="FOLDER"),
        _option("--paper", "also write the paper's tables, with ours, to this Markdown file", kind=Path),
    ],
    verify_records: [
        _option("folders", "with records; else records/*", kind=Path, nargs="*", metavar="FOLDER"),
    ],
    overhead: [
        _option("--peers", "all optimizers; else SGD, AdamW, K-FAC and FOP", action="store_true"),
        _list("--model", f"only this network; else {', '.join(steps.TASKS)}", choices=steps.MODELS),
        _list("--batch", "samples of a step; else 128, mlp-3072 1024, gpt-256 64", WHOLE),
        _list("--optimizer", "only this one", choices=PEERS),
        _flag("--bf16", "autocast", False),
        DEVICE,
        _option("--rounds", "turns of every optimizer", "10", WHOLE),
        _option("--out", "file of JSON lines; the tables go beside it", "fop-overhead.jsonl", _json_lines),
    ],
    race: [
        _list("--task", f"only this one, or these: {', '.join(GROUPS)}", choices=[*RACES, *GROUPS]),
        _list("--optimizer", "only this one", choices=races.STARTS),
        _list("--set", "an option of an optimizer, as fop.damping=0.1; a variant with a row of its own"),
        _option("--rate", "only this learning rate, without a search", kind=ABOVE_0),
        _flag("--keep-norm", "keep the norms of convolutions", True),
        _flag("--bf16", "autocast, where the processor has it", False),
        _flag("--held-out", "search by training images that are held out, not by test images", True),
        _flag("--test-flip", "judge images with their mirror images", False),
        _option("--steps", "of a run and its schedule; else the task's", kind=WHOLE),
        *HOW,
        _option("--out", "file of JSON lines; the table goes beside it", "fop-race.jsonl", _json_lines),
    ],
    defaults: [
        _list("--option", "only this one", choices=candidates.CANDIDATES),
        _list("--task", "this one of the race; else digits-autoencoder", choices=RACES),
        *HOW,
        _option("--out", "file of JSON lines; the table goes beside it", "fop-defaults.jsonl", _json_lines),
    ],
    scale: [
        _list(
            "--ranks", f"processes; else {', '.join(map(str, MEASURED))}; predicted 1, 2, 4, …, 1024", WHOLE
        ),
        _option("--predict", "measure one rank, and predict more", action="store_true"),
        _option("--bandwidth", "GB that a rank sends in a second, for --predict", "50", ABOVE_0),
        _option("--model", "network to step", "resnet18", choices=steps.MODELS),
        _option("--batch", "batch of every rank", "32", WHOLE),
        _option("--rounds", "turns of every optimizer", "2", WHOLE),
        _option("--out", "folder", "fop-scale", Path),
    ],
    surface: [
        _option("recipe", f"{', '.join(RECIPES)}; or a record, to draw its picture again", metavar="RECIPE"),
        DATA,
        _option("--batch", "samples of a step; even", "1000", WHOLE, dest="batch_size"),
        _option("--epochs", "training with FOP before the steps", "3", WHOLE),
        _option("--lr", "learning rate at the start of the training, and of steps", "0.1", ABOVE_0),
        _option("--damping", "λ of training and steps", "1e-4", ABOVE_0),
        _option("--seed", "of weights, order and the choice of the batch", "1", int),
        DEVICE,
        _option("--grid", "points along each side", "25", WHOLE, dest="points"),
        _option("--out", "folder", "fop-surface", Path),
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Be the command, by default with the arguments of this process; what may go wrong ends in a message."""
    parser = argparse.ArgumentParser("fop-bench", description="Measure FOP against SGD, AdamW and K-FAC.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for function, options in OPTIONS.items():
        text = inspect.getdoc(function) or ""
        command = commands.add_parser(
            function.__name__.replace("_", "-"), help=text.splitlines()[0], description=text
        )
        command.set_defaults(function=function)
        for name, how in options:
            command.add_argument(name, **how)
    asked = parser.parse_args(arguments)
    try:
        vars(asked).pop("function")(asked)
    except BrokenProcessPool:
        sys.exit("Error: a worker was killed; no finished run is lost; fewer --jobs?")
    except ProcessException as error:
        sys.exit(f"Error: rank {error.error_index} failed: {error}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        sys.exit(
            f"Error: this command needs {package}: pip install 'fop-optim[bench]', or '.[bench]' in a clone"
        )
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; no finished run is lost")
