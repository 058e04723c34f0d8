"""What the commands share: the choice of a device, the console and the progress bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.device:
    name = value or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} cannot be measured; use cpu or cuda")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # timing events are recorded on the current device
    return device


device_option = click.option(
    "--device",
    callback=_device,
    metavar="DEVICE",
    help="cpu or cuda[:N]; default: a GPU if there is one.",
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
    """Return the console, wide enough for tables where it is no terminal."""
    console = Console()
    # A table that is written to a file or a pipe is not squeezed into 80 columns.
    return console if console.is_terminal else Console(width=130)


def progress_bars(console: Console) -> Progress:
    """Return bars with what is under way, how much is done, and the times gone and to come."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}"), *columns, console=console)
