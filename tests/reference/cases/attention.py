"""Models of `nn.MultiheadAttention` in all of its forms, and torch's transformer layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference.observe import Inputs
from reference.steps import Case, double

E, HEADS = 4, 2
PACKED = {"attention.in_proj_weight", "attention.out_proj.weight"}
SEPARATE = {
    f"attention.{key}" for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
}


class Attention(nn.Module):
    """A MultiheadAttention called with samples in dim 0; one, two or three tensors are query, key and value.

    Args:
        call: keywords of each call.
        options: keywords of nn.MultiheadAttention.
    """

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options})
        self.call = call or {}
        if self.attention.in_proj_bias is not None:
            # Zeros as torch makes them would hide a mistake.
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        value = key if value is None else value
        if not self.attention.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        call = dict(self.call)
        if call.pop("padded", False):
            call["key_padding_mask"] = self._padding(key)
        out, _ = self.attention(query, key, value, **call)
        return out if self.attention.batch_first else out.transpose(0, 1)

    def _padding(self, key: Tensor) -> Tensor:
        """The last position of a sample whose first number is positive is padding."""
        samples = key if self.attention.batch_first else key.transpose(0, 1)
        mask = torch.zeros(samples.shape[:2], dtype=torch.bool)
        mask[:, -1] = samples[:, 0, 0] > 0
        return mask


class SelfAttention(Attention):
    """Query, key and value are one tensor in its inner form, not three views."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x, **self.call)
        return out if self.attention.batch_first else out.transpose(0, 1)


def many(*shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    return lambda N: tuple(torch.randn(N, *shape, dtype=torch.float64) for shape in shapes)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def self_attention(call: dict[str, Any] | None = None, **options: Any) -> Case:
    return Case(lambda: SelfAttention(call, **options), double(3, E), PACKED)


ATTENTION: dict[str, Case] = {
    "self": self_attention(),
    "self-no-weights": self_attention({"need_weights": False}),
    "self-weights-by-head": self_attention({"average_attn_weights": False}),
    "self-batch-second": self_attention(batch_first=False),
    "self-batch-second-no-weights": self_attention({"need_weights": False}, batch_first=False),
    "self-no-bias": self_attention(bias=False),
    "self-bias-kv": self_attention(add_bias_kv=True),
    "self-bias-kv-no-weights": self_attention({"need_weights": False}, add_bias_kv=True, batch_first=False),
    "self-zero": self_attention(add_zero_attn=True),
    "self-everything": self_attention(
        {"need_weights": False, "attn_mask": causal(3)}, add_zero_attn=True, add_bias_kv=True, bias=False
    ),
    "self-causal": self_attention({"attn_mask": causal(3), "is_causal": True, "need_weights": False}),
    "self-padded": Case(lambda: Attention({"padded": True}), double(3, E), PACKED),
    "self-padded-batch-second": Case(
        lambda: Attention({"padded": True, "need_weights": False}, batch_first=False), double(3, E), PACKED
    ),
    # Query alone with rows of its own; key and value are one tensor.
    "cross": Case(Attention, many((2, E), (3, E)), PACKED),
    "cross-no-weights": Case(lambda: Attention({"need_weights": False}), many((2, E), (3, E)), PACKED),
    "cross-batch-second": Case(lambda: Attention(batch_first=False), many((2, E), (3, E)), PACKED),
    "all-different": Case(Attention, many((2, E), (3, E), (3, E)), PACKED),
    "all-different-no-bias": Case(
        lambda: Attention({"need_weights": False}, bias=False, batch_first=False),
        many((4, E), (3, E), (3, E)),
        PACKED,
    ),
    "separate": Case(lambda: Attention(kdim=3, vdim=5), many((2, E), (3, 3), (3, 5)), SEPARATE),
    "separate-kdim": Case(
        lambda: Attention({"need_weights": False}, kdim=3, batch_first=False),
        many((2, E), (3, 3), (3, E)),
        SEPARATE,
    ),
    "separate-bias-kv-no-bias": Case(
        lambda: Attention(kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, bias=False),
        many((2, E), (3, 3), (3, 5)),
        SEPARATE,
    ),
}


class Called(nn.Module):
    """One attention called twice: first with itself, then across."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        first = torch.tanh(self.attention(x, x, x)[0])
        out: Tensor = self.attention(first, memory, memory, need_weights=False)[0]
        return out


class Windowed(nn.Module):
    """Attention within windows that are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, E)
        out, _ = self.attention(windows, windows, windows, need_weights=False)
        return out.reshape(x.shape)


class InPlace(nn.Module):
    """What attention returns is a view."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        out = self.attention(x, x, x)[0].tanh_()
        return out if self.attention.batch_first else out.transpose(0, 1)


class Transformer(nn.Module):
    """One of torch's transformer layers, called with samples in dim 0."""

    def __init__(self, layer: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.layer = layer
        self.batch_first = batch_first

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.batch_first:
            out: Tensor = self.layer(*inputs)
            return out
        out = self.layer(*(t.transpose(0, 1) for t in inputs))
        return out.transpose(0, 1)


FEED_FORWARD = {"layer.linear1.weight", "layer.linear2.weight"}
SELF = {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight"}
CROSS = {"layer.multihead_attn.in_proj_weight", "layer.multihead_attn.out_proj.weight"}


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(E, HEADS, dim_feedforward=5, dropout=0.0, **options)


def decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(E, HEADS, dim_feedforward=5, dropout=0.0, **options)


TRANSFORMERS: dict[str, Case] = {
    "attention-called-twice": Case(Called, many((2, E), (3, E)), PACKED),
    "attention-in-windows": Case(Windowed, double(4, E), PACKED),
    "attention-in-place": Case(lambda: InPlace(True), double(3, E), PACKED),
    "attention-in-place-batch-second": Case(lambda: InPlace(False), double(3, E), PACKED),
    "encoder": Case(lambda: Transformer(encoder(batch_first=True), True), double(3, E), SELF | FEED_FORWARD),
    "encoder-norm-first-gelu": Case(
        lambda: Transformer(encoder(batch_first=True, norm_first=True, activation="gelu"), True),
        double(3, E),
        SELF | FEED_FORWARD,
    ),
    "encoder-batch-second": Case(
        lambda: Transformer(encoder(), False),
        double(3, E),
        SELF | FEED_FORWARD,
        options={"layer_options": {"layer.linear*": {"batch_dim": 1}}},
    ),
    "decoder": Case(
        lambda: Transformer(decoder(batch_first=True), True),
        many((2, E), (3, E)),
        SELF | CROSS | FEED_FORWARD,
    ),
}
