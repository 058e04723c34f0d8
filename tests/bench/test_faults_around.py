"""Full disks, stray files in folders of records, and packages of the extra that are not installed."""

from __future__ import annotations

import ast
import json
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

import fop_bench
from command import invoke
from fop_bench import cli, runner
from fop_bench.records import read_runs, write_json
from study_records import line, write
from tiny_study import (
    STEPS,
    final_of,
    finished,
    go,
    lines,
    result,
    sat,
    seconds_as_steps,
    tiny_recipe,  # noqa: F401 - for every test here
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

# --- A disk without room


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file become larger: what is written behind that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_that_does_not_fit_leaves_the_file_whole_and_is_made_later(tmp_path: Path) -> None:
    with seconds_as_steps():
        go(tmp_path, minutes=4 * STEPS / 60)
    path = tmp_path / "comparison.jsonl"
    before = path.read_bytes()
    with room(len(before) + 100), pytest.raises(OSError, match=rf"cannot write {path}, which stays"):
        go(tmp_path)
    assert path.read_bytes() == before
    assert go(tmp_path) == 0
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 10


def test_a_record_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_json(tmp_path / "new" / "overhead.json", {"results": [1]})
    with (
        room(50),
        pytest.raises(OSError, match=rf"cannot write {path}, which stays as it was: .*File too large"),
    ):
        write_json(path, {"results": list(range(100))})
    assert json.loads(path.read_text()) == {"results": [1]}
    assert [each.name for each in path.parent.iterdir()] == ["overhead.json"]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/file/x.json, which stays as it was"):
        write_json(tmp_path / "file" / "x.json", {})


def test_a_state_that_does_not_fit_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finished(final_of("fop"), tmp_path / "a")
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_SAVES", 0.0)
    with room(1000), pytest.raises(OSError, match=r"cannot write .*/b/\w+\.pt, which stays as it was"):
        sat(final_of("fop"), tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    assert result(finished(final_of("fop"), tmp_path / "b")) == result(expected)


# --- What lies about in a folder of records


def test_stray_files_are_no_records(tmp_path: Path) -> None:
    runs = [line("fop", [0.5])]
    write(tmp_path / "comparison.jsonl", runs)
    for name in (".DS_Store", "._comparison.jsonl", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert read_runs(tmp_path) == runs


# --- The extra


def without(packages: str, *arguments: str) -> tuple[int, str]:
    """Run the command in a process to which some packages are not installed."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({packages.split()}))"
    program = f"{hidden}; from fop_bench.cli import main; main({list(arguments)})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


ALL = "datasets matplotlib numpy pandas PIL pytorch_optimizer rich sklearn"


@pytest.mark.slow
def test_help_needs_no_extra() -> None:
    code, told = without(ALL, "run", "--help")
    assert code == 0, told
    assert "cifar10-small comparison, ablation" in " ".join(told.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "arguments", "missing"),
    [
        (
            "pandas matplotlib datasets PIL sklearn pytorch_optimizer",
            ("scale", "--ranks", "1", "--model", "mlp", "--batch", "2", "--rounds", "1"),
            None,
        ),
        ("pandas", ("report", "OUT"), "pandas"),
        ("matplotlib", ("report", "OUT"), "matplotlib"),
        ("sklearn", ("run", "digits", "--jobs", "1"), "sklearn"),
        ("rich", ("demo",), "rich"),
    ],
)
def test_what_is_missing_is_named_by_the_command_that_needs_it(
    tmp_path: Path, packages: str, arguments: tuple[str, ...], missing: str | None
) -> None:
    write(tmp_path / "comparison.jsonl", [line("fop", [0.5])])
    asked = [str(tmp_path) if each == "OUT" else each for each in arguments]
    if "report" not in asked:
        asked += ["--out", str(tmp_path / "new")]
    code, told = without(packages, *asked)
    if missing is None:
        assert code == 0, told
    else:
        assert code == 1
        assert f"Error: this command needs {missing}: pip install 'fop-optim[bench]'" in told
        assert "Traceback" not in told


NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def imported(folder: Path) -> set[str]:
    """The distributions of all that the files of a folder import, torch and the project's own left out."""
    own = {path.stem for path in folder.rglob("*.py")} | {path.name for path in folder.iterdir()}
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    found -= sys.stdlib_module_names | own | {"torch", "fop", "fop_bench", "__future__"}
    return {NAMES.get(name, name.replace("_", "-")) for name in found}


def test_what_is_imported_is_declared() -> None:
    extras: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    declared = {extra: {re.split(r"[<>=;\s]", each)[0] for each in needs} for extra, needs in extras.items()}
    bench = imported(Path(fop_bench.__file__).parent)
    assert {"pandas", "pillow", "pytorch-optimizer", "rich"} <= bench
    # The name of Muon and its like is given to importlib.
    assert bench == declared["bench"]
    tests = imported(Path(__file__).parents[1])
    # timm is installed by the Makefile, without what it asks for.
    assert tests - {"tomli", "timm"} <= declared["bench"] | declared["test"] | declared["test-integrations"]


# --- Commands that somebody may have written down

COMMANDS = ("demo", "run", "report", "overhead", "race", "scale", "defaults", "surface", "verify-records")
SHOWN = re.compile(rf"fop[-_]bench ((?:{'|'.join(COMMANDS)})\b[^`\n\"#\\|;,()]*)")
RECORDED = re.compile(r'"command": ("(?:[^"\\]|\\.)*")')
# A command's name in prose, and an option that the page of its record says is gone.
NOT_TODAY = re.compile(r"--trace|STUDY|^(run|report|surface)$|FILE")
# All that the README of commit b0cff6b names, before half of the code went; the last three as it describes
# them: defaults, a prediction, and a surface.
BEFORE = (
    *("demo", "run cifar10-small", "run digits", "run cifar10-resnet18", "report fop-runs/cifar10-small"),
    *("overhead", "scale", "defaults", "scale --predict", "surface cifar10-small"),
)


def test_commands_of_documents_and_records_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("records/*/README.md"),
    ]
    shown = {each.strip() for file in files for each in SHOWN.findall(file.read_text(encoding="utf-8"))}
    for record in (*ROOT.glob("records/*/*.json"), *ROOT.glob("records/*/*.jsonl")):
        for command in set(RECORDED.findall(record.read_text(encoding="utf-8"))):
            _, ours, asked = json.loads(command).partition("fop_bench ")
            shown |= {asked} if ours else set()
    commands = {each for each in shown if not NOT_TODAY.search(each)} | {*BEFORE}
    assert len(commands) > 20
    understood: list[str] = []

    def named(command: Callable[..., None]) -> str:
        return command.__name__.replace("_", "-")

    def instead_of(command: Callable[..., None]) -> Callable[..., None]:
        return wraps(command)(lambda asked: understood.append(named(command)))

    monkeypatch.setattr(cli, "OPTIONS", {instead_of(each): options for each, options in cli.OPTIONS.items()})
    monkeypatch.chdir(tmp_path)
    for folder in ("CIFAR10", "fop-runs/cifar10-small", "records/cifar10-small"):
        Path(folder).mkdir(parents=True)
    for command in sorted(commands):
        # This machine may have no GPU.
        told = invoke(*shlex.split(command.replace("--device cuda", "--device cpu")))
        assert told.exit_code == 0, (command, told.output)
    assert set(understood) == {*COMMANDS} == {*map(named, cli.OPTIONS)}
