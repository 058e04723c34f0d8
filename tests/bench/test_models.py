"""The networks are those of the papers, and FOP trains all of their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from fop import FOP
from fop_bench.models import (
    Residual,
    ResNet,
    T2TViT,
    TokenTransformer,
    ViT,
    bottleneck,
    digits_cnn,
    resnet18,
    resnet50,
    sinusoids,
    soft_split,
)
from fop_bench.overhead import MODELS


def elements(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resnet50_elements(classes: int) -> int:
    """Count stem, stages and head of He et al. 2016, table 1; a BatchNorm has two weights a channel."""
    total = 3 * 64 * 49 + 2 * 64
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        total += inputs * outputs + 2 * outputs  # one projection a stage
        inner = 9 * width * width + width * outputs + 2 * (2 * width + outputs)
        total += inputs * width + inner + (blocks - 1) * (outputs * width + inner)
        inputs = outputs
    return total + (inputs + 1) * classes


def t2t_elements(classes: int) -> int:
    """Count by the dimensions in Yuan et al. 2021, table 1; the sinusoids are constants."""

    def token_transformer(inputs: int) -> int:
        return 2 * inputs + inputs * 192 + 3 * (64 * 64 + 64) + 2 * 64

    tokens = token_transformer(3 * 49) + token_transformer(64 * 9) + (64 * 9 + 1) * 384
    attention = 384 * 3 * 384 + (384 + 1) * 384
    mlp = (384 + 1) * 1152 + (1152 + 1) * 384
    return tokens + 384 + 14 * (attention + mlp + 4 * 384) + 2 * 384 + (384 + 1) * classes


def test_parameters_are_those_of_the_papers() -> None:
    for classes in (10, 1000):
        assert elements(resnet50(classes)) == resnet50_elements(classes)
        assert elements(T2TViT(classes=classes)) == t2t_elements(classes)
    assert resnet50_elements(1000) == 25_557_032
    # Table 2 of the paper says 21.5 million, the 197 × 384 constants of the positions among them or not.
    assert t2t_elements(1000) == 21_465_422
    counts = {name: elements(build()) for name, (build, _) in MODELS.items()}
    assert counts["resnet18"] == 11_173_962
    assert counts["mlp"] == 784 * 512 + 512 * 512 + 512 * 10 + 512 + 512 + 10
    assert 2.6e6 < counts["vit"] < 2.8e6


def test_small_networks_map_images_to_logits() -> None:
    assert digits_cnn()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    for model in (resnet18(classes=7), ViT(dim=24, depth=1, classes=7)):
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_resnet50_halves_the_image_in_the_3x3_and_the_shortcuts() -> None:
    blocks = [module for module in resnet50().modules() if isinstance(module, Residual)]
    strides = [
        [each.stride[0] for each in block.body.modules() if isinstance(each, nn.Conv2d)] for block in blocks
    ]
    assert strides == [[1, 2 if block in (3, 7, 13) else 1, 1] for block in range(16)]
    projections = [each.shortcut[0].stride[0] for each in blocks if isinstance(each.shortcut, nn.Sequential)]
    assert projections == [1, 2, 2, 2]


def test_bottleneck_starts_as_its_shortcut() -> None:
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(bottleneck(16, 4, stride=1)(x), relu(x))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
def test_resnet50_maps_images_to_logits(height: int, width: int) -> None:
    model = resnet50(classes=7)
    features = model.features(torch.randn(2, 3, height, width))
    assert features.shape == (2, 2048, height // 32, width // 32)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 7)


def test_t2t_vit_maps_images_to_logits() -> None:
    model = T2TViT(classes=7, image_size=64)
    seen = []
    model.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 7)
    places = sinusoids(17, 384)
    assert torch.equal(seen[0][:, :1], (model.class_token + places[:1]).expand(2, 1, 384))
    assert torch.equal(seen[0][:, 1:], model.tokens(x) + places[1:])


def test_t2t_tokens_keep_the_places_of_the_image() -> None:
    """Without attention a token sees its part of the image, and more of what is left of it and above."""
    tokens = T2TViT(image_size=64).tokens
    for transformer in (tokens.transformer1, tokens.transformer2):
        nn.init.zeros_(transformer.proj.weight)
    x = torch.randn(1, 3, 32, 96)
    changed = x.clone()
    changed[:, :, -4:, :4] += 1.0
    moved = (tokens(changed) - tokens(x)).abs().amax(dim=(0, 2)) > 0
    assert moved.unflatten(0, (2, 6)).tolist() == [[False] * 6, [True, True] + [False] * 4]


@pytest.mark.parametrize("image_size", [0, 8, 100])
def test_t2t_vit_refuses_sizes_it_cannot_split(image_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        T2TViT(image_size=image_size)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_soft_split_cuts_overlapping_patches(kernel: int, stride: int, padding: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 16))
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = [
        padded[:, :, stride * i : stride * i + kernel, stride * j : stride * j + kernel].reshape(2, -1)
        for i in range(8 // stride)
        for j in range(16 // stride)
    ]
    split = soft_split(torch.from_numpy(x), kernel, stride, padding)
    np.testing.assert_array_equal(split.numpy(), np.stack(patches, axis=1))


def test_token_transformer_adds_attention_to_the_values() -> None:
    layer = TokenTransformer(12, 4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = (layer.norm1(x) @ layer.qkv.weight.T).split(4, dim=-1)
    weights = (query @ key.mT / 12**0.5).softmax(dim=-1)
    hidden = value + weights @ value @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), hidden + layer.mlp(layer.norm2(hidden)))


def test_sinusoids_follow_the_formula() -> None:
    table = sinusoids(50, 6)
    for place in (0, 1, 49):
        for pair in range(3):
            angle = place / 10000 ** (2 * pair / 6)
            np.testing.assert_allclose(
                table[place, 2 * pair :][:2], [np.sin(angle), np.cos(angle)], atol=1e-6
            )


@pytest.mark.parametrize(
    ("build", "steps"),
    # In the first step, weights of zero at the ends of ResNet-50's blocks hide what is before them.
    [(lambda: ResNet(8, (1, 1), 10, bottleneck), 2), (lambda: T2TViT(96, 2, 2, 10, image_size=64), 1)],
    ids=["resnet50", "t2t_vit"],
)
def test_fop_changes_every_parameter(build: Callable[[], nn.Module], steps: int) -> None:
    torch.manual_seed(0)
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Weight decay would change weights without a gradient; large factors would only cost time here.
    optimizer = FOP(model, lr=0.05, weight_decay=0.0, layer_options={"*": {"max_factor_dim": 64}})
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(parameter.isfinite().all() for parameter in after.values())
    paths = {row.name: row.path for row in optimizer.summary().rows}
    weights = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert {paths[f"{name}.weight"] for name in weights} == {"FOP"}
