"""README and docs: blocks of Python run, linked files are there, public names are on the API page."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fop
import fop.distributed
from fop_bench import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "bench/README.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: \S.+ -->\s*\Z")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^()\s#]+)")


def blocks(text: str) -> list[tuple[int, str, bool]]:
    """Return each block of Python with its line, and whether a comment before it says why it is not run."""
    found = []
    for match in BLOCK.finditer(text):
        if match[3] in ("python", "py"):
            assert not match[1], "a block in a list or a tab is no script"
            line = text[: match.start()].count("\n") + 1
            found.append((line, match[4], bool(MARK.search(text[: match.start()]))))
    return found


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if any(not left_out for *_, left_out in blocks(page.read_text()))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, source, left_out in blocks(page.read_text(encoding="utf-8")):
        if not left_out:
            # Errors then name the line of the page.
            exec(compile("\n" * line + source, str(page), "exec"), names)


DIFFS = [
    pytest.param("".join(line[1:] for line in match[4].splitlines(True) if line[0] != "-"), id=named(page))
    for page in PAGES
    for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    if match[3] == "diff"
]


class NotWrapped:
    """What a script wraps, where there are no ranks."""

    def __new__(cls, model: torch.nn.Module) -> Any:
        return model


@pytest.mark.parametrize("source", DIFFS)
def test_a_script_runs_after_the_change(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", NotWrapped)
    model = torch.nn.Linear(4, 2)
    data = [(torch.randn(6, 4), torch.arange(6) % 2)]
    names: dict[str, Any] = {"torch": torch, "model": model, "train_loader": data, "steps": 3}
    names |= {"criterion": torch.nn.functional.cross_entropy, "loss": model(data[0][0]).square().mean()}
    exec(source, names)
    assert isinstance(names["optimizer"], fop.FOP)


def test_blocks_are_found_and_marks_are_seen() -> None:
    text = "```python\na = 1\n```\n\n<!-- not run: why -->\n```python\nb\n```\n\n"
    text += "<!-- not run: -->\n```py\nc\n```\n"
    assert blocks(text) == [(1, "a = 1\n", False), (6, "b\n", True), (11, "c\n", False)]
    assert len(WITH_CODE) > 10
    assert len(DIFFS) == 6


SHELL = re.compile(r"^(?:\w+=\S+ )*(pip install|make|fop-bench|python3?|git clone|cd|export) ?(.*)$")


def test_commands_of_shell_blocks_are_there() -> None:
    """Blocks without a language are commands: not run, for a reason that they name; what they name exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, targets = project["optional-dependencies"], (ROOT / "Makefile").read_text(encoding="utf-8")
    seen = Counter[str]()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            assert block[3] or MARK.search(text[: block.start()]), f"{page}: why is {block[4]!r} not run?"
            for line in [] if block[3] else block[4].splitlines():
                match = SHELL.match(line.partition("  #")[0].partition(" # ")[0].strip())
                assert match, f"{page}: {line!r} is no known command; name the language of the block"
                command, (first, *_) = match[1], [*shlex.split(match[2]), ""]
                seen[command] += 1
                if command == "make":
                    assert re.search(rf"^{first}:", targets, re.MULTILINE), line
                elif command.startswith("python") and first != "-m":
                    assert (ROOT / first).is_file(), line
                elif command == "pip install":
                    named = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", line)))
                    assert set(named) <= extras.keys(), line
                elif command == "fop-bench":
                    assert first == "--help" or first in {
                        each.__name__.replace("_", "-") for each in cli.OPTIONS
                    }
    assert min(seen[each] for each in ("make", "pip install", "fop-bench")) > 2


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=named)
def test_linked_files_are_there(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_public_names_are_on_the_api_page() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {f"fop.{name}" for name in fop.__all__ if not name.startswith("__")}
    assert {*shown} >= public | {f"fop.distributed.{name}" for name in fop.distributed.__all__}
    assert len(shown) == len({*shown})


def test_pages_are_in_the_navigation() -> None:
    shown = set(re.findall(r"^ +- .*?: (\S+\.md)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert pages <= shown
    assert all((ROOT / "docs" / each).exists() or (ROOT / each).exists() for each in shown)


# --- What an index shows


def hatch_build() -> ModuleType:
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_gets_a_readme_without_relative_links() -> None:
    text = hatch_build().absolute((ROOT / "README.md").read_text(encoding="utf-8"))
    assert LINK.findall(BLOCK.sub("", text)) == []
    assert "](https://github.com/fop-optim/fop-optim/raw/main/docs/assets/report-gpt-128.png)" in text
    assert "](https://github.com/fop-optim/fop-optim/blob/main/docs/faq.md)" in text
