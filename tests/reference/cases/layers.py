"""Models of convolutions, transposed ones, linear layers, look-ups and shared weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference.observe import Inputs
from reference.steps import Case, double


class Conv1D(nn.Module):
    """`transformers.pytorch_utils.Conv1D` as of version 4 and 5, but for inputs of any strides."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size_out)


def tokens(*shape: int, size: int) -> Callable[[int], Inputs]:
    """Batches of token numbers; the first of every second sample is 0, so that padding occurs."""

    def make(N: int) -> Inputs:
        ids = torch.randint(0, size, (N, *shape))
        ids.view(N, -1)[::2, 0] = 0
        return (ids,)

    return make


def one(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


def single(build: Callable[[], nn.Module], *shape: int) -> Case:
    """A model of one layer with a batch of random inputs of this shape."""
    return Case(lambda: one(build()), double(*shape), {"0.weight"})


# --- convolutions ----------------------------------------------------------------------------------


class Resized(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x, output_size=[8, 6])
        return out


CONVOLUTIONS: dict[str, Case] = {
    "conv1d": single(lambda: nn.Conv1d(2, 3, 3), 2, 6),
    "conv1d-geometry": single(lambda: nn.Conv1d(2, 3, 2, stride=2, padding=3, dilation=2), 2, 5),
    "conv1d-same-even": single(lambda: nn.Conv1d(2, 3, 4, padding="same"), 2, 5),
    "conv1d-circular": single(lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), 2, 4),
    "conv1d-reflect-same": single(
        lambda: nn.Conv1d(2, 3, 2, padding="same", padding_mode="reflect", bias=False), 2, 5
    ),
    "conv1d-groups": single(lambda: nn.Conv1d(4, 6, 2, groups=2, padding=1), 4, 4),
    "conv1d-depthwise": single(lambda: nn.Conv1d(3, 6, 3, groups=3, bias=False), 3, 6),
    "conv1d-inplace": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.ELU(inplace=True), nn.ConvTranspose1d(3, 2, 2), nn.SiLU(True)
        ),
        double(2, 4),
        {"0.weight", "2.weight"},
    ),
    "conv3d": single(lambda: nn.Conv3d(2, 3, 2), 2, 3, 2, 3),
    "conv3d-geometry": single(
        lambda: nn.Conv3d(1, 2, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)),
        1,
        2,
        3,
        3,
    ),
    "conv3d-same": single(lambda: nn.Conv3d(1, 2, (2, 1, 2), padding="same", bias=False), 1, 2, 2, 3),
    "conv3d-replicate": single(
        lambda: nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 2), padding_mode="replicate"), 1, 2, 2, 2
    ),
    "conv3d-groups": single(lambda: nn.Conv3d(2, 4, (1, 2, 1), groups=2), 2, 2, 3, 2),
}
TRANSPOSED: dict[str, Case] = {
    "transposed1d": single(lambda: nn.ConvTranspose1d(2, 3, 3), 2, 4),
    "transposed1d-no-bias": single(lambda: nn.ConvTranspose1d(2, 3, 2, bias=False), 2, 4),
    "transposed1d-geometry": single(
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=3, padding=2, output_padding=1, dilation=2), 2, 3
    ),
    # Some outputs see no input at all, and with dilation > stride the taps cross.
    "transposed1d-gaps": single(lambda: nn.ConvTranspose1d(2, 3, 2, stride=4, output_padding=3), 2, 3),
    "transposed1d-dilation": single(lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, dilation=3), 2, 3),
    "transposed1d-groups": single(lambda: nn.ConvTranspose1d(4, 6, 2, groups=2, stride=2), 4, 3),
    "transposed1d-depthwise": single(lambda: nn.ConvTranspose1d(3, 3, 2, groups=3, bias=False), 3, 3),
    "transposed2d": single(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), 2, 2, 3),
    "transposed2d-geometry": single(
        lambda: nn.ConvTranspose2d(
            2, 3, (2, 3), stride=(1, 2), padding=(1, 0), output_padding=(0, 1), dilation=(2, 1)
        ),
        2,
        3,
        2,
    ),
    "transposed2d-output-size": Case(Resized, double(2, 2, 2), {"up.weight"}),
    "transposed2d-groups": single(
        lambda: nn.ConvTranspose2d(4, 2, (2, 1), groups=2, padding=(1, 0), bias=False), 4, 3, 2
    ),
    "transposed3d": single(lambda: nn.ConvTranspose3d(2, 2, (1, 2, 2)), 2, 2, 2, 1),
    "transposed3d-geometry": single(
        lambda: nn.ConvTranspose3d(
            2, 2, 2, stride=(1, 2, 2), padding=(1, 0, 1), output_padding=(0, 1, 0), groups=2
        ),
        2,
        2,
        1,
        2,
    ),
}

IMAGE = (4, 5, 6)


def conv(*args: Any, **kwargs: Any) -> Case:
    return single(lambda: nn.Conv2d(*args, **kwargs), *IMAGE)


CONV2D: dict[str, Case] = {
    "conv": conv(4, 3, 3),
    "conv-no-bias": conv(4, 3, 3, bias=False),
    "conv-1x1": conv(4, 3, 1),
    "conv-stride": conv(4, 3, 3, stride=2),
    "conv-stride-leftover": conv(4, 3, 2, stride=(3, 2), bias=False),
    "conv-padding": conv(4, 3, 3, padding=1),
    "conv-padding-uneven": conv(4, 3, 3, padding=(2, 1), stride=(1, 2)),
    "conv-valid": conv(4, 3, 3, padding="valid"),
    "conv-same": conv(4, 3, 3, padding="same"),
    "conv-same-even-kernel": conv(4, 3, (2, 4), padding="same", bias=False),
    "conv-same-dilated": conv(4, 3, (2, 3), padding="same", dilation=(3, 2)),
    "conv-reflect": conv(4, 3, 3, padding=2, padding_mode="reflect"),
    "conv-circular": conv(4, 3, 3, padding=(1, 2), padding_mode="circular"),
    "conv-replicate": conv(4, 3, 3, padding=2, padding_mode="replicate", bias=False),
    "conv-same-reflect": conv(4, 3, (2, 3), padding="same", padding_mode="reflect"),
    "conv-dilation": conv(4, 3, 2, dilation=(2, 3)),
    "conv-dilation-stride-padding": conv(4, 3, 3, dilation=2, stride=2, padding=2),
    "conv-groups": conv(4, 6, 3, groups=2),
    "conv-groups-no-bias": conv(4, 6, 3, groups=2, bias=False, stride=2, padding=1),
    "conv-depthwise": conv(4, 4, 3, groups=4),
    "conv-depthwise-multiplier": conv(4, 8, 2, groups=4, bias=False, dilation=2),
    "conv-kernel": conv(4, 3, (1, 3)),
    "conv-kernel-tall": conv(4, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
    "conv-inplace": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, (2, 3), groups=2, padding="same"),
            nn.Flatten(),
            nn.Linear(48, 3),
        ),
        double(2, 5, 6),
        {"0.weight", "2.weight", "4.weight"},
    ),
}

# --- linear layers and look-ups --------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head has the weight of its embedding."""

    def __init__(
        self, size: int = 6, width: int = 3, *, bias: bool = False, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width, padding_idx=padding_idx)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, size, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return out


class Repeated(nn.Module):
    """One Linear called three times with different numbers of rows."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.inner(x))  # (N, 3, 4)
        second = torch.tanh(self.inner(first[:, :2]))  # (N, 2, 4)
        out: Tensor = self.inner(second.sum(1))  # (N, 4)
        return out


class Twins(nn.Module):
    """Two Linear layers with the same weight."""

    def __init__(self, *, bias: bool, same_bias: bool) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4, bias=bias)
        self.right = nn.Linear(4, 4, bias=bias)
        self.right.weight = self.left.weight
        if same_bias:
            self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.right(torch.tanh(self.left(x)).sum(1))
        return out


class SharedBias(nn.Module):
    """Two Linear layers with the same bias and weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(3, 3)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.right(torch.tanh(self.left(x)))
        return out


class Pyramid(nn.Module):
    """One convolution at two resolutions, and a second module with its weight and another geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 2)
        self.second = nn.Conv2d(2, 2, 2, padding=1, dilation=2)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.first(fine[:, :, ::2, ::2])
        return torch.cat([fine.flatten(1), coarse.flatten(1), self.second(x).flatten(1)], dim=1)


class Translation(nn.Module):
    """Two embeddings with one weight, one with padding; with ``head`` the output layer has it too."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.source = nn.Embedding(6, 3, padding_idx=0)
        self.target = nn.Embedding(6, 3)
        self.target.weight = self.source.weight
        self.head = nn.Linear(3, 6, bias=False) if head else None
        if self.head is not None:
            self.head.weight = self.source.weight

    def forward(self, ids: Tensor) -> Tensor:
        out = torch.tanh(self.source(ids).sum(1, keepdim=True)) + self.target(ids[:, :2])
        return out if self.head is None else self.head(out)


class Windows(nn.Module):
    """Linear layers on windows that are folded into the batch, (N·2, 2, d), as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.tanh(self.inner(x.reshape(-1, 2, 4)))
        out: Tensor = self.outer(windows + windows.mean(1, keepdim=True)).reshape(len(x), 4, 2)
        return out


class BatchSecond(nn.Module):
    """Inner layers see the samples in dim 1; what goes in and comes out has them in dim 0."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return out


LINEAR: dict[str, Case] = {
    "linear": single(lambda: nn.Linear(5, 4), 5),
    "linear-no-bias": single(lambda: nn.Linear(5, 4, bias=False), 5),
    "linear-one-output": single(lambda: nn.Linear(5, 1), 5),
    "linear-3d": single(lambda: nn.Linear(5, 4), 3, 5),
    "linear-3d-no-bias": single(lambda: nn.Linear(5, 4, bias=False), 3, 5),
    "linear-4d": single(lambda: nn.Linear(5, 4), 2, 3, 5),
    "transformers-conv1d": single(lambda: Conv1D(3, 4), 4),
    "transformers-conv1d-sequence": single(lambda: Conv1D(3, 4), 2, 4),
    "transformers-conv1d-deep": Case(
        lambda: nn.Sequential(Conv1D(5, 4), nn.GELU(), Conv1D(3, 5)), double(2, 4), {"0.weight", "2.weight"}
    ),
    "transformers-conv1d-inplace": Case(
        lambda: nn.Sequential(Conv1D(5, 4), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        double(2, 4),
        {"0.weight", "2.weight"},
    ),
    "windows": Case(Windows, double(4, 4), {"inner.weight", "outer.weight"}),
    "batch-in-dim-1": Case(
        lambda: BatchSecond(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)),
        double(3, 4),
        {"inner.0.weight", "inner.2.weight"},
        options={"layer_options": {"inner.*": {"batch_dim": 1}}},
    ),
    "embedding-batch-in-dim-1": Case(
        lambda: BatchSecond(nn.Embedding(5, 3), nn.Linear(3, 2)),
        tokens(4, size=5),
        {"inner.0.weight", "inner.1.weight"},
        options={"layer_options": {nn.Embedding: {"batch_dim": 1}, "inner.1": {"batch_dim": 1}}},
    ),
}
EMBEDDINGS: dict[str, Case] = {
    "embedding": Case(lambda: one(nn.Embedding(5, 3)), tokens(1, size=5), {"0.weight"}),
    "embedding-flat": Case(lambda: one(nn.Embedding(5, 3)), tokens(size=5), {"0.weight"}),
    "embedding-sequence": Case(lambda: one(nn.Embedding(5, 3)), tokens(4, size=5), {"0.weight"}),
    "embedding-grid": Case(lambda: one(nn.Embedding(5, 3)), tokens(2, 2, size=5), {"0.weight"}),
    "embedding-padding": Case(
        lambda: one(nn.Embedding(5, 3, padding_idx=0)), tokens(4, size=5), {"0.weight"}
    ),
    "embedding-unused-token": Case(lambda: one(nn.Embedding(9, 3)), tokens(2, size=4), {"0.weight"}),
    "embedding-linear": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=-1), nn.Linear(3, 2)),
        tokens(3, size=5),
        {"0.weight", "1.weight"},
    ),
}
SHARED: dict[str, Case] = {
    "repeated": Case(lambda: Repeated(bias=True), double(3, 4), {"inner.weight"}),
    "repeated-no-bias": Case(lambda: Repeated(bias=False), double(3, 4), {"inner.weight"}),
    "twins": Case(lambda: Twins(bias=True, same_bias=True), double(2, 4), {"left.weight"}),
    "twins-no-bias": Case(lambda: Twins(bias=False, same_bias=False), double(2, 4), {"left.weight"}),
    # The two biases take AdamW.
    "twins-different-biases": Case(lambda: Twins(bias=True, same_bias=False), double(2, 4), {"left.weight"}),
    "shared-bias": Case(SharedBias, double(4), {"left.weight", "right.weight"}),
    "pyramid": Case(Pyramid, double(2, 4, 4), {"first.weight"}),
    "translation": Case(lambda: Translation(head=False), tokens(3, size=6), {"source.weight"}),
    "translation-tied": Case(lambda: Translation(head=True), tokens(3, size=6), {"source.weight"}),
    "tied": Case(Tied, tokens(3, size=6), {"embed.weight", "hidden.weight"}),
    "tied-bias": Case(lambda: Tied(bias=True), tokens(3, size=6), {"embed.weight", "hidden.weight"}),
    "tied-padding": Case(lambda: Tied(padding_idx=0), tokens(3, size=6), {"embed.weight", "hidden.weight"}),
}
LAYERS = {**CONVOLUTIONS, **CONV2D, **TRANSPOSED, **LINEAR, **EMBEDDINGS, **SHARED}
