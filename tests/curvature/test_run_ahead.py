"""Refreshes for whose outcome nobody waits, as on a GPU, against those that wait."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fop import FOP
from internals import Refusals, Transfer, refresh
from models import assert_equal, batch, weights

NAN = float("nan")


@contextlib.contextmanager
def ahead(on: bool = True) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "may_run_ahead", lambda device: on)
        yield


def net() -> nn.Sequential:
    """Layers with Kronecker factors, one in groups, and one with a diagonal."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 3)
    return nn.Sequential(*layers).double()


def make(model: nn.Module, **options: Any) -> FOP:
    return FOP(model, **{"layer_options": {nn.LayerNorm: {"path": "fop"}}, **options})


def train(model: nn.Module, optimizer: FOP, steps: int, bad: int | None = None, first: int = 0) -> list[str]:
    """Take steps, one with a loss of NaN; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(first, first + steps):
            x, _ = batch(8, step, (2, 6, 5))
            optimizer.zero_grad()
            (model(x).square().mean() * (NAN if step == bad else 1.0)).backward()
            optimizer.step()
    return [str(each.message) for each in caught]


def run(on: bool, bad: int | None = None, **options: Any) -> tuple[dict[str, Tensor], list[str], FOP]:
    with ahead(on):
        model = net()
        optimizer = make(model, **options)
        said = train(model, optimizer, 12, bad)
    return weights(model), said, optimizer


@pytest.mark.parametrize("options", [{}, {"curvature_interval": 3}, {"step_length": "paper"}])
def test_it_leads_where_waiting_leads(options: dict[str, Any]) -> None:
    one, two = run(True, **options), run(False, **options)
    assert_equal(one[0], two[0])
    assert one[1] == two[1] == []


@pytest.mark.parametrize("bad", [1, 4])
def test_estimates_that_are_not_finite_change_nothing(bad: int) -> None:
    one, two = run(True, bad), run(False, bad)
    assert_equal(one[0], two[0])
    assert sorted(one[1]) == sorted(two[1])  # those of statistics come a step later
    assert any("statistics of 0, 3, 4 are not finite" in message for message in one[1])


def test_a_first_estimate_that_is_not_finite_is_as_none() -> None:
    values, said, optimizer = run(True, bad=0)
    expected, _, _ = run(False, bad=0)
    # Momentum began with a step of 0 here, and does not matter then.
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    assert any("statistics of" in message for message in said)
    assert {layer.fallbacks["kept"] for layer in optimizer.diagnostics().layers.values()} == {0}


def test_an_inversion_that_fails_keeps_the_inverse_and_is_made_again_with_fallbacks() -> None:
    original, fail = refresh.inverses_and_flags, [False]

    def inverses_and_flags(*given: Any) -> tuple[list[Tensor], list[Tensor]]:
        inverses, flags = original(*given)
        if fail[0]:
            inverses, flags = [torch.full_like(each, 7.0) for each in inverses], [~flag for flag in flags]
        return inverses, flags

    with ahead(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "inverses_and_flags", inverses_and_flags)
        model = net()
        optimizer = make(model)
        train(model, optimizer, 3)
        held = {p: optimizer.state[p]["A_inv"].clone() for p in (model[0].weight, model[4].weight)}
        fail[0] = True
        said = train(model, optimizer, 1, first=3)
        for p, inverse in held.items():
            assert torch.equal(optimizer.state[p]["A_inv"], inverse)
        assert said == []  # not known yet
        # A refresh that waits does not ask for what failed.
        said = train(model, optimizer, 1, first=4)
        assert all(not torch.equal(optimizer.state[p]["A_inv"], inverse) for p, inverse in held.items())
    assert len(said) == 2 and all("the last good inverse was kept" in message for message in said), said
    fallbacks = [layer.fallbacks["kept"] for layer in optimizer.diagnostics().layers.values()]
    assert fallbacks == [1, 0, 1]  # a diagonal needs no inversion


def test_after_a_failure_one_refresh_waits() -> None:
    waited: list[bool] = []
    with ahead(), pytest.MonkeyPatch.context() as patch:
        original = refresh.damped_inverses
        patch.setattr(refresh, "damped_inverses", lambda *given: (waited.append(True), original(*given))[1])
        model = net()
        optimizer = make(model)
        counts = []
        for step in range(6):
            train(model, optimizer, 1, bad=2, first=step)
            counts.append(len(waited))
    assert counts == [0, 0, 0, 1, 1, 1]


def test_a_state_that_was_loaded_since_is_not_touched() -> None:
    with ahead():
        model = net()
        optimizer = make(model)
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, optimizer, 1, bad=2, first=2)
        optimizer.load_state_dict(saved)
        model.load_state_dict(values)
        said = train(model, optimizer, 3, first=3)
        other = net()
        other.load_state_dict(values)
        fresh = make(other)
        fresh.load_state_dict(saved)
        train(other, fresh, 3, first=3)
    assert_equal(weights(model), weights(other))
    assert not any("statistics" in message for message in said)


def test_refusals_are_told_a_report_later_or_at_once() -> None:
    def report(**how: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refusals.report(**how)
        return [str(each.message) for each in caught]

    for last in ({"wait": False}, {}):
        refusals = Refusals()
        refusals._counts[("one", "two"), torch.device("cpu")] = torch.tensor([0, 3])
        assert report(wait=False) == []
        (message,) = report(**last)
        assert "the update of two was not finite" in message
        assert report() == []
    refusals._counts[("one",), torch.device("cpu")] = torch.tensor([1])
    assert len(report()) == 1


def test_numbers_arrive_as_they_were() -> None:
    numbers = torch.tensor([[True, False], [False, False]])
    transfer = Transfer(numbers.clone())
    assert transfer.read() == numbers.tolist()
