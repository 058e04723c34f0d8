"""Refreshes for whose outcome nobody waits, as on a GPU, against those that wait."""

from __future__ import annotations

import contextlib
import copy
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


@pytest.mark.parametrize("options", [{}, {"step_length": "paper", "damping": 0.0}])
def test_the_first_refresh_of_a_weight_waits(options: dict[str, Any]) -> None:
    one, two = run(True, bad=0, **options), run(False, bad=0, **options)
    assert_equal(one[0], two[0])
    assert one[1] == two[1] != []


def test_a_weight_that_is_thawed_late_is_not_still_until_the_next_refresh() -> None:
    with ahead():
        model = net()
        optimizer = make(model, curvature_interval=100)
        model[4].requires_grad_(False)
        train(model, optimizer, 5)
        model[4].requires_grad_(True)
        train(model, optimizer, 1, bad=5, first=5)
        before = weights(model)
        train(model, optimizer, 1, first=6)
    assert not torch.equal(model[4].weight, before["4.weight"])


@pytest.mark.parametrize("bad", [0, 4])
@pytest.mark.parametrize("options", [{}, {"curvature_interval": 3}, {"step_length": "paper"}])
def test_a_state_that_is_saved_after_a_failure_goes_on_as_if_it_were_not(
    bad: int, options: dict[str, Any]
) -> None:
    with ahead():
        model, other = net(), net()
        optimizer = make(model, **options)
        train(model, optimizer, bad + 1, bad)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        said = train(model, optimizer, 5, first=bad + 1)
        other.load_state_dict(saved[0])
        resumed = make(other, **options)
        resumed.load_state_dict(saved[1])
        train(other, resumed, 5, first=bad + 1)
    assert_equal(weights(model), weights(other))
    assert bad == 0 or options or any("statistics" in message for message in said)


def test_a_failed_estimate_leaves_the_inverse_and_its_age() -> None:
    with ahead():
        model = net()
        optimizer = make(model, curvature_interval=2)
        train(model, optimizer, 4)
        held = {p: (state["A_inv"].clone(), state["refreshed_at"]) for p, state in curvatures(optimizer)}
        train(model, optimizer, 1, bad=4, first=4)
        optimizer.state_dict()
    assert len(held) == 3
    for param, state in curvatures(optimizer):
        inverse, refreshed_at = held[param]
        assert torch.equal(state["A_inv"], inverse) and state["refreshed_at"] == refreshed_at == 2


def curvatures(optimizer: FOP) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(param, state) for param, state in optimizer.state.items() if "A_inv" in state]


def test_another_group_between_does_not_hide_a_failure() -> None:
    original = refresh.inverses_and_flags

    def inverses_and_flags(*given: Any) -> tuple[list[Tensor], list[Tensor]]:
        inverses, flags = original(*given)
        state = optimizer.state[model[0].weight]
        own = [any(each is state[name] for name in ("A", "G")) for each in given[0]]
        return inverses, [flag & (not mine) for flag, mine in zip(flags, own, strict=True)]

    with ahead():
        model = net()
        rare = {"params": model[0].parameters(), "curvature_interval": 4}
        optimizer = FOP([rare, {"params": model[4].parameters()}])
        train(model, optimizer, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refresh, "inverses_and_flags", inverses_and_flags)
            train(model, optimizer, 1, first=8)  # fails, and is told in the next step
            refreshed = []
            for step in range(9, 21):
                train(model, optimizer, 1, first=step)
                refreshed.append(optimizer.state[model[0].weight]["refreshed_at"])
    assert refreshed == [4] * 3 + [12] * 4 + [16] + [12] * 3 + [20]  # every other one waits


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
    assert counts == [1, 1, 1, 2, 2, 2]  # the first waits, too


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
