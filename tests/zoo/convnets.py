"""Convolutional networks, in the manner of torchvision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.task import CLASSES, Batch, Task, classification, cross_entropy

# --- ResNet ----------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_dim != dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_dim, dim, 1, stride, bias=False), nn.BatchNorm2d(dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = BasicBlock(dim, dim, 1)
        self.layer2 = BasicBlock(dim, 2 * dim, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def resnet() -> Task:
    """ResNet of basic blocks: BatchNorm, downsampling shortcut, in-place addition and activation."""
    return Task(ResNet(), classification(3, 8, 8), cross_entropy)


# --- ConvNeXt --------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ConvNeXt(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 2, stride=2), LayerNorm2d(dim, eps=1e-6))
        self.stage1 = ConvNeXtBlock(dim)
        self.downsample = nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, 2, stride=2))
        self.stage2 = ConvNeXtBlock(2 * dim)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-6)
        self.head = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.downsample(self.stage1(self.stem(x))))
        out: Tensor = self.head(self.norm(x.mean((-2, -1))))
        return out


def convnext() -> Task:
    """ConvNeXt: depthwise 7×7, pointwise Linear on channels-last, layer scale that starts at 1e-6."""
    return Task(ConvNeXt(), classification(3, 12, 12), cross_entropy)


# --- MobileNet v2 ----------------------------------------------------------------------------------


def conv_norm_relu6(in_dim: int, dim: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, dim, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(dim),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    def __init__(self, in_dim: int, dim: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_dim * expand
        self.use_res_connect = stride == 1 and in_dim == dim
        self.conv = nn.Sequential(
            *([conv_norm_relu6(in_dim, hidden, 1)] if expand != 1 else []),
            conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x) if self.use_res_connect else self.conv(x)
        return out


class MobileNetV2(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm_relu6(3, dim, 3, stride=2),
            InvertedResidual(dim, dim, 1, expand=1),
            InvertedResidual(dim, dim, 1, expand=3),
            InvertedResidual(dim, 2 * dim, 2, expand=3),
            conv_norm_relu6(2 * dim, 4 * dim, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(4 * dim, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        out: Tensor = self.classifier(torch.flatten(x, 1))
        return out


def mobilenet() -> Task:
    """MobileNet v2: depthwise convolutions, inverted residuals with and without shortcut, ReLU6 in place."""
    return Task(MobileNetV2(), classification(3, 12, 12), cross_entropy)


# --- U-Net -----------------------------------------------------------------------------------------


def double_conv(in_dim: int, dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first in (in_dim, dim):
        layers += [nn.Conv2d(first, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down1 = double_conv(1, dim)
        self.down2 = double_conv(dim, 2 * dim)
        self.bottom = double_conv(2 * dim, 4 * dim)
        self.up2 = nn.ConvTranspose2d(4 * dim, 2 * dim, 2, stride=2)
        self.merge2 = double_conv(4 * dim, 2 * dim)
        self.up1 = nn.ConvTranspose2d(2 * dim, dim, 2, stride=2)
        self.merge1 = double_conv(2 * dim, dim)
        self.out = nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.down2(self.pool(high))
        x = self.up2(self.bottom(self.pool(low)))
        x = self.up1(self.merge2(torch.cat([low, x], dim=1)))
        out: Tensor = self.out(self.merge1(torch.cat([high, x], dim=1)))
        return out


def unet() -> Task:
    """U-Net that finds a bright rectangle: transposed convolutions, skip connections, a loss per pixel."""

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        y = torch.zeros(6, 1, 8, 8)
        for mask, (top, left) in zip(
            y, torch.randint(0, 5, (6, 2), generator=generator).tolist(), strict=True
        ):
            mask[:, top : top + 4, left : left + 3] = 1
        return y + 0.3 * torch.randn(y.shape, generator=generator), y

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(model(x), y)

    return Task(UNet(), batch, loss)


# --- Sound and video -------------------------------------------------------------------------------


class AudioNet(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, dim, 9, stride=4),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(dim, 2 * dim, 3, padding="same", dilation=2, groups=2),
            nn.BatchNorm1d(2 * dim),
            nn.ReLU(),
        )
        self.fc = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).mean(-1))
        return out


def audio() -> Task:
    """Net on raw sound: strided, dilated and grouped Conv1d."""
    return Task(AudioNet(), classification(1, 101), cross_entropy)


class VideoNet(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, dim, 3, padding=1, bias=False), nn.BatchNorm3d(dim), nn.ReLU())
        # R(2+1)D: space, then time
        self.space = nn.Conv3d(dim, 2 * dim, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.time = nn.Conv3d(2 * dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate")
        self.fc = nn.Linear(2 * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.time(F.relu(self.space(self.stem(x)))))
        out: Tensor = self.fc(x.mean((-3, -2, -1)))
        return out


def video() -> Task:
    """Net on clips: full and factorised Conv3d."""
    return Task(VideoNet(), classification(3, 3, 5, 5), cross_entropy)
