import math

import numpy as np
import pytest

from fop_bench.summary import Statistic, compare, plus_minus, statistic, summarise
from fop_bench.training import Epoch, Run


def run(*accuracies, diverged=False, seconds=1.0):
    curve = [
        Epoch(number, number * seconds, 1.0, accuracy) for number, accuracy in enumerate(accuracies, start=1)
    ]
    return Run(0.1, 0, curve, diverged, [])


def test_statistic_is_mean_and_sample_deviation():
    assert statistic([1.0, 2.0, 6.0]) == Statistic(3.0, pytest.approx(7**0.5), 3)
    assert statistic([4.0]) == Statistic(4.0, None, 1)
    assert statistic([]) is None
    assert statistic([math.nan, 4.0]) == Statistic(4.0, None, 1)


def test_pooled_deviation_decides():
    one, two = [1.0, 2.0, 4.0], [3.0, 5.0]
    pooled = np.sqrt((np.var(one, ddof=1) * 2 + np.var(two, ddof=1)) / 3)
    a, b = statistic(one), statistic(two)
    assert compare(a, Statistic(a.mean + 0.99 * pooled, b.std, 2), low=True) == "within the spread"
    assert compare(a, Statistic(a.mean + 1.01 * pooled, b.std, 2), low=True) == "ahead"
    assert compare(a, Statistic(a.mean + 1.01 * pooled, b.std, 2), low=False) == "behind"
    assert compare(a, Statistic(9.0, None, 1), low=True) is None
    assert compare(None, b, low=True) is None


def test_only_the_runs_that_reached_the_target_count_towards_it():
    summary = summarise([run(0.5, 0.97, 0.9), run(0.5, 0.6, 0.98, seconds=2.0), run(0.5, 0.6, 0.7)], 0.97)
    assert (summary.runs, summary.reached, summary.diverged) == (3, 2, 0)
    assert summary.epochs == Statistic(2.5, pytest.approx(0.5**0.5), 2)
    assert summary.seconds == Statistic(4.0, pytest.approx(8**0.5), 2)
    assert summary.final_accuracy.mean == pytest.approx((0.9 + 0.98 + 0.7) / 3)
    assert summary.final_accuracy.n == 3


def test_a_diverged_run_is_counted_as_that_and_nothing_else():
    summary = summarise([run(0.99, diverged=True), run(0.5, 0.98)], 0.97)
    assert (summary.runs, summary.reached, summary.diverged) == (2, 1, 1)
    assert summary.epochs == Statistic(2.0, None, 1)
    assert summary.final_accuracy == Statistic(0.98, None, 1)
    lost = summarise([run(diverged=True)], 0.97)
    assert (lost.diverged, lost.epochs, lost.seconds, lost.final_accuracy) == (1, None, None, None)


def test_formatting():
    assert plus_minus(None, 1) == "–"
    assert plus_minus(Statistic(0.971, None, 1), 2, scale=100) == "97.10"
    assert plus_minus(Statistic(2.0, 0.5, 3), 1) == "2.0 ± 0.5"
