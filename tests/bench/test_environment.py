import subprocess
import sys

import pytest
import torch

from fop_bench.environment import environment, git_state


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    return file


def test_no_git_state_outside_a_checkout(source):
    assert git_state(source) is None


def test_commit_and_dirty_flag(source):
    git(source.parent, "init", "-q")
    assert git_state(source) is None, "not tracked, so not from this checkout"
    git(source.parent, "add", ".")
    git(source.parent, "commit", "-qm", "first")
    commit = git(source.parent, "rev-parse", "HEAD")
    assert git_state(source) == {"commit": commit, "dirty": False}
    source.write_text("x = 2\n")
    assert git_state(source) == {"commit": commit, "dirty": True}


def test_environment_says_where_and_how(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fop_bench", "demo", "--out", "a folder"])
    where = environment(torch.device("cpu"))
    assert where["command"] == "python -m fop_bench demo --out 'a folder'"
    monkeypatch.setattr(sys, "orig_argv", ["python3.11", "/opt/venv/bin/fop-bench", "run", "digits"])
    assert environment(torch.device("cpu"))["command"] == "fop-bench run digits", "as one types it"
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert where["device"]
    assert {"python", "fop", "git", "date"} <= where.keys()
