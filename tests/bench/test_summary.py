"""What tables say of several runs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from fop_bench.tables import compare, plus_minus


def test_mean_and_sample_deviation_of_what_is_known() -> None:
    assert plus_minus(pd.Series([1.0, 2.0, 6.0]), 4) == f"3.0000 ± {7**0.5:.4f}"
    assert plus_minus(pd.Series([math.nan, 4.0]), 1) == "4.0"
    assert plus_minus(pd.Series([0.0, 2e20]), 4) == "1e+20 ± 1.41e+20"
    assert plus_minus(pd.Series([math.nan, 0.971]), 2, scale=100) == "97.10"
    assert plus_minus([math.nan], 1) == plus_minus([], 1) == "–"


def test_pooled_deviation_decides() -> None:
    a, b = pd.Series([1.0, 2.0, 4.0]), pd.Series([3.0, 5.0, math.nan])
    pooled = np.sqrt((np.var([1, 2, 4], ddof=1) * 2 + np.var([3, 5], ddof=1)) / 3)
    near, far = (b - b.mean() + a.mean() + times * pooled for times in (0.99, 1.01))
    assert compare(a, near, low=True) == "within the spread"
    assert compare(a, far, low=True) == "ahead"
    assert compare(a, far, low=False) == "behind"
    assert compare(a, pd.Series([9.0, math.nan]), low=True) is None
    assert compare(pd.Series([math.nan]), b, low=True) is None
