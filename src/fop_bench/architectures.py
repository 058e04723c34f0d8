"""Sizes of the layers of well-known models, written from their published architectures, and of modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fop.distributed import LayerSize

# The default of `max_factor_dim`: of a factor with a larger side, without the bias, the diagonal is kept.
MAX_FACTOR_DIM = 8192


@dataclass(frozen=True)
class Architecture:
    """What the cost model needs to know of a model.

    Attributes:
        title: how a table names it.
        layers: those that take the FOP step.
        other_elements: number of parameters on the AdamW path.
        buffer_bytes: what DistributedDataParallel copies from rank 0 before a forward pass, such as running
            averages.
    """

    title: str
    layers: Sequence[LayerSize]
    other_elements: int
    buffer_bytes: int = 0

    @property
    def fop_elements(self) -> int:
        """Number of parameters that take the FOP step, as many as entries of their gradient matrices."""
        return sum(layer.gradient_elements for layer in self.layers)

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return self.fop_elements + self.other_elements


def linear(name: str, out_dim: int, in_dim: int, *, bias: bool = True, groups: int = 1) -> LayerSize:
    """Give the size of a linear layer with the default `max_factor_dim`."""
    return LayerSize(
        name,
        groups=groups,
        out_dim=out_dim,
        in_dim=in_dim + bias,
        diagonal_A=in_dim > MAX_FACTOR_DIM,
        diagonal_G=out_dim > MAX_FACTOR_DIM,
    )


def conv(name: str, out_channels: int, in_channels: int, kernel: int, *, bias: bool = False) -> LayerSize:
    """Give the size of a convolution with a square kernel."""
    return linear(name, out_channels, in_channels * kernel**2, bias=bias)


def embedding(name: str, vocabulary: int, features: int) -> LayerSize:
    """Give the size of an embedding, whose A is a diagonal of counts."""
    return LayerSize(name, groups=1, out_dim=features, in_dim=vocabulary, diagonal_A=True)


def architecture_of(model: nn.Module, title: str) -> Architecture:
    """Give the sizes of a model of linear layers and convolutions; all its other parameters take AdamW.

    Written apart from the optimizer's own search, so that a prediction from it can be wrong.
    """
    layers: list[LayerSize] = []
    taken = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = linear(name, module.out_features, module.in_features, bias=module.bias is not None)
        elif isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            size = linear(
                name,
                module.out_channels // module.groups,
                module.in_channels // module.groups * height * width,
                bias=module.bias is not None,
                groups=module.groups,
            )
        else:
            continue
        layers.append(size)
        taken += size.gradient_elements
    others = sum(param.numel() for param in model.parameters()) - taken
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return Architecture(title, layers, others, buffers)


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


def llama(blocks: int, width: int, key_value_width: int, hidden: int, vocabulary: int) -> list[LayerSize]:
    """A GPT with grouped queries, SwiGLU, no biases and an output layer of its own (Touvron et al. 2023)."""
    layers = [embedding("embedding", vocabulary, width)]
    for block in range(blocks):
        name = f"blocks.{block}"
        layers += [
            linear(f"{name}.qkv", width + 2 * key_value_width, width, bias=False),
            linear(f"{name}.proj", width, width, bias=False),
            linear(f"{name}.gate", hidden, width, bias=False),
            linear(f"{name}.up", hidden, width, bias=False),
            linear(f"{name}.down", width, hidden, bias=False),
        ]
    return [*layers, linear("head", vocabulary, width, bias=False)]


def published() -> list[Architecture]:
    """Give the models that `fop-bench scale --predict` makes tables of; what is not in layers is norms."""
    return [
        Architecture("ResNet-50", resnet50(), 53_120),
        Architecture("GPT, 1.3 billion parameters", gpt(24, 2048, 50257), (2 * 24 + 1) * 2 * 2048),
        Architecture("GPT, 70 billion parameters", llama(80, 8192, 1024, 28672, 128256), (2 * 80 + 1) * 8192),
    ]
