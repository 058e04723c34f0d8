"""Sizes of the layers of well-known models."""

from fop.distributed import LayerSize

MAX_FACTOR_DIM = 8192  # the default: of a factor with a larger side, without the bias, the diagonal is kept


def linear(name: str, out_dim: int, in_dim: int, *, bias: bool = True) -> LayerSize:
    diagonals = {"diagonal_A": in_dim > MAX_FACTOR_DIM, "diagonal_G": out_dim > MAX_FACTOR_DIM}
    return LayerSize(name, groups=1, out_dim=out_dim, in_dim=in_dim + bias, **diagonals)


def gpt(blocks: int, width: int, vocabulary: int) -> list[LayerSize]:
    """An embedding, to which the output layer is tied, and blocks of linear layers (Radford et al. 2019)."""
    layers = [LayerSize("embedding", groups=1, out_dim=width, in_dim=vocabulary, diagonal_A=True)]
    sizes = {"qkv": (3 * width, width), "proj": (width, width)}
    sizes |= {"up": (4 * width, width), "down": (width, 4 * width)}
    return layers + [linear(f"blocks.{n}.{name}", *sizes[name]) for n in range(blocks) for name in sizes]


def vit_b() -> list[LayerSize]:
    """Patches, 12 blocks and the classifier of ViT-B/16 for ImageNet (Dosovitskiy et al. 2021, table 1)."""
    return [linear("patch", 768, 3 * 16**2), *gpt(12, 768, 1)[1:], linear("head", 1000, 768)]


def resnet50() -> list[LayerSize]:
    """Stem, 16 blocks with a projection in the first of each stage, and head (He et al. 2016, table 1)."""
    layers, inputs = [linear("stem", 64, 3 * 7**2, bias=False)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(blocks):
            sizes = [(width, inputs), (width, 9 * width), (4 * width, width)]
            sizes += [(4 * width, inputs)] if number == 0 else []
            layers += [linear(f"stage {width}, block {number}", *each, bias=False) for each in sizes]
            inputs = 4 * width
    return [*layers, linear("head", 1000, inputs)]
