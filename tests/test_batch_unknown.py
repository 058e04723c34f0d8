"""Rows of which shapes do not tell the samples: the pair by sample, or K-FAC's step and the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_batch_dimension import E, Moved, check, permuted, sequences


def folded() -> nn.Module:
    """(N, L, E) -> (N·L, E)."""
    return Moved(lambda x: x.flatten(0, 1), lambda x, n: x.unflatten(0, (n, -1)))


def frames() -> nn.Module:
    """A video through a convolution for images: (N, L, 2, 2) -> (N·L, 1, 2, 2)."""
    return Moved(
        lambda x: x.reshape(-1, 1, 2, 2),
        lambda x, n: x.reshape(n, -1, x.shape[-1]),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def folded_backwards() -> nn.Module:
    """(N, L, E) -> (L·N, E): the rows of a sample are not next to each other."""
    return Moved(
        lambda x: x.transpose(0, 1).flatten(0, 1), lambda x, n: x.unflatten(0, (-1, n)).transpose(0, 1)
    )


def views() -> nn.Module:
    """Two views of every sample, one view after the other in dim 0, as in contrastive learning."""
    return Moved(lambda x: torch.cat([x[:, 0], x[:, 1]]), lambda x, n: x[:n] * torch.tanh(x[n:]))


# Dimension 0 has as many entries as the batch, as in a model that takes (N, N, E): nothing tells that they
# are tokens here, and K-FAC's step for all such models would be worse. docs/architecture.md, known limits.
COINCIDENCE = pytest.mark.xfail(strict=True, reason="as many tokens as samples in dim 0: architecture.md")


@pytest.mark.parametrize(
    ("build", "n", "length"),
    [
        (permuted, 4, 6),
        pytest.param(permuted, 4, 4, marks=COINCIDENCE),
        *(
            (build, n, length)
            for build in (folded_backwards, views)
            for n, length in ((4, 4), (4, 6), (5, 5))
        ),
    ],
)
def test_never_by_token(build: Callable[[], nn.Module], n: int, length: int) -> None:
    """Where shapes are not enough: the pair by sample, or K-FAC's step and the reason."""
    check(build, sequences(n, length), either=True)


@pytest.mark.parametrize("build", [folded, frames])
def test_batch_dim_0_says_that_rows_go_by_sample(build: Callable[[], nn.Module]) -> None:
    for n, length in ((4, 6), (5, 3)):
        check(build, sequences(n, length), layer_options={"*": {"batch_dim": 0}})


@pytest.mark.parametrize(
    "pack", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}], ids=["tuple", "list", "dict"]
)
def test_input_in_a_container(pack: Callable[[Tensor], Any]) -> None:
    """The batch of the model's input is not in plain sight, and the model permutes."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = permuted()

        def forward(self, batch: Any) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch[0]
            out: Tensor = self.net(x)
            return out

    check(Wrapped, sequences(6, 4), call=lambda model, x: model(pack(x)), either=True)


# --- tokens that are routed --------------------------------------------------------------------------------


class Experts(nn.Module):
    """Tokens go to one of two experts, (tokens, E) each; ``quota`` tokens of the batch to the first."""

    def __init__(self, quota: int | None) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(E, E), nn.Linear(E, E)])
        self.head = nn.Linear(E, 3)
        self.quota = quota

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, E)
        # Routed by what a token says, so that a sample keeps its experts in a batch of another size.
        to_first = tokens[:, 0] > (0 if self.quota is None else self.threshold)
        out = torch.zeros_like(tokens)
        for expert, chosen in zip(self.experts, (to_first, ~to_first), strict=True):
            out[chosen] = torch.tanh(expert(tokens[chosen]))
        done: Tensor = self.head(out.view_as(x))
        return done


def routed(x: Tensor, quota: int | None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Experts(quota)
        if quota is not None:
            values = x[..., 0].flatten().sort(descending=True).values
            model.threshold = float(values[quota - 1 : quota + 1].mean())
        return model

    return build


@pytest.mark.parametrize("quota", [None, pytest.param(4, marks=COINCIDENCE), 5, 8, 10, 12])
def test_experts(quota: int | None) -> None:
    """Also where the number of tokens of an expert is that of the samples, or a multiple of it."""
    x = sequences(4, 5)
    check(routed(x, quota), x, either=True)


def test_expert_that_gets_an_odd_number_of_tokens_says_why() -> None:
    x = sequences(4, 5)
    check(routed(x, 7), x, kfac={"experts.0": "for a batch of 4", "experts.1": "for a batch of 4"})


class Packed(nn.Module):
    """The data of a PackedSequence goes step by step through all samples; here 18 rows for 6 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(E, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + 2 * (x[:, 0, 0] > 0)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = self.lstm(packed)
        out = hidden._replace(data=self.head(hidden.data))
        done: Tensor = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=4)[0]
        return done


def test_head_on_packed_sequences() -> None:
    x = sequences(6, 4)
    x[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    check(Packed, x, either=True)
