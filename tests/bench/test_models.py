"""The networks are those of the papers, and FOP trains all of their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fop import FOP
from fop_bench.models import ResNet, ViT, digits_cnn, resnet18
from fop_bench.overhead import MODELS


def elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_those_of_the_papers() -> None:
    # Of the CIFAR network with 32 layers (He et al. 2016, table 6), but for its shortcuts.
    assert elements(ResNet(16, (5, 5, 5))) == 464_154 + 16 * 32 + 32 * 64 + 2 * (32 + 64)
    counts = {name: elements(build()) for name, (build, _) in MODELS.items()}
    assert counts["resnet18"] == 11_173_962
    assert counts["mlp"] == 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
    assert 2.6e6 < counts["vit"] < 2.8e6


def test_small_networks_map_images_to_logits() -> None:
    assert digits_cnn()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    for model in (resnet18(classes=7), ViT(dim=24, depth=1, classes=7)):
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    "build", [lambda: ResNet(8, (1, 1)), lambda: ViT(dim=24, depth=1)], ids=["resnet", "vit"]
)
def test_fop_changes_every_parameter(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Weight decay would change weights without a gradient; large factors would only cost time here.
    optimizer = FOP(model, lr=0.05, weight_decay=0.0, layer_options={"*": {"max_factor_dim": 64}})
    cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(parameter.isfinite().all() for parameter in after.values())
    paths = {row.name: row.path for row in optimizer.summary().rows}
    weights = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert {paths[f"{name}.weight"] for name in weights} == {"FOP"}
