"""The spread of a metric is Student's, and trials without a value are counted out, not dropped in silence."""

import math

import pytest
from scipy import stats

from tune.analysis.spreads import metric_spread
from tune.storage.summaries import MetricSpread


def test_mean_and_interval_are_those_of_scipy() -> None:
    values = [0.31, 0.35, 0.28, 0.4]
    spread = metric_spread(values, 0.9)
    low, high = stats.t.interval(0.9, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (spread.mean, spread.sd, spread.n) == (pytest.approx(0.335), pytest.approx(stats.tstd(values)), 4)
    assert (spread.ci_low, spread.ci_high) == (pytest.approx(low), pytest.approx(high))


def test_trials_without_a_finite_value_do_not_count() -> None:
    assert metric_spread([None, 2.0, None], 0.95) == MetricSpread(2.0, n=1)
    assert metric_spread([None, math.inf], 0.95) == MetricSpread()
    assert metric_spread([1.0, 3.0, None], 0.95).n == 2
