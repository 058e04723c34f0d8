"""The script for several ranks: it trains, and goes on after it was killed."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from fop import FOP
from ranks import run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "digits_distributed.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
EPOCHS, STEPS_AN_EPOCH = 5, 14

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def script(name: str) -> Any:
    """Return a function of the script."""
    return runpy.run_path(str(SCRIPT))[name]


def training(rank: int, folder: Path, killed_after: int | None = None) -> str:
    """Train as a rank of the script; what it prints. Rank 1 may be killed after so many steps."""
    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if rank == 1 and taken == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        script("train")(torch.device("cpu"), EPOCHS, 96, 0.05, folder)
    gc.collect()
    return output.getvalue()


def accuracies(text: str) -> dict[int, float]:
    """Return the accuracy that was printed for every epoch, in percent."""
    found = re.findall(r"^epoch (\d+): test accuracy ([\d.]+)%$", text, re.MULTILINE)
    return {int(epoch): float(accuracy) for epoch, accuracy in found}


def newest(folder: Path) -> int:
    return int((folder / "latest").read_text().removeprefix("epoch-"))


def weights(folder: Path, epoch: int) -> Tensor:
    """Return all weights of a checkpoint, (parameters,); those the script starts with for epoch 0."""
    torch.manual_seed(0)
    model: nn.Module = script("cnn")()
    if epoch:
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder / f"epoch-{epoch}", no_dist=True)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def check(text: str, ranks: int, done: int) -> None:
    assert f"ranks: {ranks}, epochs done: {done} of {EPOCHS}\n" in text
    assert list(accuracies(text)) == list(range(done + 1, EPOCHS + 1))
    assert accuracies(text)[EPOCHS] >= 95, text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints of a run on two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    check(run_ranks(training, 2, folder)[0], 2, 0)
    return folder


@pytest.mark.slow
def test_started_as_users_start_it(tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "2", SCRIPT, "--epochs", EPOCHS, "--checkpoint", tmp_path]
    # Otherwise gloo looks up the name of the host, which need not have an address.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = list(map(str, command))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout, 2, 0)
    assert newest(tmp_path) == EPOCHS


@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_three(tmp_path: Path) -> None:
    run_ranks(training, 2, tmp_path, 2 * STEPS_AN_EPOCH + 3, expected=(1, -signal.SIGKILL))
    assert newest(tmp_path) == 2
    check(run_ranks(training, 3, tmp_path)[0], 3, 2)
    # Accuracy would come back within an epoch even from the start; the weights show what it went on from.
    start, kept, went_on = (weights(tmp_path, epoch) for epoch in (0, 2, 3))
    assert (went_on - kept).norm() < 0.6 * (kept - start).norm()


@pytest.mark.slow
def test_killed_while_saving(trained: Path, tmp_path: Path) -> None:
    """Half a checkpoint is left of epoch 4, and half a name: on one process it goes on from epoch 3."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "epoch-5")
    (folder / "epoch-4" / ".metadata").unlink()
    (folder / "epoch-4" / "__1_0.distcp").unlink()
    os.truncate(folder / "epoch-4" / "__0_0.distcp", 1000)
    (folder / "latest").write_text("epoch-3")
    (folder / "latest.new").write_text("epo")
    check(run_ranks(training, 1, folder)[0], 1, 3)
    assert newest(folder) == EPOCHS
    # It ends where the run that was not killed has ended, 7 % away by another choice of the gradient pair.
    start, unbroken = weights(trained, 0), weights(trained, EPOCHS)
    for epoch in (4, EPOCHS):
        error = weights(folder, epoch) - weights(trained, epoch)
        assert error.norm() < 0.15 * (unbroken - start).norm()


def test_publishes_only_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = script("cnn")()
    optimizer = FOP(model)
    (tmp_path / "latest").write_text("epoch-1")

    def ends_in_the_middle(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp, "save", ends_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        script("save")(tmp_path, 2, model, optimizer, LambdaLR(optimizer, lambda _: 1.0))
    assert newest(tmp_path) == 1
