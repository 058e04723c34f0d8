"""Language models: GPT, BERT, encoder-decoder, LSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.task import CLASSES, SAMPLES, Batch, Task, cross_entropy

VOCABULARY = 11
LENGTH = 8


def token_rows(seed: int, length: int, first: int = 0) -> tuple[Tensor, torch.Generator]:
    """Tokens (N, length) that count up from a random one, from ``first`` and modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (SAMPLES, 1), generator=generator)
    return (start + torch.arange(length)) % (VOCABULARY - first) + first, generator


def start_small(model: nn.Module) -> None:
    """Initialise as these models are, with a spread for their width."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


# --- GPT -------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return out


class GPT(nn.Module):
    def __init__(self, dim: int = 12, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, dim)
        self.wpe = nn.Embedding(LENGTH, dim)
        self.h = nn.ModuleList(GPTBlock(dim, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        start_small(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        out: Tensor = self.lm_head(self.ln_f(x))
        return out


def gpt() -> Task:
    """GPT: causal attention with fused qkv, learned positions, output head tied to the tokens' embedding."""

    def batch(seed: int) -> Batch:
        tokens, _ = token_rows(seed, LENGTH + 1)
        return tokens[:, :-1], tokens[:, 1:]

    return Task(GPT(), batch, cross_entropy)


# --- BERT ------------------------------------------------------------------------------------------

PAD, MASK = 0, 1


class Bert(nn.Module):
    def __init__(self, dim: int = 12, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, dim, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(LENGTH, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.transform = nn.Linear(dim, dim)
        self.transform_norm = nn.LayerNorm(dim)
        self.decoder = nn.Linear(dim, VOCABULARY)
        self.decoder.weight = self.word_embeddings.weight
        start_small(self)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1])[None]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.norm(x + self.position_embeddings(positions))
        x = self.encoder(x, src_key_padding_mask=input_ids == PAD)
        out: Tensor = self.decoder(self.transform_norm(F.gelu(self.transform(x))))
        return out


def bert() -> Task:
    """BERT: three embeddings, padding, masked tokens, tied head with a bias of its own."""

    def batch(seed: int) -> Batch:
        tokens, generator = token_rows(seed, LENGTH, first=2)
        length = torch.randint(LENGTH // 2, LENGTH + 1, (SAMPLES, 1), generator=generator)
        real = torch.arange(LENGTH) < length
        masked = real & (torch.rand(tokens.shape, generator=generator) < 0.3)
        masked[:, 1] = True
        types = (torch.arange(LENGTH) >= length // 2).long()
        ids = torch.where(masked, MASK, tokens).masked_fill(~real, PAD)
        return ids, types, tokens.masked_fill(~masked, -100)

    return Task(Bert(), batch, cross_entropy)


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
