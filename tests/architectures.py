"""Sizes of the layers of well-known models."""

from fop.distributed import LayerSize
from fop_bench.cost_model import gpt, linear, published

__all__ = ["gpt", "resnet50", "vit_b"]


def resnet50() -> list[LayerSize]:
    return list(published()[0].layers)


def vit_b() -> list[LayerSize]:
    """Patches, 12 blocks and the classifier of ViT-B/16 for ImageNet (Dosovitskiy et al. 2021, table 1)."""
    return [linear("patch", 768, 3 * 16**2), *gpt(12, 768, 1)[1:], linear("head", 1000, 768)]
