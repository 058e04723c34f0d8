"""diagnostics().as_dict() in loggers: scripts of docs/guides/logging.md, and what loggers then hold."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fop import FOP
from tiny import DOCS, Sentences, loader, loss_of, net, run_block

PAGE = DOCS.parent / "guides" / "logging.md"


def trained() -> FOP:
    model = net()
    optimizer = FOP(model)
    for batch in loader(22):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return optimizer


def test_tensorboard() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = trained()
    run_block("TensorBoard", PAGE, optimizer=optimizer, step=7)
    read = EventAccumulator("runs").Reload()
    numbers = optimizer.diagnostics().as_dict()
    assert "0/noise" in numbers
    assert {*read.Tags()["scalars"]} == numbers.keys()
    for name, value in numbers.items():
        [event] = read.Scalars(name)
        assert (event.step, event.value) == (7, pytest.approx(value))


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    optimizer = trained()
    run_block("Weights & Biases", PAGE, optimizer=optimizer, step=7)
    wandb.teardown()  # the file is written by another process
    [file] = Path().glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for name, value in optimizer.diagnostics().as_dict().items():
        assert name.encode() in written
        assert repr(value).encode() in written


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any) -> Any:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> FOP:
            return FOP(self)

    run_block("Lightning", PAGE, model=Classifier(), loader=loader())
    [file] = Path().glob("logs/**/metrics.csv")
    with file.open() as lines:
        [row] = csv.DictReader(lines)
    assert row["step"] == "1"
    assert float(row["net.0/noise"]) < 1
    assert float(row["net.4/length"]) > 0


def test_hugging_face_trainer() -> None:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20))

        def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
            return {"loss": nn.functional.cross_entropy(self.net(input_ids).flatten(0, 1), labels.flatten())}

    model = Classifier()
    args = transformers.TrainingArguments(
        "out",
        max_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizer = FOP(model)
    given = {"model": model, "args": args, "train_set": Sentences(), "optimizer": optimizer}
    names = run_block("Hugging Face Trainer", PAGE, **given)
    first, second, *_ = names["trainer"].state.log_history
    for logged in (first, second):
        assert {"loss", "net.0/length", "net.1/noise"} <= logged.keys()
    assert second["net.1/length"] == optimizer.diagnostics().as_dict()["net.1/length"]
