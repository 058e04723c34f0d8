"""Well-known architectures at toy size, written for these tests: faithful in what an optimizer meets.

Each entry of `ZOO` builds a `Task`: a model, a maker of batches and a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from zoo import convnets, language, vision
from zoo.task import Batch, Task

ZOO: dict[str, Callable[[], Task]] = {
    "resnet": convnets.resnet,
    "convnext": convnets.convnext,
    "mobilenet": convnets.mobilenet,
    "unet": convnets.unet,
    "audio": convnets.audio,
    "video": convnets.video,
    "vit": vision.vit,
    "swin": vision.swin,
    "swin_functional": vision.swin_functional,
    "mixer": vision.mixer,
    "gpt": language.gpt,
    "bert": language.bert,
    "seq2seq": partial(language.seq2seq, batch_first=True),
    "seq2seq_length_first": partial(language.seq2seq, batch_first=False),
    "lstm": language.lstm,
}

__all__ = ["ZOO", "Batch", "Task"]
