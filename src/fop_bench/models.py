"""The networks that are measured, each small enough to read.

Shapes: N batch, C channels, H and W image, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu, scaled_dot_product_attention, unfold

# --- ResNets


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(body(x) + x), with a 1×1 convolution of x where the shapes differ."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return relu(self.body(x_NCHW) + self.shortcut(x_NCHW))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Build the block of ResNet-18, (N, inputs, H, W) to (N, width, H/stride, W/stride)."""
    body = nn.Sequential(_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, width, 3))
    return Residual(body, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """Build the block of ResNet-50 (He et al. 2016, figure 5), to 4·width channels, its stride in the 3×3."""
    first, last = _convolution(inputs, width, 1), _convolution(width, 4 * width, 1)
    # The block starts as its shortcut, which eases the first epochs at large batches (Goyal et al. 2017).
    nn.init.zeros_(last.get_parameter("1.weight"))
    body = nn.Sequential(first, nn.ReLU(), _convolution(width, width, 3, stride), nn.ReLU(), last)
    return Residual(body, inputs, 4 * width, stride)


class ResNet(nn.Module):
    """A ResNet from images (N, 3, H, W) to logits (N, classes), its stem by default that for 32×32 images."""

    def __init__(
        self,
        width: int,
        blocks: Sequence[int],
        classes: int = 10,
        block: Callable[[int, int, int], Residual] = basic_block,
        stem: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        layers = [*(stem or [*_convolution(3, width, 3), nn.ReLU()])]
        channels, expansion = width, 4 if block is bottleneck else 1
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(block(channels, width * 2**stage, stride))
                channels = expansion * width * 2**stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW).mean(dim=(2, 3)))


def resnet18(classes: int = 10) -> ResNet:
    """Build ResNet-18 in its CIFAR size (11.2 million parameters)."""
    return ResNet(width=64, blocks=(2, 2, 2, 2), classes=classes)


def resnet50(classes: int = 1000) -> ResNet:
    """Build ResNet-50 v1.5 for ImageNet (He et al. 2016; Goyal et al. 2017)."""
    stem = [*_convolution(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    model = ResNet(64, (3, 4, 6, 3), classes, bottleneck, stem)
    for module in model.features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


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


def airbench(patches: Tensor, widths: Sequence[int] = (16, 64, 64), classes: int = 10) -> nn.Sequential:
    """Build the network of airbench94 for 32×32 images, narrower (Jordan 2024; 127,000 parameters)."""
    layers: list[nn.Module] = [Whitening(patches), nn.GELU()]
    for inputs, width in pairwise((2 * patches[0].numel(), *widths)):
        for number in range(2):
            norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
            norm.weight.requires_grad_(False)
            layers.append(nn.Conv2d(width if number else inputs, width, 3, padding=1, bias=False))
            layers += [norm, nn.GELU()] if number else [nn.MaxPool2d(2), norm, nn.GELU()]
    head = nn.Linear(widths[-1], classes, bias=False)
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), head, Scaled(1 / 9))


# --- Transformers


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection, on tokens (N, T, D)."""

    scale: float | None = None  # of the products of queries and keys; by default the root of their width

    def __init__(
        self,
        dim: int,
        heads: int,
        expansion: int = 4,
        qkv_bias: bool = True,
        inputs: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(inputs or dim)
        self.qkv: nn.Module = nn.Linear(inputs or dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))

    def forward(self, x_NTD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_NTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal, scale=self.scale)
        # Where the width changes, the values stand in for the input in the residual connection.
        kept = x_NTD if self.scale is None else qkv[2].transpose(1, 2).flatten(2)
        hidden_NTD = kept + self.proj(mixed.transpose(1, 2).flatten(2))
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


def small_gpt(dim: int = 128, depth: int = 2, tokens: int = 64) -> GPT:
    """Build a GPT with GPT-2's initial weights (0.5 million parameters by default)."""
    model = GPT(dim, depth, heads=dim // 64, tokens=tokens)
    for block in model.blocks:
        block.qkv = Apart(dim)
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            last = name.endswith(("proj.weight", "mlp.2.weight"))  # of a residual branch
            nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)
    return model


def soft_split(x_NCHW: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Cut (N, C, H, W) into overlapping patches (N, T, C·kernel²), row by row (Yuan et al. 2021, 3.1)."""
    return unfold(x_NCHW, kernel, padding=padding, stride=stride).transpose(1, 2)


class TokenTransformer(TransformerBlock):
    """The one-head transformer between soft splits, (N, T, inputs) to (N, T, dim) (Yuan et al. 2021, 3.1)."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__(dim, heads=1, expansion=1, qkv_bias=False, inputs=inputs)
        # The authors' code divides by the root of the input's width, not of the keys' width.
        self.scale = inputs**-0.5


class TokensToToken(nn.Module):
    """Three soft splits of images into tokens (N, H/16·W/16, dim) (Yuan et al. 2021, figure 4)."""

    def __init__(self, dim: int, token_dim: int = 64) -> None:
        super().__init__()
        self.transformer1 = TokenTransformer(3 * 7 * 7, token_dim)
        self.transformer2 = TokenTransformer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, dim)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        height, width = x_NCHW.shape[2] // 4, x_NCHW.shape[3] // 4
        x_NTD = self.transformer1(soft_split(x_NCHW, 7, stride=4, padding=2))
        x_NCHW = x_NTD.transpose(1, 2).unflatten(2, (height, width))
        x_NTD = self.transformer2(soft_split(x_NCHW, 3, stride=2, padding=1))
        x_NCHW = x_NTD.transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return self.project(soft_split(x_NCHW, 3, stride=2, padding=1))


def sinusoids(tokens: int, dim: int) -> Tensor:
    """Compute the fixed position encoding (tokens, dim) of Vaswani et al. 2017, 3.5."""
    rate_D = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle_TD = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) * rate_D
    return torch.stack((angle_TD.sin(), angle_TD.cos()), dim=2).flatten(1).float()


class T2TViT(nn.Module):
    """T2T-ViT with transformers between its soft splits, by default T2T-ViT_t-14 (Yuan et al. 2021)."""

    position_TD: Tensor

    def __init__(
        self, dim: int = 384, depth: int = 14, heads: int = 6, classes: int = 100, image_size: int = 224
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size}")
        self.tokens = TokensToToken(dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        # Not persistent, so that a checkpoint loads at any image size.
        self.register_buffer("position_TD", sinusoids((image_size // 16) ** 2 + 1, dim), persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, 3, qkv_bias=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NTD = self.tokens(x_NCHW)
        x_NTD = torch.cat((self.class_token.expand(len(x_NTD), -1, -1), x_NTD), dim=1) + self.position_TD
        return self.head(self.norm(self.blocks(x_NTD))[:, 0])


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


def digits_autoencoder() -> nn.Sequential:
    """Build a network from 8×8 digits (N, 1, 8, 8) to 8 numbers and back to their pixels (N, 64)."""
    return nn.Sequential(mlp((64, 128, 32, 8)), mlp((8, 32, 128, 64)))


class DigitsLSTM(nn.Module):
    """An LSTM that reads 8×8 digits (N, 1, 8, 8) row by row, to logits."""

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])
