"""Vision models on patches, in the manner of timm: ViT, Swin, MLP-Mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.task import CLASSES, Task, classification, cross_entropy


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3·D) as query, key and value of (B, heads, T, D/heads)."""
    B, T, D3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, D3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


# --- ViT -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    def __init__(self, size: int, dim: int = 12, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 4) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out


def vit() -> Task:
    """Vision transformer: patch convolution, class token, learned positions, fused qkv."""
    return Task(VisionTransformer(12), classification(3, 12, 12), cross_entropy)


# --- Swin ------------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Attention inside windows that are folded into the batch.

    Args:
        functional: give the weights to functions instead of calling the modules, as torchvision does.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int, *, functional: bool) -> None:
        super().__init__()
        self.window = window
        self.heads = heads
        self.functional = functional
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        places = torch.stack([y, x]).flatten(1)
        relative = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("relative_position_index", relative[0] * (2 * window - 1) + relative[1])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend; x is (N·windows, window², D), the mask (windows, window², window²)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)
        bias = bias[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias) if self.functional else self.qkv(x)
        q, k, v = split_heads(qkv, self.heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        out: Tensor = F.linear(x, self.proj.weight, self.proj.bias) if self.functional else self.proj(x)
        return out


class SwinBlock(nn.Module):
    attn_mask: Tensor | None

    def __init__(self, size: int, dim: int, window: int, shift: int, heads: int, *, functional: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, functional=functional)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        mask = None
        if shift:
            # Which pixels of a shifted window come from the same side of the image.
            line = torch.arange(size)
            region = (line >= size - window).int() + (line >= size - shift).int()
            region = (3 * region[:, None] + region).float()
            regions = self.windows(region[None, :, :, None]).squeeze(-1)
            mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
        self.register_buffer("attn_mask", mask)

    def windows(self, x: Tensor) -> Tensor:
        """(N, H, W, D) as (N·windows, window², D)."""
        N, H, W, D = x.shape
        w = self.window
        return x.view(N, H // w, w, W // w, w, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, D)

    def image(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Undo `windows`."""
        N, H, W, D = shape
        w = self.window
        return x.view(N, H // w, W // w, w, w, D).permute(0, 1, 3, 2, 4, 5).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), dims=(1, 2))
        y = self.image(self.attn(self.windows(y), self.attn_mask), x.shape)
        x = x + torch.roll(y, (self.shift, self.shift), dims=(1, 2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return out


class Swin(nn.Module):
    def __init__(self, size: int, dim: int = 6, *, functional: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 2, stride=2)
        self.patch_norm = nn.LayerNorm(dim)
        tokens = size // 2
        window = tokens // 2
        self.layers = nn.Sequential(
            SwinBlock(tokens, dim, window, 0, 2, functional=functional),
            SwinBlock(tokens, dim, window, window // 2, 2, functional=functional),
            PatchMerging(dim),
            SwinBlock(tokens // 2, 2 * dim, window, 0, 4, functional=functional),
        )
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))
        out: Tensor = self.head(self.norm(self.layers(x)).mean((1, 2)))
        return out


def swin() -> Task:
    """Swin: windows folded into the batch, shifted windows with a mask, position bias, patch merging."""
    return Task(Swin(16, functional=False), classification(3, 16, 16), cross_entropy)


def swin_functional() -> Task:
    """Swin as in torchvision, whose attention gives its weights to `F.linear`."""
    return Task(Swin(16, functional=True), classification(3, 16, 16), cross_entropy)


# --- MLP-Mixer -------------------------------------------------------------------------------------


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp_tokens = Mlp(tokens, 2 * tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_channels = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).mT).mT
        out: Tensor = x + self.mlp_channels(self.norm2(x))
        return out


class Mixer(nn.Module):
    def __init__(self, size: int, dim: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock((size // 4) ** 2, dim) for _ in range(2)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).mT)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def mixer() -> Task:
    """MLP-Mixer: Linear layers over tokens and over channels."""
    return Task(Mixer(12), classification(3, 12, 12), cross_entropy)
