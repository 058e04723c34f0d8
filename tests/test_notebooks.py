"""Every notebook of docs/tutorials runs (`make notebooks`); its last cell asserts what the page claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Of the extra test-integrations.
NEEDED = {"7-lightning-optuna": ("lightning", "optuna")}


@pytest.mark.notebook
@named
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nbclient", "ipykernel", *NEEDED.get(path.stem, ())):
        pytest.importorskip(name)
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    book = nbformat.read(path, as_version=4)
    # A cell that raises an error, such as the assertion in the last one, raises it here.
    NotebookClient(book, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_there_are_eight() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == [*"12345678"]


@named
def test_notebook_is_saved_with_outputs_and_a_claim(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "assert " in "".join(codes[-1]["source"])
    assert [cell["execution_count"] for cell in codes] == [*range(1, len(codes) + 1)]
    assert any("image/png" in output.get("data", {}) for cell in codes for output in cell["outputs"])
    assert all(output["output_type"] != "error" for cell in codes for output in cell["outputs"])
    # Small in the repository, and without the folders of the machine that ran it.
    assert path.stat().st_size < 150_000
    outputs = json.dumps([cell["outputs"] for cell in codes])
    assert not any(folder in outputs for folder in ("site-packages", "/home/", "/tmp/", "/work/", "/Users/"))
