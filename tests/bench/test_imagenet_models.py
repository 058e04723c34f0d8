"""The networks of the ImageNet measurements are those of the papers, and FOP trains all of their weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu

from fop import FOP
from fop_bench.imagenet_models import Bottleneck, TokenTransformer, resnet50, sinusoids, soft_split, t2t_vit


def parameters_of(build, classes: int) -> int:
    return sum(parameter.numel() for parameter in build(classes).parameters())


def resnet50_parameters(classes: int) -> int:
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


def t2t_parameters(classes: int) -> int:
    """Count by the dimensions in Yuan et al. 2021, table 1; the sinusoids are constants."""

    def token_transformer(inputs: int) -> int:
        return 2 * inputs + inputs * 192 + 3 * (64 * 64 + 64) + 2 * 64

    tokens = token_transformer(3 * 49) + token_transformer(64 * 9) + (64 * 9 + 1) * 384
    attention = 384 * 3 * 384 + (384 + 1) * 384
    mlp = (384 + 1) * 1152 + (1152 + 1) * 384
    return tokens + 384 + 14 * (attention + mlp + 4 * 384) + 2 * 384 + (384 + 1) * classes


@pytest.mark.parametrize("classes", [10, 1000])
def test_resnet50_has_the_parameters_of_the_paper(classes):
    assert parameters_of(resnet50, classes) == resnet50_parameters(classes)


def test_resnet50_has_the_known_number_of_parameters():
    assert resnet50_parameters(1000) == 25_557_032


@pytest.mark.parametrize("classes", [10, 1000])
def test_t2t_vit_has_the_parameters_of_the_paper(classes):
    assert parameters_of(t2t_vit, classes) == t2t_parameters(classes)


def test_t2t_vit_has_the_published_number_of_parameters():
    # Table 2 of the paper says 21.5 million, the 197 × 384 constants of the positions among them or not.
    count = t2t_parameters(1000)
    assert count == 21_465_422
    assert round(count / 1e6, 1) == round((count + 197 * 384) / 1e6, 1) == 21.5


def test_resnet50_halves_the_image_in_the_3x3_and_the_shortcuts():
    blocks = [module for module in resnet50().modules() if isinstance(module, Bottleneck)]
    assert [block.conv2.stride[0] for block in blocks] == [1] * 3 + [2] + [1] * 3 + [2] + [1] * 5 + [2, 1, 1]
    assert {(block.conv1.stride, block.conv3.stride) for block in blocks} == {((1, 1), (1, 1))}
    projections = [
        block.shortcut[0].stride[0] for block in blocks if isinstance(block.shortcut, nn.Sequential)
    ]
    assert projections == [1, 2, 2, 2]


def test_bottleneck_starts_as_its_shortcut():
    block = Bottleneck(16, 4, stride=1)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), relu(x))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
def test_resnet50_maps_images_to_logits(height, width):
    model = resnet50(classes=7)
    features = model.blocks(model.stem(torch.randn(2, 3, height, width)))
    assert features.shape == (2, 2048, height // 32, width // 32)
    assert model.head(model.pool(features)).shape == (2, 7)


def test_t2t_vit_maps_images_to_logits():
    model = t2t_vit(classes=7, image_size=64)
    seen = []
    model.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 7)
    places = sinusoids(17, 384)
    assert torch.equal(seen[0][:, :1], (model.class_token + places[:1]).expand(2, 1, 384))
    assert torch.equal(seen[0][:, 1:], model.tokens(x) + places[1:])


def test_t2t_tokens_keep_the_places_of_the_image():
    """Without attention a token sees its part of the image, and more of what is left of it and above."""
    tokens = t2t_vit(image_size=64).tokens
    for transformer in (tokens.transformer1, tokens.transformer2):
        nn.init.zeros_(transformer.proj.weight)
    x = torch.randn(1, 3, 32, 96)
    changed = x.clone()
    changed[:, :, -4:, :4] += 1.0
    moved = (tokens(changed) - tokens(x)).abs().amax(dim=(0, 2)) > 0
    assert moved.unflatten(0, (2, 6)).tolist() == [[False] * 6, [True, True] + [False] * 4]


@pytest.mark.parametrize("image_size", [0, 8, 100])
def test_t2t_vit_refuses_sizes_it_cannot_split(image_size):
    with pytest.raises(ValueError, match="multiple of 16"):
        t2t_vit(image_size=image_size)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_soft_split_cuts_overlapping_patches(kernel, stride, padding):
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 16))
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = [
        padded[:, :, stride * i : stride * i + kernel, stride * j : stride * j + kernel].reshape(2, -1)
        for i in range(8 // stride)
        for j in range(16 // stride)
    ]
    split = soft_split(torch.from_numpy(x), kernel, stride, padding)
    np.testing.assert_array_equal(split.numpy(), np.stack(patches, axis=1))


def test_token_transformer_adds_attention_to_the_values():
    layer = TokenTransformer(12, 4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = (layer.norm1(x) @ layer.qkv.weight.T).split(4, dim=-1)
    weights = (query @ key.mT / 12**0.5).softmax(dim=-1)
    hidden = value + weights @ value @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), hidden + layer.mlp(layer.norm2(hidden)))


def test_sinusoids_follow_the_formula():
    table = sinusoids(50, 6)
    for place in (0, 1, 49):
        for pair in range(3):
            angle = place / 10000 ** (2 * pair / 6)
            expected = [np.sin(angle), np.cos(angle)]
            np.testing.assert_allclose(table[place, 2 * pair : 2 * pair + 2], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (
            resnet50,
            2,
        ),  # in the first step, weights of zero at the ends of the blocks hide what is before them
        (lambda classes: t2t_vit(classes, image_size=64), 1),
    ],
    ids=["resnet50", "t2t_vit"],
)
def test_fop_changes_every_parameter(build, steps):
    torch.manual_seed(0)
    model = build(10)
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
