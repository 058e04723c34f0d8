"""`nn.MultiheadAttention` in a few dense lines, so that inputs and outputs of every projection can be had."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.kinds import Kind, Packed


class DenseAttention(nn.MultiheadAttention):
    """A MultiheadAttention whose projections are recorded; `densify` makes one of a module that exists."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        n = len(q)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(n, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(n, 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :1])], dim=1) for t in (k, v))
        scores = self._heads(q) @ self._heads(k).mT / math.sqrt(self.head_dim)
        weights = (scores + self._mask(scores, attn_mask, key_padding_mask)).softmax(-1)
        mixed = (weights @ self._heads(v)).transpose(1, 2).flatten(2)  # (N, L, E)
        out = self.out_proj(mixed)
        if average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out[0], weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights if need_weights else None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v (N, L or S, E)."""
        given = [query, key, value]
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            parts = zip(given, self.in_proj_weight.chunk(3), biases, strict=True)
            projected = [F.linear(x, w, bias) for x, w, bias in parts]
            return self.tape.record(Packed(), self.in_proj_weight, self.in_proj_bias, given, projected)
        found = []
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for x, w, bias in zip(given, separate, biases, strict=True):
            # The three share one bias parameter, which therefore belongs to none of them.
            found += self.tape.record(Kind(), w, None, [x], [F.linear(x, w, bias)])
        return found

    def _heads(self, t: Tensor) -> Tensor:
        """(N, heads, L, head dim)."""
        return t.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """What is added to the scores (N, heads, L, S'), where S' may have more columns than the masks."""
        total = torch.zeros_like(scores)
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                if mask.dim() == 3:
                    mask = mask.unflatten(0, (-1, self.num_heads))
                as_float = torch.zeros_like(scores[..., : mask.shape[-1]])
                as_float += torch.where(mask, -torch.inf, 0.0) if mask.dtype is torch.bool else mask
                total = total + F.pad(as_float, (0, scores.shape[-1] - mask.shape[-1]))
        return total


def densify(model: nn.Module, tape: Any) -> None:
    """Make every MultiheadAttention of ``model`` a `DenseAttention` that records on ``tape``."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = DenseAttention
            module.tape = tape
