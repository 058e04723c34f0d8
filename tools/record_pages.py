"""What pages of this repository must say by the records that no command of fop-bench makes a page of today.

`fop-bench verify-records` asks `pages`. The pages of demo, scale-cpu, step-time and rebuild were made by
commands of earlier versions, from files that today's do not read: here is what stands in their tables.
"""

from __future__ import annotations

import json
import runpy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fop_bench.paper import paper_page
from fop_bench.surface import surface_table
from fop_bench.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
LABELS = {"sgd": "SGD", "adamw": "AdamW", "kfac": "K-FAC", "fop": "FOP"}
LABELS |= {f"fop-{mode}": f"FOP {mode}" for mode in ("compatible", "lean")}
Cells = list[object]
# Differences that are there and have a reason: records/README.md.
KNOWN = {
    *("records/adamw-rate has no data", "records/fine-tuning has no data"),
    *("records/faults/new.json lacks command", "records/faults/old.json lacks command"),
}


def pages(folder: Path) -> Iterator[tuple[Path, str, bool]]:
    """Yield pages, what the records of a folder give, and whether that is only the tables of the page."""
    name, notes = folder.name, folder / "README.md"
    if folder.parent != ROOT / "records":
        return
    if name == "race" or (name.startswith("overhead-") and any(folder.glob("*.jsonl"))):
        report = tool("report_page.py")
        yield report["PAGE"], report["page"](), False
    if name == "race":
        results = tool("race_results.py")
        yield from ((page, results["made"](page), False) for page in results["PAGES"])
    elif name == "cifar10-small":
        yield ROOT / "docs/paper-tables.md", paper_page([folder]), False
    elif name == "zoo":
        record = folder / "zoo.json"
        yield ROOT / "docs/compatibility-zoo.md", tool("zoo")["table"](read(record), record), False
    elif name == "faults":
        faults = tool("plant_faults")["tomllib"].loads((ROOT / "tools/faults.toml").read_text())["fault"]
        tables = [tool("plant_faults")["table"](record, faults) for record in sorted(folder.glob("*.json"))]
        yield notes, "\n".join(line for table in tables for line in table), True
    elif name == "torch-matrix":
        matrix = tool("torch_matrix")
        table, begin, end = matrix["table"](read(folder / "matrix.json")), matrix["BEGIN"], matrix["END"]
        yield notes, table, True
        before, _, rest = matrix["DOC"].read_text().partition(begin)
        yield matrix["DOC"], f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}", False
    elif name == "surface":
        yield notes, "\n".join(surface_table(read(file)) for file in sorted(folder.glob("*.json"))), True
    elif name == "step-profile":
        table = tool("profile_step.py")["table"]
        yield notes, "\n".join(table(read(file)["shares"]) for file in sorted(folder.glob("*.json"))), True
    elif name == "no-schedule":
        table, files = tool("no_schedule.py")["table"], ("now.json", "slow-average.json", "before.json")
        yield notes, "\n".join(table(read(folder / file)) for file in files), True
    elif name in EARLIER:
        text = notes.read_text()
        files = sorted(folder.glob("*.json"), key=lambda file: text.find(file.name))
        rows = [row for file in files for row in EARLIER[name](read(file))]
        yield notes, markdown_table([], rows), True


def tool(name: str) -> dict[str, Any]:
    """Return the names in a script beside this one."""
    return runpy.run_path(str(ROOT / "tools" / name))


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


# --- Rows of tables that earlier versions made


def demo(record: Any) -> Iterator[Cells]:
    """One row a batch size and optimizer."""
    for each in record["results"]:
        told = each["summary"]
        times = [
            f"{told[key]['mean'] * scale:.{digits}f} ± {told[key]['std'] * scale:.{digits}f}"
            for key, digits, scale in (("epochs", 1, 1), ("seconds", 2, 1), ("final_accuracy", 2, 100))
        ]
        head = [each["batch_size"], LABELS[each["optimizer"]], each["learning_rate"]]
        yield [*head, f"{told['reached']} of {told['runs']}", *times, told["diverged"]]


def scale(record: Any) -> Iterator[Cells]:
    """The rows of five tables: times, bytes, bytes through the loopback interface, curvature, reduces."""

    def numbers(values: Any, digits: int, scale: float) -> str:
        return ", ".join(f"{each * scale:.{digits}f}" for each in values)

    def named(*, several: bool = False) -> Iterator[tuple[Any, Cells]]:
        for each in record["results"]:
            if each["ranks"] > several:
                yield each, [each["ranks"], LABELS[each["optimizer"]]]

    for each, head in named():
        times = [max(each[key] or [0]) for key in ("plain_seconds", "curvature_seconds")]
        shown = [f"{time * 1e3:.1f}" if time else "–" for time in (*times, each["amortised_seconds"])]
        yield [*head, *shown, f"{each['ratio_to_sgd']:.2f}"]
    for each, head in named(several=True):
        sent = each["traffic"]["plain"] | each["traffic"]["curvature"]
        parts = [sent.get(key, 0) for key in ("gradients", "updates", "curvature factors", "control")]
        counted, predicted = each["amortised_bytes"], each["predicted_bytes"]
        parts = [f"{part / 1e6:.3f}" for part in (each["traffic"]["wrapper"], *parts, counted)]
        ratios = f"{each['ratio_to_ddp']:.3f}", f"{predicted / 1e6:.3f}", f"{counted / predicted:.5f}"
        yield [*head, *parts, *ratios]
    for each, head in named(several=True):
        kinds = (each["transport"][kind] or {} for kind in ("plain", "curvature"))
        ratios = [kind.get(key) for kind in kinds for key in ("ratio", "expected")]
        yield [*head, *(f"{ratio:.3f}" if ratio else "–" for ratio in ratios)]
    for each, head in named():
        if times := each["inversion_seconds"]:
            held = [numbers(each[key], 1, 1e-6) for key in ("factor_bytes", "predicted_factor_bytes")]
            largest = numbers([max(times)], 1, 1e3)
            yield [
                *head,
                *held,
                numbers([sum(each["factor_bytes"])], 3, 1e-6),
                numbers(times, 1, 1e3),
                largest,
            ]
    for each, head in named(several=True):
        if profiled := each["samples"][0]["profiled"]:
            seen = profiled["overlap"]
            inside, whole = (f"{seen[key] * 1e3:.1f}" for key in ("seconds_inside", "seconds"))
            yield [*head, f"{seen['started_inside']} of {seen['reduces']}", f"{inside} of {whole}"]


def step_time(record: Any) -> Iterator[Cells]:
    """One row a task, optimizer and kind of step, from the seconds of the blocks."""
    for each in record["results"]:
        old, new = each["seconds"]["old"], each["seconds"]["new"]
        low, middle, high = statistics.quantiles([b / a for a, b in zip(old, new, strict=True)], n=4)
        times = [f"{statistics.median(seconds) * 1e3:.2f}" for seconds in (old, new)]
        head = [each["task"], each["optimizer"], each["step"], len(old)]
        yield [*head, *times, f"{middle:.3f} ({low:.3f} to {high:.3f})"]


def rebuild(record: Any) -> Iterator[Cells]:
    """One row a dtype: the recorded trainings, and the tests of all that did not pass."""
    missed = record["failures"] + record["errors"] + record["skipped"]
    commits = [record["recorded_from"]["commit"][:7], record["commit"][:7]]
    yield from ([dtype, *commits, count, missed] for dtype, count in record["trainings"].items())


EARLIER = {"demo": demo, "scale-cpu": scale, "step-time": step_time, "rebuild": rebuild}
