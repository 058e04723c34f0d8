"""The command `fop-bench surface`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from fop_bench.recipes import RECIPES
from fop_bench.report import write_json
from fop_bench.surface import STEPS, Question
from fop_bench.surface import surface as measure_surface
from fop_bench.surface_plot import plot_surface
from fop_bench.terminal import console_here, data_option, device_option, progress_bars

ABOVE_0 = click.FloatRange(min=0, min_open=True)
OUT = click.Path(path_type=Path, file_okay=False)
HELP = f"""Draw the loss around a point of a training, with one step of K-FAC and of FOP from there.

Trains with FOP first. Then K-FAC steps on the gradient of each half of one batch and on their mean, and
FOP on the pair, all with the same curvature. Writes surface.json and surface.png into --out.

RECIPE is one of: {", ".join(RECIPES)}."""
BATCH = "Samples of a training step, and of the batch of the picture; even."


@click.command(help=HELP)
@click.argument("recipe", metavar="RECIPE")
@data_option
@click.option("--task", help="Data set of the recipe.  [default: its first]")
@click.option("--batch", "batch_size", type=click.IntRange(min=2), default=1000, help=BATCH)
@click.option("--epochs", type=click.IntRange(min=1), default=3, help="Training with FOP before the steps.")
@click.option("--lr", type=ABOVE_0, default=0.1, help="Learning rate of training (constant) and steps.")
@click.option("--damping", type=ABOVE_0, default=1e-4, help="λ of the training and steps.")
@click.option("--seed", type=int, default=1, help="Of weights, order and the choice of the batch.")
@device_option
@click.option("--grid", "points", type=click.IntRange(min=2), default=25, help="Points along each side.")
@click.option("--out", type=OUT, default=Path("fop-surface"), help="Folder for the results.")
def surface(device: torch.device, out: Path, **asked: Any) -> None:
    """Run what `HELP` says."""
    question = Question(**asked)
    try:
        with progress_bars(console_here()) as progress:
            training = progress.add_task("training epochs", total=question.epochs)
            rows = progress.add_task("rows of the surface", total=question.points)
            result = measure_surface(
                question,
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
        share = f"{step['share_in_plane']:.0%} of the step is in the plane"
        click.echo(f"  {step['losses_at_end']['whole']} after {step['what']} ({share})")
    click.echo(f"Wrote surface.json and surface.png to {out}")
