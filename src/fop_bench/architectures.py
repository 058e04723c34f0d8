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
    """What the cost model needs to know of a model."""

    title: str
    layers: Sequence[LayerSize]  # those that take the FOP step
    other_elements: int  # number of parameters on the AdamW path
    buffer_bytes: int = 0  # what DistributedDataParallel copies from rank 0 before a forward pass

    @property
    def fop_elements(self) -> int:
        """Number of parameters that take the FOP step."""
        return sum(layer.gradient_elements for layer in self.layers)

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return self.fop_elements + self.other_elements


def linear(name: str, out_dim: int, in_dim: int, *, bias: bool = True, groups: int = 1) -> LayerSize:
    """Return the size of a linear layer with the default `max_factor_dim`."""
    diagonals = {"diagonal_A": in_dim > MAX_FACTOR_DIM, "diagonal_G": out_dim > MAX_FACTOR_DIM}
    return LayerSize(name, groups=groups, out_dim=out_dim, in_dim=in_dim + bias, **diagonals)


def embedding(name: str, vocabulary: int, features: int) -> LayerSize:
    """Return the size of an embedding, whose A is a diagonal of counts."""
    return LayerSize(name, groups=1, out_dim=features, in_dim=vocabulary, diagonal_A=True)


def architecture_of(model: nn.Module, title: str) -> Architecture:
    """Return the sizes of a model of linear layers and convolutions; all its other parameters take AdamW.

    Written apart from the optimizer's own search, so that a prediction from it can be wrong.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            outputs, inputs = module.weight.flatten(1).shape
            bias = module.bias is not None
            layers.append(linear(name, outputs // groups, inputs, bias=bias, groups=groups))
    taken = sum(layer.gradient_elements for layer in layers)
    others = sum(param.numel() for param in model.parameters()) - taken
    return Architecture(title, layers, others, sum(buffer.nbytes for buffer in model.buffers()))


def resnet50() -> list[LayerSize]:
    """The 53 convolutions and the classifier of ResNet-50 for ImageNet (He et al. 2016, table 1)."""
    layers = [_conv("conv1", 64, 3, 7)]
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            layers += [
                _conv(f"{name}.conv1", width, channels, 1),
                _conv(f"{name}.conv2", width, width, 3),
                _conv(f"{name}.conv3", 4 * width, width, 1),
            ]
            if block == 0:
                layers.append(_conv(f"{name}.downsample", 4 * width, channels, 1))
            channels = 4 * width
    return [*layers, linear("fc", 1000, channels)]


def _conv(name: str, out_channels: int, in_channels: int, kernel: int, *, bias: bool = False) -> LayerSize:
    return linear(name, out_channels, in_channels * kernel**2, bias=bias)


def vit_b() -> list[LayerSize]:
    """Patches, 12 blocks and the classifier of ViT-B/16 for ImageNet (Dosovitskiy et al. 2021, table 1)."""
    return [_conv("patch", 768, 3, 16, bias=True), *_blocks(12, 768), linear("head", 1000, 768)]


def gpt(blocks: int, width: int, vocabulary: int) -> list[LayerSize]:
    """A GPT whose output layer is tied to the embedding, without learned positions (Radford et al. 2019)."""
    return [embedding("embedding", vocabulary, width), *_blocks(blocks, width)]


def _blocks(count: int, width: int) -> list[LayerSize]:
    sizes = {"qkv": (3, 1), "proj": (1, 1), "up": (4, 1), "down": (1, 4)}
    return [
        linear(f"blocks.{block}.{name}", out * width, of * width)
        for block in range(count)
        for name, (out, of) in sizes.items()
    ]


def llama(blocks: int, width: int, key_value_width: int, hidden: int, vocabulary: int) -> list[LayerSize]:
    """A GPT with grouped queries, SwiGLU, no biases and an output layer of its own (Touvron et al. 2023)."""
    sizes = {
        "qkv": (width + 2 * key_value_width, width),
        "proj": (width, width),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    inner = [
        linear(f"blocks.{block}.{name}", out, of, bias=False)
        for block in range(blocks)
        for name, (out, of) in sizes.items()
    ]
    return [
        embedding("embedding", vocabulary, width),
        *inner,
        linear("head", vocabulary, width, bias=False),
    ]


def published() -> list[Architecture]:
    """Return the models that `fop-bench scale --predict` makes tables of; what is not in layers is norms."""
    return [
        Architecture("ResNet-50", resnet50(), 53_120),
        Architecture("GPT, 1.3 billion parameters", gpt(24, 2048, 50257), (2 * 24 + 1) * 2 * 2048),
        Architecture("GPT, 70 billion parameters", llama(80, 8192, 1024, 28672, 128256), (2 * 80 + 1) * 8192),
    ]
