"""Well-known architectures at toy size: those of `transformers` where it has them, and a few written here.

Each entry of `ZOO` builds a `Task`: a model, a maker of batches and a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]

CLASSES, VOCABULARY, LENGTH = 4, 11, 8
# Unlike every length and window count of the zoo, so that samples cannot be taken for tokens by luck.
SAMPLES = 6


class Task(NamedTuple):
    """A model, ``batch(seed)``, and ``loss(model, batch)``."""

    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def classification(*shape: int) -> Callable[[int], Batch]:
    """Make batches of noisy class prototypes of this shape, and the classes."""
    prototypes = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        return prototypes[y] + 0.5 * torch.randn(SAMPLES, *shape, generator=generator), y

    return batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of classes along the last dimension of the model's output; -100 is no class."""
    *inputs, target = batch
    out = model(*inputs)
    logits: Tensor = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def token_rows(seed: int, length: int, first: int = 0) -> tuple[Tensor, torch.Generator]:
    """Tokens (N, length) that count up from a random one, from ``first`` and modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (SAMPLES, 1), generator=generator)
    return (start + torch.arange(length)) % (VOCABULARY - first) + first, generator


# --- models of transformers ------------------------------------------------------------------------


def pretrained(kind: str, head: str, **config: Any) -> nn.Module:
    """A model with random weights, of a spread for its small width."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{kind}Config")(**{"initializer_range": 0.2, **config})
    model: nn.Module = getattr(transformers, f"{kind}For{head}" if head != "LMHeadModel" else kind + head)(
        made
    )
    return model


def vision(kind: str, **config: Any) -> Task:
    model = pretrained(kind, "ImageClassification", num_labels=CLASSES, image_size=16, **config)
    return Task(model, classification(3, 16, 16), cross_entropy)


def resnet() -> Task:
    """Basic blocks: BatchNorm, downsampling shortcut, in-place activation."""
    return vision("ResNet", embedding_size=6, hidden_sizes=[6, 12], depths=[1, 1], layer_type="basic")


def convnext() -> Task:
    """Depthwise 7×7, pointwise Linear on channels-last, layer scale that starts at 1e-6."""
    return vision("ConvNext", patch_size=2, num_stages=2, hidden_sizes=[6, 12], depths=[1, 1])


def mobilenet() -> Task:
    """MobileNet v2: depthwise convolutions, inverted residuals with and without shortcut, ReLU6."""
    small = {"depth_multiplier": 0.1, "depth_divisible_by": 2, "min_depth": 2, "expand_ratio": 2}
    return vision("MobileNetV2", first_layer_is_expansion=True, initializer_range=0.02, **small)


def vit() -> Task:
    """Patch convolution, class token, learned positions."""
    return vision(
        "ViT", patch_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )


def swin() -> Task:
    """Windows folded into the batch, shifted windows with a mask, position bias, patch merging."""
    small = {"embed_dim": 6, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    return vision("Swin", patch_size=2, drop_path_rate=0.0, **small)


def gpt() -> Task:
    """GPT-2: causal attention by Conv1D with fused qkv, learned positions, head tied to the embedding."""

    def batch(seed: int) -> Batch:
        tokens, _ = token_rows(seed, LENGTH + 1)
        return tokens[:, :-1], tokens[:, 1:]

    small = {"n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return Task(pretrained("GPT2", "LMHeadModel", **small, **off), batch, cross_entropy)


def bert() -> Task:
    """Three embeddings, padding, masked tokens, tied head with a bias of its own."""
    pad, mask = 0, 1

    def batch(seed: int) -> Batch:
        tokens, generator = token_rows(seed, LENGTH, first=2)
        length = torch.randint(LENGTH // 2, LENGTH + 1, (SAMPLES, 1), generator=generator)
        real = torch.arange(LENGTH) < length
        masked = real & (torch.rand(tokens.shape, generator=generator) < 0.3)
        masked[:, 1] = True
        types = (torch.arange(LENGTH) >= length // 2).long()
        ids = torch.where(masked, mask, tokens).masked_fill(~real, pad)
        return ids, real.long(), types, tokens.masked_fill(~masked, -100)

    small = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": pad}
    sizes = {"max_position_embeddings": LENGTH, "vocab_size": VOCABULARY}
    return Task(pretrained("Bert", "MaskedLM", **small, **off, **sizes), batch, cross_entropy)


# --- U-Net -----------------------------------------------------------------------------------------


def double_conv(in_dim: int, dim: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for first in (in_dim, dim):
        layers += [nn.Conv2d(first, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down1 = double_conv(1, dim)
        self.down2 = double_conv(dim, 2 * dim)
        self.bottom = double_conv(2 * dim, 4 * dim)
        self.up2 = nn.ConvTranspose2d(4 * dim, 2 * dim, 2, stride=2)
        self.merge2 = double_conv(4 * dim, 2 * dim)
        self.up1 = nn.ConvTranspose2d(2 * dim, dim, 2, stride=2)
        self.merge1 = double_conv(2 * dim, dim)
        self.out = nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.down2(self.pool(high))
        x = self.up2(self.bottom(self.pool(low)))
        x = self.up1(self.merge2(torch.cat([low, x], dim=1)))
        out: Tensor = self.out(self.merge1(torch.cat([high, x], dim=1)))
        return out


def unet() -> Task:
    """U-Net that finds a bright rectangle: transposed convolutions, skip connections, a loss per pixel."""

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        y = torch.zeros(6, 1, 8, 8)
        for mask, (top, left) in zip(
            y, torch.randint(0, 5, (6, 2), generator=generator).tolist(), strict=True
        ):
            mask[:, top : top + 4, left : left + 3] = 1
        return y + 0.3 * torch.randn(y.shape, generator=generator), y

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(model(x), y)

    return Task(UNet(), batch, loss)


# --- Encoder and decoder ---------------------------------------------------------------------------


class Seq2Seq(nn.Module):
    positions: Tensor

    def __init__(self, dim: int = 12, heads: int = 2, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.source = nn.Embedding(VOCABULARY, dim)
        self.target = nn.Embedding(VOCABULARY, dim)
        angles = torch.arange(LENGTH)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(100) / dim))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, heads, 2 * dim, norm_first=True, **options),
            1,
            nn.LayerNorm(dim),
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(dim, heads, 2 * dim, norm_first=True, **options), 1, nn.LayerNorm(dim)
        )
        self.generator = nn.Linear(dim, VOCABULARY)

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        along = 1 if self.batch_first else 0
        positions = self.positions[: tokens.shape[along]]
        out: Tensor = embedding(tokens) + (positions if self.batch_first else positions[:, None])
        return out

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1 if self.batch_first else 0]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        memory = self.encoder(self.embed(self.source, source))
        x = self.decoder(self.embed(self.target, target), memory, tgt_mask=causal, tgt_is_causal=True)
        out: Tensor = self.generator(x)
        return out


def seq2seq(*, batch_first: bool) -> Task:
    """Encoder and decoder of torch that learn to reverse a sequence; source and target differ in length."""

    def batch(seed: int) -> Batch:
        source, _ = token_rows(seed, LENGTH)
        target = source[:, -5:].flip(1)
        tokens = (source, target[:, :-1], target[:, 1:])
        return tokens if batch_first else tuple(part.T.contiguous() for part in tokens)

    return Task(Seq2Seq(batch_first=batch_first), batch, cross_entropy)


# --- LSTM ------------------------------------------------------------------------------------------


class LSTMClassifier(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.lstm = nn.LSTM(dim, dim)
        self.fc = nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(tokens))
        out: Tensor = self.fc(state[-1])
        return out


def lstm() -> Task:
    """LSTM with the batch along dim 1, as is its default."""

    def batch(seed: int) -> Batch:
        tokens, _ = token_rows(seed, LENGTH)
        return tokens.T.contiguous(), tokens[:, 0] % CLASSES

    return Task(LSTMClassifier(), batch, cross_entropy)


# --- GAN -------------------------------------------------------------------------------------------

# DCGAN: two models whose losses go through each other.
LATENT = 5


def generator(dim: int = 4) -> nn.Sequential:
    """Make (N, LATENT, 1, 1) into images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 2 * dim, 4, bias=False),
        nn.BatchNorm2d(2 * dim),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(2 * dim, 1, 4, stride=2, padding=1, bias=False),
        nn.Tanh(),
    )


def discriminator(dim: int = 4) -> nn.Sequential:
    """Make images (N, 1, 8, 8) into logits (N, 1)."""
    return nn.Sequential(
        nn.Conv2d(1, dim, 4, stride=2, padding=1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(dim, 2 * dim, 4, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(),
        nn.Linear(2 * dim, 1),
    )


def real(seed: int) -> Tensor:
    """Images whose left half is bright."""
    image = torch.full((8, 8), -0.8)
    image[:, :4] = 0.8
    return image + 0.1 * torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def noise(seed: int) -> Tensor:
    return torch.randn(SAMPLES, LATENT, 1, 1, generator=torch.Generator().manual_seed(seed))


def verdict(model: nn.Module, images: Tensor, *, is_real: bool) -> Tensor:
    """Loss of a discriminator that should find these images real, or not."""
    logits = model(images)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


ZOO: dict[str, Callable[[], Task]] = {
    "resnet": resnet,
    "convnext": convnext,
    "mobilenet": mobilenet,
    "vit": vit,
    "swin": swin,
    "gpt": gpt,
    "bert": bert,
    "unet": unet,
    "seq2seq": partial(seq2seq, batch_first=True),
    "seq2seq_length_first": partial(seq2seq, batch_first=False),
    "lstm": lstm,
}
