"""The networks that are measured, each small enough to read.

Shapes: N batch, C channels, H and W image, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu, scaled_dot_product_attention

# --- ResNets


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A block of ResNet-18: relu(body(x) + x), with a 1×1 convolution of x where the shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(inputs, width, 3, stride), _convolution(width, width, 3)
        self.body = nn.Sequential(first, nn.ReLU(), second)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else _convolution(inputs, width, 1, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return relu(self.body(x_NCHW) + self.shortcut(x_NCHW))


class ResNet(nn.Module):
    """A ResNet for 32×32 images (N, 3, H, W), with so many blocks in each stage, to logits (N, classes)."""

    def __init__(self, width: int, blocks: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        layers, channels = [*_convolution(3, width, 3), nn.ReLU()], width
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(Residual(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW).mean(dim=(2, 3)))


def resnet18(classes: int = 10) -> ResNet:
    """Build ResNet-18 in its CIFAR size (11.2 million parameters)."""
    return ResNet(width=64, blocks=(2, 2, 2, 2), classes=classes)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, on a GPU with channels last, as one trains convolutions there."""
    if device.type != "cuda":
        return model.to(device)
    return model.to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]


# --- airbench


class Whitening(nn.Module):
    """A fixed convolution whose outputs are white on patches (P, 3, 2, 2), and the same with minus signs."""

    filters: Tensor

    def __init__(self, patches: Tensor) -> None:
        super().__init__()
        rows = patches.flatten(1).double()
        squares, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        filters = (vectors / (squares + 5e-4).sqrt()).T.float().unflatten(1, patches.shape[1:])
        self.register_buffer("filters", torch.cat([filters, -filters]))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return conv2d(x_NCHW, self.filters)


class Scaled(nn.Module):
    """Inputs times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def airbench(
    patches: Tensor, widths: Sequence[int] = (16, 64, 64), logits: float = 1 / 9, classes: int = 10
) -> nn.Sequential:
    """Build the network of airbench94 for 32×32 images, narrower (Jordan 2024; 127,000 parameters).

    Its logits are what the last layer gives times ``logits``.
    """
    layers: list[nn.Module] = [Whitening(patches), nn.GELU()]
    for inputs, width in pairwise((2 * patches[0].numel(), *widths)):
        for number in range(2):
            norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
            norm.weight.requires_grad_(False)
            layers.append(nn.Conv2d(width if number else inputs, width, 3, padding=1, bias=False))
            layers += [norm, nn.GELU()] if number else [nn.MaxPool2d(2), norm, nn.GELU()]
    head = nn.Linear(widths[-1], classes, bias=False)
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), head, Scaled(logits))


# --- Transformers


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection, on tokens (N, T, D)."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(dim)
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_NTD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_NTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        hidden_NTD = x_NTD + self.proj(mixed.transpose(1, 2).flatten(2))
        return hidden_NTD + self.mlp(self.norm2(hidden_NTD))


class ViT(nn.Module):
    """A small vision transformer from 32×32 images to logits (2.7 million parameters by default)."""

    def __init__(
        self, dim: int = 192, depth: int = 6, heads: int = 3, patch: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NTD = self.embed(x_NCHW).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x_NTD)).mean(dim=1))


class GPT(nn.Module):
    """A small language model from bytes (N, T) to the logits of the next ones (N, T, 256)."""

    def __init__(self, dim: int = 256, depth: int = 4, heads: int = 4, tokens: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256)

    def forward(self, x_NT: Tensor) -> Tensor:
        x_NTD = self.embed(x_NT) + self.position[:, : x_NT.shape[1]]
        return self.head(self.norm(self.blocks(x_NTD)))


class Apart(nn.Module):
    """Queries, keys and values (N, T, 3·D) by a matrix each, which have gradients of unlike sizes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x_NTD: Tensor) -> Tensor:
        return torch.cat([part(x_NTD) for part in self.parts], dim=-1)


def small_gpt(dim: int = 128, depth: int = 2, tokens: int = 64, tied: bool = False) -> GPT:
    """Build a GPT with GPT-2's initial weights (0.5 million parameters by default).

    The head of a ``tied`` one has the weight of the embedding.
    """
    model = GPT(dim, depth, heads=dim // 64, tokens=tokens)
    for block in model.blocks:
        block.qkv = Apart(dim)
    if tied:
        model.head.weight = model.embed.weight
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            last = name.endswith(("proj.weight", "mlp.2.weight"))  # of a residual branch
            nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)
    return model


# --- Small networks


def mlp(sizes: Sequence[int] = (784, 512, 512, 10)) -> nn.Sequential:
    """Build a ReLU network of linear layers between the given sizes, for inputs of any shape."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits_cnn(classes: int = 10) -> nn.Sequential:
    """Build the small CNN with BatchNorm for 8×8 digits (N, 1, 8, 8)."""
    # At full batch an epoch is one step: slower running averages would hide how far the weights have come.
    norm = partial(nn.BatchNorm2d, momentum=0.3)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1), norm(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, classes)),
    )


def digits_autoencoder(sizes: Sequence[int] = (128, 32, 8)) -> nn.Sequential:
    """Build a network from 8×8 digits (N, 1, 8, 8) to as many numbers as the last size says, and back."""
    return nn.Sequential(mlp((64, *sizes)), mlp((*reversed(sizes), 64)))


class DigitsLSTM(nn.Module):
    """An LSTM that reads 8×8 digits (N, 1, 8, 8) row by row, to logits."""

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])
