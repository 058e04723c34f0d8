"""The `fop-bench` command."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch.multiprocessing.spawn import ProcessException

from fop_bench import scale as scaling
from fop_bench.cost_model import H100
from fop_bench.environment import environment
from fop_bench.overhead import MODELS, PLAIN_STEPS, Workload, measure_overhead, overhead_table
from fop_bench.paper import paper_page
from fop_bench.plots import plot_surface
from fop_bench.recipes import DEFAULTS, RECIPES
from fop_bench.report import write_json
from fop_bench.run_records import read_runs
from fop_bench.runner import OnRun, Selection, make
from fop_bench.study import comparison_table, studies
from fop_bench.study_report import write_defaults, write_report
from fop_bench.surface import Question
from fop_bench.surface import surface as measure_surface
from fop_bench.world import World, under_torchrun, world_on

MEASURED = (1, 2, 4)  # ranks that `scale` measures by default
MINUTES = ABOVE_0 = click.FloatRange(min=0, min_open=True)
ABOVE = click.IntRange(min=1)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Measure FOP against SGD, AdamW and K-FAC."""


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.device:
    name = value or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # timing events are recorded on the current device
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


device_option = click.option(
    "--device", callback=_device, metavar="DEVICE", help="cpu or cuda[:N]; default: a GPU if there is one."
)
data_option = click.option(
    "--data",
    help="Folder with train/<class>/* and test/<class>/*, or a name on the Hugging Face hub; not for digits.",
)


def out_option(default: str | None, *, file: bool = False, **given: Any) -> Callable[[Any], Any]:
    """Return --out for a folder, or for a file."""
    kind = click.Path(path_type=Path, file_okay=file, dir_okay=not file)
    return click.option("--out", type=kind, default=default, **given)


def console_here() -> Console:
    """Return the console; a table that is written to a file or a pipe is not squeezed into 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


@contextmanager
def _bar_of_runs(title: str, hidden: bool = False) -> Iterator[OnRun]:
    """Yield what a runner calls before and after a run."""
    with Progress(console=console_here(), disable=hidden) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, planned, title: progress.update(
            bar, completed=done, total=planned, description=f"{done} of {planned} · {title}"
        )


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what may go wrong into messages."""
    try:
        yield
    except BrokenProcessPool as error:
        raise click.ClickException("a worker was killed; no finished run is lost; fewer --jobs?") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--study", default="comparison", help="Which of the recipe's studies.")
@data_option
@click.option("--task", "tasks", multiple=True, help="Only this data set of the recipe; may be repeated.")
@click.option("--batch", "batch_sizes", type=int, multiple=True, help="Only this size; may be repeated.")
@click.option("--optimizer", "contenders", multiple=True, help="Only this one; may be repeated.")
@device_option
@click.option("--jobs", type=ABOVE, help="Runs at a time.  [default: one a GPU, one a core]")
@click.option("--minutes", type=MINUTES, default=60.0, help="Stop after this time, wherever a run is.")
@out_option(None, help="Folder.  [default: fop-runs/RECIPE]")
def run(
    recipe: str,
    study: str,
    data: str | None,
    device: torch.device,
    jobs: int | None,
    minutes: float,
    out: Path | None,
    **asked: Any,
) -> None:
    """Make the runs of a recipe's study, one JSON line each in OUT/STUDY.jsonl.

    The optimizers are tuned first, each by the same number of runs on held-out images, and then trained with
    new seeds. Goes on where it stopped or was killed.
    """
    folder = out or Path("fop-runs") / recipe
    lines = folder / f"{study}.jsonl"
    jobs = jobs or (1 if device.type == "cuda" or under_torchrun() else os.cpu_count() or 1)
    if jobs > 1 and under_torchrun():
        raise click.BadParameter("ranks that torchrun started make one run at a time", param_hint="--jobs")
    with _errors():
        chosen = Selection(recipe, study, **asked).checked()
        with world_on(device) as world, _bar_of_runs(recipe, hidden=world.rank > 0) as on_run:
            left = make(chosen, data=data, world=world, out=folder, jobs=jobs, minutes=minutes, on_run=on_run)
    end = "all that was asked for is there" if left == 0 else f"{left} runs left; the same command goes on"
    if world.rank == 0:
        click.echo(f"{lines}: {end}. Tables and plots: fop-bench report {folder}")


_LIST = "\n".join(f"{name}: {', '.join(each.studies)}" for name, each in RECIPES.items())
run.help = f"{inspect.cleandoc(run.help or '')}\n\nRecipes and their studies:\n\n\b\n{_LIST}"


@main.command()
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
@click.option("--paper", type=FILE, help="Also write the paper's tables, with ours, to this Markdown file.")
def report(folders: tuple[Path, ...], paper: Path | None) -> None:
    """Make README.md and its plots in every one of FOLDERS, from the JSON lines in there alone."""
    with warnings.catch_warnings(record=True) as caught, _errors():
        warnings.simplefilter("always")
        written = [write_report(folder) for folder in folders]
        if paper is not None:
            paper.parent.mkdir(parents=True, exist_ok=True)
            paper.write_text(paper_page(folders), encoding="utf-8")
            written.append(paper)
    for notice in dict.fromkeys(str(each.message) for each in caught):
        click.echo(f"Note: {notice}", err=True)
    for path in written:
        click.echo(f"Wrote {path}")


@main.command()
@click.argument("study", type=click.Choice([*DEFAULTS[0].studies]))
@click.option("--data", type=FOLDER, help="CIFAR-10 as train/<class>/*; without it only the digits.")
@click.option("--tasks", default="", help="Only tasks whose name holds this text.")
@device_option
@click.option("--jobs", type=ABOVE, default=2, help="Runs at a time, one thread each.")
@click.option("--minutes", type=MINUTES, default=60.0, help="Stop after this time; call again to go on.")
@out_option("fop-defaults")
def defaults(
    study: str, data: Path | None, tasks: str, device: torch.device, jobs: int, minutes: float, out: Path
) -> None:
    """Measure default options on small real tasks, and write the tables of all studies in --out.

    STUDY is a grid of runs; each is one JSON line in --out.
    """
    names = {
        f"{task}, {'batch ' + str(batch) if batch < 1000 else 'full batch'}": (plan, batch)
        for plan in DEFAULTS
        for task in plan.tasks
        for batch in plan.studies[study].epochs
        if data or "digits" in task
    }
    chosen = [each for name, each in names.items() if tasks in name]
    if not chosen:
        raise click.BadParameter(f"{tasks!r} matches none of: {', '.join(names)}", param_hint="--tasks")
    left = 0
    with _errors(), _bar_of_runs(study) as on_run:
        end = time.monotonic() + 60 * minutes
        for plan, batch in chosen:
            left += make(
                Selection(plan.name, study, batch_sizes=(batch,)),
                data=None if "digits" in plan.name else str(data),
                world=World(device),
                out=out,
                jobs=jobs,
                minutes=(end - time.monotonic()) / 60,
                on_run=on_run,
            )
        click.echo(f"Wrote {write_defaults(out)}; {left} runs left")


@main.command()
@out_option("fop-demo")
@device_option
@click.option("--quick", is_flag=True, help="Two seeds, two epochs: shows that all works; not a result.")
def demo(out: Path, device: torch.device, quick: bool) -> None:
    """Train a small CNN on handwritten digits at batch 64, 512 and the full training set.

    Takes about two minutes on two CPU cores. Writes the runs, README.md and its plots into --out.
    """
    # The tensors are tiny: a second thread gains little, and stalls once other programs want its core.
    torch.set_num_threads(1)
    chosen = Selection("digits", "demo-quick" if quick else "demo")
    (out / f"{chosen.study}.jsonl").unlink(missing_ok=True)
    with _errors(), _bar_of_runs("demo") as on_run:
        make(chosen, data=None, world=World(device), out=out, jobs=1, minutes=600.0, on_run=on_run)
        page = write_report(out)
    (study,) = (each for each in studies(read_runs(out)) if each.name == chosen.study)
    console_here().print(Markdown(comparison_table(study)))
    click.echo(f"Wrote {page}, its plots and {chosen.study}.jsonl")


@main.command()
@click.option("--model", type=click.Choice([*MODELS, "all"]), default="all", help="Network to step.")
@click.option("--batch", "batches", type=ABOVE, multiple=True, default=[128], help="May be repeated.")
@click.option("--bf16/--no-bf16", default=None, help="bf16 autocast on or off; both by default.")
@device_option
@click.option("--rounds", type=ABOVE, default=10, help="Turns of every optimizer.")
@out_option("fop-overhead.json", file=True)
def overhead(
    model: str, batches: tuple[int, ...], bf16: bool | None, device: torch.device, rounds: int, out: Path
) -> None:
    """Measure time and peak memory per step, the optimizers taking turns."""
    todo = [
        Workload(name, batch, precision)
        for name in (MODELS if model == "all" else [model])
        for batch in batches
        for precision in ([False, True] if bf16 is None else [bf16])
    ]
    where, results = environment(device), []
    with Progress(console=console_here()) as progress:
        task = progress.add_task("rounds", total=len(todo) * rounds)
        for workload in todo:
            results += measure_overhead(workload, device, rounds, lambda: progress.advance(task))
            # After every workload: one that does not fit into memory takes no other's result with it.
            write_json(out, {"environment": where, "rounds": rounds, "results": results})
    console_here().print(Markdown(overhead_table(results)))
    click.echo(f"Wrote {out}")


@main.command()
@click.option("--ranks", "counts", type=ABOVE, multiple=True, help="Processes, or GPUs; may be repeated.")
@click.option("--model", type=click.Choice([*MODELS]), default="resnet18", help="Network to step.")
@click.option("--batch", type=ABOVE, default=32, help="Batch of every rank.")
@click.option("--rounds", type=ABOVE, default=2, help="Turns of every optimizer.")
@click.option("--predict", is_flag=True, help="Only predict bytes, memory and times for up to 1024 GPUs.")
@out_option("fop-scale")
def scale(counts: tuple[int, ...], model: str, batch: int, rounds: int, predict: bool, out: Path) -> None:
    """Measure SGD, K-FAC and FOP on several processes of this machine, or predict larger ones.

    Writes scale.json into --out; with --predict prediction.json and prediction.md.
    """
    # A number that is given twice is measured once.
    counts = tuple(dict.fromkeys(counts)) or (scaling.GPUS if predict else MEASURED)
    console = console_here()
    if predict:
        predicted = scaling.predictions(counts)
        write_json(out / "prediction.json", {"assumptions": H100, "results": predicted})
        tables = scaling.predicted_tables(predicted)
        (out / "prediction.md").write_text(tables, encoding="utf-8")
        console.print(Markdown(tables))
        console.print(scaling.ASSUMED, soft_wrap=True)
        console.print(f"Wrote prediction.json and prediction.md to {out}", soft_wrap=True)
        return
    workload, cores = Workload(model, batch, bf16=False), os.cpu_count() or 1
    where = environment(torch.device("cpu")) | {"threads": 1}
    protocol = {
        "workload": asdict(workload),
        "cores": cores,
        "rounds": rounds,
        "plain_steps_a_round": PLAIN_STEPS,
    }
    results: list[scaling.Row] = []
    with Progress(console=console) as progress:
        for count in progress.track(counts, description=f"{model} · batch {batch}"):
            try:
                results += scaling.measure_scale(workload, count, rounds)
            except ProcessException as error:
                raise click.ClickException(f"rank {error.error_index} of {count} failed: {error}") from error
            # After every number of ranks: one that fails takes no other's result with it.
            write_json(out / "scale.json", {"environment": where, "protocol": protocol, "results": results})
    console.print(Markdown(scaling.measured_tables(results)))
    console.print(f"Wrote scale.json to {out}", soft_wrap=True)


SURFACE = f"""Draw the loss around a point of a training, with one step of K-FAC and of FOP from there.

Trains with FOP first. Then K-FAC steps on the gradient of each half of one batch and on their mean, and
FOP on the pair, all with the same curvature. Writes surface.json and surface.png into --out.

RECIPE is one of: {", ".join(RECIPES)}."""
SURFACE_BATCH = "Samples of a training step, and of the batch of the picture; even."


@main.command(help=SURFACE)
@click.argument("recipe", metavar="RECIPE")
@data_option
@click.option("--task", help="Data set of the recipe.  [default: its first]")
@click.option("--batch", "batch_size", type=click.IntRange(min=2), default=1000, help=SURFACE_BATCH)
@click.option("--epochs", type=ABOVE, default=3, help="Training with FOP before the steps.")
@click.option("--lr", type=ABOVE_0, default=0.1, help="Learning rate of training (constant) and steps.")
@click.option("--damping", type=ABOVE_0, default=1e-4, help="λ of the training and steps.")
@click.option("--seed", type=int, default=1, help="Of weights, order and the choice of the batch.")
@device_option
@click.option("--grid", "points", type=click.IntRange(min=2), default=25, help="Points along each side.")
@out_option("fop-surface")
def surface(device: torch.device, out: Path, **asked: Any) -> None:
    """Run what `SURFACE` says."""
    question = Question(**asked)
    with _errors(), console_here().status("training, then the steps and the losses around"):
        result = measure_surface(question, device)
        write_json(out / "surface.json", result)
        plot_surface(result, out / "surface.png")
    click.echo(f"loss of the batch: {result['origin']['whole']} at the point")
    for step in result["steps"].values():
        share = f"{step['share_in_plane']:.0%} of the step is in the plane"
        click.echo(f"  {step['losses_at_end']['whole']} after {step['what']} ({share})")
    click.echo(f"Wrote surface.json and surface.png to {out}")
