import math

import numpy as np
import pytest

from fop_bench.report import Statistic, compare, plus_minus, statistic


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


def test_formatting():
    assert plus_minus(None, 1) == "–"
    assert plus_minus(Statistic(0.971, None, 1), 2, scale=100) == "97.10"
    assert plus_minus(Statistic(2.0, 0.5, 3), 1) == "2.0 ± 0.5"
