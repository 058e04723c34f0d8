"""The script for several ranks, started as users start it: it trains, and goes on after it was killed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fop import FOP

SCRIPT = Path(__file__).parents[2] / "examples" / "digits_distributed.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# Limit for one run; alone on two cores it takes about 8 s.
SECONDS = 120.0
EPOCHS = 5

pytestmark = [
    pytest.mark.timeout(3 * SECONDS),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


class Run:
    """The script, on some number of ranks, as it runs.

    Args:
        ranks: with torchrun; None for plain Python.
        arguments: of the script.
        output: file for what it prints.
    """

    def __init__(self, ranks: int | None, arguments: tuple[object, ...], output: Path) -> None:
        self.output = output
        self._mark = f"FOP_TEST_RUN={uuid.uuid4()}"
        name, value = self._mark.split("=")
        torchrun = () if ranks is None else (*TORCHRUN, str(ranks))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", name: value}
        if sys.platform.startswith("linux"):
            # Otherwise gloo looks up the name of the host, which need not have an address.
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *torchrun, str(SCRIPT), *map(str, arguments)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._end = time.monotonic() + SECONDS

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, line: str) -> None:
        """Wait until it has printed something."""
        while line not in self.text:
            assert self._process.poll() is None, f"ended before {line!r}\n{self.text}"
            assert time.monotonic() < self._end, f"no {line!r} in {SECONDS} s\n{self.text}"
            time.sleep(0.02)

    def wait(self) -> None:
        """Wait for its end, which must be a good one."""
        try:
            code = self._process.wait(self._end - time.monotonic())
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end in {SECONDS} s\n{self.text}")
        assert code == 0, f"exit code {code}\n{self.text}"

    def kill(self) -> None:
        """End all its processes at once, without a warning."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        # torchrun puts its workers into sessions of their own; what they still share is the environment.
        while pids := list(self._marked()):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._process.wait()

    def _marked(self) -> Iterator[int]:
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)
            except OSError:  # it has ended, or is somebody else's
                continue


@contextmanager
def running(ranks: int | None, *arguments: object, output: Path) -> Iterator[Run]:
    run = Run(ranks, arguments, output)
    try:
        yield run
    finally:
        run.kill()


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


def script(name: str) -> Any:
    """Return a function of the script."""
    return runpy.run_path(str(SCRIPT))[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on two ranks: what it printed, and its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    with running(2, "--epochs", EPOCHS, "--checkpoint", folder, output=folder / "output") as run:
        run.wait()
    return folder


def test_two_ranks_train(trained: Path) -> None:
    text = (trained / "output").read_text()
    assert f"ranks: 2, epochs done: 0 of {EPOCHS}\n" in text
    assert list(accuracies(text)) == [1, 2, 3, 4, 5]
    assert accuracies(text)[EPOCHS] >= 95, text
    assert newest(trained) == EPOCHS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_killed_on_two_ranks_and_resumed_on_three(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    # Small batches, so that an epoch lasts: about a second.
    arguments = ("--epochs", EPOCHS, "--batch-size", 24, "--checkpoint", folder)
    with running(2, *arguments, output=tmp_path / "first") as run:
        run.wait_for("epoch 2: ")
        time.sleep(0.3)
        run.kill()
        before = accuracies(run.text)
    done = newest(folder)
    assert 2 <= done < EPOCHS, run.text
    with running(3, *arguments, output=tmp_path / "second") as run:
        run.wait()
        after = accuracies(run.text)
    assert f"ranks: 3, epochs done: {done} of {EPOCHS}\n" in run.text
    assert list(after) == list(range(done + 1, EPOCHS + 1))
    assert after[EPOCHS] >= max(95, max(before.values()) - 1), (before, after)
    # Accuracy would come back within an epoch even from the start; the weights show what it went on from.
    start, kept, went_on = (weights(folder, epoch) for epoch in (0, done, done + 1))
    assert (went_on - kept).norm() < 0.6 * (kept - start).norm()


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
    with running(None, "--epochs", EPOCHS, "--checkpoint", folder, output=tmp_path / "output") as run:
        run.wait()
        after = accuracies(run.text)
    assert f"ranks: 1, epochs done: 3 of {EPOCHS}\n" in run.text
    assert list(after) == [4, 5]
    assert after[EPOCHS] >= 95, run.text
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
