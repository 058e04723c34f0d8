"""What every test here needs: no network, and libraries that start without a memory of earlier tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when huggingface_hub is imported. Nothing here asks a hub for anything; if it ever did, it must fail.
os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget accelerate's process-wide settings: precision, accumulation, whether gradients are in sync."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the libraries put their files into a folder of the test's."""
    monkeypatch.chdir(tmp_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning of FOP's is a RuntimeWarning: nothing here gives it a reason for one."""
    for item in items:
        if item.path.parent == HERE:
            for rule in ("error::RuntimeWarning", "ignore::UserWarning", "ignore::FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(rule))
            item.add_marker(pytest.mark.slow)
