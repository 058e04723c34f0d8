"""The networks of the ImageNet measurements: ResNet-50 and T2T-ViT.

Shapes: N batch, C channels, H and W image, T tokens, D embedding.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention, unfold

from fop_bench.models import TransformerBlock, shortcut


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution with a shortcut (He et al. 2016, figure 5, with the stride in the 3×3)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        # The block starts as its shortcut, which eases the first epochs at large batches (Goyal et al. 2017).
        nn.init.zeros_(self.norm3.weight)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4·width, H/stride, W/stride)."""
        hidden = relu(self.norm1(self.conv1(x_NCHW)))
        hidden = relu(self.norm2(self.conv2(hidden)))
        return relu(self.norm3(self.conv3(hidden)) + self.shortcut(x_NCHW))


def resnet50(classes: int = 1000) -> nn.Module:
    """Build ResNet-50 v1.5 (He et al. 2016; Goyal et al. 2017), from (N, 3, H, W) to logits (N, classes)."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    blocks = nn.Sequential()
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(count):
            blocks.append(Bottleneck(channels, width, stride=2 if stage > 0 and block == 0 else 1))
            channels = 4 * width
    for module in (*stem.modules(), *blocks.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(channels, classes)
    return nn.Sequential(OrderedDict(stem=stem, blocks=blocks, pool=pool, head=head))


def soft_split(x_NCHW: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Cut (N, C, H, W) into overlapping patches (N, T, C·kernel²), row by row (Yuan et al. 2021, 3.1)."""
    return unfold(x_NCHW, kernel, padding=padding, stride=stride).transpose(1, 2)


def feed_forward(dim: int, hidden: int) -> nn.Sequential:
    """Build the MLP of a transformer block, from (..., dim) to (..., dim)."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class TokenTransformer(nn.Module):
    """The one-head transformer between soft splits, which narrows its tokens (Yuan et al. 2021, 3.1)."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        # The authors' code divides by the root of the input's width, not of the keys' width.
        self.scale = inputs**-0.5
        self.norm1 = nn.LayerNorm(inputs)
        self.qkv = nn.Linear(inputs, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = feed_forward(dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Map tokens (N, T, inputs) to tokens (N, T, dim)."""
        query, key, value = self.qkv(self.norm1(x_NTD)).unsqueeze(1).chunk(3, dim=-1)
        mixed = scaled_dot_product_attention(query, key, value, scale=self.scale)
        # The values stand in for the input in the residual connection, as its width is another.
        hidden_NTD = value.squeeze(1) + self.proj(mixed.squeeze(1))
        out: Tensor = hidden_NTD + self.mlp(self.norm2(hidden_NTD))
        return out


class TokensToToken(nn.Module):
    """Three soft splits with a transformer after the first two (Yuan et al. 2021, figure 4)."""

    def __init__(self, dim: int, token_dim: int = 64) -> None:
        super().__init__()
        self.transformer1 = TokenTransformer(3 * 7 * 7, token_dim)
        self.transformer2 = TokenTransformer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, dim)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map images (N, 3, H, W), H and W multiples of 16, to tokens (N, H/16·W/16, dim)."""
        height, width = x_NCHW.shape[2] // 4, x_NCHW.shape[3] // 4
        x_NTD = self.transformer1(soft_split(x_NCHW, 7, stride=4, padding=2))
        x_NCHW = x_NTD.transpose(1, 2).unflatten(2, (height, width))
        x_NTD = self.transformer2(soft_split(x_NCHW, 3, stride=2, padding=1))
        x_NCHW = x_NTD.transpose(1, 2).unflatten(2, (height // 2, width // 2))
        out: Tensor = self.project(soft_split(x_NCHW, 3, stride=2, padding=1))
        return out


class SlimBlock(TransformerBlock):
    """The transformer block of T2T-ViT, with a narrower MLP and no bias on queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.mlp = feed_forward(dim, 3 * dim)


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
        self.blocks = nn.Sequential(*(SlimBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map images (N, 3, image_size, image_size) to logits (N, classes)."""
        x_NTD = self.tokens(x_NCHW)
        x_NTD = torch.cat((self.class_token.expand(len(x_NTD), -1, -1), x_NTD), dim=1) + self.position_TD
        logits: Tensor = self.head(self.norm(self.blocks(x_NTD))[:, 0])
        return logits


def t2t_vit(classes: int = 100, *, image_size: int = 224) -> nn.Module:
    """Build T2T-ViT_t-14 (Yuan et al. 2021), from (N, 3, image_size, image_size) to logits (N, classes)."""
    return T2TViT(classes=classes, image_size=image_size)
