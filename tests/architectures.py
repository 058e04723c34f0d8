"""Sizes of the layers of well-known models, where the benchmarks keep them."""

from fop_bench.architectures import gpt, resnet50, vit_b

__all__ = ["gpt", "resnet50", "vit_b"]
