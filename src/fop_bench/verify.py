"""Re-reads records, and compares the pages that were made from them with what they give today."""

from __future__ import annotations

import gzip
import json
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

from fop_bench import overhead, race, records
from fop_bench.study_report import report

# JSON lines by a key that no other command writes: the command, and what reads its lines.
LINES: dict[str, tuple[str, Callable[[Path], list[records.Record]]]] = {
    "variant": ("race", race.read),
    "recipe": ("run", records.read_runs),
    "workload": ("overhead", overhead.read),
}
# What every record names, in whichever of its parts.
NEEDED = ("torch", "python", "command", "commit")
NULL = re.compile(r'"(value|last_loss|processor_seconds|plain_seconds|accuracy|train_loss)": null')
CHANGED = re.compile(r'"dirty": true| with changes"')
CELLS = re.compile(r"\s*[|│]\s*")
Page = tuple[Path, str, bool]  # a file, what records give, and whether that is only the rows of its tables


def verify(folder: Path) -> tuple[str, list[str]]:
    """Return what a folder of records holds, and every difference, with its place."""
    folder = folder.resolve()
    root, found, pages, count = folder.parent.parent, list[str](), list[Page](), 0
    files = [path for path in sorted(folder.iterdir()) if {".json", ".jsonl"} & {*path.suffixes}]
    tool = root / "tools/record_pages.py"
    own = runpy.run_path(str(tool)) if tool.exists() else {}
    try:
        for file in files:
            command, rows = _read(file)
            count += len(rows)
            found += [f"{where} {wrong}" for where, row in rows for wrong in _wrongs(row)]
            pages += _made(command, file, [row for _, row in rows])
        pages += own["pages"](folder) if own else ()
        found += [difference for page in pages for difference in _differences(*page)]
        if not files or not pages:
            found.append(f"{folder} has no {'page that is made from its data' if files else 'data'}")
    except ValueError as error:  # a file that cannot be read, which it names
        found.append(str(error))
    except (TypeError, KeyError) as error:  # null for a number, which was found above, or a text
        if not found:
            found.append(f"{folder} holds a value that is not of its kind, or lacks one: {error!r}")
    found = [each.replace(f"{root}/", "") for each in found]
    new = [each for each in found if each not in own.get("KNOWN", ())]
    known = f" ({len(found) - len(new)} known)" if len(new) < len(found) else ""
    title = f"{folder.relative_to(root)}: {len(files)} files, {count} records, {len(pages)} pages"
    return f"{title}, {len(new)} differences{known}", new


def _read(file: Path) -> tuple[str, list[tuple[str, Any]]]:
    """Return the command that wrote a file ("" if unknown), and its records, each with its place."""
    if file.suffix == ".jsonl":
        head = file.read_bytes().partition(b"\n")[0]
        for key, (command, read) in LINES.items():
            if f'"{key}": '.encode() in head:
                return command, [(f"{file}, line {n}", row) for n, row in enumerate(read(file), start=1)]
        raise ValueError(f"{file}, line 1 is no line of fop-bench run, overhead or race")
    if file.suffix == ".gz":  # a trace of a profiler
        records.loads(gzip.decompress(file.read_bytes()), str(file))
        return "", []
    content = records.loads(file.read_bytes(), str(file))
    return "", [(str(file), row) for row in (content if isinstance(content, list) else [content])]


def _wrongs(row: Any) -> Iterator[str]:
    text, source = json.dumps(row), row.get("source")  # the library's tree, which says more than a commit
    for key in NEEDED:
        if f'"{key}": ' not in text and not (key == "commit" and source):
            yield f"lacks {key}"
    if ", changed" in source if source else CHANGED.search(text):
        yield "is of sources that no commit has"
    if "Infinity" in text:
        yield "has a number that is not finite"
    if (null := NULL.search(text)) and '"diverged": true' not in text:
        yield f"has {null[0]}, and is not marked as diverged"


def _made(command: str, file: Path, rows: Sequence[Any]) -> Iterator[Page]:
    """Yield what a command makes of its JSON lines."""
    beside, notes = file.with_suffix(".md"), file.with_name("README.md")
    if command == "race":
        yield beside, race.race_table(rows), False
    elif command == "run" and file == records.record_files(file.parent)[0]:  # of all files
        yield notes, report(file.parent)[0], False
    elif command == "overhead":
        page = beside if beside.exists() else notes
        yield page, overhead.overhead_table(rows), page == notes


def _differences(page: Path, text: str, tables_only: bool) -> Iterator[str]:
    """Say where a page is not what its records give."""
    if not page.exists():
        yield f"{page} is missing"
        return
    there, made = (_lines(each, tables_only) for each in (page.read_text(encoding="utf-8"), text))
    what = f"rows of {page}" if tables_only else str(page)
    if diff := [*unified_diff(there, made, what, "what its records give", n=0, lineterm="")]:
        yield "\n  ".join(diff)


def _lines(text: str, tables_only: bool) -> list[str]:
    """Return lines; of tables, in Markdown or drawn, the rows that have a digit, spaces aside."""
    if not tables_only:
        return text.splitlines()
    return [CELLS.sub(" | ", line).strip() for line in text.splitlines() if re.match(r"[|│].*\d", line)]
