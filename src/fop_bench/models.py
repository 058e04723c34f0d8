"""The networks that are measured, each small enough to read.

Shapes: N batch, C channels, H and W image, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Build what a residual block adds to its output: the input, by a 1×1 convolution where shapes differ."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm and a shortcut (the basic block of ResNet-18)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        hidden = relu(self.norm1(self.conv1(x_NCHW)))
        return relu(self.norm2(self.conv2(hidden)) + self.shortcut(x_NCHW))


class ResNet(nn.Module):
    """A ResNet for 32×32 images: no max-pooling; each stage doubles the channels and halves the image."""

    def __init__(self, width: int = 16, blocks: Sequence[int] = (1, 1, 1), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        logits: Tensor = self.head(self.features(x_NCHW).mean(dim=(2, 3)))
        return logits


def resnet18(classes: int = 10) -> ResNet:
    """Build ResNet-18 in its CIFAR size (11.2 million parameters)."""
    return ResNet(width=64, blocks=(2, 2, 2, 2), classes=classes)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Map tokens (N, T, D) to tokens of the same shape."""
        x_NTD = x_NTD + self.attention(self.norm1(x_NTD))
        out: Tensor = x_NTD + self.mlp(self.norm2(x_NTD))
        return out

    def attention(self, x_NTD: Tensor) -> Tensor:
        """Mix tokens (N, T, D) by multi-head self-attention."""
        qkv = self.qkv(x_NTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class ViT(nn.Module):
    """A small vision transformer for 32×32 images (2.7 million parameters by default)."""

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
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        x_NTD = self.embed(x_NCHW).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x_NTD)).mean(dim=1))
        return logits


def mlp(sizes: Sequence[int] = (784, 512, 512, 10)) -> nn.Sequential:
    """Build a ReLU network of linear layers between the given sizes, for inputs of any shape."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits_cnn(classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Build the small CNN with BatchNorm for 8×8 digits (N, channels, 8, 8).

    BatchNorm's running averages move three times as fast as by default: at full batch an epoch is one step,
    and averages that lag ten steps behind would hide from the evaluation how far the weights have come.
    """
    norm = partial(nn.BatchNorm2d, momentum=0.3)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        norm(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, classes),
    )


class DigitsTransformer(nn.Module):
    """A `torch.nn.TransformerEncoder` for 8×8 digits (N, 1, 8, 8), one token a row of pixels."""

    def __init__(self, width: int = 32, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map digits (N, 1, 8, 8) to logits (N, classes)."""
        h_NTD = self.encoder(self.embed(x.squeeze(1)) + self.positions)
        logits: Tensor = self.head(h_NTD.mean(dim=1))
        return logits
