"""Tests that some versions of torch cannot run say so by name, with the reason."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def requires_torch(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test on versions before this one; ``why`` says what they lack."""
    return pytest.mark.skipif(
        tuple(map(int, version.split("."))) > TORCH, reason=f"needs torch {version}: {why}"
    )


one_graph = requires_torch("2.5", "before, torch.compile breaks its graph at every hook of ours")
fsdp_on_cpu = requires_torch("2.7", "before, fully_shard is private or asks for CUDA streams")
knows_retained_graphs = requires_torch("2.5", "before, nobody can ask whether a graph is retained")
