"""`fop-bench verify-records`: committed records are sound; what is wrong with others has its place said."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command import invoke
from study_records import line, write

DIRTY = {"commit": "1" * 40, "dirty": True}
ROOT = Path(__file__).parents[2]
pytest.importorskip("tomllib", reason="tools that make pages need Python 3.11")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the command reads."""
    copy = tmp_path_factory.mktemp("clone")
    for folder in ("records", "docs", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.png", "*.ipynb"))
    shutil.copy(ROOT / "README.md", copy)
    return copy


@pytest.fixture
def change(original: Path) -> Iterator[Callable[..., str]]:
    """Returns what the command says of a folder once a file has other text."""
    saved: dict[Path, str] = {}

    def changed(folder: str, file: str, old: str, new: str, code: int = 1) -> str:
        path = original / file
        saved[path] = path.read_text()
        assert old in saved[path]
        path.write_text(saved[path].replace(old, new, 1))
        told = invoke("verify-records", str(original / "records" / folder))
        assert told.exit_code == code, told.output
        return told.output

    yield changed
    for path, text in saved.items():
        path.write_text(text)


def test_the_committed_records_give_the_committed_pages() -> None:
    told = invoke("verify-records", str(ROOT / "records"))
    assert told.exit_code == 0, told.output
    folders = sorted(path.name for path in (ROOT / "records").iterdir() if path.is_dir())
    assert [row.partition(":")[0] for row in told.output.splitlines()] == [
        f"records/{each}" for each in folders
    ]


@pytest.mark.parametrize(
    ("folder", "file", "old", "new"),
    [
        ("race", "records/race/race.md", "99.48", "99.58"),
        ("race", "README.md", "| CIFAR-10, 5,000", "| CIFAR-10, 5,001"),
        ("race", "docs/results.md", "| MLP, 32", "| MLP, 33"),
        ("cifar10-small", "records/cifar10-small/README.md", "49.69", "49.79"),
        ("cifar10-small", "docs/paper-tables.md", "paper 58", "paper 59"),
        ("demo", "records/demo/README.md", "3.0 ± 1.0", "2.0 ± 1.0"),
        ("overhead-peers", "records/overhead-peers/before.md", "(0.69–1.02)", "(0.69–1.03)"),
        ("scale-cpu", "records/scale-cpu/README.md", "17 of 18", "18 of 18"),
        ("surface", "records/surface/README.md", "1.2830", "1.2831"),
        ("step-time", "records/step-time/README.md", "0.915 (0.907 to 0.979) |", "0.815 (0.907 to 0.979) |"),
        ("torch-matrix", "records/torch-matrix/README.md", "| 719 |", "| 720 |"),
        ("torch-matrix", "docs/compatibility.md", "| 719 |", "| 720 |"),
        ("zoo", "docs/compatibility-zoo.md", "78 tiny", "79 tiny"),
    ],
)
def test_a_page_that_its_record_does_not_give(
    change: Callable[..., str], original: Path, folder: str, file: str, old: str, new: str
) -> None:
    before, _, after = (original / file).read_text().partition(old)
    row = before.rpartition("\n")[2].lstrip("| ") + new + after.partition("\n")[0].rstrip("| ")
    said = change(folder, file, old, new)
    assert f"{file}\n  +++ what its records give\n  @@ " in said
    assert row in said and row.replace(new, old, 1) in said


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"seed": 0, ', "", "line 1 has no seed; it is no line of this version's fop-bench race"),
        ('"value": 1.6819642782211304', '"value": NaN', "line 1 is not JSON"),
        ('"value": 1.6819642782211304', '"value": 1e999', "line 1 has a number that is not finite"),
        (
            '"value": 1.6819642782211304',
            '"value": null',
            'line 1 has "value": null, and is not marked as diverged',
        ),
        (
            '"source": "826a38a41f"',
            '"source": "826a38a41f, changed"',
            "line 1 is of sources that no commit has",
        ),
        ('"torch": "2.13.0+cpu", ', "", "line 1 has no environment.torch"),
        ('"variant"', '"variety"', "line 1 is no line of fop-bench run, overhead or race"),
    ],
)
def test_a_line_that_is_no_record(change: Callable[..., str], old: str, new: str, what: str) -> None:
    assert f"  records/race/race.jsonl, {what}" in change("race", "records/race/race.jsonl", old, new)


def test_a_value_of_another_kind_is_a_difference(change: Callable[..., str]) -> None:
    said = change("race", "records/race/race.jsonl", '"value": 1.6819642782211304', '"value": "high"')
    assert "records/race holds a value that is not of its kind, or lacks one: TypeError(" in said


def test_a_tree_of_the_library_stands_for_a_commit(change: Callable[..., str]) -> None:
    assert (
        "\n"
        not in change("race", "records/race/race.jsonl", '"dirty": false', '"dirty": true', code=0).strip()
    )


def test_a_table_has_no_row_more_and_none_less(change: Callable[..., str]) -> None:
    file, row = "records/overhead-peers/before.md", "| 1.00 (1.00–1.00) | – | 1.00 | 1.00 | 0.93 | 7.02 |\n"
    said = change("overhead-peers", file, row, f"{row}| SGD | 9 |\n")
    assert "  @@ -8 +7,0 @@\n  -| SGD | 9 |\n" in said
    said = change("demo", "records/demo/README.md", "| 64 | AdamW |", "64 AdamW")
    assert "--- rows of records/demo/README.md\n" in said and "  +| 64 | AdamW |" in said


def test_known_differences_are_counted_and_not_named(change: Callable[..., str]) -> None:
    told = invoke("verify-records", str(ROOT / "records/adamw-rate"))
    assert told.output == "records/adamw-rate: 0 files, 0 records, 0 pages, 0 differences (1 known)\n"
    known = '"records/adamw-rate has no data"'
    assert "  records/adamw-rate has no data\n" in change("adamw-rate", "tools/record_pages.py", known, '""')


def test_a_folder_outside_of_a_clone(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    diverged = line("fop", [0.5], seed=2, diverged=True)
    diverged["curve"][0]["train_loss"] = None
    write(folder / "comparison.jsonl", [line("fop", [0.5]), diverged])
    assert invoke("report", str(folder)).exit_code == 0
    told = invoke("verify-records", str(folder))
    assert (told.exit_code, told.output.count("\n")) == (0, 1)
    (folder / "README.md").unlink()
    write(folder / "comparison.jsonl", [line("fop", [0.5], git=None), line("fop", [0.5], seed=2, git=DIRTY)])
    said = invoke("verify-records", str(tmp_path)).output
    for place in (
        "comparison.jsonl, line 1 lacks commit",
        "comparison.jsonl, line 2 is of sources that no commit",
    ):
        assert f"/small/{place}" in said
    assert invoke("verify-records", str(tmp_path / "nowhere")).exit_code == 1


def test_a_new_record_needs_its_table_beside_it(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "overhead-new"
    folder.mkdir()
    shutil.copy(original / "records/overhead-peers/before.jsonl", folder / "overhead.jsonl")
    assert "overhead-new/README.md is missing" in invoke("verify-records", str(folder)).output
    table = (original / "records/overhead-peers/before.md").read_text().partition("## mlp")[2]
    (folder / "overhead.md").write_text(f"## mlp{table}")
    assert invoke("verify-records", str(folder)).exit_code == 0
    (folder / "overhead.md").write_text(f"# Mine\n\n## mlp{table}")
    assert "/overhead-new/overhead.md\n" in (said := invoke("verify-records", str(folder)).output)
    assert "\n  -# Mine\n" in said
    (folder / "overhead.jsonl").rename(folder / "other.json")
    assert invoke("verify-records", str(folder)).exit_code == 1  # several lines are no JSON
    (folder / "other.json").write_text('{"torch": "2", "python": "3", "command": "x", "commit": "1"}')
    assert (
        "overhead-new has no page that is made from its data" in invoke("verify-records", str(folder)).output
    )


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    told = invoke("verify-records", str(tmp_path / "nowhere"))
    assert told.exit_code == 1 and f"Error: {tmp_path / 'nowhere'} is no folder; give folders" in told.output
