"""The command `fop-bench surface`."""

from __future__ import annotations

import inspect
from pathlib import Path

import click
import torch

from fop_bench.recipes import RECIPES
from fop_bench.report import write_json
from fop_bench.surface import STEPS, Question
from fop_bench.surface import surface as measure_surface
from fop_bench.surface_plot import plot_surface
from fop_bench.terminal import console_here, data_option, device_option, progress_bars


def _even(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value % 2:
        raise click.BadParameter(f"{value} is odd; a batch has two halves alike, so give an even number")
    return value


@click.command()
@click.argument("recipe", metavar="RECIPE")
@data_option
@click.option("--task", help="Data set of the recipe.  [default: its first]")
@click.option(
    "--batch",
    type=click.IntRange(min=2),
    callback=_even,
    default=1000,
    help="Samples of a training step, and of the batch of the picture; even.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=3, help="Training with FOP before the steps.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    help="Learning rate of the training, constant, and of the steps.",
)
@click.option(
    "--damping",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    help="λ of the training and steps.",
)
@click.option("--seed", type=int, default=1, help="Of weights, order and the choice of the batch.")
@device_option
@click.option("--grid", type=click.IntRange(min=2), default=25, help="Points along each side of the surface.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("fop-surface"),
    help="Folder for the results.",
)
def surface(
    recipe: str,
    data: str | None,
    task: str | None,
    batch: int,
    epochs: int,
    lr: float,
    damping: float,
    seed: int,
    device: torch.device,
    grid: int,
    out: Path,
) -> None:
    """Draw the loss around a point of a training, with one step of K-FAC and of FOP from there.

    Trains with FOP first. Then K-FAC steps on the gradient of each half of one batch and on their mean, and
    FOP on the pair, all with the same curvature. Writes surface.json and surface.png into --out.
    """
    if recipe not in RECIPES:
        raise click.BadParameter(
            f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}", param_hint="RECIPE"
        )
    asked = Question(
        recipe, task or next(iter(RECIPES[recipe].tasks)), data, batch, epochs, lr, damping, seed, grid
    )
    try:
        with progress_bars(console_here()) as progress:
            training = progress.add_task("training epochs", total=epochs)
            rows = progress.add_task("rows of the surface", total=grid)
            result = measure_surface(
                asked,
                device,
                on_epoch=lambda: progress.advance(training),
                on_row=lambda: progress.advance(rows),
            )
        write_json(out / "surface.json", result)
        plot_surface(result, out / "surface.png")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"loss of the batch: {result['origin']['whole']} at the point")
    for name in STEPS:
        step = result["steps"][name]
        click.echo(
            f"  {step['losses_at_end']['whole']} after {step['what']} "
            f"({step['share_in_plane']:.0%} of the step is in the plane)"
        )
    click.echo(f"Wrote surface.json and surface.png to {out}")


surface.help = f"{inspect.cleandoc(surface.help or '')}\n\nRECIPE is one of: {', '.join(RECIPES)}."
