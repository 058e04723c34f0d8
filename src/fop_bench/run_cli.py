"""The command `fop-bench run`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch

from fop_bench.recipes import RECIPES
from fop_bench.runner import Selection, make
from fop_bench.terminal import console_here, device_option, progress_bars


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--study", default="comparison", help="Which of the recipe's studies.")
@click.option(
    "--data", help="Folder with train/<class>/* and test/<class>/*, or a name on the Hugging Face hub."
)
@click.option("--task", "tasks", multiple=True, help="Only this data set of the recipe; may be repeated.")
@click.option("--batch", "batches", type=int, multiple=True, help="Only this batch size; may be repeated.")
@click.option("--optimizer", "optimizers", multiple=True, help="Only this one; may be repeated.")
@device_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at a time.  [default: one a GPU, one a core of the processor]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Stop after this time, in the middle of a run if need be; the same command goes on.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder.  [default: fop-runs/RECIPE]"
)
def run(
    recipe: str,
    study: str,
    data: str | None,
    tasks: tuple[str, ...],
    batches: tuple[int, ...],
    optimizers: tuple[str, ...],
    device: torch.device,
    jobs: int | None,
    minutes: float,
    out: Path | None,
) -> None:
    """Make the runs of a recipe's study, one JSON line each in OUT/STUDY.jsonl.

    The optimizers are tuned first, each by the same number of runs on held-out images, and then trained with
    new seeds. Goes on where it stopped or was killed.
    """
    folder = out or Path("fop-runs") / recipe
    jobs = jobs or (1 if device.type == "cuda" else os.cpu_count() or 1)
    try:
        with progress_bars(console_here()) as progress:
            bar = progress.add_task(recipe, total=None)
            left = make(
                Selection(recipe, study, tasks, optimizers, batches),
                data=data,
                device=device,
                out=folder,
                jobs=jobs,
                minutes=minutes,
                on_run=lambda done, planned, title: progress.update(
                    bar, completed=done, total=planned, description=title
                ),
            )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    end = "complete" if left == 0 else f"{left} runs left; the same command goes on"
    click.echo(f"{folder / study}.jsonl: {end}")


run.help = f"{run.help}\n\nRECIPE is one of: {', '.join(RECIPES)}."
