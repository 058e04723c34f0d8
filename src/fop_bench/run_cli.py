"""The commands `fop-bench run` and `fop-bench report`."""

from __future__ import annotations

import inspect
import os
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click
import torch

from fop_bench.paper import paper_page
from fop_bench.recipes import RECIPES
from fop_bench.runner import Selection, make
from fop_bench.study_report import write_report
from fop_bench.terminal import console_here, data_option, device_option, progress_bars
from fop_bench.world import under_torchrun, world_on


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--study", default="comparison", help="Which of the recipe's studies.")
@data_option
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
    jobs = jobs or (1 if device.type == "cuda" or under_torchrun() else os.cpu_count() or 1)
    if jobs > 1 and under_torchrun():
        raise click.BadParameter("ranks that torchrun started make one run at a time", param_hint="--jobs")
    try:
        chosen = Selection(recipe, study, tasks, optimizers, batches).checked()
        with world_on(device) as world, progress_bars(console_here()) as progress:
            progress.disable = world.rank > 0
            bar = progress.add_task(recipe, total=None)
            left = make(
                chosen,
                data=data,
                world=world,
                out=folder,
                jobs=jobs,
                minutes=minutes,
                on_run=lambda done, planned, title: progress.update(
                    bar, completed=done, total=planned, description=title
                ),
            )
    except KeyboardInterrupt as error:
        raise click.ClickException(
            f"stopped; every finished run is in {folder / study}.jsonl, and the same command goes on"
        ) from error
    except BrokenProcessPool as error:
        raise click.ClickException(
            "a worker was killed, perhaps for want of memory; no finished run is lost: go on by fewer --jobs"
        ) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    end = "all that was asked for is there" if left == 0 else f"{left} runs left; the same command goes on"
    if world.rank == 0:
        click.echo(f"{folder / study}.jsonl: {end}. Tables and plots: fop-bench report {folder}")


run.help = "\n\n".join(
    [
        inspect.cleandoc(run.help or ""),
        "Recipes and their studies:",
        "\b\n" + "\n".join(f"{name}: {', '.join(each.studies)}" for name, each in RECIPES.items()),
    ]
)


@click.command()
@click.argument(
    "folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option("--commit", help="Only the runs of this commit, where a folder holds several.")
@click.option(
    "--paper",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the paper's tables to this Markdown file, what these folders hold beside them.",
)
def report(folders: tuple[Path, ...], commit: str | None, paper: Path | None) -> None:
    """Make README.md and its plots in every one of FOLDERS, from the JSON lines in there alone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            written = [write_report(folder, commit) for folder in folders]
            if paper is not None:
                paper.parent.mkdir(parents=True, exist_ok=True)
                paper.write_text(paper_page(folders, commit), encoding="utf-8")
                written.append(paper)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
    for notice in dict.fromkeys(str(each.message) for each in caught):
        click.echo(f"Note: {notice}", err=True)
    for path in written:
        click.echo(f"Wrote {path}")
