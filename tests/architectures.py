"""Sizes of the layers of well-known models, written from their published architectures."""

from __future__ import annotations

from fop.distributed.plan import LayerSize

# The default of `max_factor_dim`: of a factor with a larger side, without the bias, the diagonal is kept.
MAX_FACTOR_DIM = 8192


def linear(name: str, out_dim: int, in_dim: int, *, bias: bool = True) -> LayerSize:
    return LayerSize(
        name,
        groups=1,
        out_dim=out_dim,
        in_dim=in_dim + bias,
        diagonal_A=in_dim > MAX_FACTOR_DIM,
        diagonal_G=out_dim > MAX_FACTOR_DIM,
    )


def conv(name: str, out_channels: int, in_channels: int, kernel: int, *, bias: bool = False) -> LayerSize:
    return linear(name, out_channels, in_channels * kernel**2, bias=bias)


def embedding(name: str, vocabulary: int, features: int) -> LayerSize:
    return LayerSize(name, groups=1, out_dim=features, in_dim=vocabulary, diagonal_A=True)


def resnet50() -> list[LayerSize]:
    """The 53 convolutions and the classifier of ResNet-50 for ImageNet (He et al. 2016, table 1)."""
    layers = [conv("conv1", 64, 3, 7)]
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            layers += [
                conv(f"{name}.conv1", width, channels, 1),
                conv(f"{name}.conv2", width, width, 3),
                conv(f"{name}.conv3", 4 * width, width, 1),
            ]
            if block == 0:
                layers.append(conv(f"{name}.downsample", 4 * width, channels, 1))
            channels = 4 * width
    return [*layers, linear("fc", 1000, channels)]


def vit_b() -> list[LayerSize]:
    """Patches, 12 blocks and the classifier of ViT-B/16 for ImageNet (Dosovitskiy et al. 2021, table 1)."""
    blocks = [layer for block in range(12) for layer in _transformer_block(f"blocks.{block}", 768)]
    return [conv("patch", 768, 3, 16, bias=True), *blocks, linear("head", 1000, 768)]


def gpt(blocks: int, width: int, vocabulary: int) -> list[LayerSize]:
    """A GPT whose output layer is tied to the embedding, without learned positions (Radford et al. 2019)."""
    inner = [layer for block in range(blocks) for layer in _transformer_block(f"blocks.{block}", width)]
    return [embedding("embedding", vocabulary, width), *inner]


def _transformer_block(name: str, width: int) -> list[LayerSize]:
    return [
        linear(f"{name}.qkv", 3 * width, width),
        linear(f"{name}.proj", width, width),
        linear(f"{name}.up", 4 * width, width),
        linear(f"{name}.down", width, 4 * width),
    ]
