"""The `fop-bench` command."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click
import torch

from fop_bench.cost_model import H100
from fop_bench.defaults import STUDIES, TASKS, measure
from fop_bench.defaults_report import write_report
from fop_bench.demo import FULL, QUICK, SELECTION, TARGET, TUNING_SEED, run_demo
from fop_bench.environment import environment
from fop_bench.overhead import Measurement, measure_overhead, workloads
from fop_bench.plot import plot_demo
from fop_bench.report import demo_markdown, demo_table, overhead_table, write_json
from fop_bench.run_cli import report, run
from fop_bench.scale import PLAIN_STEPS, measure_scale
from fop_bench.scale import Measurement as Measured
from fop_bench.scale_report import (
    GPUS,
    assumptions,
    measured_markdown,
    measured_sheets,
    predicted_markdown,
    predicted_sheets,
    predictions,
)
from fop_bench.surface_cli import surface
from fop_bench.terminal import console_here, device_option, progress_bars
from fop_bench.workloads import MODELS, Workload

MEASURED = (1, 2, 4)  # ranks that `scale` measures by default


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Measure FOP against SGD, AdamW and K-FAC."""


main.add_command(run)
main.add_command(report)
main.add_command(surface)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("fop-demo"),
    help="Folder for the results.",
)
@device_option
@click.option("--quick", is_flag=True, help="Two seeds, two epochs: shows that all works; not a result.")
def demo(out: Path, device: torch.device, quick: bool) -> None:
    """Train a small CNN on handwritten digits at batch 64, 512 and the full training set.

    Takes about two minutes on two CPU cores. Writes demo.json, demo.png and README.md into --out.
    """
    console = console_here()
    plan = QUICK if quick else FULL
    # The tensors are tiny: a second thread gains little, and stalls once other programs want its core.
    torch.set_num_threads(1)
    where = environment(device)
    with progress_bars(console) as progress:
        task = progress.add_task("", total=plan.total_runs())
        entries = run_demo(plan, device, lambda text: progress.update(task, description=text, advance=1))
    protocol = {
        "data": "sklearn.datasets.load_digits",
        "target_accuracy": TARGET,
        "tuning_seed": TUNING_SEED,
        "selection": SELECTION,
        "schedule": "half a cosine from the learning rate to 0 over all steps",
        "quick": quick,
        **asdict(plan),
    }
    write_json(
        out / "demo.json",
        {"environment": where, "protocol": protocol, "results": [asdict(entry) for entry in entries]},
    )
    plot_demo(entries, out / "demo.png")
    (out / "README.md").write_text(demo_markdown(entries, where), encoding="utf-8")
    console.print(demo_table(entries))
    console.print(f"Wrote demo.json, demo.png and README.md to {out}", soft_wrap=True)


@main.command()
@click.option("--model", type=click.Choice([*MODELS, "all"]), default="all", help="Network to step.")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=[128], help="May be repeated."
)
@click.option("--bf16/--no-bf16", default=None, help="bf16 autocast on or off; both by default.")
@device_option
@click.option("--rounds", type=click.IntRange(min=1), default=10, help="Turns of every optimizer.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("fop-overhead.json"))
def overhead(
    model: str, batches: tuple[int, ...], bf16: bool | None, device: torch.device, rounds: int, out: Path
) -> None:
    """Measure time and peak memory per step, the optimizers taking turns."""
    console = console_here()
    models = list(MODELS) if model == "all" else [model]
    precisions = [False, True] if bf16 is None else [bf16]
    todo = workloads(models, batches, precisions)
    where = environment(device)
    measurements: list[Measurement] = []
    with progress_bars(console) as progress:
        task = progress.add_task("", total=len(todo) * rounds)
        for workload in todo:
            precision = "bf16" if workload.bf16 else "float32"
            progress.update(task, description=f"{workload.model} · batch {workload.batch_size} · {precision}")
            measurements += measure_overhead(workload, device, rounds, lambda: progress.advance(task))
            # After every workload: one that does not fit into memory takes no other's result with it.
            write_json(
                out,
                {"environment": where, "rounds": rounds, "results": [asdict(each) for each in measurements]},
            )
    console.print(overhead_table(measurements))
    console.print(f"Wrote {out}", soft_wrap=True)


@main.command()
@click.argument("study", type=click.Choice([*STUDIES]))
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="CIFAR-10 as an image folder, train/<class>/*; without it only the digits tasks run.",
)
@click.option("--tasks", default="", help="Only tasks whose name holds this text.")
@device_option
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Runs at a time, one thread each.")
@click.option("--minutes", type=float, default=60.0, help="No new run after this time; call again to go on.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("fop-defaults"))
def defaults(
    study: str, data: Path | None, tasks: str, device: torch.device, jobs: int, minutes: float, out: Path
) -> None:
    """Measure default options on small real tasks, and write the tables of all studies in --out.

    STUDY is a grid of runs; each is one JSON line in --out.
    """
    chosen = [name for name, task in TASKS.items() if tasks in name and (data or task.data == "digits")]
    if not chosen:
        raise click.BadParameter(f"{tasks!r} matches none of: {', '.join(TASKS)}", param_hint="--tasks")
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars(console_here()) as progress:
        bar = progress.add_task(study)
        left = measure(
            study,
            chosen,
            device=str(device),
            folder=data,
            out=out / f"{study}.jsonl",
            jobs=jobs,
            minutes=minutes,
            on_run=lambda done, left: progress.update(bar, completed=done, total=done + left),
        )
    click.echo(f"Wrote {write_report(out)}; {left} runs left")


@main.command()
@click.option(
    "--ranks",
    "counts",
    type=click.IntRange(min=1),
    multiple=True,
    help="Processes, or GPUs for --predict; may be repeated.  [default: 1, 2, 4; for --predict 1, 2, … 1024]",
)
@click.option("--model", type=click.Choice([*MODELS]), default="resnet18", help="Network to step.")
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Batch of every rank.")
@click.option("--mode", type=click.Choice(["compatible", "lean", "both"]), default="both", help="FOP's mode.")
@click.option("--rounds", type=click.IntRange(min=1), default=2, help="Turns of every optimizer.")
@click.option("--trace", is_flag=True, help="Also write Chrome traces of curvature steps of rank 0.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    help="Limit for each number of ranks.",
)
@click.option("--predict", is_flag=True, help="Only predict bytes, memory and times for up to 1024 GPUs.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("fop-scale"))
def scale(
    counts: tuple[int, ...],
    model: str,
    batch: int,
    mode: str,
    rounds: int,
    trace: bool,
    minutes: float,
    predict: bool,
    out: Path,
) -> None:
    """Measure SGD, K-FAC and FOP on several processes of this machine, or predict larger ones.

    Writes scale.json and README.md into --out; with --predict prediction.json and prediction.md.
    """
    # A number that is given twice is measured once.
    counts = tuple(dict.fromkeys(counts))
    if predict:
        _predict_scale(counts or GPUS, out)
        return
    console = console_here()
    workload = Workload(model, batch, bf16=False)
    modes = ["compatible", "lean"] if mode == "both" else [mode]
    where = environment(torch.device("cpu")) | {"threads": 1}
    cores = os.cpu_count() or 1
    protocol = {
        "workload": asdict(workload),
        "cores": cores,
        "modes": modes,
        "rounds": rounds,
        "plain_steps_a_round": PLAIN_STEPS,
        "transport": "gloo over the loopback interface",
    }
    measurements: list[Measured] = []
    with progress_bars(console) as progress:
        task = progress.add_task("", total=len(counts or MEASURED))
        for count in counts or MEASURED:
            progress.update(task, description=f"{model} · batch {batch} · {count} rank{'s' * (count > 1)}")
            try:
                measurements += measure_scale(
                    workload, count, modes, rounds, minutes * 60, out if trace else None
                )
            except (RuntimeError, TimeoutError) as error:
                raise click.ClickException(str(error)) from error
            progress.advance(task)
            # After every number of ranks: one that fails takes no other's result with it.
            results = [asdict(each) for each in measurements]
            write_json(out / "scale.json", {"environment": where, "protocol": protocol, "results": results})
            (out / "README.md").write_text(measured_markdown(measurements, where, cores), encoding="utf-8")
    for sheet in measured_sheets(measurements):
        console.print(sheet.table())
    console.print(f"Wrote scale.json and README.md to {out}", soft_wrap=True)


def _predict_scale(counts: tuple[int, ...], out: Path) -> None:
    predicted = predictions(counts)
    results = {title: [asdict(row) for row in rows] for title, rows in predicted.items()}
    write_json(out / "prediction.json", {"assumptions": asdict(H100), "results": results})
    (out / "prediction.md").write_text(predicted_markdown(predicted), encoding="utf-8")
    console = console_here()
    for sheet in predicted_sheets(predicted):
        console.print(sheet.table())
    console.print(assumptions(), soft_wrap=True)
    console.print(f"Wrote prediction.json and prediction.md to {out}", soft_wrap=True)
