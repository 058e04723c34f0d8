"""The batch is what the loss averages over: several inputs, sizes that are told, computed ids, orders."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fop import FOP, KFAC
from internals import sub_batch_runs
from models import PLAIN, check_kept_pair, check_lost_pair, weights
from reference import split

N, T, E = 8, 5, 4
Options = dict[str, Any]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """One layer between what ``before`` makes of the inputs and the mean over all but the samples."""

    def __init__(self, before: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(E, 3).double()
        self.before = before

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.layer(self.before(*args, **kwargs)).tanh()
        return out.flatten(1, -2).mean(1) if out.dim() > 2 else out


def step(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Options, options: Options
) -> tuple[FOP, list[str]]:
    optimizer = FOP(model, **PLAIN, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            out = model(*inputs, **kwargs)
            (out - values(*out.shape, seed=9)).square().mean().backward()
            optimizer.step()
    return optimizer, [str(each.message) for each in caught]


def masked(mask: Tensor, x: Tensor) -> Tensor:
    return mask @ x


AGREE: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], Options]] = {
    "two": (lambda x, y: x + y, (values(N, E), values(N, E)), {}),
    "length beside": (lambda x, length: x / len(length), (values(N, T, E), values(N)), {}),
    "dictionary": (lambda x, mask: x * mask, (), {"x": values(N, T, E), "mask": values(N, T, 1)}),
    "nested": (
        lambda batch: batch["x"] * batch["mask"],
        ({"x": values(N, T, E), "mask": values(N, T, 1)},),
        {},
    ),
    "time step": (lambda t, x: x * t, (values(1), values(N, E)), {}),
    # Two against one.
    "table beside": (lambda table, x, y: x + y + table.sum(), (values(T, E), values(N, E), values(N, E)), {}),
    # The layer's input fits one of the sizes only.
    "state first": (lambda h, x: x + h[0], (values(2, N, E), values(N, E)), {}),
    "graph": (lambda x, edges: x, (values(N, E), torch.zeros(2, 11, dtype=torch.long)), {}),
}


@pytest.mark.parametrize("case", AGREE)
def test_inputs_that_agree(case: str) -> None:
    before, inputs, kwargs = AGREE[case]
    optimizer, messages = step(Net(before), inputs, kwargs, {})
    check_kept_pair(optimizer)
    assert messages == []


def test_inputs_that_do_not_agree() -> None:
    inputs = torch.eye(T, dtype=torch.float64), values(N, T, E)
    optimizer, messages = step(Net(masked), inputs, {}, {})
    check_lost_pair(optimizer, steps=2, why="the model has inputs or outputs of [5, 8]")
    assert len(messages) == 1
    assert "batch_size=lambda x, mask: len(x)" in messages[0] and "batch_dim in layer_options" in messages[0]


def test_kfac_needs_no_samples() -> None:
    """K-FAC has no pair: nothing to warn of."""
    model = Net(masked)
    optimizer = KFAC(model, **{name: value for name, value in PLAIN.items() if name not in ("beta", "eta")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.eye(T, dtype=torch.float64), values(N, T, E)).square().mean().backward()
        optimizer.step()


TOLD: dict[str, Options] = {
    "batch_size": {"batch_size": lambda mask, x: len(x)},
    "batch_dim": {"layer_options": {"layer": {"batch_dim": 0}}},
}


@pytest.mark.parametrize("told", TOLD)
def test_batch_size_that_is_told(told: str) -> None:
    """The step of a model to which the batch is plain."""
    x = values(N, T, E)
    model, plain = Net(masked), Net(lambda x: x)
    optimizer, messages = step(model, (torch.eye(T, dtype=torch.float64), x), {}, TOLD[told])
    step(plain, (x,), {}, {})
    check_kept_pair(optimizer)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-10, atol=1e-12)
    assert messages == []


@pytest.mark.parametrize("size", [-1, 2.5, True, "8", None])
def test_wrong_batch_size(size: Any) -> None:
    model = Net(lambda x: x)
    optimizer = FOP(model, **PLAIN, batch_size=lambda x: size)
    with pytest.raises((TypeError, ValueError), match="batch_size gave"):
        model(values(N, E))
    assert optimizer.state_dict()["state"] == {}
    with pytest.raises(TypeError, match="batch_size=8 must be a function"):
        FOP(Net(lambda x: x), batch_size=8)  # type: ignore[arg-type]


def test_output_that_has_dimension_one() -> None:
    """(time, samples, features) goes in, and (samples, 3) comes out."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(E, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x).tanh().mean(0)
            return out

    optimizer, messages = step(Loop(), (values(T, N, E),), {}, {})
    check_lost_pair(optimizer, steps=2, why="[5, 8]")
    assert len(messages) == 1
    told, messages = step(Loop(), (values(T, N, E),), {}, {"batch_size": lambda x: x.shape[1]})
    check_kept_pair(told)
    assert messages == []


def test_packed_input() -> None:
    """A head on the last state of every sample knows its samples; one on the packed data does not."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head, self.every = (
                nn.LSTM(E, 6, batch_first=True),
                nn.Linear(6, 3),
                nn.Linear(6, 3),
            )
            self.double()

        def forward(self, x: PackedSequence) -> Tensor:
            out, (hidden, _) = self.lstm(x)
            done: Tensor = self.head(hidden[-1]) + self.every(out.data).mean()
            return done

    packed = pack_padded_sequence(values(N, T, E), torch.tensor([5, 5, 4, 3, 3, 2, 1, 1]), batch_first=True)
    optimizer, _ = step(Packed(), (packed,), {}, {})
    check_kept_pair(optimizer, ["head"])
    check_lost_pair(optimizer, ["every"], steps=2, why="for a batch of 8")


IDS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x[:, 0].long(),
    "shifted": lambda x: (x[:, 0] + 1).long() % 7,
    "hashed": lambda x: (x[:, 0].long() * 31 + 7) % 7,
    "two columns": lambda x: x[:, :2].long(),
}


@pytest.mark.parametrize("how", IDS)
def test_computed_ids(how: str) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, E), nn.Linear(E, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.table(IDS[how](x))
            done: Tensor = self.head(out if out.dim() == 2 else out.mean(1))
            return done

    x = torch.randint(0, 7, (N, 3), generator=torch.Generator().manual_seed(0)).double()
    optimizer, messages = step(Lookup(), (x,), {}, {})
    check_kept_pair(optimizer)
    assert messages == []


ORDERS: dict[str, Callable[[int], Tensor]] = {
    "two blocks": lambda n: torch.arange(n),
    "in turn": lambda n: torch.arange(n).view(2, -1).T.reshape(-1),
    "in turn, reversed": lambda n: torch.arange(n).view(2, -1).T.flip(0).reshape(-1),
    "four blocks": lambda n: torch.arange(n).view(2, 2, -1).transpose(0, 1).reshape(-1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_split_alike(order: str) -> None:
    """Chosen and rejected answers, in any of these orders: each sub-batch has as many of either."""
    kinds = torch.arange(64) >= 32
    ordered = kinds[ORDERS[order](64)]
    assert [int(ordered[part].sum()) for part in split(64)] == [16, 16]


def test_a_step_depends_on_the_order_as_on_a_random_one() -> None:
    """A loss over pairs of chosen and rejected answers, with these in blocks and in turn."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.cat([values(64, 8) + 0.5, values(64, 8, seed=1) - 0.5])

    def move(order_of: Tensor) -> Tensor:
        model = copy.deepcopy(base)
        optimizer = FOP(model, kl_clip=None, momentum=0.0)
        sign = torch.where(order_of < 64, 1.0, -1.0)
        nn.functional.softplus(-sign * model(x[order_of]).squeeze(1)).mean().backward()
        optimizer.step()
        check_kept_pair(optimizer)
        pairs = zip(model.parameters(), base.parameters(), strict=True)
        return torch.cat([(now - was).detach().flatten() for now, was in pairs])

    by_kind = torch.stack([move(order(128)) for order in ORDERS.values()])
    by_chance = torch.stack([move(torch.randperm(128)) for _ in range(16)])
    spread = (by_chance - by_chance.mean(0)).norm(dim=1)
    # With the halves one after the other, blocks are off by four times the largest.
    assert (by_kind - by_chance.mean(0)).norm(dim=1).max() < 1.5 * spread.max()


@pytest.mark.parametrize(("count", "samples"), [(1, 6), (2, 1), (2, 9), (3, 13), (3, 27), (4, 10), (5, 4)])
def test_every_sample_is_in_one_sub_batch(count: int, samples: int) -> None:
    def numbers(rows: int) -> list[list[int]]:
        every = range(samples * rows)
        return [[n for run in own for n in every[run]] for own in sub_batch_runs(samples, count, rows)]

    parts = numbers(1)
    assert sorted(n for part in parts for n in part) == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert numbers(3) == [[3 * sample + row for sample in part for row in range(3)] for part in parts]
